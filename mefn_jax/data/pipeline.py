"""The grain pipeline: the global batch of step k is a pure function of (seed, k), whatever the hosts and workers.

Batches are dicts of NumPy arrays: images uint8 `(B, H, W, 3)` or regions float `(B, N, C)`, ids int32 `(B, L)` or
cached words float16 `(B, M, C)`, mask bool, which of these exist, owner int32 `(B,)`, the image's position in the split
(what makes captions positives of one another), caption int32 `(B,)`, the caption's position, and epoch int32 `(B,)`.
What is random in a row follows from (seed, epoch, caption).
"""

import grain
import numpy as np

from mefn_jax.data import images, word_augment
from mefn_jax.data.augment import Augment
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import EncodedCaptions, Tokenizer

PASSES = 1_000_000  # over the data: without end for any run, yet positions stay within what slicing can count
IMAGE, WORDS = range(2)  # the streams of random numbers; one does not see what another draws


class LoadBatch(grain.transforms.Map):
    """A step to this process's rows of its batch, which are `rows` of `size`."""

    def __init__(self, split: Split, order, size: int, rows, tokenizer: Tokenizer, resize, augment, seed: int):
        self.split, self.order, self.size, self.rows = split, order, size, rows
        self.resize, self.augment, self.seed = resize, augment or Augment(), seed
        self.encoded = None if split.cached_text else EncodedCaptions(tokenizer, split.num_captions)

    def map(self, step: int) -> dict:
        """The rows of a step."""
        places = step * self.size + self.rows
        captions = self.order[places].astype(np.int32)
        epochs = (places // len(self.order)).astype(np.int32)
        owners = self.split.caption_image[captions]
        records = [self.split.record(image) for image in owners]
        ids, mask = self._texts(records, owners, epochs, captions)
        pictures = self._pictures(records, owners, epochs, captions)
        return {
            "images": pictures,
            "text": ids,
            "text_mask": mask,
            "image_index": owners,
            "caption_index": captions,
            "epoch": epochs,
        }

    def _texts(self, records, owners, epochs, captions) -> tuple[np.ndarray, np.ndarray]:
        if self.split.cached_text:
            return self.split.cached_text.read(captions)
        numbers = captions - self.split.caption_offsets[owners]
        texts = [record["captions"][number] for record, number in zip(records, numbers, strict=True)]
        ids, mask, numbered = self.encoded(captions, texts)
        if not self.augment.word_noise:
            return ids, mask
        rows = zip(ids, mask, numbered, self._rngs(WORDS, epochs, captions), strict=True)
        altered = [
            word_augment.add_word_noise(*row[:3], self.augment.word_noise, row[3], self.encoded.tokenizer)
            for row in rows
        ]
        return tuple(np.stack(x) for x in zip(*altered, strict=True))

    def _pictures(self, records, owners, epochs, captions) -> np.ndarray:
        if self.split.region_width:
            return self.split.records.read(self.split.record_ids[owners])
        if not self.augment.changes_pixels:
            return np.stack([images.decode(record["image"], self.resize, record["image_id"]) for record in records])
        rows = zip(records, self._rngs(IMAGE, epochs, captions), strict=True)
        return np.stack(
            [
                images.decode(r["image"], self.resize, r["image_id"], self.augment, rng, _may_flip(r["captions"]))
                for r, rng in rows
            ]
        )

    def _rngs(self, stream: int, epochs, captions):
        """A generator for each row, which follows from (seed, epoch, caption) alone."""
        return [
            _random(2 * self.seed + stream, (epoch << 32) + caption)
            for epoch, caption in zip(epochs.tolist(), captions.tolist(), strict=True)
        ]


def _random(*key: int) -> np.random.Generator:
    """A generator that follows from two numbers below 2^64."""
    return np.random.Generator(np.random.Philox(key=np.uint64(key)))


def _may_flip(captions: list[str]) -> bool:
    """Whether an image may be mirrored: not if any of its captions speaks of left or right, since all of them are its
    positives, in whatever row they stand."""
    return not any(map(word_augment.mentions_side, captions))


def training_dataset(
    split: Split,
    tokenizer: Tokenizer,
    resize: images.Resize,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    pair_twins=False,
    augment: Augment | None = None,
):
    """This process's rows of every global batch, by step: `dataset[k]` is the batch of step k, without end.

    `batch_size` is the global one; `rows` are this process's of it, ascending; by default all. Every pass visits
    each (image, caption) pair once, in a new order of all of them.
    `pair_twins` (drawn scenes) shuffles captions two by two, a caption with that of the twin: even batches then
    hold both.
    """
    order = shuffle_twin_pairs(split, seed) if pair_twins else Shuffled(np.arange(split.num_captions)[:, None], seed)
    steps = PASSES * (len(order) // batch_size + 1)
    rows = np.arange(batch_size) if rows is None else rows
    return grain.MapDataset.range(steps).map(
        LoadBatch(split, order, batch_size, rows, tokenizer, resize, augment, seed)
    )


def training_dataset_from_config(config, split: Split, tokenizer: Tokenizer, rows: np.ndarray | None = None):
    """`training_dataset` of a configuration."""
    d, t = config.data, config.train
    resize, augment = images.resize_from_config(config.image), Augment(**config.augment)
    return training_dataset(split, tokenizer, resize, t.batch_size, t.seed, rows, d.pair_twins, augment)


class Shuffled:
    """Groups of captions `(G, n)` in a new order in every epoch, endlessly: `order[place]` is a caption. The order is a
    permutation of all groups, which follows from (seed, epoch). grain's `shuffle` takes 10 microseconds a place, a
    tenth of what reading regions takes, and gives seed 0 in epoch 1 the order of seed 1 in epoch 0."""

    def __init__(self, groups: np.ndarray, seed: int):
        self.groups, self.seed = groups, seed
        self._epochs = {}

    def __len__(self):
        return self.groups.size

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The captions at places int64 `(B,)`, int64 `(B,)`."""
        epochs, places = np.divmod(places, len(self))
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._epoch(epoch)[places[here]]
        return found

    def _epoch(self, epoch: int) -> np.ndarray:
        order = self._epochs.get(epoch)
        if order is None:
            order = self.groups[_random(2**63 + self.seed, epoch).permutation(len(self.groups))].reshape(-1)
            # The epoch before may still be read by another thread.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1} | {epoch: order}
        return order


def shuffle_twin_pairs(split: Split, seed: int) -> Shuffled:
    """All captions in twos: of a scene and its twin with the same number, the others as they come. An odd one out is
    its own partner, and is visited twice."""
    twin = split.twins()
    firsts = np.flatnonzero(twin > np.arange(split.num_images))
    of = [
        (split.caption_offsets[i] + k, split.caption_offsets[twin[i]] + k)
        for i in firsts
        for k in range(split.caption_offsets[i + 1] - split.caption_offsets[i])
    ]
    alone = np.flatnonzero(twin[split.caption_image] < 0)
    alone = np.append(alone, alone[-1:]) if len(alone) % 2 else alone
    return Shuffled(np.array([*of, *alone.reshape(-1, 2)]), seed)


def iterate(dataset, start: int, threads: int, workers: int, put):
    """Iterates over `put(batch)` of the batches from step `start` on. They are read ahead in threads, or in `workers`
    processes, and put two ahead, so that a step never waits where reading keeps up. Order and content depend on none of
    these. Close the iterator when done."""
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset[start:].to_iter_dataset(read)
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches.map(put), prefetch_buffer_size=2))


def image_batches(split: Split, resize: images.Resize, batch_size: int, threads: int, start: int = 0, rows=None):
    """The images of a split in order, from position `start` on: `(uint8 (batch_size, H, W, 3), number)`, or regions
    `(batch_size, N, C)`; the last batch is padded with zeros and `number` says how many of its rows are real. With
    `rows`, positions in a batch, only these rows of each are read and given (the share of a process)."""
    rows = np.arange(batch_size) if rows is None else rows

    def load(first):
        # A share that lies beyond the end has the last image, which is no row of the result.
        chosen = np.minimum(first + rows, split.num_images - 1)
        chosen = chosen[: max(1, np.sum(first + rows < split.num_images))]
        if split.region_width:
            return split.records.read(split.record_ids[chosen])
        records = [split.record(k) for k in chosen]
        return np.stack([images.decode(r["image"], resize, r["image_id"]) for r in records])

    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    firsts = range(start, split.num_images, batch_size)
    batches = grain.MapDataset.range(start, split.num_images, batch_size).map(load).to_iter_dataset(read)
    for first, loaded in zip(firsts, batches, strict=True):
        yield pad_rows(loaded, len(rows)), min(batch_size, split.num_images - first)


def text_batches(captions: list[str], tokenizer: Tokenizer, batch_size: int):
    """Captions in order: `(ids, mask, number)`, padded likewise."""
    for start in range(0, len(captions), batch_size):
        ids, mask = tokenizer(captions[start : start + batch_size])
        yield pad_rows(ids, batch_size), pad_rows(mask, batch_size), len(ids)


def caption_batches(split: Split, tokenizer: Tokenizer, batch_size: int):
    """The captions of a split in order, `(ids or cached words, mask, number)`, the last batch padded likewise."""
    if not split.cached_text:
        yield from text_batches(split.all_captions(), tokenizer, batch_size)
        return
    for start in range(0, split.num_captions, batch_size):
        found, mask = split.cached_text.read(np.arange(start, min(start + batch_size, split.num_captions)))
        yield pad_rows(found, batch_size), pad_rows(mask, batch_size), len(found)


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with zero rows appended up to `rows`."""
    if len(x) == rows:
        return x
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
