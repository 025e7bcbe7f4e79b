"""The train step: frozen parameters, dropout of frozen towers, learning-rate multipliers, and hyperparameters."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes
from mefn_jax import optim
from mefn_jax.features import make_features
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training import state, step
from mefn_jax.training.hyperparameters import Hyperparameters
from mefn_jax.training.loss_inputs import mark_same_pair


def linear_model():
    """A model with the few methods that the train step calls."""

    def encode(kind):
        def features(params, x, *rest):
            pooled = x.astype(jnp.float32) @ params[kind]["kernel"] + params[kind]["bias"]
            return make_features(pooled[:, None], jnp.ones((len(x), 1), bool), pooled)

        return features

    return types.SimpleNamespace(
        has_products=False,
        has_train_score=False,
        floats_per_pair=lambda images, texts: 1,
        encode_images=encode("image"),
        encode_texts=encode("text"),
        score=lambda params, images, texts: images.pooled @ texts.pooled.T * params["matcher"]["factor"],
        hub_offsets=lambda params, images, texts: (jnp.zeros(len(images.pooled)), jnp.zeros(len(texts.pooled))),
    )


HYPER = Hyperparameters(
    learning_rate=np.float32(0.1),
    steps=np.int32(1000),
    warmup_steps=np.int32(1),
    schedule_offset=np.float32(0),
    weight_decay=np.float32(0.5),
    clip_norm=np.float32(1e9),
    ema_decay=np.float32(0.05),
    margin=np.float32(0.2),
    hard_negative_ramp=np.int32(-1),
    seed=np.uint32(0),
)


def make_linear_training(*rules, model=None, constant_rate=True, loss="triplet", devices=1):
    """Returns a function that makes the initial state, with a moving average, the compiled step with these rules of
    learning rates, a batch, and the initial parameters. With `constant_rate`, the learning rate does not depend on the
    step."""
    rng = np.random.default_rng(0)
    params = {
        kind: {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.ones(3, np.float32)}
        for kind in ("image", "text")
    } | {"matcher": {"factor": jnp.float32(1.0)}, "loss": {}}
    multipliers = optim.lr_multipliers(params, rules, 1.0)
    config = shapes.get_config("smoke")
    with config.unlocked():
        config.loss.name = loss
    step_config = step.make_step_config(config, model or linear_model(), multipliers)
    if constant_rate:

        def make_optimizer(hyper):
            return optim.adamw(lambda _: hyper.learning_rate, hyper.weight_decay, hyper.clip_norm, multipliers)

        step_config = dataclasses.replace(step_config, make_optimizer=make_optimizer)
    mesh = make_mesh(devices=jax.devices()[:devices])

    def init(seed):
        return jax.tree.map(jnp.asarray, params) | {"constants": {}}

    def make_state():
        return state.create_state(init, 0, step_config.make_optimizer(HYPER), multipliers, mesh, with_ema=True)

    batch = {"images": rng.normal(size=(8, 5)), "text": rng.normal(size=(8, 5)), "text_mask": np.ones((8, 5), bool)}
    batch |= {name: np.arange(8) for name in ("image_index", "caption_index", "epoch")} | {"view": np.zeros(8, int)}
    return make_state, step.compile_step(mesh, make_state(), step_config), batch, params


def train_linear_model(steps: int, *rules, model=None):
    """The state after some steps with these rules of learning rates, and the parameters before."""
    make_state, run, batch, params = make_linear_training(*rules, model=model)
    current = make_state()
    for _ in range(steps):
        current, _ = run(current, batch, HYPER)
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


@pytest.fixture(scope="module")
def compiled():
    """A compiled step of the linear model with dropout of its images, and the number of its traces so far."""
    model, traces = linear_model(), []
    encode_images = model.encode_images

    def drop_and_encode(params, x, key, *rest):
        traces.append(key)
        return encode_images(params, x * jax.random.bernoulli(key, 0.5, x.shape), key, *rest)

    model.encode_images = drop_and_encode
    make_state, run, batch, _ = make_linear_training(model=model, constant_rate=False)

    def train(hyper):
        current = make_state()
        for _ in range(4):
            current, metrics = run(current, batch, hyper)
        return jax.tree.map(np.asarray, (current, metrics)), len(traces)

    return train


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.2),
        ("steps", 5),
        ("warmup_steps", 3),
        ("schedule_offset", 50.5),
        ("weight_decay", 0.0),
        ("clip_norm", 0.1),
        ("ema_decay", 0.2),
        ("margin", 0.4),
        ("hard_negative_ramp", 2),
        ("seed", 1),
    ],
)
def test_compiled_step_takes_hyperparameter_without_second_trace(name, value, compiled):
    first, traces = compiled(HYPER)
    again, _ = compiled(HYPER)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other, traces_of_both = compiled(HYPER.replace(**{name: np.asarray(value, getattr(HYPER, name).dtype)}))
    assert traces_of_both == traces
    changed = jax.tree.map(lambda a, b: np.any(a != b), first, other)
    assert any(jax.tree.leaves(changed))
    # The moving average does not change the parameters; everything else does.
    assert any(jax.tree.leaves(changed[0].params)) == (name != "ema_decay")


def test_compiled_step_differs_by_every_hyperparameter():
    mark = test_compiled_step_takes_hyperparameter_without_second_trace.pytestmark[0]
    assert [name for name, _ in mark.args[1]] == [field.name for field in dataclasses.fields(Hyperparameters)]


def test_row_keys_differ_by_view_and_are_those_of_today_for_the_first():
    epochs, captions = np.array([0, 0, 3, 3]), np.array([5, 5, 7, 7])
    keys = jax.random.key_data(step.row_keys(1, epochs, captions, np.array([0, 1, 0, 2])))
    assert len({key.tobytes() for key in np.asarray(keys)}) == 4
    base = jax.random.fold_in(jax.random.key(1), 0x7FFFFFFF)
    for row in (0, 2):
        first = jax.random.fold_in(jax.random.fold_in(base, epochs[row]), captions[row])
        np.testing.assert_array_equal(keys[row], jax.random.key_data(first))


def test_step_gives_loss_same_pair_of_its_rows():
    """Rows of one caption in one epoch are views of a pair; SEL then differs from the triplet loss."""
    values = {}
    for name in ("triplet", "sel"):
        make_state, run, batch, _ = make_linear_training(loss=name)
        for views in (1, 2):
            rows = {name: np.arange(8) // views for name in ("caption_index", "image_index", "epoch")}
            values[name, views] = float(run(make_state(), batch | rows, HYPER)[1]["loss"])
    assert values["sel", 1] == values["triplet", 1]
    assert values["sel", 2] > values["triplet", 2]


def test_rows_of_one_caption_in_two_epochs_are_no_views_of_a_pair():
    """A batch can hold the end of an epoch and the beginning of the next."""
    batch = {"caption_index": jnp.array([4, 4, 4, 5]), "epoch": jnp.array([0, 0, 1, 1])}
    same_pair = mark_same_pair(types.SimpleNamespace(batch=batch))
    np.testing.assert_array_equal(same_pair, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
