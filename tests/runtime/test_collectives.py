"""Collectives, read from the text of a compiled program."""

from mefn_jax.runtime.collectives import list_collectives

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


def test_list_collectives_counts_executions():
    assert list_collectives(HLO) == [
        {"kind": "all-gather", "count": 1, "bytes": 8 * 4},  # the same channel in two computations counts once
        {"kind": "all-reduce", "count": 1, "bytes": 16 * 2 + 9 * 4},
        {"kind": "collective-permute", "count": 12, "bytes": 6 * (8 * 4 * 4 + 2 * 4)},
    ]
