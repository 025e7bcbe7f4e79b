"""Times the scoring of all pairs, beside the bare product of regions and words, and SCAN as it is usually written.

    python benchmarks/scoring.py [--sizes=200x1000,1000x5000] [--regions=36] [--width=1024] [--skip_torch]
    python benchmarks/scoring.py --growth [--sizes=200x1000]

Random unit vectors, float32, captions of 8 to 21 words (14.7 on average). All are timed in one run, the best of three
(PyTorch once), without compilation and after a first tile:

    gemm        regions x words alone, a tile of images at a time, words without padding
    scan, mefn  our matchers as evaluation uses them, from Features in memory to scores in memory, packing included
    torch_scan  SCAN t2i LSE in PyTorch, a loop over captions with attended vectors, as its authors structure it

`--growth` doubles one thing at a time, of the first size, and says by how much time grows, and the arithmetic of the
products in the program. Last line: JSON, seconds by size, or for each thing and matcher both factors.
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from mefn_jax.evaluation.evaluator import default_score_tile_mib
from mefn_jax.features import Features
from mefn_jax.matching.mefn import MEFN
from mefn_jax.matching.scan import SCAN
from mefn_jax.model import MODELS
from mefn_jax.runtime.flops import count_flops
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.layouts import region_block, to_packed
from mefn_jax.scoring.packing import pack
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, TiledScores, compile_tile_scorer, even_slices

SHORTEST, LONGEST, MEAN = 8, 21, 14.7
REPEATS = 3


def lengths(rng, captions: int) -> np.ndarray:
    return np.clip(np.round(rng.normal(MEAN, 3.6, captions)), SHORTEST, LONGEST).astype(int)


def unit(rng, *shape) -> np.ndarray:
    x = rng.standard_normal(shape, np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def drawn(images: int, captions: int, regions: int, width: int, times: int = 1) -> tuple[Features, Features]:
    """Random Features of images and captions, these as many times as long."""
    rng = np.random.default_rng(0)
    v = unit(rng, images, regions, width)
    mask = np.arange(times * LONGEST) < times * lengths(rng, captions)[:, None]
    t = unit(rng, captions, times * LONGEST, width) * mask[..., None]
    ones = np.ones((images, regions), bool)
    return Features(v, ones, unit(rng, images, width)), Features(t, mask, unit(rng, captions, width))


def best(run, repeats=REPEATS) -> float:
    """The shortest of several runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm(images: Features, texts: Features) -> float:
    words = jnp.asarray(texts.fragments[texts.mask]).T  # (D, words)
    tiles = [jnp.asarray(images.fragments[k : k + 40].reshape(-1, len(words))) for k in range(0, len(images.mask), 40)]
    product = jax.jit(jnp.matmul)

    def run():
        for tile in tiles:
            product(tile, words).block_until_ready()

    run()
    return best(run)


def ours(matcher, images: Features, texts: Features) -> tuple[float, float]:
    """Seconds of scoring, and of compiling."""
    mesh, some = make_mesh(), jax.tree.map(lambda x: x[:1], (images, texts))
    params = matcher.init(jax.random.key(0), *some)

    def tile(params, regions, words):
        return matcher.apply(params, regions, words, method="score_tile")

    step = functools.partial(compile_tile_scorer(tile, mesh, default_score_tile_mib(mesh)), params)
    rows, columns = even_slices(len(images.mask), TILE_IMAGES), even_slices(len(texts.mask), TILE_CAPTIONS)

    def run():
        scores = TiledScores(step, images, texts, mesh)  # new, so that packing is timed
        for r in rows:
            for c in columns:
                scores(r, c)

    start = time.perf_counter()
    TiledScores(step, images, texts, mesh)(rows[0], columns[0])
    first = time.perf_counter() - start
    return best(run), first


def arithmetic(matcher, images: Features, texts: Features) -> float:
    """FLOPs of the products that score all pairs of packed captions."""
    groups, number, _ = pack(texts)
    params = matcher.init(jax.random.key(0), *jax.tree.map(lambda x: x[:1], (images, texts)))
    words = jax.tree.map(lambda x: x[0], to_packed(*(jnp.asarray(x[:1]) for x in groups)))
    tile = functools.partial(matcher.apply, params, method="score_tile")
    return number * count_flops(tile, jax.eval_shape(region_block, images), words)


def growth(images: int, captions: int, regions: int, width: int) -> dict:
    """By how much time and arithmetic grow when one thing is doubled."""
    sizes = {"images": images, "captions": captions, "regions": regions, "width": width, "times": 1}
    base, results = drawn(**sizes), {}
    for name, matcher in (("scan", SCAN(**MODELS["scan_t2i_lse"][1])), ("mefn", MEFN())):
        seconds, work = ours(matcher, *base)[0], arithmetic(matcher, *base)
        for what in sizes:
            both = drawn(**sizes | {what: 2 * sizes[what]})
            factors = ours(matcher, *both)[0] / seconds, arithmetic(matcher, *both) / work
            label = "words" if what == "times" else what
            print(
                f"{name}: twice the {label:9} {factors[0]:5.2f} x the time, {factors[1]:5.2f} x the arithmetic",
                flush=True,
            )
            results[f"{name} {label}"] = {"time": round(factors[0], 3), "arithmetic": round(factors[1], 3)}
    return results


def torch_scan(images: Features, texts: Features) -> float:
    """SCAN t2i LSE, PEERS' structure: for each caption, attention of its words over the regions of every image."""
    import torch

    v = torch.from_numpy(images.fragments)  # (I, N, D)

    def score(words):  # (M, D) -> (I,)
        query = words.expand(len(v), -1, -1)  # (I, M, D)
        attention = torch.nn.functional.leaky_relu(torch.bmm(v, query.transpose(1, 2)), 0.1)  # (I, N, M)
        attention = torch.nn.functional.normalize(attention, dim=2)
        attention = torch.softmax(9.0 * attention.transpose(1, 2), dim=2)  # (I, M, N)
        attended = torch.bmm(attention, v)  # (I, M, D)
        r = torch.nn.functional.cosine_similarity(query, attended, dim=2)
        return torch.logsumexp(6.0 * r, dim=1) / 6.0

    def run():
        with torch.no_grad():
            for words, mask in zip(texts.fragments, texts.mask, strict=True):
                score(torch.from_numpy(words[: mask.sum()]))

    with torch.no_grad():
        score(torch.from_numpy(texts.fragments[0]))
    return best(run, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="200x1000,1000x5000", help="images x captions, separated by commas")
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--skip_torch", action="store_true")
    parser.add_argument("--growth", action="store_true", help="what doubling each thing costs")
    o = parser.parse_args()
    if o.growth:
        print(json.dumps(growth(*map(int, o.sizes.split(",")[0].split("x")), o.regions, o.width)))
        return
    with_torch = not o.skip_torch and importlib.util.find_spec("torch") is not None
    results = {}
    for size in o.sizes.split(","):
        images, texts = drawn(*map(int, size.split("x")), o.regions, o.width)
        times = {"gemm": gemm(images, texts)}
        print(f"{size}: {texts.mask.sum(1).mean():.1f} words, {o.regions} regions, D = {o.width}")
        print(f"  {'gemm':10} {times['gemm']:8.2f} s", flush=True)
        for name, matcher in (("scan", SCAN(**MODELS["scan_t2i_lse"][1])), ("mefn", MEFN())):
            times[name], first = ours(matcher, images, texts)
            ratio = times[name] / times["gemm"]
            print(f"  {name:10} {times[name]:8.2f} s  {ratio:5.2f} x gemm  (first tile {first:.1f} s)", flush=True)
        if with_torch:
            times["torch_scan"] = torch_scan(images, texts)
            by = times["torch_scan"] / times["gemm"], times["torch_scan"] / times["scan"]
            print(
                f"  {'torch_scan':10} {times['torch_scan']:8.2f} s  {by[0]:5.2f} x gemm, {by[1]:.1f} x scan", flush=True
            )
        results[size] = {name: round(seconds, 4) for name, seconds in times.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
