"""Any arrangement of the devices gives the same training: losses and parameters after some steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import configs.shapes
from mefn_jax import optim
from mefn_jax.errors import ConfigError
from mefn_jax.model import build_model, dummy_inputs
from mefn_jax.runtime.collectives import list_collectives
from mefn_jax.runtime.sharding import batch_sharding, check_divides, from_full_copy, make_mesh, mesh_shape, param_spec
from mefn_jax.training import state, step
from mefn_jax.training.grad_cache import encode_in_chunks

B, VOCABULARY = 16, 64
MESHES = [  # sizes, and what is to make no difference either
    ({"data": 2}, {"grad_cache_chunks": 4}),
    ({"data": 8}, {}),
    ({"data": 1, "fsdp": 4}, {"remat": "dots"}),
    ({"data": 2, "fsdp": 2, "tensor": 2}, {"remat": "blocks"}),
]


def config_of(**train):
    c = configs.shapes.get_config("smoke")
    with c.unlocked():
        c.text.max_tokens, c.text.vocab_size = 6, VOCABULARY
        c.train.update(batch_size=B, **train)
        c.matcher.hub_vectors = 8
    return c


def batch_of(config, number):
    rng = np.random.default_rng(number)
    words = np.arange(config.text.max_tokens + 2) < rng.integers(3, config.text.max_tokens + 3, (B, 1))
    return {
        "images": rng.integers(0, 256, (B, config.image.size, config.image.size, 3), np.uint8),
        "text": rng.integers(0, VOCABULARY, words.shape).astype(np.int32) * words,
        "text_mask": words,
        "image_index": rng.integers(0, 12, B).astype(np.int32),
        "caption_index": np.arange(B, dtype=np.int32),
        "epoch": np.zeros(B, np.int32),
    }


def trained(config, sizes, steps=3):
    """Losses, and parameters as NumPy arrays, after some steps on a mesh of these sizes; the mesh's state, and what the
    program sends."""
    number = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, jax.devices()[:number])
    model = build_model(config, VOCABULARY)
    init = functools.partial(model.init, jax.random.key(0), *dummy_inputs(config))
    factors = optim.lr_multipliers(jax.eval_shape(init), (), 1.0)
    # Not Adam, which makes steps of full length of the rounding in a gradient that is zero (the keys' bias).
    optimizer = optax.sgd(0.05, momentum=0.9)
    current = state.create_state(init, optimizer, factors, mesh)
    batches = [from_full_copy(batch_sharding(mesh), batch_of(config, k)) for k in range(steps)]
    recipe = step.make_step_config(config, model, optimizer, factors)
    run, losses = step.compile_step(mesh, current, recipe).lower(current, batches[0]).compile(), []
    for batch in batches:
        current, metrics = run(current, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.tree.map(np.asarray, current.params), current, list_collectives(run.as_text())


@functools.cache
def alone():
    return trained(config_of(), {"data": 1})[:2]


@pytest.mark.parametrize(("sizes", "options"), MESHES, ids=str)
def test_every_mesh_trains_as_one_device_does(sizes, options):
    losses, params, current, sent = trained(config_of(**options), sizes)
    np.testing.assert_allclose(losses, alone()[0], rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, alone()[1])
    kernel = current.params["text"]["backbone"]["layer_0"]["mlp_in"]["kernel"]
    parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
    moment = optim_state_of(current, "mlp_in")
    assert {m.addressable_shards[0].data.size * parts for m in moment} == {kernel.size}
    if parts == 1:  # all are sent the pairs' owners and the like, and never their fragments
        assert sum(c["bytes"] for c in sent if c["kind"] == "all-gather") <= 32 * B


def test_a_resnet_and_dropout_do_not_see_the_devices():
    config = config_of()
    with config.unlocked():
        config.image.arch = "resnet"
        config.image.resnet.update(depths=(1, 1), widths=(32, 64))
        config.text.bert.dropout = config.augment.region_dropout = 0.2
    (losses, params, *_), (ours, theirs, *_) = (trained(config, sizes, 2) for sizes in ({"data": 1}, {"data": 4}))
    np.testing.assert_allclose(losses, ours, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, theirs)


def optim_state_of(current, name):
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
def test_sizes_of_a_mesh(sizes, devices, expected):
    assert mesh_shape(sizes, devices) == expected


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": -1, "fsdp": 3}, {"data": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"mesh\.data="):
        mesh_shape(sizes, 8)


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule of mefn_jax/sharding\.py says where image/new/table"):
        param_spec("image/new/table", (4, 4), {"data": 1, "fsdp": 2, "tensor": 1})


def test_an_axis_that_does_not_divide_is_left_out():
    sizes = {"data": 1, "fsdp": 4, "tensor": 3}
    assert param_spec("text/backbone/layer_0/mlp_in/kernel", (8, 10), sizes) == P("fsdp", None)
    assert param_spec("0/mu/params/text/backbone/layer_0/mlp_in/kernel", (6, 10), sizes) == P()


def test_a_batch_that_cannot_be_split_is_refused():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    check_divides(48, 3, mesh)
    with pytest.raises(ConfigError, match=r"train\.batch_size=20 is not a multiple of the 8 devices;"):
        check_divides(20, 1, mesh)
    with pytest.raises(ConfigError, match=r"train\.batch_size=40 .* times train\.grad_cache_chunks=4"):
        check_divides(40, 4, mesh)


def test_parts_have_the_same_dropout_going_back():
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    x, w, key = jnp.arange(48.0).reshape(B, 3) / 48, jnp.array([1.0, -2, 3]), jax.random.key(0)

    def encode(w):
        return lambda key, x: jnp.tanh(x * w) * jax.random.bernoulli(key, 0.5, x.shape)

    def by_loop(w):
        places = np.arange(B).reshape(2, 4, -1).swapaxes(0, 1).reshape(4, -1)  # device, part, row
        parts = [encode(w)(k, x[rows]) for k, rows in zip(jax.random.split(key, 4), places, strict=True)]
        return jnp.zeros_like(x).at[places.reshape(-1)].set(jnp.concatenate(parts))

    def loss(make):
        return lambda w: jnp.sum(jnp.square(make(w)))

    ours = jax.jit(jax.value_and_grad(loss(lambda w: encode_in_chunks(encode(w), key, (x,), mesh=mesh, parts=4))))(w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, jax.value_and_grad(loss(by_loop))(w))
