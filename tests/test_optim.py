"""The optimizer: weight decay, the schedule, clipping, and learning-rate multipliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax import optim
from mefn_jax.encoders.transformer import SelfAttention
from mefn_jax.errors import ConfigError


def test_adamw_decays_only_matrices():
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


def test_learning_rate_at_warms_up_and_decays_to_zero():
    warmup_steps = optim.count_warmup_steps(100, 0.1)
    assert warmup_steps == 10
    assert optim.count_warmup_steps(100, 0.0) == 1
    schedule = jax.jit(lambda step: optim.learning_rate_at(step, 0.01, 100, warmup_steps))
    assert [float(schedule(k)) for k in (0, 5, 10, 100)] == pytest.approx([0.0, 0.005, 0.01, 0.0], abs=1e-9)
    assert np.all(np.diff([float(schedule(k)) for k in range(10, 101)]) < 0)


def test_adamw_clips_gradient_before_moments():
    """Adam's first update does not depend on the gradient's length, but its moments do."""
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.0, clip_norm=2.0)
    _, state = optimizer.update({"kernel": jnp.full((2, 2), 100.0)}, optimizer.init(params), params)
    mean = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2))
    np.testing.assert_allclose(
        mean, 0.1 * np.full((2, 2), 1.0), rtol=1e-5
    )  # the norm 200 becomes 2, that is 1 for each of four entries


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
    "matcher": {"log_lambda": 1.0},
}


def multipliers(*rules, decay=1.0):
    tree = optim.lr_multipliers(PARAMS, rules, decay)
    return {"/".join(k.key for k in path): f for path, f in jax.tree_util.tree_leaves_with_path(tree)}


def test_lr_multipliers_use_first_matching_rule():
    multiplier_of = multipliers("image/backbone/layer_0:0", "backbone:0.1", "^matcher:2")
    assert multiplier_of.pop("image/backbone/layer_0/mlp") == 0
    assert multiplier_of.pop("matcher/log_lambda") == 2
    assert multiplier_of.pop("image/regions") == 1
    assert set(multiplier_of.values()) == {0.1}


def test_lr_multipliers_decay_layers_from_output():
    multiplier_of = multipliers("layer_1:0.5", decay=0.1)
    assert multiplier_of["image/backbone/patches"] == pytest.approx(0.01)
    assert multiplier_of["image/backbone/layer_0/mlp"] == pytest.approx(0.1)
    assert multiplier_of["image/backbone/layer_1/mlp"] == 0.5
    assert multiplier_of["text/backbone/words"] == multiplier_of["text/backbone/norm/scale"] == pytest.approx(0.1)
    for name in ("image/backbone/norm/scale", "text/backbone/pooler/kernel", "text/backbone/layer_0/mlp"):
        assert multiplier_of[name] == 1
    assert multiplier_of["image/regions"] == 1


def test_lr_multipliers_find_final_norm_of_clip():
    clip = {name: PARAMS["text"]["backbone"][name] for name in ("words", "norm", "layer_0")}
    multiplier_of = optim.lr_multipliers(PARAMS | {"text": {"backbone": clip}}, (), 0.1)["text"]["backbone"]
    assert (multiplier_of["words"], multiplier_of["layer_0"]["mlp"], multiplier_of["norm"]["scale"]) == pytest.approx(
        (0.1, 1, 1)
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("image", "is not a regex:factor"),
        ("image:-1", "a factor of at least 0"),
        ("imge:0.1", "matches no parameter that earlier rules leave"),
        ("(:0", "is not a regex:factor"),
    ],
)
def test_lr_multipliers_name_wrong_rule(rule, message):
    with pytest.raises(ConfigError, match=message):
        multipliers(rule)
