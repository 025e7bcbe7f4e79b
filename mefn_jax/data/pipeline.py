"""Input pipeline with grain: the batch of step k is a pure function of the seed and of the number of examples that the
steps before it have seen, whatever the hosts and workers.

A batch is a dict of NumPy arrays (docs/data.md, The batch):

    images         uint8 pixels (B, H, W, 3), or precomputed regions float (B, N, C)
    text           token ids int32 (B, L), or cached words float16 (B, M, C)
    text_mask      bool (B, L) or (B, M), the tokens or words that exist
    image_index    int32 (B,), position of the image in the split; rows with equal values are positives of each other
    caption_index  int32 (B,), position of the caption in the split
    text_digest    int32 (B, 2), equal for captions that are equal as text, but for upper case and spaces
    epoch          int32 (B,), number of earlier passes over the data
    view           int32 (B,), number of the view: with n views, rows n k to n k + n - 1 are views 0 to n - 1 of a pair

Random numbers of a row follow from (seed, epoch, caption, view) alone.
"""

import dataclasses
import functools
import hashlib

import grain
import numpy as np

from mefn_jax.data import images, word_augment
from mefn_jax.data.augment import Augment
from mefn_jax.data.mixture import MixedSplit
from mefn_jax.data.negatives import read_negatives
from mefn_jax.data.order import GroupedCaptions, MixedCaptions, ShuffledCaptions, make_rng, make_singles
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import EncodedCaptions, Tokenizer
from mefn_jax.errors import ConfigError
from mefn_jax.runtime.processes import set_up_worker

PASSES = 1_000_000  # passes over the data: more than any run makes, but few enough that positions fit into int64
IMAGE, WORDS = range(2)  # independent streams of random numbers


class LoadBatch(grain.transforms.Map):
    """Map that loads this process's part of a step's batch: `rows`, positions among the rows of `size` pairs, `views`
    for each pair."""

    def __init__(
        self,
        split: Split,
        order,
        size: int,
        views: int,
        rows,
        tokenizer: Tokenizer,
        resize,
        augment,
        seed: int,
        offset,
        may_reduce,
    ):
        self.split, self.order, self.size, self.offset = split, order, size, offset
        self.pairs, self.view = rows // views, (rows % views).astype(np.int32)
        self.resize, self.augment, self.seed, self.may_reduce = resize, augment or Augment(), seed, may_reduce
        self.encoded = None if split.cached_text else EncodedCaptions(tokenizer, split.num_captions)

    def map(self, step: int) -> dict:
        """Loads the rows of a step."""
        positions = self.offset + step * self.size + self.pairs
        captions, epochs = self.order.locate(positions)
        caption_index, epoch = captions.astype(np.int32), epochs.astype(np.int32)
        image_index = self.split.caption_image[caption_index]
        records = [self.split.record(image) for image in image_index]
        caption_in_image = caption_index - self.split.caption_offsets[image_index]
        captions = [record["captions"][k] for record, k in zip(records, caption_in_image, strict=True)]
        text, text_mask = self._load_text(captions, epoch, caption_index)
        pixels = self._load_images(records, image_index, epoch, caption_index)
        return {
            "images": pixels,
            "text": text,
            "text_mask": text_mask,
            "image_index": image_index,
            "caption_index": caption_index,
            "text_digest": digest_captions(captions),
            "epoch": epoch,
            "view": self.view,
        }

    def _load_text(self, captions, epoch, caption_index) -> tuple[np.ndarray, np.ndarray]:
        """Returns `text` and `text_mask` of a batch, with word noise."""
        if self.split.cached_text:
            return self.split.cached_text.read(caption_index)
        ids, mask, word_index = self.encoded(caption_index, captions)
        if not self.augment.word_noise:
            return ids, mask
        rows = zip(ids, mask, word_index, self._make_rngs(WORDS, epoch, caption_index), strict=True)
        noisy = [
            word_augment.add_word_noise(row_ids, row_mask, words, self.augment.word_noise, rng, self.encoded.tokenizer)
            for row_ids, row_mask, words, rng in rows
        ]
        return tuple(np.stack(x) for x in zip(*noisy, strict=True))

    def _load_images(self, records, image_index, epoch, caption_index) -> np.ndarray:
        """Returns `images` of a batch: precomputed regions, or pixels with augmentation."""
        if self.split.region_width:
            return self.split.records.read(self.split.record_ids[image_index])
        decode = functools.partial(images.decode, resize=self.resize, may_reduce=self.may_reduce)
        if not self.augment.changes_pixels:
            return np.stack([decode(r["image"], name=r["image_id"]) for r in records])
        decode = functools.partial(decode, augment=self.augment)
        rows = zip(records, self._make_rngs(IMAGE, epoch, caption_index), strict=True)
        return np.stack(
            [decode(r["image"], name=r["image_id"], rng=rng, may_flip=_may_flip(r["captions"])) for r, rng in rows]
        )

    def _make_rngs(self, stream: int, epochs, captions):
        """Returns a random generator for each row, which follows from (seed, epoch, caption, view) and the stream
        alone."""
        # These keys lie below 2^63; those from there on belong to `ShuffledCaptions`.
        return [
            make_rng(2 * self.seed + stream, (epoch << 32) + caption, view=view)
            for epoch, caption, view in zip(epochs.tolist(), captions.tolist(), self.view.tolist(), strict=True)
        ]


def digest_captions(captions: list[str]) -> np.ndarray:
    """Returns the first 64 bits of the SHA-256 of each caption, lower case and with single spaces, int32 `(B, 2)`."""
    digests = [hashlib.sha256(" ".join(caption.lower().split()).encode()).digest()[:8] for caption in captions]
    return np.frombuffer(b"".join(digests), "<i4").reshape(-1, 2).astype(np.int32)


def _may_flip(captions: list[str]) -> bool:
    """Returns whether an image may be mirrored: if none of its captions mentions left or right. All captions count,
    because all are positives of the image, whatever row of the batch they stand in."""
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
    offset: int = 0,
    may_reduce: bool = False,
    views: int = 1,
    order=None,
):
    """Returns an endless grain dataset: `dataset[k]` is the part of step k's batch that this process loads.

    `batch_size` counts the rows of the whole batch; `rows` are the positions in it that belong to this process,
    ascending (by default all). A batch has `batch_size / views` pairs, each of them in `views` rows with other random
    numbers. Step k begins at position `offset + k * batch_size / views` of the endless sequence of pairs; `offset` is
    not 0 after a change of the batch size, and may be negative. Every pass visits each (image, caption) pair once, in a
    new order. With `pair_twins` (drawn scenes), a caption and that of its twin stay together, so that batches of an
    even number of pairs hold both; if an odd number of captions has no twin, one of them is visited twice. `may_reduce`
    is that of `images.decode`. `order` replaces the endless sequence of captions by another.
    """
    order = order_captions(split, seed, pair_twins) if order is None else order
    size = batch_size // views
    steps = PASSES * (len(order) // size + 1)
    rows = np.arange(batch_size) if rows is None else rows
    return grain.MapDataset.range(steps).map(
        LoadBatch(split, order, size, views, rows, tokenizer, resize, augment, seed, offset, may_reduce)
    )


def order_captions(split: Split, seed: int, pair_twins: bool):
    """Returns the endless sequence of a split's captions. Raises ConfigError for twins of a mixture."""
    if isinstance(split, MixedSplit):
        if pair_twins:
            raise ConfigError(
                "data.pair_twins does not go with a mixture of data sets; set --config.data.pair_twins=False"
            )
        return MixedCaptions(split.captions_of_parts, split.shares, seed)
    return shuffle_twin_pairs(split, seed) if pair_twins else ShuffledCaptions(make_singles(split.num_captions), seed)


def training_dataset_from_config(
    config, split: Split, tokenizer: Tokenizer, rows: np.ndarray | None = None, offset: int = 0
):
    """Returns the `training_dataset` of a configuration."""
    d, t = config.data, config.train
    resize, augment = images.resize_from_config(config.image), Augment(**config.augment)
    if augment.flip and not word_augment.knows_sides(split.sampled_captions):
        augment = dataclasses.replace(augment, flip=0.0)  # `statistics.summarize_text` says so
    # A pretrained tower knows the pixels of the whole image as its own preprocessing resizes them.
    may_reduce = not config.image.pretrained
    order = None
    if d.negatives:
        order = GroupedCaptions(read_negatives(d.negatives, split), 1 + d.negatives_per_pair, t.seed)
    return training_dataset(
        split, tokenizer, resize, t.batch_size, t.seed, rows, d.pair_twins, augment, offset, may_reduce, d.views, order
    )


def shuffle_twin_pairs(split: Split, seed: int) -> ShuffledCaptions:
    """Returns all captions, shuffled in pairs.

    The k-th caption of a scene and the k-th caption of its twin form a pair, and captions of scenes without twin are
    paired in order. If one is left over, it is paired with itself, and so visited twice in an epoch.
    """
    twin = split.twins()
    firsts = np.flatnonzero(twin > np.arange(split.num_images))  # the lower index of each pair
    pairs = [
        (split.caption_offsets[i] + k, split.caption_offsets[twin[i]] + k)
        for i in firsts
        for k in range(split.caption_offsets[i + 1] - split.caption_offsets[i])
    ]
    alone = np.flatnonzero(twin[split.caption_image] < 0)
    alone = np.append(alone, alone[-1:]) if len(alone) % 2 else alone
    return ShuffledCaptions(np.array([*pairs, *alone.reshape(-1, 2)]), seed)


def iterate(dataset, start: int, threads: int, workers: int, put):
    """Iterates over `put(batch)` of the batches from step `start` on.

    Batches are read ahead in threads, or in `workers` processes if there are any. `put` runs two batches ahead, so that
    a step never waits as long as reading keeps up. Order and content depend on none of these. Close the iterator when
    done.
    """
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset[start:].to_iter_dataset(read)
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), set_up_worker)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches.map(put), prefetch_buffer_size=2))


def image_batches(split: Split, resize: images.Resize, batch_size: int, threads: int, start: int = 0, rows=None):
    """Yields the images of a split in order, from position `start` on, as `(batch, number)`.

    A batch is uint8 pixels `(batch_size, H, W, 3)` or regions `(batch_size, N, C)`. The last one is padded with zeros,
    and `number` is the number of real images in the whole batch. With `rows`, positions in a batch, only these rows are
    read and returned (the rows of one process).
    """
    rows = np.arange(batch_size) if rows is None else rows

    def load(first):
        # If all rows lie beyond the end, the last image is read all the same: its shape and type are needed, and its
        # row is not counted.
        image_index = np.minimum(first + rows, split.num_images - 1)
        image_index = image_index[: max(1, np.sum(first + rows < split.num_images))]
        if split.region_width:
            return split.records.read(split.record_ids[image_index])
        records = [split.record(k) for k in image_index]
        return np.stack([images.decode(r["image"], resize, r["image_id"]) for r in records])

    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    firsts = range(start, split.num_images, batch_size)
    batches = grain.MapDataset.range(start, split.num_images, batch_size).map(load).to_iter_dataset(read)
    for first, batch in zip(firsts, batches, strict=True):
        yield pad_rows(batch, len(rows)), min(batch_size, split.num_images - first)


def text_batches(captions: list[str], tokenizer: Tokenizer, batch_size: int):
    """Yields captions in order as `(ids, mask, number)`, `batch_size` rows each; rows after the first `number`, in the
    last batch, are zero."""
    for start in range(0, len(captions), batch_size):
        ids, mask = tokenizer(captions[start : start + batch_size])
        yield pad_rows(ids, batch_size), pad_rows(mask, batch_size), len(ids)


def caption_batches(split: Split, tokenizer: Tokenizer, batch_size: int):
    """Yields the captions of a split in order as `(ids or cached words, mask, number)`, padded as in `text_batches`."""
    if not split.cached_text:
        yield from text_batches(split.all_captions(), tokenizer, batch_size)
        return
    for start in range(0, split.num_captions, batch_size):
        words, mask = split.cached_text.read(np.arange(start, min(start + batch_size, split.num_captions)))
        yield pad_rows(words, batch_size), pad_rows(mask, batch_size), len(words)


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Appends rows of zeros to `x`, up to `rows` rows."""
    if len(x) == rows:
        return x
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
