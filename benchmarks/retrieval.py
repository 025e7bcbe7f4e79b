"""Times an index of many images: opening it, and the exact ten best images of one query.

    python benchmarks/retrieval.py [--images=1000000] [--width=512] [--dir=DIR]

Random unit vectors, float32, are written to DIR (2 GB; by default a temporary folder). The first query compiles and
reads the file from disk; later queries find it in the page cache. Brute force checks a sample of the vectors. The last
line is JSON: seconds, and the peak memory of the process in GB.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

CHUNK = 50_000


def write_index(folder: Path, images: int, width: int) -> None:
    """Writes an index of random vectors."""
    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(folder / "embeddings.npy", "w+", np.float32, (images, width))
    for first in range(0, images, CHUNK):
        chunk = rng.normal(size=(min(CHUNK, images - first), width)).astype(np.float32)
        vectors[first : first + len(chunk)] = chunk / np.linalg.norm(chunk, axis=1, keepdims=True)
    vectors.flush()
    (folder / "images.json").write_text(json.dumps([f"{k}.jpg" for k in range(images)]))
    metadata = {"checkpoint": {}, "folder": str(folder), "images": images, "done": images, "skipped": []}
    metadata |= {"format": 2, "arrays": ["embeddings"]}
    (folder / "index.json").write_text(json.dumps(metadata))


def time_search(folder: Path, width: int) -> dict:
    """Opens the index and searches it four times. Returns seconds, and the peak memory in GB. Meant for a process of
    its own."""
    from mefn_jax.retrieval.index import open_index, search_embeddings
    from mefn_jax.runtime.sharding import make_mesh

    mesh, seconds = make_mesh(), []
    start = time.perf_counter()
    index = open_index(folder)
    open_seconds = time.perf_counter() - start
    rng = np.random.default_rng(1)
    for _ in range(4):
        query = rng.normal(size=width).astype(np.float32)
        query /= np.linalg.norm(query)
        start = time.perf_counter()
        positions, products = search_embeddings(index.embeddings, query, 10, mesh, index.readable)
        seconds.append(time.perf_counter() - start)
    sample = np.unique(np.concatenate([np.arange(0, len(index.embeddings), 97), positions]))
    brute_force = np.asarray(index.embeddings[sample]) @ query
    best = sample[np.argsort(-brute_force, kind="stable")[:10]]
    assert best.tolist() == positions.tolist(), "the results differ from brute force"
    np.testing.assert_allclose(products, np.sort(brute_force)[::-1][:10], atol=1e-6)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"open": open_seconds, "first_query": seconds[0], "query": min(seconds[1:]), "peak_gb": peak_gb}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dir", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir or None) as folder:
        write_index(Path(folder), options.images, options.width)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(time_search, (Path(folder), options.width))
    print(f"{options.images:,} vectors of width {options.width}")
    for name, value in result.items():
        print(f"  {name:12} {value:8.3f} {'GB' if name == 'peak_gb' else 's'}")
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
