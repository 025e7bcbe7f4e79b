"""Entropy of the correspondence between image regions and words (docs/method.md, section 3; MEFN, Eq. 1, Figure 2).

Every entropy is one pure function of one pair:

    entropy(S, region_mask, word_mask, lam) -> (H [N, M], h_i [N], h_j [M])

S holds the cosines of N regions and M words, `lam` is the inverse temperature lambda. H is the entropy map, 0 where
masked. `h_i` (regions) and `h_j` (words) lie in [0, 1] and are low where a fragment singles out few partners; those of
masked fragments are not used. They make the weights of Eqs. 17 and 18, and their mean is the evidence for a match
(Eqs. 12 and 25). To add an entropy, write the function and add a line to `ENTROPIES`; a form for all pairs is optional
and faster. Letters and word axes W are those of `scoring/layouts.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mefn_jax.features import MASKED_LOGIT
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, RegionBlock, replace_zeros


def masked_log_softmax(logits, mask, axis):
    """Returns the log-softmax along `axis` over the entries of `mask`, and 0 elsewhere, also where a whole row is
    masked. Gradients stay finite."""
    mask = jnp.broadcast_to(mask, logits.shape)
    masked_logits = jnp.where(mask, logits, MASKED_LOGIT)
    return jnp.where(mask, masked_logits - jax.nn.logsumexp(masked_logits, axis=axis, keepdims=True), 0.0)


def _normalize_shannon(log_p, mask, axis):
    """Returns the Shannon entropy along `axis`, divided by the logarithm of the number of entries; 1 for one entry."""
    p = jnp.where(mask, jnp.exp(log_p), 0.0)
    return _divide_by_largest(-jnp.sum(p * log_p, axis=axis), jnp.sum(mask, axis=axis))


def shannon(S, region_mask, word_mask, lam):
    """Computes Shannon entropies in nats (docs/method.md, Eqs. 13 and 14): `P = softmax_j(lam S)` and
    `H_ij = -P_ij ln P_ij` for S `(N, M)`. A row of H sums to the region's entropy over the words; a word's entropy is
    that of its softmax Q over the regions."""
    mask = region_mask[:, None] & word_mask[None, :]  # (N, M)
    log_p = masked_log_softmax(lam * S, mask, axis=1)
    log_q = masked_log_softmax(lam * S, mask, axis=0)
    H = jnp.where(mask, -jnp.exp(log_p) * log_p, 0.0)
    return H, _normalize_shannon(log_p, mask, axis=1), _normalize_shannon(log_q, mask, axis=0)


def gaussian(S, region_mask, word_mask, lam):
    """Computes the joint entropy of two unit-variance Gaussians with correlation `rho = clip(S, 0, 0.999)`:
    `ln(2 pi e) + ln(1 - rho^2) / 2` nats (docs/method.md, Eq. 15). A fragment's entropy is the mean over its partners
    of the same, rescaled to [0, 1]. `lam` is not used."""
    mask = region_mask[:, None] & word_mask[None, :]
    rho = jnp.clip(S, 0.0, 0.999)
    H = jnp.log(2 * jnp.pi * jnp.e) + 0.5 * jnp.log1p(-rho * rho)
    return jnp.where(mask, H, 0.0), *_average_cells(_rescale_gaussian(S, lam), mask)


def _rescale_gaussian(S, lam):
    """Returns e_ij of docs/method.md, Eq. 15: the joint entropy of each cell, rescaled to [0, 1]."""
    rho = jnp.clip(S, 0.0, 0.999)
    return 1 - jnp.log1p(-rho * rho) / jnp.log1p(-(0.999**2))


def bernoulli(S, region_mask, word_mask, lam):
    """Computes the entropy, in nats, of a coin that says "this word means this region" with probability
    `p = sigmoid(lam S)` (docs/method.md, Eq. 16). It stays at `ln 2` where p is below one half, so that only evidence
    for a match lowers it. A fragment's entropy is the mean over its partners, divided by `ln 2`."""
    mask = region_mask[:, None] & word_mask[None, :]
    cells = _rescale_bernoulli(S, lam)
    return jnp.where(mask, cells * jnp.log(2.0), 0.0), *_average_cells(cells, mask)


def _rescale_bernoulli(S, lam):
    """Returns the coin's entropy of each cell divided by ln 2, in [0, 1] (docs/method.md, Eq. 16)."""
    logit = jnp.maximum(lam * S, 0.0)
    return (jax.nn.softplus(logit) - jax.nn.sigmoid(logit) * logit) / jnp.log(2.0)


def _average_cells(cells, mask):
    """Returns each region's mean over its words `(N,)` and each word's mean over the regions `(M,)`, both of cells that
    exist; 1 for a fragment without a partner."""
    cells = jnp.where(mask, cells, 0.0)
    return tuple(_divide_by_count(jnp.sum(cells, axis), jnp.sum(mask, axis)) for axis in (1, 0))


def average_fragments(h_v, h_t, region_mask, word_mask):
    """Returns MFE of one pair as the mean entropy of its fragments, a scalar in [0, 1], from `h_v (N,)` and
    `h_t (M,)` (docs/method.md, Eq. 12); 1 if there are none."""
    sides = (h_v, region_mask), (h_t, word_mask)
    return sum(_divide_by_count(jnp.sum(jnp.where(mask, h, 0.0)), jnp.sum(mask)) for h, mask in sides) / 2


def average_fragments_all_pairs(h_v, h_t, regions: RegionBlock, words: PaddedTexts | PackedTexts):
    """Returns `average_fragments` of all pairs, `(I, T)`, from `h_v (I, N, T)` and `h_t (I, W)`."""
    mask = regions.mask[..., None]
    region_mean = _divide_by_count(jnp.sum(jnp.where(mask, h_v, 0.0), 1), jnp.sum(mask, 1))
    return (region_mean + _divide_by_count(words.sum(h_t), words.lengths())) / 2


def shannon_all_pairs(S, attention, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
    """Computes the fragment entropies of `shannon` for all pairs: regions `(I, N, T)`, words `(I, W)`. Each is
    `-sum p ln p = ln Z - (sum E l) / Z`, divided by the logarithm of the number of partners, and 1 for a single partner
    (docs/method.md, Eqs. 13, 14 and 32)."""
    Z = replace_zeros(words.sum(attention.over_words))  # (I, N, T)
    h_v = jnp.log(Z) - words.sum(attention.over_words * attention.over_words_logits) / Z
    Z = replace_zeros(jnp.sum(attention.over_regions, 1))  # (I, W)
    h_t = jnp.log(Z) - jnp.sum(attention.over_regions * attention.over_regions_logits, 1) / Z
    return _divide_by_largest(h_v, words.lengths()), _divide_by_largest(h_t, _count_regions(regions, words))


def average_all_pairs(rescale):
    """Returns the all-pairs form of an entropy whose fragments' values are means over their partners of the cells
    `rescale(S, lam)` in [0, 1] (docs/method.md, Eqs. 15 and 16)."""

    def compute(S, attention, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
        cells = jnp.where(regions.mask_for(words), rescale(S, lam), 0.0)
        h_t = _divide_by_count(jnp.sum(cells, 1), _count_regions(regions, words))
        return _divide_by_count(words.sum(cells), words.lengths()), h_t

    return compute


@dataclasses.dataclass(frozen=True)
class Entropy:
    """An entropy.

    Attributes:
        pair: its function of one pair, see the top of this file.
        all_pairs: the same for all pairs, `(S, attention, regions, words, lam) -> (h_v (I, N, T), h_t (I, W))`, without
            the map; `attention` are the unnormalized softmaxes of `matching/gram.py`. None: `pair` is called for one
            text at a time, which takes T times the time and the memory for T texts.
    """

    pair: Callable
    all_pairs: Callable | None = None

    def compute_all_pairs(self, S, attention, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
        """Computes the fragment entropies of all pairs, regions `(I, N, T)` and words `(I, W)`."""
        if self.all_pairs is not None:
            return self.all_pairs(S, attention, regions, words, lam)
        return self._compute_by_text(S, regions, words, lam)

    def _compute_by_text(self, S, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
        """Calls the function of one pair for each text with all other words masked."""
        word_mask = words.single_masks()  # (T, W)
        word_mask = word_mask.reshape(len(word_mask), -1)
        over_texts = jax.vmap(self.pair, (None, None, 0, None), (0, 1, 0))
        S_flat = S.reshape(*S.shape[:2], -1)
        _, h_v, h_t = jax.vmap(over_texts, (0, 0, None, None))(S_flat, regions.mask, word_mask, lam)
        # Each word keeps the value from its own text.
        return h_v, jnp.sum(jnp.where(word_mask, h_t, 0.0), 1).reshape(len(S), *S.shape[2:])


def _divide_by_largest(entropy, count):
    """Returns an entropy divided by its largest value for `count` partners, and 1 for a single partner: a fragment
    without a choice is no evidence for a match."""
    return jnp.where(count > 1, entropy / jnp.log(jnp.maximum(count, 2)), 1.0)


def _divide_by_count(total, count):
    """Returns the mean of `count` entropies with the sum `total`, and 1 for none."""
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)


def _count_regions(regions: RegionBlock, words: PaddedTexts | PackedTexts):
    """Returns the number of regions of each image, `(I, 1)` with one axis for each axis of the words."""
    return jnp.sum(regions.mask, 1).reshape(-1, *[1] * words.word_axes)


ENTROPIES = {
    "shannon": Entropy(shannon, shannon_all_pairs),
    "gaussian": Entropy(gaussian, average_all_pairs(_rescale_gaussian)),
    "bernoulli": Entropy(bernoulli, average_all_pairs(_rescale_bernoulli)),
}
