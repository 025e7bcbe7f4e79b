"""One of the two processes of `end_to_end/test_multihost.py`: writes the global batches that both read, and the ranks
that both compute, as process 0 sees them.

    python two_processes.py PREPARED PORT INDEX OUT.npz
"""

import functools
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from random_features import length_mask, random_features

from mefn_jax.data import images, pipeline
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.matching.mefn import MEFN
from mefn_jax.runtime.multihost import broadcast_text
from mefn_jax.runtime.sharding import from_local_rows, local_rows, make_mesh
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TiledScores, compile_tile_scorer


def ranks(mesh) -> dict[str, np.ndarray]:
    """Returns the ranks and the five best results of every query, by MEFN, for 24 images, two of them equal, and 40
    captions."""
    images = random_features(0, 24, 5, 8, length_mask(1, 24, 5))
    texts = random_features(2, 40, 7, 8, length_mask(3, 40, 7))
    images = jax.tree.map(lambda x: np.concatenate([x[:-1], x[:1]]), images)
    module = MEFN()
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), images, texts))
    tile = functools.partial(module.apply, method="score_tile")
    score_tile = compile_tile_scorer(tile, module.uses_pooled_products, mesh, 0.005)
    scores = TiledScores(functools.partial(score_tile, params), images, texts, mesh)
    result = rank(scores, np.arange(40) % 24, top_k=5)
    i2t, t2i = result.counts[1]
    return {"i2t": i2t, "t2i": t2i, "captions": result.top_captions.positions, "images": result.top_images.positions}


def main(prepared, port, index, out):
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    text = broadcast_text(lambda: f"written by process {jax.process_index()}: é")
    assert text == "written by process 0: é", text
    dataset = Dataset(prepared)
    tokenizer = Tokenizer(broadcast_text(lambda: dataset.tokenizer_json), 8, True, "keep")
    mesh = make_mesh()
    assert (mesh.size, jax.process_count()) == (4, 2)
    batches = pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 8, 3, local_rows(mesh, 8))
    iterator = pipeline.iterate(batches, 5, 2, 0, lambda batch: from_local_rows(mesh, batch))
    arrays = {}
    for step in (5, 6):
        batch = next(iterator)
        assert all(len(x.addressable_shards) == 2 and x.shape[0] == 8 for x in batch.values())
        global_batch = multihost_utils.process_allgather(batch, tiled=True)
        arrays |= {f"{step} {name}": x for name, x in global_batch.items()}
    iterator.close()
    arrays |= ranks(mesh)
    if jax.process_index() == 0:
        np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
