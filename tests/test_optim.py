"""The optimiser: what decays, the schedule's ends, clipping."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax import losses, optim
from mefn_jax.encoders.transformer import SelfAttention
from mefn_jax.errors import ConfigError
from mefn_jax.features import make_features
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training import state, step


def test_matrices_decay_and_nothing_else():
    attention = SelfAttention(heads=2).init(jax.random.key(0), jnp.ones((1, 3, 4)))["params"]
    params = {
        "attention": attention,
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "log_scale": jnp.float32(2.0),
    }
    params = jax.tree.map(lambda p: p + 1.0, params)
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)

    def check(path, update, value):
        np.testing.assert_allclose(update, -0.05 * value if path[-1].key == "kernel" else 0 * value, rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, updates, params)


def test_the_schedule_rises_and_falls_to_zero():
    schedule = optim.lr_schedule(0.01, steps=100, warmup_fraction=0.1)
    assert [float(schedule(k)) for k in (0, 5, 10, 100)] == pytest.approx([0.0, 0.005, 0.01, 0.0], abs=1e-9)
    assert np.all(np.diff([float(schedule(k)) for k in range(10, 101)]) < 0)


def test_a_long_gradient_is_shortened_first():
    """Adam's first step does not see the gradient's length; its moments do."""
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.0, clip_norm=2.0)
    _, state = optimizer.update({"kernel": jnp.full((2, 2), 100.0)}, optimizer.init(params), params)
    mean = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2))
    np.testing.assert_allclose(mean, 0.1 * np.full((2, 2), 1.0), rtol=1e-5)  # norm 200 becomes 2: 1 each


PARAMS = {
    "image": {
        "backbone": {"patches": 1.0, "layer_0": {"mlp": 1.0}, "layer_1": {"mlp": 1.0}, "norm": {"scale": 1.0}},
        "regions": 1.0,
    },
    "text": {
        "backbone": {
            "words": 1.0,
            "segments": 1.0,
            "norm": {"scale": 1.0},
            "layer_0": {"mlp": 1.0},
            "pooler": {"kernel": 1.0},
        }
    },
    "matcher": {"log_scale": 1.0},
}


def factors(*rules, decay=1.0):
    found = optim.lr_multipliers(PARAMS, rules, decay)
    return {"/".join(k.key for k in path): f for path, f in jax.tree_util.tree_leaves_with_path(found)}


def test_the_first_rule_that_fits_counts():
    found = factors("image/backbone/layer_0:0", "backbone:0.1", "^matcher:2")
    assert found.pop("image/backbone/layer_0/mlp") == 0
    assert found.pop("matcher/log_scale") == 2
    assert found.pop("image/regions") == 1
    assert set(found.values()) == {0.1}


def test_layer_decay_counts_from_the_output():
    found = factors("layer_1:0.5", decay=0.1)
    assert found["image/backbone/patches"] == pytest.approx(0.01)
    assert found["image/backbone/layer_0/mlp"] == pytest.approx(0.1)
    assert found["image/backbone/layer_1/mlp"] == 0.5
    assert found["text/backbone/words"] == found["text/backbone/norm/scale"] == pytest.approx(0.1)
    for name in ("image/backbone/norm/scale", "text/backbone/pooler/kernel", "text/backbone/layer_0/mlp"):
        assert found[name] == 1
    assert found["image/regions"] == 1


def test_layer_decay_knows_where_a_towers_norm_stands():
    clip = {name: PARAMS["text"]["backbone"][name] for name in ("words", "norm", "layer_0")}
    found = optim.lr_multipliers(PARAMS | {"text": {"backbone": clip}}, (), 0.1)["text"]["backbone"]
    assert (found["words"], found["layer_0"]["mlp"], found["norm"]["scale"]) == pytest.approx((0.1, 1, 1))


def test_stored_statistics_are_never_trained():
    norm = dict.fromkeys(("scale", "bias", "mean", "var"), 1.0)
    found = optim.lr_multipliers({"image": {"backbone": {"stem_norm": norm}}, "text": {}}, (), 1.0)
    assert found["image"]["backbone"]["stem_norm"] == {"scale": 1, "bias": 1, "mean": 0, "var": 0}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("image", "is not a regex:factor"),
        ("image:-1", "a factor of at least 0"),
        ("imge:0.1", "fits no parameter that the rules before it leave"),
        ("(:0", "is not a regex:factor"),
    ],
)
def test_a_wrong_rule_is_named(rule, message):
    with pytest.raises(ConfigError, match=message):
        factors(rule)


def linear_model():
    """The least that the train step needs of a model."""

    def encode(kind):
        def features(params, x, *rest):
            pooled = x.astype(jnp.float32) @ params[kind]["kernel"] + params[kind]["bias"]
            return make_features(pooled[:, None], jnp.ones((len(x), 1), bool), pooled)

        return features

    return types.SimpleNamespace(
        encode_images=encode("image"),
        encode_texts=encode("text"),
        score=lambda params, images, texts: images.pooled @ texts.pooled.T * params["matcher"]["factor"],
    )


def after(steps: int, *rules, model=None):
    """The state after some steps with these learning rates, and the state before."""
    rng = np.random.default_rng(0)
    params = {
        kind: {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.ones(3, np.float32)}
        for kind in ("image", "text")
    } | {"matcher": {"factor": jnp.float32(1.0)}, "loss": {}}
    found = optim.lr_multipliers(params, rules, 1.0)
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1e9, factors=found)
    mesh = make_mesh(devices=jax.devices()[:1])
    current = state.create_state(lambda: jax.tree.map(jnp.asarray, params), optimizer, found, mesh)
    batch = {"images": rng.normal(size=(8, 5)), "text": rng.normal(size=(8, 5)), "text_mask": np.ones((8, 5), bool)}
    batch |= {name: np.arange(8) for name in ("image_index", "caption_index", "epoch")}
    config = types.SimpleNamespace(name="triplet", margin=0.2, hard_negative_ramp=-1, anchors="both")
    recipe = step.StepConfig(model or linear_model(), optimizer, found, losses.make_loss(config), seed=0)
    run = step.compile_step(mesh, current, recipe)
    for _ in range(steps):
        current, _ = run(current, batch)
    return current, params


def test_frozen_parameters_stay_bit_identical_and_have_no_state():
    current, before = after(3, "^image:0")
    jax.tree.map(np.testing.assert_array_equal, current.params["image"], before["image"])
    assert np.abs(current.params["text"]["kernel"] - before["text"]["kernel"]).max() > 0.01
    # Two moments of the 19 trainable numbers, and counters.
    held = sum(leaf.size for leaf in jax.tree.leaves(current.opt_state) if leaf.ndim or leaf.dtype == jnp.float32)
    assert held == 2 * (5 * 3 + 3 + 1)


@pytest.mark.parametrize(
    ("rules", "without"),
    [(("^image:0",), ["images"]), (("text/bias:0",), []), (("image:0", "text:0"), ["images", "texts"])],
)
def test_a_tower_that_is_frozen_whole_has_no_dropout(rules, without):
    """What the model gets as keys of dropout, when the step is traced."""
    model, seen = linear_model(), []

    def watched(kind, encode, place):
        def features(*args):
            if args[place] is None:  # the key of the dropout
                seen.append(kind)
            return encode(*args)

        return features

    model.encode_images = watched("images", model.encode_images, 2)
    model.encode_texts = watched("texts", model.encode_texts, 3)
    after(1, *rules, model=model)
    assert seen == without


def test_a_factor_multiplies_the_step():
    plain, before = after(1)
    slow, _ = after(1, "text:0.1", "image/bias:0.5")
    for kind, name, factor in (
        ("text", "kernel", 0.1),
        ("text", "bias", 0.1),
        ("image", "bias", 0.5),
        ("image", "kernel", 1),
    ):
        steps = [current.params[kind][name] - before[kind][name] for current in (plain, slow)]
        np.testing.assert_allclose(steps[1], factor * steps[0], rtol=1e-4, atol=1e-7)


def test_the_average_forgets_its_beginning_and_then_moves_slowly():
    """Against a loop: the weight of the past is (1 + k) / (10 + k) until it reaches the decay."""
    values = np.random.default_rng(0).normal(size=40)
    expected = ema = 5.0
    for k, value in enumerate(values):
        decay = min(0.7, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * value
        ema = state.ema_update({"x": jnp.float32(ema)}, {"x": jnp.float32(value)}, jnp.int32(k), 0.7)["x"]
    assert float(ema) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - np.sum(values[::-1] * 0.3 * 0.7 ** np.arange(40))) < 1e-2  # 5.0 has no part in it
