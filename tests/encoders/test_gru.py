"""The GRU over words: a naive loop, PyTorch's packed sequences, padding, gradients and dropout."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_gru import naive_gru

from mefn_jax.encoders.gru import GRU

WIDTH, WORD_WIDTH, LAYERS = 4, 3, 2
IDS = np.array([[4, 6, 1, 0, 0], [5, 3, 7, 2, 8], [9, 0, 0, 0, 0]], np.int32)
MASK = IDS > 0


def random_gru(**options):
    """A GRU and random parameters, including the biases, whose initial values are zeros."""
    module = GRU(10, WIDTH, word_width=WORD_WIDTH, layers=LAYERS, **options)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS, MASK)
    return module, jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)


def test_gru_initializes_word_embeddings_uniformly():
    module = GRU(400, 1, word_width=5, bidirectional=False)
    words = np.asarray(module.init(jax.random.key(0), IDS, MASK)["params"]["words"]["embedding"])
    assert words.shape == (400, 5)
    np.testing.assert_allclose(np.quantile(words, [0, 0.25, 0.5, 0.75, 1]), np.linspace(-0.1, 0.1, 5), atol=0.01)


def test_gru_ignores_padding():
    module, params = random_gru()
    apply = jax.jit(module.apply)
    hidden, pooled = apply(params, IDS, MASK)
    assert hidden.dtype == pooled.dtype == jnp.float32
    other = apply(params, np.where(MASK, IDS, 9), MASK)
    for a, b in zip(other, (hidden, pooled), strict=True):
        np.testing.assert_array_equal(a, b)
    longer, pooled_longer = apply(params, *(np.pad(a, ((0, 0), (0, 2))) for a in (IDS, MASK)))
    np.testing.assert_allclose(longer[:, :5], hidden, atol=1e-6)
    np.testing.assert_allclose(pooled_longer, pooled, atol=1e-6)
    assert np.all(longer[:, 5:] == 0)


def test_gru_gradients_are_finite_and_zero_for_pad_tokens():
    module, params = random_gru()

    def loss(params):
        hidden, pooled = module.apply(params, IDS, MASK)
        return jnp.sum(hidden**2) + jnp.sum(pooled**2)

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(
        np.any(gradients["params"]["words"]["embedding"], axis=1), np.isin(range(10), IDS[MASK])
    )


def test_gru_dropout_acts_on_layer_inputs_in_training_only():
    module, params = random_gru(dropout=1.0)
    params = params["params"]
    # With all inputs dropped, the last layer depends neither on the words nor on the layers below.
    below = {name: jax.tree.map(lambda p: p + 1, params[name]) for name in params if not name.startswith("layer_1")}

    def hidden(params, deterministic):
        rngs = {"dropout": jax.random.key(1)}
        return module.apply({"params": params}, IDS, MASK, deterministic, rngs=rngs)[0]

    run = jax.jit(hidden, static_argnums=1)
    np.testing.assert_array_equal(run(params, False), run(params | below, False))
    assert np.abs(run(params, True) - run(params | below, True)).max() > 1e-2


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed; the naive loop replaces it")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_gru_equals_pytorch_packed_sequences(bidirectional):
    import torch

    module, params = random_gru(bidirectional=bidirectional)
    p = params["params"]
    theirs = torch.nn.GRU(WORD_WIDTH, WIDTH, LAYERS, batch_first=True, bidirectional=bidirectional)
    directions = {"forward": "", "backward": "_reverse"} if bidirectional else {"forward": ""}
    with torch.no_grad():
        for k in range(LAYERS):
            for direction, suffix in directions.items():
                cell = p[f"layer_{k}_{direction}"]
                values = {
                    "weight_ih": np.concatenate([cell[f"i{n}"]["kernel"].T for n in "rzn"]),
                    "weight_hh": np.concatenate([cell[f"h{n}"]["kernel"].T for n in "rzn"]),
                    "bias_ih": np.concatenate([cell[f"i{n}"]["bias"] for n in "rzn"]),
                    # PyTorch adds a second bias to r and z.
                    "bias_hh": np.concatenate([np.zeros(2 * WIDTH, np.float32), cell["hn"]["bias"]]),
                }
                for name, value in values.items():
                    getattr(theirs, f"{name}_l{k}{suffix}").copy_(torch.from_numpy(value))
        words = torch.from_numpy(p["words"]["embedding"][IDS])
        packed = torch.nn.utils.rnn.pack_padded_sequence(words, MASK.sum(1), batch_first=True, enforce_sorted=False)
        states, last = theirs(packed)
        states, _ = torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=IDS.shape[1])
    hidden, pooled = module.apply(params, IDS, MASK)
    np.testing.assert_allclose(hidden, states.numpy().reshape(3, 5, len(directions), WIDTH).mean(2), atol=1e-5)
    np.testing.assert_allclose(pooled, last.numpy()[-len(directions) :].mean(0), atol=1e-5)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, True), (2, True), (1, False)])
def test_gru_equals_naive_loop(layers, bidirectional):
    module = GRU(10, 4, word_width=3, layers=layers, bidirectional=bidirectional)
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), IDS, MASK))
    hidden, pooled = module.apply(params, IDS, MASK)
    p = params["params"]
    assert np.abs(p["words"]["embedding"]).max() <= 0.1
    for row, ids in enumerate(IDS):
        x = p["words"]["embedding"][ids[ids > 0]]
        for k in range(layers):
            states = [naive_gru(p[f"layer_{k}_forward"], x)]
            last = [states[0][-1]]
            if bidirectional:
                states.append(naive_gru(p[f"layer_{k}_backward"], x[::-1])[::-1])
                last.append(states[1][0])
            x = np.concatenate(states, -1)
        np.testing.assert_allclose(hidden[row, : len(x)], np.mean(states, 0), atol=1e-5)
        assert np.all(hidden[row, len(x) :] == 0)
        np.testing.assert_allclose(pooled[row], np.mean(last, 0), atol=1e-5)


def test_gru_returns_zeros_for_text_without_tokens():
    module = GRU(10, 4, word_width=3)
    empty = np.zeros((1, 3), np.int32)
    (hidden, pooled), _ = module.init_with_output(jax.random.key(0), empty, empty > 0)
    assert np.all(hidden == 0)
    assert np.all(pooled == 0)
