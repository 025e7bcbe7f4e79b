"""Times the scoring of all pairs, compared with the bare product of regions and words, and with SCAN as it is usually
written.

    python benchmarks/scoring.py [--sizes=200x1000,1000x5000] [--regions=36] [--width=1024] [--models=visita]
                                 [--skip_torch]
    python benchmarks/scoring.py --growth [--sizes=200x1000]
    python benchmarks/scoring.py --certified [--sizes=1000x5000] [--width=256]

Random unit vectors, float32; captions of 8 to 21 words (14.7 on average). Everything is timed in one process after a
first tile: the best of three runs (of one for PyTorch), without compilation.

    gemm        regions x words alone, a tile of images at a time, words without padding
    scan, ...   our matchers as evaluation uses them, from Features in memory to scores in memory, packing included;
                mate (not in the default list) with one layer, 512 wide
    torch_scan  SCAN t2i LSE in PyTorch, a loop over captions with attended vectors, structured like the authors' code

`--growth` doubles one quantity of the first size at a time, and prints the factors by which the time and the FLOPs of
the program's products grow. `--certified` ranks the first ten of the first size by certificate, for mate with related
random pairs of several numbers of directions, and prints the shares of the pairs that are scored and the time relative
to all pairs. The last line is JSON: seconds by size, both factors by quantity and matcher, or that table.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from configs import default
from mefn_jax.evaluation.evaluator import Evaluator, default_score_tile_mib
from mefn_jax.features import Features
from mefn_jax.matching.matcher import Matcher
from mefn_jax.matching.systems import MODELS
from mefn_jax.model import build_model
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.packing import pack
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import (
    PAIRS_BLOCK,
    TILE_CAPTIONS,
    TILE_IMAGES,
    TiledScores,
    compile_pair_scorer,
    compile_tile_scorer,
    count_tile_flops,
    even_slices,
)

SYSTEMS = {"scan": ("scan_t2i_lse", {}), "mefn": ("mefn", {}), "visita": ("visita", {}), "sfe": ("sfe", {})}
MATE = {"layers": 1, "mlp_width": 512}
DIRECTIONS = (8, 16, 32, 64)  # numbers of directions in which the items of `--certified` differ
NOISE = 0.6  # length of a caption's noise relative to its image's vector
SHORTEST, LONGEST, MEAN = 8, 21, 14.7
REPEATS = 3


def draw_lengths(rng, captions: int) -> np.ndarray:
    """Returns random caption lengths in words, int `(C,)`."""
    return np.clip(np.round(rng.normal(MEAN, 3.6, captions)), SHORTEST, LONGEST).astype(int)


def random_unit_vectors(rng, *shape) -> np.ndarray:
    """Returns random unit vectors, float32, of the given shape."""
    x = rng.standard_normal(shape, np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def random_features(images: int, captions: int, regions: int, width: int, times: int = 1) -> tuple[Features, Features]:
    """Returns random Features of images and of captions; `times` multiplies the lengths of the captions."""
    rng = np.random.default_rng(0)
    v = random_unit_vectors(rng, images, regions, width)
    mask = np.arange(times * LONGEST) < times * draw_lengths(rng, captions)[:, None]
    t = random_unit_vectors(rng, captions, times * LONGEST, width) * mask[..., None]
    ones = np.ones((images, regions), bool)
    image_features = Features(v, ones, random_unit_vectors(rng, images, width))
    return image_features, Features(t, mask, random_unit_vectors(rng, captions, width))


def make_matcher(name: str, **options) -> Matcher:
    """Returns the matcher of a system with its default options, except for `options`."""
    return MODELS[name].matcher(**default.get_config(f"model={name}").matcher.to_dict() | options)


def projections_of(matcher) -> tuple:
    """Returns the matcher's `project_regions` and `project_words`, functions `(params, vectors)`."""
    return tuple(functools.partial(matcher.apply, method=f"project_{kind}") for kind in ("regions", "words"))


def shortest_seconds(run, repeats=REPEATS) -> float:
    """Returns the duration of the fastest of several runs."""
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return min(durations)


def time_gemm(images: Features, texts: Features) -> float:
    """Returns the seconds of the bare product of regions and words."""
    words = jnp.asarray(texts.fragments[texts.mask]).T  # (D, words)
    tiles = [jnp.asarray(images.fragments[k : k + 40].reshape(-1, len(words))) for k in range(0, len(images.mask), 40)]
    product = jax.jit(jnp.matmul)

    def run():
        for tile in tiles:
            product(tile, words).block_until_ready()

    run()
    return shortest_seconds(run)


def time_matcher(matcher, images: Features, texts: Features) -> tuple[float, float]:
    """Returns the seconds of scoring all pairs, and those of the first tile, which includes compilation."""
    mesh, example = make_mesh(), jax.tree.map(lambda x: x[:1], (images, texts))
    params, mib = matcher.init(jax.random.key(0), *example), default_score_tile_mib(mesh)

    def method(name):
        return functools.partial(matcher.apply, method=name)

    if matcher.defines("score_pairs"):
        prepare, block = (method("prepare_images"), method("prepare_texts")), PAIRS_BLOCK
        program = compile_pair_scorer(prepare, method("score_pairs"), matcher.floats_per_pair, mesh, mib)
    else:
        with_pooled, block = matcher.uses_pooled_products, None
        program = compile_tile_scorer(method("score_tile"), with_pooled, mesh, mib, projections_of(matcher))
    scorer = functools.partial(program, params)
    rows, columns = even_slices(len(images.mask), TILE_IMAGES), even_slices(len(texts.mask), TILE_CAPTIONS)

    def run():
        scores = TiledScores(scorer, images, texts, mesh, block)  # new in each run, so that packing is timed
        for r in rows:
            for c in columns:
                scores(r, c)

    start = time.perf_counter()
    TiledScores(scorer, images, texts, mesh, block)(rows[0], columns[0])
    first = time.perf_counter() - start
    return shortest_seconds(run), first


def scoring_flops(matcher, images: Features, texts: Features) -> float:
    """Returns the FLOPs of the products that score all pairs of packed captions."""
    (*groups, pooled), num_groups, _ = pack(texts)
    params = matcher.init(jax.random.key(0), *jax.tree.map(lambda x: x[:1], (images, texts)))
    score_tile = functools.partial(matcher.apply, method="score_tile")
    groups = *(x[:num_groups] for x in groups), pooled
    with_pooled, project = matcher.uses_pooled_products, projections_of(matcher)
    return count_tile_flops(score_tile, with_pooled, params, images, groups, project)


def measure_growth(images: int, captions: int, regions: int, width: int) -> dict:
    """Prints and returns the factors by which time and FLOPs grow when one quantity is doubled."""
    sizes = {"images": images, "captions": captions, "regions": regions, "width": width, "times": 1}
    base_features, results = random_features(**sizes), {}
    for name, matcher in (("scan", make_matcher("scan_t2i_lse")), ("mefn", make_matcher("mefn"))):
        seconds, flops = time_matcher(matcher, *base_features)[0], scoring_flops(matcher, *base_features)
        for quantity in sizes:
            features = random_features(**sizes | {quantity: 2 * sizes[quantity]})
            factors = time_matcher(matcher, *features)[0] / seconds, scoring_flops(matcher, *features) / flops
            label = "words" if quantity == "times" else quantity
            print(
                f"{name}: twice the {label:9} {factors[0]:5.2f} x the time, {factors[1]:5.2f} x the arithmetic",
                flush=True,
            )
            results[f"{name} {label}"] = {"time": round(factors[0], 3), "arithmetic": round(factors[1], 3)}
    return results


def related_features(images: int, captions: int, width: int, directions: int) -> tuple[Features, Features]:
    """Returns Features with one fragment, whose pooled embeddings lie in a space of some directions; a caption's is
    that of its image and noise."""
    rng, caption_image = np.random.default_rng(0), np.arange(captions) * images // captions
    basis = np.linalg.qr(rng.standard_normal((width, directions)))[0].T.astype(np.float32)
    vectors = random_unit_vectors(rng, images, directions)
    texts = vectors[caption_image] + NOISE * random_unit_vectors(rng, captions, directions)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return tuple(Features((x @ basis)[:, None], np.ones((len(x), 1), bool), x @ basis) for x in (vectors, texts))


def measure_certificates(images: int, captions: int, width: int) -> list[dict]:
    """Prints and returns, by the number of directions, the spread of the cosines, the shares of all pairs that are
    scored for the first ten, and the time relative to all pairs; None where all are scored."""
    config = default.get_config("model=mate")
    config.matcher.update(MATE)
    model, table, caption_image = build_model(config, 100), [], np.arange(captions) * images // captions
    evaluator = Evaluator(model, None, config, make_mesh())
    for directions in DIRECTIONS:
        features = related_features(images, captions, width, directions)
        params = {
            "matcher": model.matcher.init(jax.random.key(0), *(jax.tree.map(lambda x: x[:1], f) for f in features))
        }
        params = {"matcher": params["matcher"]["params"]}
        spread = float(np.std(features[0].pooled @ features[1].pooled.T))
        evaluator.rank_first(params, *features, caption_image, 10)  # compiles
        first = evaluator.rank_first(params, *features, caption_image, 10)
        row = {"directions": directions, "spread": spread, "captions": None, "images": None, "time": None}
        if first is not None:
            scores = evaluator.scores(params, *features)
            rank(scores, caption_image, top_k=10)  # compiles
            whole = rank(scores, caption_image, top_k=10)
            assert np.array_equal(whole.top_images.positions, first[0].top_images.positions)
            assert np.array_equal(whole.top_captions.positions, first[0].top_captions.positions)
            row |= {"captions": first[1][0], "images": first[1][1], "time": first[0].seconds / whole.seconds}
            row |= {"seconds": first[0].seconds, "seconds of all": whole.seconds}
        table.append(row)
        print(row, flush=True)
    return table


def time_torch_scan(images: Features, texts: Features) -> float:
    """Returns the seconds of SCAN t2i LSE in PyTorch, structured like the authors' code: for each caption, the
    attention of its words over the regions of every image."""
    import torch

    v = torch.from_numpy(images.fragments)  # (I, N, D)

    def score(words):  # (M, D) -> (I,)
        query = words.expand(len(v), -1, -1)  # (I, M, D)
        attention = torch.nn.functional.leaky_relu(torch.bmm(v, query.transpose(1, 2)), 0.1)  # (I, N, M)
        attention = torch.nn.functional.normalize(attention, dim=2)
        attention = torch.softmax(9.0 * attention.transpose(1, 2), dim=2)  # (I, M, N)
        attended = torch.bmm(attention, v)  # (I, M, D)
        similarity = torch.nn.functional.cosine_similarity(query, attended, dim=2)
        return torch.logsumexp(6.0 * similarity, dim=1) / 6.0

    def run():
        with torch.no_grad():
            for words, mask in zip(texts.fragments, texts.mask, strict=True):
                score(torch.from_numpy(words[: mask.sum()]))

    with torch.no_grad():
        score(torch.from_numpy(texts.fragments[0]))
    return shortest_seconds(run, 1)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="200x1000,1000x5000", help="images x captions, separated by commas")
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--models", default=",".join(SYSTEMS), help="our matchers, separated by commas")
    parser.add_argument("--skip_torch", action="store_true")
    parser.add_argument("--certified", action="store_true", help="measure the certificate of the first ten results")
    parser.add_argument("--growth", action="store_true", help="measure what doubling each quantity costs")
    options = parser.parse_args()
    systems = SYSTEMS | {"mate": ("mate", MATE)}
    if unknown := set(options.models.split(",")) - systems.keys():
        parser.error(f"--models={','.join(sorted(unknown))}: give some of {', '.join(systems)}")
    if options.growth:
        first_size = map(int, options.sizes.split(",")[0].split("x"))
        print(json.dumps(measure_growth(*first_size, options.regions, options.width)))
        return
    if options.certified:
        first_size = map(int, options.sizes.split(",")[0].split("x"))
        print(json.dumps(measure_certificates(*first_size, options.width)))
        return
    with_torch = not options.skip_torch and importlib.util.find_spec("torch") is not None
    results = {}
    for size in options.sizes.split(","):
        images, texts = random_features(*map(int, size.split("x")), options.regions, options.width)
        times = {"gemm": time_gemm(images, texts)}
        print(f"{size}: {texts.mask.sum(1).mean():.1f} words, {options.regions} regions, D = {options.width}")
        print(f"  {'gemm':10} {times['gemm']:8.2f} s", flush=True)
        for name in options.models.split(","):
            system, matcher_options = systems[name]
            matcher = make_matcher(system, **matcher_options)
            times[name], first_tile = time_matcher(matcher, images, texts)
            ratio = times[name] / times["gemm"]
            print(f"  {name:10} {times[name]:8.2f} s  {ratio:5.2f} x gemm  (first tile {first_tile:.1f} s)", flush=True)
        if with_torch:
            times["torch_scan"] = time_torch_scan(images, texts)
            ratios = times["torch_scan"] / times["gemm"], times["torch_scan"] / times["scan"]
            print(
                f"  {'torch_scan':10} {times['torch_scan']:8.2f} s  {ratios[0]:5.2f} x gemm, {ratios[1]:.1f} x scan",
                flush=True,
            )
        results[size] = {name: round(seconds, 4) for name, seconds in times.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
