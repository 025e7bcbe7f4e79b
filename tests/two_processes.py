"""One of two processes of `test_processes.py`: the batches that they read and put together, and the ranks that they
find, as process 0 sees them.

python two_processes.py PREPARED PORT INDEX OUT.npz
"""

import functools
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from mefn_jax.data import images, pipeline
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.features import make_features
from mefn_jax.matching.mefn import MEFN
from mefn_jax.runtime.multihost import broadcast_text
from mefn_jax.runtime.sharding import from_local_rows, local_rows, make_mesh
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TiledScores, compile_tile_scorer


def ranks(mesh) -> dict[str, np.ndarray]:
    """Ranks and the best five of every query among 24 images, two of them equal, and 40 captions, by MEFN."""
    rng = np.random.default_rng(0)

    def features(number, length):
        mask = np.arange(length) < rng.integers(1, length + 1, (number, 1))
        vectors, pooled = rng.normal(size=(number, length, 8)), rng.normal(size=(number, 8))
        return make_features(vectors.astype(np.float32), mask, pooled.astype(np.float32))

    images, texts = jax.tree.map(np.asarray, (features(24, 5), features(40, 7)))
    images = jax.tree.map(lambda x: np.concatenate([x[:-1], x[:1]]), images)
    module = MEFN()
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), images, texts))
    step = compile_tile_scorer(functools.partial(module.apply, method="score_tile"), mesh, 0.005)
    scores = TiledScores(functools.partial(step, params), images, texts, mesh)
    found = rank(scores, np.arange(40) % 24, best=5)
    i2t, t2i = found.counts[1]
    return {"i2t": i2t, "t2i": t2i, "captions": found.top_captions.positions, "images": found.top_images.positions}


def main(prepared, port, index, out):
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    text = broadcast_text(lambda: f"said by process {jax.process_index()}: é")
    assert text == "said by process 0: é", text
    dataset = Dataset(prepared)
    tokenizer = Tokenizer(broadcast_text(lambda: dataset.tokenizer_json), 8, True, "keep")
    mesh = make_mesh()
    assert (mesh.size, jax.process_count()) == (4, 2)
    batches = pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 8, 3, local_rows(mesh, 8))
    iterator = pipeline.iterate(batches, 5, 2, 0, lambda batch: from_local_rows(mesh, batch))
    found = {}
    for step in (5, 6):
        batch = next(iterator)
        assert all(len(x.addressable_shards) == 2 and x.shape[0] == 8 for x in batch.values())
        whole = multihost_utils.process_allgather(batch, tiled=True)
        found |= {f"{step} {name}": x for name, x in whole.items()}
    iterator.close()
    found |= ranks(mesh)
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
