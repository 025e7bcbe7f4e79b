"""One of two processes of `test_processes.py`: the batches that they read and put together, as process 0 sees them.

python two_processes.py PREPARED PORT INDEX OUT.npz
"""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from mefn_jax.data import images, pipeline
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.distributed import from_first
from mefn_jax.sharding import make_mesh, put_rows, rows_here


def main(prepared, port, index, out):
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    text = from_first(lambda: f"said by process {jax.process_index()}: é")
    assert text == "said by process 0: é", text
    dataset = Dataset(prepared)
    tokenizer = Tokenizer(from_first(lambda: dataset.tokenizer_json), 8, True, "keep")
    mesh = make_mesh()
    assert (mesh.size, jax.process_count()) == (4, 2)
    batches = pipeline.training_dataset(dataset.split("train"), tokenizer, images.Resize(16), 8, 3, rows_here(mesh, 8))
    iterator = pipeline.iterate(batches, 5, 2, 0, lambda batch: put_rows(mesh, batch))
    found = {}
    for step in (5, 6):
        batch = next(iterator)
        assert all(len(x.addressable_shards) == 2 and x.shape[0] == 8 for x in batch.values())
        whole = multihost_utils.process_allgather(batch, tiled=True)
        found |= {f"{step} {name}": x for name, x in whole.items()}
    iterator.close()
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
