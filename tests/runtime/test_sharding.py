"""Training on any mesh of devices gives equal losses and parameters; shapes of meshes and partition specs."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import configs.shapes
from mefn_jax import optim
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.errors import ConfigError
from mefn_jax.model import build_model, split_constants
from mefn_jax.runtime.collectives import list_collectives
from mefn_jax.runtime.sharding import (
    batch_sharding,
    check_divides,
    from_full_copy,
    make_mesh,
    mesh_shape,
    param_spec,
    replicated,
)
from mefn_jax.training import state, step
from mefn_jax.training.hyperparameters import hyperparameters_from_config

B, VOCABULARY = 16, 64
MESHES = [  # sizes of the axes, and options that must not change the result either
    ({"data": 2}, {"grad_cache_chunks": 4}),
    ({"data": 8}, {}),
    ({"data": 1, "fsdp": 4}, {"remat": "dots"}),
    ({"data": 2, "fsdp": 2, "tensor": 2}, {"remat": "blocks"}),
]


def make_config(**train):
    c = configs.shapes.get_config("smoke")
    with c.unlocked():
        c.text.max_tokens, c.text.vocab_size = 6, VOCABULARY
        c.train.update(batch_size=B, **train)
        c.matcher.hub_vectors = 8
    return c


def make_batch(config, number):
    rng = np.random.default_rng(number)
    words = np.arange(config.text.max_tokens + 2) < rng.integers(3, config.text.max_tokens + 3, (B, 1))
    return {
        "images": rng.integers(0, 256, (B, config.image.size, config.image.size, 3), np.uint8),
        "text": rng.integers(0, VOCABULARY, words.shape).astype(np.int32) * words,
        "text_mask": words,
        "image_index": rng.integers(0, 12, B).astype(np.int32),
        "caption_index": np.arange(B, dtype=np.int32),
        "epoch": np.zeros(B, np.int32),
        "view": np.zeros(B, np.int32),
    }


def train(config, sizes, steps=3):
    """Trains some steps on a mesh with axes of these sizes. Returns the losses, the parameters as NumPy arrays, the
    sharded state, and the collectives of the program."""
    number = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, jax.devices()[:number])
    model = build_model(config, VOCABULARY)
    hyper = hyperparameters_from_config(config, steps)
    init = lambda seed: model.init(jax.random.key(seed), *dummy_inputs(config))  # noqa: E731
    factors = optim.lr_multipliers(split_constants(jax.eval_shape(init, hyper.seed))[0], (), 1.0)
    # Not Adam: where the gradient is zero (the keys' bias), it turns rounding errors into steps of full length.
    optimizer = optax.sgd(0.05, momentum=0.9)
    current = state.create_state(init, hyper.seed, optimizer, factors, mesh)
    batches = [from_full_copy(batch_sharding(mesh), make_batch(config, k)) for k in range(steps)]
    step_config = step.make_step_config(config, model, factors)
    step_config = dataclasses.replace(step_config, make_optimizer=lambda hyper: optimizer)
    hyper = from_full_copy(replicated(mesh), hyper)
    run, losses = step.compile_step(mesh, current, step_config).lower(current, batches[0], hyper).compile(), []
    for batch in batches:
        current, metrics = run(current, batch, hyper)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.tree.map(np.asarray, current.params), current, list_collectives(run.as_text())


@functools.cache
def train_on_one_device():
    return train(make_config(), {"data": 1})[:2]


@pytest.mark.parametrize(("sizes", "options"), MESHES, ids=str)
def test_training_on_every_mesh_equals_one_device(sizes, options):
    losses, params, current, collectives = train(make_config(**options), sizes)
    np.testing.assert_allclose(losses, train_on_one_device()[0], rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, train_on_one_device()[1])
    kernel = current.params["text"]["backbone"]["layer_0"]["mlp_in"]["kernel"]
    shards = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * shards == kernel.size
    moment = optimizer_state_of(current, "mlp_in")
    assert {m.addressable_shards[0].data.size * shards for m in moment} == {kernel.size}
    if shards == 1:  # small arrays such as image indices are gathered, but never fragments
        assert sum(c["bytes"] for c in collectives if c["kind"] == "all-gather") <= 32 * B


def test_resnet_and_dropout_train_equally_on_four_devices():
    # With seed 0, an activation is so close to the kink of the ReLU that rounding decides about its gradient: on one
    # device, XLA's two code generators for CPUs differ as much.
    config = make_config(seed=1)
    with config.unlocked():
        config.image.arch = "resnet"
        config.image.resnet.update(depths=(1, 1), widths=(32, 64))
        config.text.bert.dropout = config.augment.region_dropout = 0.2
    (losses, params, *_), (other_losses, other_params, *_) = (
        train(config, sizes, 2) for sizes in ({"data": 1}, {"data": 4})
    )
    np.testing.assert_allclose(losses, other_losses, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, other_params)


def optimizer_state_of(current, name):
    leaves = jax.tree_util.tree_leaves_with_path(current.opt_state)
    wanted = f"['text']['backbone']['layer_0']['{name}']['kernel']"
    return [x for path, x in leaves if jax.tree_util.keystr(path).endswith(wanted)]


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ({"data": -1}, 8, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": 4}, 4, (1, 1, 4)),
    ],
)
def test_mesh_shape_infers_missing_size(sizes, devices, expected):
    assert mesh_shape(sizes, devices) == expected


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": -1, "fsdp": 3}, {"data": 0}])
def test_mesh_shape_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(ConfigError, match=r"mesh\.data="):
        mesh_shape(sizes, 8)


def test_param_spec_refuses_parameter_without_rule():
    with pytest.raises(ValueError, match=r"no rule shards image/new/table"):
        param_spec("image/new/table", (4, 4), {"data": 1, "fsdp": 2, "tensor": 1})


def test_param_spec_skips_axis_that_does_not_divide():
    sizes = {"data": 1, "fsdp": 4, "tensor": 3}
    assert param_spec("text/backbone/layer_0/mlp_in/kernel", (8, 10), sizes) == P("fsdp", None)
    assert param_spec("0/mu/params/text/backbone/layer_0/mlp_in/kernel", (6, 10), sizes) == P()


def test_check_divides_refuses_batch_that_does_not_divide():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    check_divides(48, 3, mesh)
    with pytest.raises(ConfigError, match=r"train\.batch_size=20 is not a multiple of the 8 devices;"):
        check_divides(20, 1, mesh)
    with pytest.raises(ConfigError, match=r"train\.batch_size=40 .* times train\.grad_cache_chunks=4"):
        check_divides(40, 4, mesh)
