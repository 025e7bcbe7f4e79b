"""What a tile of scores moves on a TPU, read off the program compiled for it: is a kernel of our own worth writing?

    python benchmarks/tile_traffic.py [--target=v5e:2x4] [--model=mefn,scan_t2i_lse]

`configs/flickr30k.py:image=vit_b16`, the step that `eval.py` runs, at XLA's default level. Of the computation that
scores a tile: the bytes that its operations read from and write to HBM and VMEM, the largest array in HBM, how often
they read or write a regions x words block, there and in all; and what HBM and the tile's products take at least. Last
line: JSON, one object a model.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from configs import flickr30k
from mefn_jax import aot
from mefn_jax.runtime.chips import chip_of
from mefn_jax.scoring.packing import GROUP_TEXTS

WIDTH = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
# What moves nothing, or is counted where it happens.
STILL = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "while", "conditional", "call"}


def computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation of a program's text, but for the insides of fusions, which stay in registers."""
    found, name = {}, None
    for line in program.splitlines():
        if begins := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*{$", line):
            name = begins[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name:
            found[name].append(line)
    return {name: lines for name, lines in found.items() if not name.startswith("fused")}


def arrays(shapes: str) -> list[tuple[str, int, bool]]:
    """Each array of a printed type: its shape, its bytes, and whether it lies in VMEM (memory space 1)."""
    return [
        (f"{kind}[{sizes}]", WIDTH[kind] * math.prod(int(n) for n in sizes.split(",") if n), "S(1)" in layout)
        for kind, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\]({[^}]*})?", shapes)
        if kind in WIDTH
    ]


def moved(lines: list[str]) -> list[tuple[str, int, bool]]:
    """All arrays that the operations of a computation read or write, once an operation."""
    known, found = {}, []
    for line in lines:
        parts = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)", line)
        if not parts:
            continue
        name, shapes, operation, inputs = parts.groups()
        known[name] = arrays(shapes)
        if operation not in STILL:
            read = [a for given in re.findall(r"%([\w.\-]+)", inputs) for a in known.get(given, [])]
            found += known[name][:1] if operation == "copy-start" else known[name] + read
    return found


def of_tile(name: str, target: str) -> dict:
    config = aot.resolve_config(flickr30k.get_config(f"model={name},image=vit_b16"), "")
    lowered, mesh, tile, _, work = aot.lower_scoring(config, target)
    program = lowered.compile().as_text()
    chip = chip_of(mesh.devices.flat[0])
    block = rf"\w+\[{tile['images']},{tile['regions']},({tile['words']}|{tile['words'] + GROUP_TEXTS})\]"

    def blocks(arrays):
        return [shape for shape, *_ in arrays if re.fullmatch(block, shape)]

    # The computation with most of these; MEFN has two, one of which runs.
    found = max((moved(lines) for lines in computations(program).values()), key=lambda arrays: len(blocks(arrays)))
    outside = [a for a in found if not a[2]]
    work = sum(work.values()) / mesh.size / tile["tiles"]
    hbm = sum(size for _, size, _ in outside)
    return {
        "model": name,
        "tile": tile,
        "blocks": len(blocks(found)),
        "blocks_in_hbm": len(blocks(outside)),
        "hbm_bytes": hbm,
        "largest_in_hbm": max(outside, key=lambda a: a[1])[0],
        "vmem_bytes": sum(size for _, size, inside in found if inside),
        "flops": work,
        "least_us": {"hbm": 1e6 * hbm / chip.bandwidth, "arithmetic": 1e6 * work / chip.flops},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e:2x4")
    parser.add_argument("--model", default="mefn,scan_t2i_lse")
    o = parser.parse_args()
    rows = [of_tile(name, o.target) for name in o.model.split(",")]
    for r in rows:
        t, least = r["tile"], r["least_us"]
        print(
            f"{r['model']}: a tile of {t['images']} images by {t['words']} words moves {r['hbm_bytes'] / 1e6:.1f} MB "
            f"through HBM ({least['hbm']:.1f} us; largest {r['largest_in_hbm']}), "
            f"{r['vmem_bytes'] / 1e6:.0f} MB in VMEM; {r['flops'] / 1e9:.2f} GFLOP ({least['arithmetic']:.1f} us). "
            f"Regions x words blocks are read or written {r['blocks']} times, {r['blocks_in_hbm']} of these in HBM"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
