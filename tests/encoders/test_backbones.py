"""Backbones of images and texts: rematerialization, bfloat16, and the published numbers of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.resnet import ResNet
from mefn_jax.encoders.vit import ViT
from mefn_jax.training.state import num_params

SMALL = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
BACKBONES = {
    "vit": ViT(**SMALL | {"layers": 2}, patch=8, pool="pooler", stochastic_depth=0.5),
    "resnet": ResNet(8, (1, 2), (8, 16), True, True, stochastic_depth=0.5),
    "resnet_batch": ResNet(8, (1, 1), (8, 16), True, True, norm="batch"),
    "bert": BERT(**SMALL | {"layers": 2}, vocab_size=20, max_positions=8, pooler=True, dropout=0.1),
    "clip": CLIPText(**SMALL | {"layers": 2}, vocab_size=20, max_positions=8, stochastic_depth=0.5),
}


def make_inputs(name):
    rng = np.random.default_rng(0)
    if name in ("bert", "clip"):
        return rng.integers(1, 20, (3, 8)), np.arange(8) < np.array([[8], [5], [3]])
    return (rng.normal(size=(3, 32, 32, 3)).astype(np.float32),)


def pooled_gradient(module, params, inputs):
    def loss(params):
        states, pooled = module.apply(params, *inputs, deterministic=False, rngs={"dropout": jax.random.key(3)})
        last = states[-1] if isinstance(states, list) else states
        return jnp.mean(last.astype(jnp.float32) ** 2) + jnp.mean(pooled.astype(jnp.float32) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_backbone_gradients_with_remat_and_bfloat16(name):
    inputs, module = make_inputs(name), BACKBONES[name]
    params = jax.jit(module.init)(jax.random.key(0), *inputs)
    loss, gradient = pooled_gradient(module, params, inputs)
    for remat in ("dots", "blocks"):
        same = pooled_gradient(module.clone(remat=remat), params, inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), same, (loss, gradient))
    half = module.clone(dtype="bfloat16")
    assert jax.eval_shape(half.apply, params, *inputs)[1].dtype == jnp.bfloat16
    shapes = jax.eval_shape(half.init, jax.random.key(0), *inputs)
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(pooled_gradient(half, params, inputs)[0], loss, rtol=0.05)
    assert set(operand_dtypes(jax.make_jaxpr(half.apply)(params, *inputs).jaxpr)) == {jnp.dtype("bfloat16")}


def operand_dtypes(jaxpr):
    """The dtypes of the operands of a program's matrix products and convolutions, including inner programs."""
    for e in jaxpr.eqns:
        if e.primitive.name in ("dot_general", "conv_general_dilated"):
            yield from (v.aval.dtype for v in e.invars)
        for value in e.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from operand_dtypes(inner)


def param_shapes(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def test_full_size_backbones_have_published_number_of_parameters():
    c = default.get_config()
    pixels = jnp.zeros((1, 224, 224, 3))
    # torchvision's ResNet-101 has 44,549,160, including 2048 * 1000 + 1000 of the classifier.
    assert num_params(param_shapes(ResNet(**c.image.resnet), pixels)) == 44_549_160 - 2_049_000
    # timm's ViT-S/16 has 22,050,664: without the classifier, the class token and its position.
    assert num_params(param_shapes(ViT(**c.image.vit), pixels)) == 22_050_664 - 385_000 - 2 * 384
    # transformers' bert-base-uncased has 109,482,240, including 768 * 768 + 768 of the pooler.
    bert = BERT(vocab_size=30522, **c.text.bert)
    ids = jnp.zeros((1, 8), jnp.int32)
    assert num_params(param_shapes(bert, ids, ids > 0)) == 109_482_240 - 590_592
