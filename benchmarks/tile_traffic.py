"""Measures the memory traffic of a score tile on a TPU, read from the program compiled for it: would a custom kernel
pay off?

    python benchmarks/tile_traffic.py [--target=v5e:2x4] [--model=mefn,scan_t2i_lse]

Compiles the scoring step, as `eval.py compile` does, for `configs/flickr30k.py:image=vit_b16`, at XLA's default level.
For the computation that scores a tile, it reports: the bytes that its operations read from and write to HBM and VMEM;
the largest array in HBM; how often a regions x words block is read or written, in HBM and in total; and the least time
that HBM and the tile's products take. The last line is JSON, one object for each model.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from configs import flickr30k
from mefn_jax import aot
from mefn_jax.runtime.chips import chip_of
from mefn_jax.scoring.packing import GROUP_TEXTS

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
# Operations that move nothing, or whose traffic is counted elsewhere.
UNCOUNTED = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "copy-done",
    "while",
    "conditional",
    "call",
}


def list_computations(program: str) -> dict[str, list[str]]:
    """Returns the lines of each computation of a program's text, without the inside of fusions, whose values stay in
    registers."""
    lines_by_name, name = {}, None
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*{$", line):
            name = header[1]
            lines_by_name[name] = []
        elif line.startswith("}"):
            name = None
        elif name:
            lines_by_name[name].append(line)
    return {name: lines for name, lines in lines_by_name.items() if not name.startswith("fused")}


def parse_arrays(shapes: str) -> list[tuple[str, int, bool]]:
    """Returns the arrays of a printed HLO type: shape, bytes, and whether the array lies in VMEM (memory space 1)."""
    return [
        (f"{kind}[{sizes}]", BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n), "S(1)" in layout)
        for kind, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\]({[^}]*})?", shapes)
        if kind in BYTES
    ]


def list_moved_arrays(lines: list[str]) -> list[tuple[str, int, bool]]:
    """Returns all arrays that the operations of a computation read or write, once for each operation."""
    results, moved_arrays = {}, []
    for line in lines:
        parts = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)", line)
        if not parts:
            continue
        name, shapes, operation, inputs = parts.groups()
        results[name] = parse_arrays(shapes)
        if operation not in UNCOUNTED:
            inputs_read = [
                array for operand in re.findall(r"%([\w.\-]+)", inputs) for array in results.get(operand, [])
            ]
            moved_arrays += results[name][:1] if operation == "copy-start" else results[name] + inputs_read
    return moved_arrays


def measure_tile(name: str, target: str) -> dict:
    """Returns the traffic of a score tile of the model `name`, compiled for `target`."""
    config = aot.resolve_config(flickr30k.get_config(f"model={name},image=vit_b16"))
    lowered, mesh, tile, _, flops = aot.lower_scoring(config, target)
    program = lowered.compile().as_text()
    chip = chip_of(mesh.devices.flat[0])
    block_pattern = rf"\w+\[{tile['images']},{tile['regions']},({tile['words']}|{tile['words'] + GROUP_TEXTS})\]"

    def list_blocks(arrays):
        return [shape for shape, *_ in arrays if re.fullmatch(block_pattern, shape)]

    # The computation with the most blocks scores a tile; MEFN has two of them, and only one runs.
    tile_arrays = max(
        (list_moved_arrays(lines) for lines in list_computations(program).values()),
        key=lambda arrays: len(list_blocks(arrays)),
    )
    hbm_arrays = [array for array in tile_arrays if not array[2]]
    flops = sum(flops.values()) / mesh.size / tile["tiles"]
    hbm = sum(size for _, size, _ in hbm_arrays)
    return {
        "model": name,
        "tile": tile,
        "blocks": len(list_blocks(tile_arrays)),
        "blocks_in_hbm": len(list_blocks(hbm_arrays)),
        "hbm_bytes": hbm,
        "largest_in_hbm": max(hbm_arrays, key=lambda array: array[1])[0],
        "vmem_bytes": sum(size for _, size, in_vmem in tile_arrays if in_vmem),
        "flops": flops,
        "least_us": {"hbm": 1e6 * hbm / chip.bandwidth, "arithmetic": 1e6 * flops / chip.flops},
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e:2x4")
    parser.add_argument("--model", default="mefn,scan_t2i_lse")
    options = parser.parse_args()
    rows = [measure_tile(name, options.target) for name in options.model.split(",")]
    for row in rows:
        tile, least_us = row["tile"], row["least_us"]
        print(
            f"{row['model']}: a tile of {tile['images']} images by {tile['words']} words moves "
            f"{row['hbm_bytes'] / 1e6:.1f} MB through HBM ({least_us['hbm']:.1f} us; largest "
            f"{row['largest_in_hbm']}), {row['vmem_bytes'] / 1e6:.0f} MB in VMEM; "
            f"{row['flops'] / 1e9:.2f} GFLOP ({least_us['arithmetic']:.1f} us). "
            f"Regions x words blocks are read or written {row['blocks']} times, {row['blocks_in_hbm']} of these in HBM"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
