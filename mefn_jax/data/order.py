"""Orders of training captions: endless sequences in which the caption at any position follows from the seed alone."""

import functools
from fractions import Fraction

import numpy as np

from mefn_jax.data.negatives import HardNegatives, arrange_groups

STREAM_BITS = 48  # epochs are below, numbers of streams above
MIXTURE_STREAM = 2**15  # the stream of the order of data sets in a mixture
MIXED_BLOCK = 4096  # positions of a mixture in which every data set has its share, in random order
SMALLEST_SHARE = Fraction(2, MIXED_BLOCK)


def make_rng(*key: int, view: int = 0) -> np.random.Generator:
    """Returns the random generator that follows from a key of two numbers below 2^64, and from the number of a view.
    Generators of other views begin so far ahead in the key's sequence that they never meet."""
    return np.random.Generator(np.random.Philox(key=np.uint64(key), counter=(0, 0, 0, view)))


class ShuffledCaptions:
    """Endless sequence of captions: groups of captions `(G, n)` in a new order in every epoch.

    `order[positions]` are the captions at these positions. Each epoch's order is a permutation of all groups that
    follows from (seed, epoch). grain's `shuffle` is not used, for two reasons. It takes 10 microseconds for each
    position, a tenth of the time that reading regions takes. And with it, seed 0 has in epoch 1 the order that seed 1
    has in epoch 0. Sequences with another `stream` have other orders.
    """

    def __init__(self, groups: np.ndarray, seed: int, stream: int = 0):
        self.groups, self.seed, self.stream = groups, seed, stream
        self._epochs = {}

    def __len__(self):
        return self.groups.size

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the captions int64 `(B,)` at positions int64 `(B,)`."""
        return self.locate(positions)[0]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the captions at positions, and the numbers of earlier passes over all captions, int64 `(B,)`."""
        epochs, positions = np.divmod(positions, len(self))
        captions = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            captions[in_epoch] = self._permute(epoch)[positions[in_epoch]]
        return captions, epochs

    def _permute(self, epoch: int) -> np.ndarray:
        """Returns all captions in the order of an epoch, int64 `(G n,)`."""
        order = self._epochs.get(epoch)
        if order is None:
            # From 2^63 on, so that no row of a batch draws from the same key (`LoadBatch`).
            order = self._draw(make_rng(2**63 + self.seed, epoch + (self.stream << STREAM_BITS)), epoch)
            # Another thread may still read the previous epoch.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1} | {epoch: order}
        return order

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        return self.groups[rng.permutation(len(self.groups))].reshape(-1)


class GroupedCaptions(ShuffledCaptions):
    """Endless sequence of captions in groups of `size`, each a caption with its hard negatives: every epoch has all
    captions, in other groups (`negatives.arrange_groups`). Groups begin at multiples of their size, over all epochs, so
    that batches hold whole groups."""

    def __init__(self, negatives: HardNegatives, size: int, seed: int):
        super().__init__(make_singles(len(negatives.texts)), seed)
        self.negatives, self.size = negatives, size

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        return arrange_groups(self.negatives, self.size, rng, -epoch * len(self) % self.size)


class MixedCaptions:
    """Endless sequence of the captions of several data sets, numbered one data set after the other, in given shares.

    Blocks of MIXED_BLOCK positions are filled by the data sets in their shares, up to one position, in an order that
    follows from (seed, block). The k-th position of a data set has the k-th caption of its own endless sequence
    (`ShuffledCaptions`), so that its passes are as many as its share asks for.
    """

    def __init__(self, sizes: list[int], shares: list[Fraction], seed: int):
        """Makes the sequence of data sets with `sizes` captions. The shares sum to 1, and none is below
        SMALLEST_SHARE."""
        self.sizes, self.seed = list(sizes), seed
        self.firsts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.ends = [sum(shares[: k + 1], Fraction(0)) for k in range(len(shares))]
        self.orders = [ShuffledCaptions(make_singles(n), seed, 1 + k) for k, n in enumerate(self.sizes)]
        self._fill = functools.lru_cache(8)(self._fill_block)

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_fill"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._fill = functools.lru_cache(8)(self._fill_block)

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the captions int64 `(B,)` at positions int64 `(B,)`."""
        return self.locate(positions)[0]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the captions at positions, and the numbers of earlier passes over their data sets, int64 `(B,)`."""
        sources, ranks = self.assign(positions)
        captions, epochs = np.empty((2, len(positions)), np.int64)
        for k in np.unique(sources).tolist():
            rows = sources == k
            captions[rows], epochs[rows] = self.orders[k].locate(ranks[rows])
            captions[rows] += self.firsts[k]
        return captions, epochs

    def assign(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the data set of each position, and how many earlier positions it has, int64 `(B,)`."""
        blocks, places = np.divmod(positions, MIXED_BLOCK)
        sources, ranks = np.empty((2, len(positions)), np.int64)
        for block in np.unique(blocks).tolist():
            rows = blocks == block
            sources[rows], ranks[rows] = (x[places[rows]] for x in self._fill(block))
        return sources, ranks

    def _fill_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the data sets of a block's positions, and how many earlier positions these have, int64 arrays."""
        starts, stops = self._count(block), self._count(block + 1)
        numbers = stops - starts
        sources = np.repeat(np.arange(len(numbers)), numbers)
        ranks = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        # Positions of one data set stay in order, so that its sequence is read from its beginning.
        sources = sources[make_rng(2**63 + self.seed, block + (MIXTURE_STREAM << STREAM_BITS)).permutation(MIXED_BLOCK)]
        in_block = np.empty(MIXED_BLOCK, np.int64)
        in_block[np.argsort(sources, kind="stable")] = ranks
        return sources, in_block

    def _count(self, block: int) -> np.ndarray:
        """Returns how many positions before a block each data set has, int64. The numbers of the first k data sets
        together are rounded down, so that all sum to the positions."""
        ends = [int(block * MIXED_BLOCK * end) for end in self.ends]  # fractions, which are exact
        return np.diff(np.array([0, *ends], np.int64))


def make_singles(number: int) -> np.ndarray:
    """Returns each of a number of captions as a group of its own, int64 `(number, 1)`."""
    return np.arange(number)[:, None]
