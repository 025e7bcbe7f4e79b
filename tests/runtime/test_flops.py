"""The count of arithmetic against formulas, written out."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mefn_jax.encoders.vit import ViT
from mefn_jax.runtime import flops


def test_count_flops_of_products_loops_and_convolutions():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert flops.count_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5

    def multiply_in_loop(a, b):
        return jax.lax.scan(lambda c, _: (c, a @ b), 0.0, None, length=7)[1].sum()

    assert flops.count_flops(jax.jit(jax.checkpoint(multiply_in_loop)), a, b) == 7 * 2 * 3 * 4 * 5
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 6))
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.count_flops(convolve, image, kernel) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 3)


def test_count_flops_of_transformer():
    width, layers, hidden, patch, size, batch = 32, 3, 64, 8, 32, 5
    tower = ViT(width=width, layers=layers, heads=4, mlp_width=hidden, patch=patch, stem=(), pool="mean")
    pixels = jnp.zeros((batch, size, size, 3))
    params = jax.eval_shape(tower.init, jax.random.key(0), pixels)
    tokens = (size // patch) ** 2
    block = 4 * width**2 + 2 * width * hidden + 2 * tokens * width  # multiplications of one token
    expected = 2 * batch * tokens * (layers * block + patch**2 * 3 * width)
    assert flops.count_flops(tower.apply, params, pixels) == expected


@pytest.mark.parametrize(
    ("frozen", "adapters", "negatives"),
    [("", False, "global"), ("image", False, "global"), ("text", False, "local"), ("image", True, "global")],
)
def test_step_flops_triple_forward_flops_except_of_frozen_towers(frozen, adapters, negatives):
    b, n, c, d, words, devices = 6, 5, 3, 7, 4, 2
    images, ids, mask = jnp.zeros((b, n, c)), jnp.zeros((b, words), int), jnp.ones((b, words), bool)
    params = {"image": jnp.zeros((c, d)), "text": jnp.zeros((9, d))}
    model = SimpleNamespace(
        encode_images=lambda p, x: x @ p["image"],
        encode_texts=lambda p, ids, mask: jax.nn.one_hot(ids, 9) @ p["text"],
        score=lambda p, v, t: jnp.einsum("ind,jmd->ij", v, t),
        has_train_score=False,
    )
    multipliers = {kind: {"backbone": {"kernel": 0.0 if kind == frozen else 1.0}} for kind in ("image", "text")}
    if adapters:
        multipliers["lora"] = {frozen: {"up": 1.0, "down": 1.0}}
    passes = {"image": 3, "text": 3} | {frozen: 2 if adapters else 1}
    step_config = SimpleNamespace(model=model, lr_multipliers=multipliers, negatives=negatives, loss_needs=())
    mesh, batch = SimpleNamespace(size=devices), {"images": images, "text": ids, "text_mask": mask}
    step_flops = flops.step_flops(step_config, mesh, params, batch)
    scores = flops.count_flops(lambda v, t: model.score(None, v, t), jnp.zeros((b, n, d)), jnp.zeros((b, words, d)))
    assert step_flops == {
        "images": 2 * b * n * c * d * passes["image"],
        "texts": 2 * b * words * 9 * d * passes["text"],
        "scores": 3 * scores / (devices if negatives == "local" else 1),
    }


def test_step_flops_count_teacher_once_and_three_fused_pairs_a_row():
    b, c, d = 6, 5, 7
    params = {"image": jnp.zeros((c, d)), "text": jnp.zeros((9, d)), "fusion": jnp.zeros((2 * d, 3))}
    model = SimpleNamespace(
        encode_images=lambda p, x: x @ p["image"],
        encode_texts=lambda p, ids, mask: jax.nn.one_hot(ids, 9)[:, 0] @ p["text"],
        train_score=lambda p, v, t: v @ t.T,
        has_train_score=True,
        embed=lambda p, x: x,
        fused_similarity=lambda p, v, t: (jnp.concatenate([v, t], 1) @ p["fusion"])[:, 0],
    )
    multipliers = {kind: {"backbone": {"kernel": 1.0}} for kind in ("image", "text")}
    needs = ("fused_similarity", "teacher_scores")
    step_config = SimpleNamespace(model=model, lr_multipliers=multipliers, negatives="global", loss_needs=needs)
    batch = {"images": jnp.zeros((b, c)), "text": jnp.zeros((b, 1), int), "text_mask": jnp.ones((b, 1), bool)}
    assert flops.step_flops(step_config, SimpleNamespace(size=1), params, batch) == {
        "images": 4 * 2 * b * c * d,
        "texts": 4 * 2 * b * 9 * d,
        "scores": 4 * 2 * b * b * d,
        "fusion": 3 * 3 * 2 * b * 2 * d * 3,
    }
