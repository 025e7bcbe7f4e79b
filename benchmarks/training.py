"""Times scores and their gradients in training, compared with the bare product of regions and words, and with SCAN as
it is usually written.

    python benchmarks/training.py [--widths=256,1024] [--batch=128] [--regions=36] [--words=16] [--tile_mib=0.5]
                                  [--skip_torch]

One batch of given Features, random unit vectors, with captions of 4 to 16 words (11 on average; the product is that of
the padded words). `forward` is the triplet loss summed over all pairs, `train` the loss and its gradients with respect
to the Features and the matcher's parameters. The best of several runs, in turns with the product, without compilation.

    gemm            regions x words, one product
    mefn, ...       our matchers in chunks and tiles, as training uses them (docs/method.md, section 12)
    mefn shared lambda  MEFN whose evidence has the inverse temperature of the attention
    mefn_no_entropy     MEFN without entropy
    torch_scan      SCAN t2i LSE in PyTorch, a loop over captions with attended vectors, like the authors' code

The last line is JSON: seconds by width and matcher; a row's `gemm` is the product of the same turns.
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

from benchmarks.scoring import make_matcher, random_unit_vectors
from mefn_jax import losses
from mefn_jax.features import Features
from mefn_jax.model import Model
from mefn_jax.scoring.chunks import make_block_scorer

MARGIN, REPEATS, CHUNK_MIB = 0.2, 20, 64.0
SYSTEMS = {
    "mefn": ("mefn", {}),
    "mefn_paper": ("mefn_paper", {}),
    "mefn_no_evidence": ("mefn_no_evidence", {}),
    "mefn shared lambda": ("mefn", {"init_evidence_lambda": 0.0}),
    "mefn_no_entropy": ("mefn_no_entropy", {}),
    "mefn_no_global": ("mefn_no_global", {}),
    "scan_t2i_lse": ("scan_t2i_lse", {}),
    "scan_i2t_lse": ("scan_i2t_lse", {}),
    "visita": ("visita", {}),
    "sfe": ("sfe", {}),
    "vsepp": ("vsepp", {}),
    "mate": ("mate", {}),
    "mate 1 layer": ("mate", {"layers": 1, "mlp_width": 512}),
}


def random_features(batch: int, regions: int, words: int, width: int) -> tuple[Features, Features]:
    """Returns random Features of a batch of images and captions."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(rng.normal(11, 3, batch)), 4, words)
    mask = np.arange(words) < lengths[:, None]
    v, t = random_unit_vectors(rng, batch, regions, width), random_unit_vectors(rng, batch, words, width)
    pooled = (random_unit_vectors(rng, batch, width) for _ in range(2))
    images = Features(v, np.ones((batch, regions), bool), next(pooled))
    return jax.tree.map(jnp.asarray, (images, Features(t * mask[..., None], mask, next(pooled))))


def time_in_turns(runs: dict, images: Features, texts: Features) -> dict[str, float]:
    """Returns the seconds of the fastest of several runs, after a first one, of `gemm`, the bare product of regions and
    words, and of the functions `runs`. They take turns, so that other work on the machine affects all alike."""
    v, t = (x.fragments.reshape(-1, x.fragments.shape[-1]) for x in (images, texts))
    product, transposed = jax.jit(jnp.matmul), jnp.array(t.T)
    runs = {"gemm": lambda: product(v, transposed)} | runs
    seconds = {name: [] for name in runs}
    for _ in range(1 + REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: min(durations[1:]) for name, durations in seconds.items()}


def triplet_sum(scores):
    """Returns the sum of the hinges of all pairs off the diagonal."""
    positives, negatives = jnp.diagonal(scores), 1 - jnp.eye(len(scores))
    costs = jax.nn.relu(MARGIN + scores - positives[:, None]) + jax.nn.relu(MARGIN + scores - positives)
    return jnp.sum(costs * negatives)


def time_matcher(name: str, options: dict, images: Features, texts: Features, tile_mib: float) -> dict:
    """Returns the seconds of `gemm`, of the loss, and of the loss with its gradients, and the MiB of temporary
    arrays."""
    matcher = make_matcher(name, **options)
    model = Model(image=None, text=None, matcher=matcher, hubness=None, loss={})
    variables = matcher.init(jax.random.key(0), *jax.tree.map(lambda x: x[:1], (images, texts)))
    params, score = {"matcher": variables.get("params", {})}, make_block_scorer(model, CHUNK_MIB, tile_mib)
    constants = {"constants": {"matcher": variables.get("constants", {})}}

    def loss(params, v, g, t, h):
        features = images.replace(fragments=v, pooled=g), texts.replace(fragments=t, pooled=h)
        scores = score(params | constants, *features)
        if not matcher.defines("fused_similarity"):
            return triplet_sum(scores)
        fused_similarity = functools.partial(model.fused_similarity, params)
        return triplet_sum(scores) + losses.hect(scores, jnp.eye(len(scores), dtype=bool), (g, h), fused_similarity)

    inputs = params, images.fragments, images.pooled, texts.fragments, texts.pooled
    train = jax.jit(jax.value_and_grad(loss, range(5))).lower(*inputs).compile()
    forward = jax.jit(loss)
    seconds = time_in_turns({"forward": lambda: forward(*inputs), "train": lambda: train(*inputs)}, images, texts)
    return seconds | {"mib": train.memory_analysis().temp_size_in_bytes / 2**20}


def time_torch_scan(images: Features, texts: Features) -> dict:
    """Returns the seconds of `gemm` and of SCAN t2i LSE in PyTorch, forward and with the gradients of the vectors: for
    each caption, the attention of its words over the regions of every image."""
    import torch

    v, t = (torch.from_numpy(np.array(x.fragments)).requires_grad_() for x in (images, texts))
    lengths = np.asarray(texts.mask).sum(1)

    def score(words):  # (M, D) -> (B,)
        query = words.expand(len(v), -1, -1)  # (B, M, D)
        attention = torch.nn.functional.leaky_relu(torch.bmm(v, query.transpose(1, 2)), 0.1)  # (B, N, M)
        attention = torch.nn.functional.normalize(attention, dim=2)
        attention = torch.softmax(9.0 * attention.transpose(1, 2), dim=2)  # (B, M, N)
        similarity = torch.nn.functional.cosine_similarity(query, torch.bmm(attention, v), dim=2)
        return torch.logsumexp(6.0 * similarity, dim=1) / 6.0

    def loss():
        scores = torch.stack([score(words[:length]) for words, length in zip(t, lengths, strict=True)], 1)
        positives, negatives = scores.diagonal(), 1 - torch.eye(len(scores))
        costs = torch.relu(MARGIN + scores - positives[:, None]) + torch.relu(MARGIN + scores - positives)
        return torch.sum(costs * negatives)

    def forward():
        with torch.no_grad():
            loss()

    return time_in_turns({"forward": forward, "train": lambda: loss().backward()}, images, texts)


def print_row(name: str, row: dict) -> None:
    """Prints a row of the table, with the ratios to the product of the same turns."""
    cells = [f"  {part} {1000 * row[part]:7.1f} ms {row[part] / row['gemm']:5.1f} x" for part in ("forward", "train")]
    memory = f"  {row['mib']:5.0f} MiB" if "mib" in row else ""
    print(f"  {name:15}  gemm {1000 * row['gemm']:6.1f} ms{''.join(cells)}{memory}", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="256,1024", help="dimensions D, separated by commas")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=16, help="words of the longest caption")
    parser.add_argument("--tile_mib", type=float, default=0.5, help="train.score_tile_mib")
    parser.add_argument("--skip_torch", action="store_true")
    options = parser.parse_args()
    with_torch, results = not options.skip_torch and importlib.util.find_spec("torch") is not None, {}
    for width in map(int, options.widths.split(",")):
        images, texts = random_features(options.batch, options.regions, options.words, width)
        print(f"batch {options.batch}, {options.regions} regions, {options.words} words, D = {width}")
        rows = {}
        for name, (system, changes) in SYSTEMS.items():
            rows[name] = time_matcher(system, changes, images, texts, options.tile_mib)
            print_row(name, rows[name])
        if with_torch:
            rows["torch_scan"] = time_torch_scan(images, texts)
            print_row("torch_scan", rows["torch_scan"])
        rounded = {name: {key: round(value, 6) for key, value in row.items()} for name, row in rows.items()}
        results[f"D{width}"] = {"gemm": min(row["gemm"] for row in rounded.values())} | rounded
    print(json.dumps(results))


if __name__ == "__main__":
    main()
