"""The teacher in the train step: what it learns, that it is not trained, and the same on any number of devices."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from test_step import HYPER, linear_model, make_linear_training

from configs import default, shapes
from mefn_jax import losses
from mefn_jax.config import set_dotted
from mefn_jax.errors import ConfigError
from mefn_jax.resolve import check_options
from mefn_jax.training import step


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scores_of(params, batch):
    v, t = (
        unit(np.asarray(batch[key]) @ params[kind]["kernel"] + params[kind]["bias"])
        for key, kind in (("images", "image"), ("text", "text"))
    )
    return v @ t.T * params["matcher"]["factor"]


def relative_entropy(teacher, student):
    parts = [[log_softmax(x / 0.07, axis) for x in (teacher, student)] for axis in (0, 1)]
    return np.mean([np.sum(np.exp(p) * (p - q), axis).mean() for (p, q), axis in zip(parts, (0, 1), strict=True)])


def test_step_distills_the_average_that_numpy_computes():
    """The teacher of a step is the average of all parameters up to those of this step, with Eq. 54's rising decay."""
    make_state, run, batch, params = make_linear_training(loss="sel_distill")
    sel = losses.make_loss(types.SimpleNamespace(name="sel", anchors="both"))
    state, ema, distilled = make_state(), params, []
    hyper = HYPER.replace(ema_decay=np.float32(0.6))
    for k in range(5):
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = run(state, batch, hyper)
        student, teacher = (scores_of(p, batch) for p in (before, ema))
        eye = np.eye(8, dtype=bool)
        expected = float(sel({}, student, eye, hyper, k, same_pair=eye)) + 0.5 * relative_entropy(teacher, student)
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        distilled.append(relative_entropy(teacher, student))
        decay = min(0.6, (1 + k) / (10 + k))
        ema = jax.tree.map(lambda a, b, d=decay: d * np.asarray(a) + (1 - d) * np.asarray(b), ema, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.ema, ema)
    assert distilled[0] == pytest.approx(0, abs=1e-6)  # the teacher is the student at the start
    assert distilled[-1] > 1e-4


def test_teacher_is_encoded_without_dropout_and_frozen_parts_are_the_students():
    """The model notes whether it got a dropout key."""
    model, seen = linear_model(), []

    def record(kind, encode, position):
        def features(*args):
            seen.append((kind, args[position] is None))
            return encode(*args)

        return features

    model.encode_images = record("images", model.encode_images, 2)
    model.encode_texts = record("texts", model.encode_texts, 3)
    make_state, run, batch, params = make_linear_training("^image:0", model=model, loss="sel_distill")
    state = make_state()
    state, _ = run(state, batch, HYPER)
    assert seen[:2] == [("images", True), ("texts", True)]  # the teacher
    assert ("texts", False) in seen[2:]
    assert not jax.tree.leaves(state.ema["image"])
    jax.tree.map(np.testing.assert_array_equal, state.params["image"], params["image"])


def test_teacher_sees_all_regions_where_the_student_sees_some():
    """Region dropout follows from keys of the rows, not from the dropout key of a tower."""
    model, drop = linear_model(), jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (5,)))
    encode = model.encode_images
    model.encode_images = lambda params, x, key, row_keys: encode(
        params, x if row_keys is None else x * drop(row_keys), key
    )
    make_state, run, batch, params = make_linear_training(model=model, loss="sel_distill")
    _, metrics = run(make_state(), batch, HYPER)
    kept = drop(step.row_keys(HYPER.seed, batch["epoch"], batch["caption_index"], batch["view"]))
    student, teacher = scores_of(params, batch | {"images": batch["images"] * kept}), scores_of(params, batch)
    eye, sel = np.eye(8, dtype=bool), losses.make_loss(types.SimpleNamespace(name="sel", anchors="both"))
    expected = float(sel({}, student, eye, HYPER, 0, same_pair=eye)) + 0.5 * relative_entropy(teacher, student)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


def fusing_model():
    """The linear model with a matcher that fuses pairs by a parameter of its own."""
    model = linear_model()
    model.embed = lambda params, features: features.pooled
    model.fused_similarity = lambda params, v, t: jnp.tanh(params["matcher"]["factor"] * jnp.sum(v * jnp.sin(t), -1))
    return model


def test_step_with_hect_and_teacher_is_equal_on_eight_devices():
    results = []
    for devices in (1, 8):
        make_state, run, batch, _ = make_linear_training(
            model=fusing_model(), loss="sel_hect_distill", devices=devices, constant_rate=False
        )
        batch |= {name: np.arange(8) // 2 for name in ("image_index", "caption_index")}
        state, values = make_state(), []
        for _ in range(4):
            state, metrics = run(state, batch, HYPER)
            values.append(float(metrics["loss"]))
        results.append((values, state.params, state.ema))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert len(set(results[0][0])) == 3  # the first step has a learning rate of 0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("mate", {"train.ema_decay": 0.0}, "train.ema_decay=0: loss.name=sel_hect_distill learns from the averaged"),
        ("vsepp", {"loss.name": "sel_hect"}, "loss.name=sel_hect fuses pairs, and the matcher of model=vsepp does not"),
        ("mate", {"loss.negatives": "local"}, "loss.negatives=local: loss.name=sel_hect_distill needs same_pair"),
        ("mate", {"matcher.share": 1.0}, r"matcher.share: 1.0 must be in \[0, 1\)"),
    ],
)
def test_check_options_refuses_loss_without_what_it_needs(model, options, message):
    config = default.get_config(f"model={model}")
    with config.unlocked():
        for key, value in options.items():
            set_dotted(config, key, value)
    with pytest.raises(ConfigError, match=message):
        check_options(config)


@pytest.mark.parametrize("name", ["mate", "mate_no_fusion", "mate_no_momentum", "mate_no_hect"])
def test_mate_and_its_ablations_are_complete_configurations(name):
    config = shapes.get_config(f"model={name}")
    check_options(config)
    assert (config.image.pooling, config.text.pooling, config.data.views) == ("esa", "esa", 2)
    assert config.train.ema_decay == (0.0 if name == "mate_no_momentum" else 0.995)
