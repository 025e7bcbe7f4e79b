"""The grain pipeline: the global batch of step k is a pure function of (seed, k), whatever the hosts and workers.

Batches are dicts of NumPy arrays: pixels uint8 `(B, H, W, 3)`, ids int32 and mask bool `(B, L)`, image int32 `(B,)`,
the image's position in the split (what makes captions positives of one another), caption int32 `(B,)`.
"""

import grain
import numpy as np

from mefn_jax.data import images
from mefn_jax.data.dataset import Split
from mefn_jax.data.tokenizer import Tokenizer

PASSES = 1_000_000  # over the data: without end for any run, yet positions stay within what slicing can count


class LoadPair(grain.transforms.Map):
    """The position of a caption in the split to one (image, caption) example."""

    def __init__(self, split: Split, tokenizer: Tokenizer, resize: images.Resize):
        self.split, self.tokenizer, self.resize = split, tokenizer, resize

    def map(self, caption: int) -> dict:
        """One row of a batch (see above), without its first axis."""
        image = int(self.split.caption_image[caption])
        record = self.split.record(image)
        text = record["captions"][caption - int(self.split.first[image])]
        ids, mask = self.tokenizer([text])
        return {
            "pixels": images.decode(record["image"], self.resize, record["image_id"]),
            "ids": ids[0],
            "mask": mask[0],
            "image": np.int32(image),
            "caption": np.int32(caption),
        }


def training_dataset(
    split: Split,
    tokenizer: Tokenizer,
    resize: images.Resize,
    batch_size: int,
    seed: int,
    process=(0, 1),
    twins_together=False,
):
    """This process's rows of every global batch, by step: `dataset[k]` is the batch of step k, without end.

    `batch_size` is the global one; `process` is (index, count). Every pass visits each (image, caption) pair once, in
    a new order. Joining the processes' rows in order gives the same global batch for any count. `twins_together`
    (drawn scenes) shuffles captions two by two, a caption with that of the twin: even batches then hold both.
    """
    index, number = process
    if twins_together:
        captions = _shuffled_twos(split, seed)
    else:
        captions = grain.MapDataset.range(split.captions).shuffle(seed=seed).repeat(PASSES)
    # Batch before slicing by process: slicing examples would permute the global batch with the number of hosts.
    return captions.map(LoadPair(split, tokenizer, resize)).batch(batch_size // number)[index::number]


def _shuffled_twos(split: Split, seed: int):
    """All captions by position, endlessly, shuffled in twos: of a scene and its twin with the same number, the others
    as they come. An odd one out is its own partner, and is visited twice."""
    twin = split.twins()
    firsts = np.flatnonzero(twin > np.arange(split.images))
    of = [
        (split.first[i] + k, split.first[twin[i]] + k)
        for i in firsts
        for k in range(split.first[i + 1] - split.first[i])
    ]
    alone = np.flatnonzero(twin[split.caption_image] < 0)
    alone = np.append(alone, alone[-1:]) if len(alone) % 2 else alone
    twos = np.array([*of, *alone.reshape(-1, 2)])
    order = grain.MapDataset.range(len(twos)).shuffle(seed=seed).repeat(PASSES)
    return grain.MapDataset.range(2 * len(order)).map(lambda p: int(twos[order[p // 2], p % 2]))


def iterate(dataset, start: int, threads: int, workers: int = 0):
    """Iterates over the batches from step `start` on, read ahead in threads, or in `workers` processes. Order and
    content depend on neither. Close the iterator when done."""
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset[start:].to_iter_dataset(read)
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


def image_batches(split: Split, resize: images.Resize, batch_size: int, threads: int, start: int = 0):
    """The images of a split in order, from position `start` on: `(pixels uint8 (batch_size, H, W, 3), number)`; the
    last batch is padded with zeros and `number` says how many rows are real."""

    def load(k):
        record = split.record(k)
        return images.decode(record["image"], resize, record["image_id"])

    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = grain.MapDataset.range(start, split.images).map(load).batch(batch_size).to_iter_dataset(read)
    for pixels in batches:
        yield pad_rows(pixels, batch_size), len(pixels)


def text_batches(captions: list[str], tokenizer: Tokenizer, batch_size: int):
    """Captions in order: `(ids, mask, number)`, padded likewise."""
    for start in range(0, len(captions), batch_size):
        ids, mask = tokenizer(captions[start : start + batch_size])
        yield pad_rows(ids, batch_size), pad_rows(mask, batch_size), len(ids)


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with zero rows appended up to `rows`."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
