"""The count of arithmetic against formulae written out, MFU, and collectives read from a program's text."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tqdm import tqdm

from mefn_jax.encoders.vit import ViT
from mefn_jax.runtime import flops
from mefn_jax.runtime.chips import CHIPS, chip_of
from mefn_jax.runtime.collectives import list_collectives
from mefn_jax.training.logs import StepLog


def test_products_loops_and_convolutions():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert flops.count_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5

    def looped(a, b):
        return jax.lax.scan(lambda c, _: (c, a @ b), 0.0, None, length=7)[1].sum()

    assert flops.count_flops(jax.jit(jax.checkpoint(looped)), a, b) == 7 * 2 * 3 * 4 * 5
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 6))
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.count_flops(convolve, image, kernel) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 3)


def test_a_transformers_arithmetic():
    width, layers, hidden, patch, size, batch = 32, 3, 64, 8, 32, 5
    tower = ViT(width=width, layers=layers, heads=4, mlp_width=hidden, patch=patch, stem=(), pool="mean")
    pixels = jnp.zeros((batch, size, size, 3))
    params = jax.eval_shape(tower.init, jax.random.key(0), pixels)
    tokens = (size // patch) ** 2
    block = 4 * width**2 + 2 * width * hidden + 2 * tokens * width  # products of one token
    expected = 2 * batch * tokens * (layers * block + patch**2 * 3 * width)
    assert flops.count_flops(tower.apply, params, pixels) == expected


@pytest.mark.parametrize(("frozen", "negatives"), [("", "global"), ("image", "global"), ("text", "local")])
def test_a_step_is_three_times_forwards_but_for_what_is_frozen(frozen, negatives):
    b, n, c, d, words, devices = 6, 5, 3, 7, 4, 2
    images, ids, mask = jnp.zeros((b, n, c)), jnp.zeros((b, words), int), jnp.ones((b, words), bool)
    params = {"image": jnp.zeros((c, d)), "text": jnp.zeros((9, d))}
    model = SimpleNamespace(
        encode_images=lambda p, x: x @ p["image"],
        encode_texts=lambda p, ids, mask: jax.nn.one_hot(ids, 9) @ p["text"],
        score=lambda p, v, t: jnp.einsum("ind,jmd->ij", v, t),
    )
    factors = {kind: {"backbone": {"kernel": 0.0 if kind == frozen else 1.0}} for kind in ("image", "text")}
    recipe = SimpleNamespace(model=model, factors=factors, negatives=negatives)
    mesh, batch = SimpleNamespace(size=devices), {"images": images, "text": ids, "text_mask": mask}
    found = flops.step_flops(recipe, mesh, params, batch)
    scores = flops.count_flops(lambda v, t: model.score(None, v, t), jnp.zeros((b, n, d)), jnp.zeros((b, words, d)))
    assert found == {
        "images": 2 * b * n * c * d * (1 if frozen == "image" else 3),
        "texts": 2 * b * words * 9 * d * (1 if frozen == "text" else 3),
        "scores": 3 * scores / (devices if negatives == "local" else 1),
    }


HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%outer_condition (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%k, %limit), direction=LT
}

%outer_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %sent = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  %also = f32[2]{0} collective-permute(%y), channel_id=1
}

%fused_1 (p: s32[4]) -> s32[8] {
  ROOT %gathered.1 = s32[8]{0} all-gather(%p), channel_id=2, dimensions={0}
}

%fused_2 (p: s32[4]) -> s32[8] {
  ROOT %gathered.2 = s32[8]{0} all-gather(%p), channel_id=2, dimensions={0}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%start), condition=%outer_condition, body=%outer_body
  %one = s32[8]{0} fusion(%ids), kind=kCustom, calls=%fused_1
  %two = s32[8]{0} fusion(%ids), kind=kCustom, calls=%fused_2
  %reduced = (bf16[16]{0}, /*index=1*/f32[3,3]{1,0}) all-reduce(%g, %h), channel_id=3, to_apply=%add
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert list_collectives(HLO) == [
        {"kind": "all-gather", "count": 1, "bytes": 8 * 4},  # overlapped: the same in two computations
        {"kind": "all-reduce", "count": 1, "bytes": 16 * 2 + 9 * 4},
        {"kind": "collective-permute", "count": 12, "bytes": 6 * (8 * 4 * 4 + 2 * 4)},
    ]


def test_the_log_has_the_mfu_on_known_chips(capsys):
    assert chip_of(SimpleNamespace(device_kind="TPU v5e")) is CHIPS["TPU v5 lite"]
    assert chip_of(SimpleNamespace(device_kind="cpu")) is None
    lines = []
    writer = SimpleNamespace(write=lambda step, values: lines.append(values))
    config = SimpleNamespace(train=SimpleNamespace(log_every=1, batch_size=8))
    log = StepLog(config, lambda step: 0.1, 2, peak_seconds=1e-3)
    for done in (1, 2):
        log.add(done, {"loss": 1.0, "grad_norm": 1.0}, None)
    log.write(writer, tqdm(disable=True), everything=True)
    assert lines[-1]["mfu"] == pytest.approx(1.0 / lines[-1]["ms_per_step"])  # 1 ms at the peak
    assert "MFU" in capsys.readouterr().out
