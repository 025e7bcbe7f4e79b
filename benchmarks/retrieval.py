"""Times an index of many images: opening it, and the exact best ten of one query.

    python benchmarks/retrieval.py [--images=1000000] [--width=512] [--dir=DIR]

Random unit vectors, float32, written to DIR (a temporary folder by default; 2 GB). The first query compiles and reads
the file from disk, the later ones find it in the page cache. A sample of the vectors is checked by brute force. Last
line: JSON, seconds and the most memory the process had, in GB.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

PART = 50_000


def write(folder: Path, images: int, width: int) -> None:
    """An index of random vectors."""
    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(folder / "coarse.npy", "w+", np.float32, (images, width))
    for first in range(0, images, PART):
        part = rng.normal(size=(min(PART, images - first), width)).astype(np.float32)
        vectors[first : first + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    vectors.flush()
    (folder / "images.json").write_text(json.dumps([f"{k}.jpg" for k in range(images)]))
    facts = {"checkpoint": {}, "folder": str(folder), "images": images, "done": images, "skipped": []}
    facts["arrays"] = ["coarse"]
    (folder / "index.json").write_text(json.dumps(facts))


def timed(folder: Path, width: int) -> dict:
    """Opens and searches, in a process of its own."""
    from mefn_jax.retrieval.index import open_index, search_embeddings
    from mefn_jax.runtime.sharding import make_mesh

    mesh, times = make_mesh(), []
    start = time.perf_counter()
    index = open_index(folder)
    opened = time.perf_counter() - start
    rng = np.random.default_rng(1)
    for _ in range(4):
        query = rng.normal(size=width).astype(np.float32)
        query /= np.linalg.norm(query)
        start = time.perf_counter()
        positions, products = search_embeddings(index.embeddings, query, 10, mesh, index.readable)
        times.append(time.perf_counter() - start)
    sample = np.unique(np.concatenate([np.arange(0, len(index.embeddings), 97), positions]))
    brute = np.asarray(index.embeddings[sample]) @ query
    best = sample[np.argsort(-brute, kind="stable")[:10]]
    assert best.tolist() == positions.tolist(), "not what brute force finds"
    np.testing.assert_allclose(products, np.sort(brute)[::-1][:10], atol=1e-6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"open": opened, "first_query": times[0], "query": min(times[1:]), "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dir", default="")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=o.dir or None) as folder:
        write(Path(folder), o.images, o.width)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(timed, (Path(folder), o.width))
    print(f"{o.images:,} vectors of width {o.width}")
    for name, value in result.items():
        print(f"  {name:12} {value:8.3f} {'GB' if name == 'peak_gb' else 's'}")
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
