"""LoRA: adapters alone are trained, change nothing at first, and can be merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs.shapes
from mefn_jax import optim
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.encoders.lora import LoRA
from mefn_jax.errors import ConfigError
from mefn_jax.model import build_model, split_constants
from mefn_jax.runtime.sharding import make_mesh, param_spec
from mefn_jax.training import state, step
from mefn_jax.training.hyperparameters import hyperparameters_from_config

VOCABULARY = 40


def make_config(rank, **train):
    c = configs.shapes.get_config("smoke,model=vsepp")
    with c.unlocked():
        c.image.arch, c.image.size = "vit", 32
        c.text.max_tokens, c.text.vocab_size = 6, VOCABULARY
        c.train.lora.rank = rank
        c.train.update(batch_size=8, **train)
    return c


def make_batch(config):
    rng = np.random.default_rng(0)
    mask = np.arange(8) < rng.integers(3, 9, (8, 1))
    return {
        "images": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "text": rng.integers(1, VOCABULARY, mask.shape).astype(np.int32) * mask,
        "text_mask": mask,
        **{name: np.arange(8, dtype=np.int32) for name in ("image_index", "caption_index")},
        **{name: np.zeros(8, np.int32) for name in ("epoch", "view")},
    }


def make_variables(rank):
    config = make_config(rank)
    model = build_model(config, VOCABULARY)
    return config, model, jax.jit(model.init)(jax.random.key(0), *dummy_inputs(config))


def encode_both(model, variables, batch):
    texts = jax.jit(model.encode_texts)(variables, batch["text"], batch["text_mask"])
    return jax.jit(model.encode_images)(variables, batch["images"]), texts


@functools.cache
def train(fsdp=1, steps=3):
    config = make_config(rank=2)
    mesh = make_mesh({"data": 1, "fsdp": fsdp}, jax.devices()[:fsdp])
    model = build_model(config, VOCABULARY)
    hyper = hyperparameters_from_config(config, steps=100)

    def init(seed):
        return model.init(jax.random.key(seed), *dummy_inputs(config))

    shapes, _ = split_constants(jax.eval_shape(init, hyper.seed))
    factors = optim.lr_multipliers(shapes, (), 1.0)
    step_config = step.make_step_config(config, model, factors)
    train_state = state.create_state(init, hyper.seed, step_config.make_optimizer(hyper), factors, mesh)
    first = jax.device_get(train_state.params)
    run = step.compile_step(mesh, train_state, step_config)
    for _ in range(steps):
        train_state, metrics = run(train_state, make_batch(config), hyper)
    return model, factors, first, jax.device_get(train_state), float(metrics["loss"])


def test_first_step_equals_frozen_tower_exactly():
    _, plain, variables = make_variables(0)
    config, adapted, with_adapters = make_variables(2)
    batch = make_batch(config)
    assert set(with_adapters) - set(variables) == {"lora"}
    jax.tree.map(np.testing.assert_array_equal, variables, {k: v for k, v in with_adapters.items() if k != "lora"})
    computed = encode_both(plain, variables, batch), encode_both(adapted, with_adapters, batch)
    jax.tree.map(np.testing.assert_array_equal, *computed)


def test_only_adapters_of_a_tower_are_trained_and_merge_exactly():
    model, factors, first, trained, _ = train()
    for tower in ("image", "text"):
        assert not optim.is_trained(factors[tower]["backbone"])
        jax.tree.map(np.testing.assert_array_equal, first[tower]["backbone"], trained.params[tower]["backbone"])
        assert optim.is_trained({k: v for k, v in factors[tower].items() if k != "backbone"})
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first["lora"], trained.params["lora"])
    assert min(jax.tree.leaves(moved)) > 0
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained.opt_state)}
    assert any("lora" in name for name in names)
    assert not any("backbone" in name and "lora" not in name for name in names)
    variables = trained.params | {"constants": trained.constants}
    merged = model.merge_adapters(variables)
    assert "lora" not in merged
    kernels = [v["text"]["backbone"]["layer_0"]["attention"]["query"]["kernel"] for v in (merged, first)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
    batch = make_batch(None)
    computed = encode_both(model, variables, batch), encode_both(model, merged, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *computed)


def test_adapters_train_equally_under_fsdp():
    *_, one, loss = train()
    *_, four, sharded_loss = train(fsdp=4)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params["lora"], four.params["lora"])


def test_adapters_have_shardings():
    sizes = {"data": 1, "fsdp": 4, "tensor": 1}
    path = "params/lora/image/backbone/layer_0/attention/query/"
    assert param_spec(path + "up", (2, 32), sizes) == jax.sharding.PartitionSpec(None, "fsdp")
    assert param_spec(path + "down", (32, 2), sizes) == jax.sharding.PartitionSpec()


def test_matrices_are_chosen_by_path():
    _, _, variables = make_variables(0)
    lora = LoRA(2, 4.0, "^image/.*mlp_in")
    adapters = lora.init(jax.random.key(0), variables)
    assert list(adapters) == ["image"]
    assert list(adapters["image"]["backbone"]["layer_0"]) == ["mlp_in"]
    up = jnp.ones_like(adapters["image"]["backbone"]["layer_0"]["mlp_in"]["up"])
    adapters["image"]["backbone"]["layer_0"]["mlp_in"]["up"] = up
    down = adapters["image"]["backbone"]["layer_0"]["mlp_in"]["down"]
    merged = lora.merge(variables | {"lora": adapters})
    kernels = [v["image"]["backbone"]["layer_0"]["mlp_in"]["kernel"] for v in (variables, merged)]
    np.testing.assert_allclose(kernels[1] - kernels[0], 2.0 * down @ up, atol=1e-6)
    for matrices, message in (("nothing", "is found in no matrix"), ("(", "is no regular expression")):
        with pytest.raises(ConfigError, match=message):
            LoRA(2, 4.0, matrices).init(jax.random.key(0), variables)
