"""The train step: frozen parameters, dropout of frozen towers, and learning-rate multipliers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mefn_jax import losses, optim
from mefn_jax.features import make_features
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training import state, step


def linear_model():
    """A model with the few methods that the train step calls."""

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


def train_linear_model(steps: int, *rules, model=None):
    """The state after some steps with these rules of learning rates, and the parameters before."""
    rng = np.random.default_rng(0)
    params = {
        kind: {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.ones(3, np.float32)}
        for kind in ("image", "text")
    } | {"matcher": {"factor": jnp.float32(1.0)}, "loss": {}}
    multipliers = optim.lr_multipliers(params, rules, 1.0)
    optimizer = optim.adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1e9, factors=multipliers)
    mesh = make_mesh(devices=jax.devices()[:1])
    current = state.create_state(lambda: jax.tree.map(jnp.asarray, params), optimizer, multipliers, mesh)
    batch = {"images": rng.normal(size=(8, 5)), "text": rng.normal(size=(8, 5)), "text_mask": np.ones((8, 5), bool)}
    batch |= {name: np.arange(8) for name in ("image_index", "caption_index", "epoch")}
    config = types.SimpleNamespace(name="triplet", margin=0.2, hard_negative_ramp=-1, anchors="both")
    step_config = step.StepConfig(model or linear_model(), optimizer, multipliers, losses.make_loss(config), seed=0)
    run = step.compile_step(mesh, current, step_config)
    for _ in range(steps):
        current, _ = run(current, batch)
    return current, params


def test_step_keeps_frozen_parameters_without_optimizer_state():
    current, before = train_linear_model(3, "^image:0")
    jax.tree.map(np.testing.assert_array_equal, current.params["image"], before["image"])
    assert np.abs(current.params["text"]["kernel"] - before["text"]["kernel"]).max() > 0.01
    # Two moments of the 19 trainable numbers, besides counters.
    size = sum(leaf.size for leaf in jax.tree.leaves(current.opt_state) if leaf.ndim or leaf.dtype == jnp.float32)
    assert size == 2 * (5 * 3 + 3 + 1)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [(("^image:0",), ["images"]), (("text/bias:0",), []), (("image:0", "text:0"), ["images", "texts"])],
)
def test_step_gives_frozen_towers_no_dropout_key(rules, expected):
    """The step passes None as the dropout key of a tower whose parameters are all frozen."""
    model, without_key = linear_model(), []

    def record_missing_key(kind, encode, position):
        def features(*args):
            if args[position] is None:  # the dropout key
                without_key.append(kind)
            return encode(*args)

        return features

    model.encode_images = record_missing_key("images", model.encode_images, 2)
    model.encode_texts = record_missing_key("texts", model.encode_texts, 3)
    train_linear_model(1, *rules, model=model)
    assert without_key == expected


def test_step_scales_updates_by_lr_multiplier():
    plain, before = train_linear_model(1)
    slow, _ = train_linear_model(1, "text:0.1", "image/bias:0.5")
    for kind, name, factor in (
        ("text", "kernel", 0.1),
        ("text", "bias", 0.1),
        ("image", "bias", 0.5),
        ("image", "kernel", 1),
    ):
        steps = [current.params[kind][name] - before[kind][name] for current in (plain, slow)]
        np.testing.assert_allclose(steps[1], factor * steps[0], rtol=1e-4, atol=1e-7)
