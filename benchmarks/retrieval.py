"""Times searches of an index of many images, with and without the matcher, and the memory that they take.

    python benchmarks/retrieval.py [--images=1000000] [--width=128] [--regions=8] [--dir=DIR]

Random images that lie in topics, as those of an encoder do, are written to DIR in an index's own format (5 GB; by
default a temporary folder). Each column is a process of its own, which finds nothing of the index in the page cache:
`embedding` finds the ten nearest images, `matcher` has MEFN score the 1,000 nearest, as `eval.py search` does. The
first query compiles and reads the disk. Brute force checks a sample of the embeddings. Memory is the largest that was
seen: of the process, and the part of it that is pages of files, mostly the index's, which the system takes back when it
needs them. The last line is JSON.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

CHUNK, TOPICS, NOISE = 20_000, 1_000, 0.7
BATCH = 64  # queries at once
WORDS, MAX_WORDS = 12, 32


def make_unit(x: np.ndarray) -> np.ndarray:
    """Returns vectors `(..., D)` scaled to unit length, float32."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def write_index(folder: Path, images: int, width: int, regions: int) -> None:
    """Writes an index of random images: the pooled embedding is that of a topic and noise, a region's that of the image
    and noise."""
    from mefn_jax.retrieval.index_files import ENCODED, GrowingIndex, encode_names

    rng = np.random.default_rng(0)
    topics = make_unit(rng.standard_normal((TOPICS, width)))
    growing = GrowingIndex(folder, [f"{k // 1000:04}/{k:07}.jpg" for k in range(images)], {}, str(folder))
    (folder / "images.json").write_bytes(encode_names(growing.names))
    for first in range(0, images, CHUNK):
        rows = np.arange(first, min(first + CHUNK, images))
        noise = make_unit(rng.standard_normal((len(rows), width), np.float32))
        pooled = make_unit(topics[rng.integers(0, TOPICS, len(rows))] + NOISE * noise)
        noise = make_unit(rng.standard_normal((len(rows), regions, width), np.float32))
        fragments = make_unit(pooled[:, None] + noise)
        arrays = {"embeddings": pooled, "pooled": pooled, "fragments": fragments}
        growing.write_rows(rows, arrays | {"mask": np.ones((len(rows), regions), bool)})
    growing.states[:, 2] = ENCODED
    growing.save()


def drop_from_page_cache(folder: Path) -> None:
    """Has the system forget the content of files, so that the next reader reads the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class MemoryWatch(threading.Thread):
    """Notes the largest memory of this process, in GB: in all, pages of files, and the rest. Zeros without /proc."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self._ended = {"memory_gb": 0.0, "of files_gb": 0.0, "other_gb": 0.0}, threading.Event()

    def run(self) -> None:
        """Looks again and again, until `stop`."""
        while not self._ended.wait(0.02):
            self._look()

    def stop(self) -> dict:
        """Returns the largest values."""
        self._ended.set()
        self.join()
        self._look()
        return self.largest

    def _look(self) -> None:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        values = {
            name: int(value.split()[0]) * 1024 / 1e9 for name, value in (x.split(":") for x in lines if " kB" in x)
        }
        for key, name in zip(self.largest, ("VmRSS", "RssFile", "RssAnon"), strict=True):
            self.largest[key] = max(self.largest[key], values.get(name, 0.0))


def make_searcher(index, width: int):
    """Returns a Searcher of an MEFN without encoders: queries are random Features."""
    import jax

    from configs import default
    from mefn_jax.evaluation.evaluator import Evaluator
    from mefn_jax.model import build_model
    from mefn_jax.retrieval.searcher import Searcher
    from mefn_jax.runtime.sharding import make_mesh

    config = default.get_config("model=mefn")
    config.embed_dim, config.matcher.hub_vectors = width, 0
    model = build_model(config, 100)
    one = jax.tree.map(lambda x: x[:1], make_queries(index, 1, 0))
    params = {"matcher": model.matcher.init(jax.random.key(0), one, one)["params"]}
    return Searcher(Evaluator(model, None, config, make_mesh()), params, index)


def make_queries(index, number: int, seed: int):
    """Returns the Features of random captions, each near an image."""
    from mefn_jax.features import Features

    rng = np.random.default_rng(seed)
    near = np.array(index.embeddings[np.sort(rng.choice(len(index.names), number))])
    noise = make_unit(rng.standard_normal((number, MAX_WORDS, near.shape[1])))
    mask = np.broadcast_to(np.arange(MAX_WORDS) < WORDS, (number, MAX_WORDS))
    pooled = make_unit(near + NOISE * noise[:, 0])
    return Features(make_unit(near[:, None] + noise) * mask[..., None], mask, pooled)


def time_search(folder: Path, with_matcher: bool) -> dict:
    """Opens the index and searches it. Returns seconds and GB. Meant for a process of its own."""
    from mefn_jax.retrieval.coarse import CoarseSearch
    from mefn_jax.retrieval.index import open_index
    from mefn_jax.runtime.sharding import make_mesh

    watch = MemoryWatch()
    watch.start()
    start = time.perf_counter()
    index = open_index(folder)
    result = {"open": time.perf_counter() - start}
    if with_matcher:
        searcher = make_searcher(index, index.embeddings.shape[1])
        search = lambda texts: searcher.search(texts, 10)  # noqa: E731
    else:
        coarse = CoarseSearch(index.embeddings, make_mesh(), index.readable)
        search = lambda texts: coarse.find(texts.pooled, 10)  # noqa: E731

    def measure(number, seed):
        texts, start = make_queries(index, number, seed), time.perf_counter()
        found = search(texts)
        return time.perf_counter() - start, texts, found

    result["first query"] = measure(1, 1)[0]
    result["second query"] = measure(1, 2)[0]
    seconds = [measure(1, seed) for seed in range(3, 8)]
    result["later query"] = float(np.median([x[0] for x in seconds]))
    measure(BATCH, 8)  # compiles
    result[f"one of {BATCH} at once"] = measure(BATCH, 9)[0] / BATCH
    if not with_matcher:
        check_by_brute_force(index, seconds[-1][1].pooled[0], *(x[0] for x in seconds[-1][2]))
    return result | watch.stop()


def check_by_brute_force(index, query: np.ndarray, positions: np.ndarray, products: np.ndarray) -> None:
    """Raises AssertionError unless the found images are the best of a sample that includes them."""
    sample = np.unique(np.concatenate([np.arange(0, len(index.embeddings), 97), positions]))
    brute_force = np.asarray(index.embeddings[sample]) @ query
    best = sample[np.argsort(-brute_force, kind="stable")[:10]]
    assert best.tolist() == positions.tolist(), "the results differ from brute force"
    np.testing.assert_allclose(products, np.sort(brute_force)[::-1][:10], atol=1e-6)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--regions", type=int, default=8)
    parser.add_argument("--dir", default="")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=options.dir or None) as folder:
        write_index(Path(folder), options.images, options.width, options.regions)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e9
        for name, with_matcher in (("embedding", False), ("matcher", True)):
            drop_from_page_cache(Path(folder))
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                results[name] = pool.submit(time_search, Path(folder), with_matcher).result()
    print(f"{options.images:,} images, {options.regions} regions of width {options.width}: {size:.2f} GB")
    print(f"{'':20}" + "".join(f"{name:>12}" for name in results))
    for row in results["matcher"]:
        unit = "GB" if row.endswith("_gb") else "s"
        print(f"{row.removesuffix('_gb'):20}" + "".join(f"{x[row]:12.3f}" for x in results.values()) + f" {unit}")
    print(json.dumps({name: {row: round(x, 4) for row, x in result.items()} for name, result in results.items()}))


if __name__ == "__main__":
    main()
