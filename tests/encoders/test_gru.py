"""The GRU over words: a naive loop, PyTorch's packed sequences, padding, gradients and dropout."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax.encoders.gru import GRU

WIDTH, WORD_WIDTH, LAYERS = 4, 3, 2
IDS = np.array([[4, 6, 1, 0, 0], [5, 3, 7, 2, 8], [9, 0, 0, 0, 0]], np.int32)
MASK = IDS > 0


def made(**options):
    """A GRU and its parameters, biases included, which begin as zeros."""
    module = GRU(10, WIDTH, word_width=WORD_WIDTH, layers=LAYERS, **options)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS, MASK)
    return module, jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)


def test_words_begin_uniform_around_zero():
    module = GRU(400, 1, word_width=5, bidirectional=False)
    words = np.asarray(module.init(jax.random.key(0), IDS, MASK)["params"]["words"]["embedding"])
    assert words.shape == (400, 5)
    np.testing.assert_allclose(np.quantile(words, [0, 0.25, 0.5, 0.75, 1]), np.linspace(-0.1, 0.1, 5), atol=0.01)


def test_pad_tokens_and_further_padding_have_no_effect():
    module, params = made()
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


def test_gradients_are_finite_and_leave_pad_tokens_alone():
    module, params = made()

    def loss(params):
        hidden, pooled = module.apply(params, IDS, MASK)
        return jnp.sum(hidden**2) + jnp.sum(pooled**2)

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(np.any(grads["params"]["words"]["embedding"], axis=1), np.isin(range(10), IDS[MASK]))


def test_dropout_is_on_what_each_layer_reads_and_only_in_training():
    module, params = made(dropout=1.0)
    params = params["params"]
    # With everything dropped, neither the words nor the layers below make a difference to the last layer.
    below = {name: jax.tree.map(lambda p: p + 1, params[name]) for name in params if not name.startswith("layer_1")}

    def hidden(params, deterministic):
        rngs = {"dropout": jax.random.key(1)}
        return module.apply({"params": params}, IDS, MASK, deterministic, rngs=rngs)[0]

    run = jax.jit(hidden, static_argnums=1)
    np.testing.assert_array_equal(run(params, False), run(params | below, False))
    assert np.abs(run(params, True) - run(params | below, True)).max() > 1e-2


@pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="torch is not installed; the naive loop stands for it"
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_padded_texts_are_pytorchs_packed_sequences(bidirectional):
    import torch

    module, params = made(bidirectional=bidirectional)
    p = params["params"]
    theirs = torch.nn.GRU(WORD_WIDTH, WIDTH, LAYERS, batch_first=True, bidirectional=bidirectional)
    ways = {"forward": "", "backward": "_reverse"} if bidirectional else {"forward": ""}
    with torch.no_grad():
        for k in range(LAYERS):
            for way, suffix in ways.items():
                cell = p[f"layer_{k}_{way}"]
                values = {
                    "weight_ih": np.concatenate([cell[f"i{n}"]["kernel"].T for n in "rzn"]),
                    "weight_hh": np.concatenate([cell[f"h{n}"]["kernel"].T for n in "rzn"]),
                    "bias_ih": np.concatenate([cell[f"i{n}"]["bias"] for n in "rzn"]),
                    # PyTorch has a second bias of r and z, which adds to the first.
                    "bias_hh": np.concatenate([np.zeros(2 * WIDTH, np.float32), cell["hn"]["bias"]]),
                }
                for name, value in values.items():
                    getattr(theirs, f"{name}_l{k}{suffix}").copy_(torch.from_numpy(value))
        words = torch.from_numpy(p["words"]["embedding"][IDS])
        packed = torch.nn.utils.rnn.pack_padded_sequence(words, MASK.sum(1), batch_first=True, enforce_sorted=False)
        states, last = theirs(packed)
        states, _ = torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=IDS.shape[1])
    hidden, pooled = module.apply(params, IDS, MASK)
    np.testing.assert_allclose(hidden, states.numpy().reshape(3, 5, len(ways), WIDTH).mean(2), atol=1e-5)
    np.testing.assert_allclose(pooled, last.numpy()[-len(ways) :].mean(0), atol=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_direction(p, x):
    h, states = np.zeros(p["hn"]["kernel"].shape[0]), []
    for step in x:
        dense = {n: step @ p[f"i{n}"]["kernel"] + p[f"i{n}"]["bias"] for n in "rzn"}
        r, z = (sigmoid(dense[n] + h @ p[f"h{n}"]["kernel"]) for n in "rz")
        n = np.tanh(dense["n"] + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, True), (2, True), (1, False)])
def test_gru_is_the_naive_loop(layers, bidirectional):
    module = GRU(10, 4, word_width=3, layers=layers, bidirectional=bidirectional)
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), IDS, MASK))
    hidden, pooled = module.apply(params, IDS, MASK)
    p = params["params"]
    assert np.abs(p["words"]["embedding"]).max() <= 0.1
    for row, ids in enumerate(IDS):
        x = p["words"]["embedding"][ids[ids > 0]]
        for k in range(layers):
            states = [naive_direction(p[f"layer_{k}_forward"], x)]
            last = [states[0][-1]]
            if bidirectional:
                states.append(naive_direction(p[f"layer_{k}_backward"], x[::-1])[::-1])
                last.append(states[1][0])
            x = np.concatenate(states, -1)
        np.testing.assert_allclose(hidden[row, : len(x)], np.mean(states, 0), atol=1e-5)
        assert np.all(hidden[row, len(x) :] == 0)
        np.testing.assert_allclose(pooled[row], np.mean(last, 0), atol=1e-5)


def test_a_text_without_tokens_is_zero():
    module = GRU(10, 4, word_width=3)
    empty = np.zeros((1, 3), np.int32)
    (hidden, pooled), _ = module.init_with_output(jax.random.key(0), empty, empty > 0)
    assert np.all(hidden == 0)
    assert np.all(pooled == 0)
