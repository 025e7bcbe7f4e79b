"""MEFN's scores of all pairs without attended vectors (DESIGN.md 3.5): what training, evaluation and retrieval use.

A cosine is lam-free in the attention, so `t_j . a_j = sum_i alpha_ij S_ij` and `|a_j|^2 = alpha_j' G alpha_j` need
no normaliser and no vector: G, the products of an image's regions with one another, is made once an image. Equal to
`mefn.pair`, which is the one to read first; a test holds the two together. Words stand as in `sides.py`; letters as
exists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mefn_jax.matching import entropy as entropies
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, RegionBlock

# An inverse temperature for which exp(lambda S), and its squares, stay within float32.
MAX_PLAIN_SCALE = 32.0
MIN_LOG_WEIGHT = -20.0  # of the logarithm of a weight over the largest that exists could be, for the same reason
TINY = 1e-36


class Attention(NamedTuple):
    """Unnormalised softmaxes of `lambda S`, `(I, N, W)`: `over_words`, of each region over the words of each text, is
    the exponential of `word_logits`; likewise `over_regions`, of each word. 0 at masked regions."""

    over_words: jax.Array
    word_logits: jax.Array
    over_regions: jax.Array
    region_logits: jax.Array


def score_all_pairs(
    regions: RegionBlock,
    words: PaddedTexts | PackedTexts,
    *,
    lam,
    kappa,
    entropy,
    local,
    global_input,
    stabilized: bool,
):
    """All pairs' local and global scores, float32 `(I, T)` each; arguments as for `mefn.pair`. Without `stabilized`, which
    is right for a `lam` up to STEEP, one exponential serves both directions."""
    if global_input == "weighted":
        S, v_to_t = words.products_with_pooled(regions.vectors)  # (I, N, W), (I, N, T)
    else:
        S, v_to_t = words.products(regions.vectors), None
    e = compute_attention(S, regions, words, lam, stabilized)
    H_v, H_t = ALL_PAIRS_ENTROPIES.get(entropy, entropy_by_text)(entropy, S, e, regions, words, lam)
    # Softmaxes of -kappa H but for their normalisers: entropies lie in [0, 1].
    w = jnp.exp(jnp.maximum(-kappa * H_v, MIN_LOG_WEIGHT)) * regions.mask[..., None]  # (I, N, T)
    u = jnp.exp(jnp.maximum(-kappa * H_t, MIN_LOG_WEIGHT))  # (I, W)
    w_sum, u_sum = _nonzero(jnp.sum(w, 1)), _nonzero(words.sum(u))  # (I, T)

    directions = []
    if local in ("both", "t2i"):
        alpha = e.over_regions * words.broadcast(w)
        cosines = normalize_product(jnp.sum(alpha * S, 1), regions.squared_norms(alpha))  # (I, W)
        directions.append(words.sum(u * cosines) / u_sum)
    if local in ("both", "i2t"):
        beta = e.over_words * u[:, None]
        cosines = normalize_product(words.sum(beta * S), words.squared_norms(beta))  # (I, N, T)
        directions.append(jnp.sum(w * cosines, 1) / w_sum)

    global_score = regions.pooled @ words.pooled.T
    if global_input == "weighted":
        w, u = w / w_sum[:, None], u / _nonzero(words.broadcast(u_sum))
        global_score = _weighted_cosine(global_score, regions, words, S, v_to_t, w, u)
    return sum(directions) / len(directions), global_score


def compute_attention(S, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam, stabilized: bool) -> Attention:
    """Both directions' softmaxes of `lam S`; with `stabilized` each from its own level, which is close to its maximum, so
    that it holds for any lam. The levels are found by sums, which both arrangements of the words can do."""
    exists, plain = regions.mask_for(words), jnp.minimum(lam, MAX_PLAIN_SCALE) if stabilized else lam
    e = jnp.where(exists, jnp.exp(plain * S), 0.0)
    if not stabilized:
        return Attention(e, lam * S, e, lam * S)
    # The maximum, and at most ln(M) / STEEP more. That it is no other does not change what is made of it.
    word_shift = jax.lax.stop_gradient(jnp.log(_nonzero(words.sum(e))) / plain)
    region_shift = jax.lax.stop_gradient(jnp.log(_nonzero(jnp.sum(e, 1))) / plain)
    # Above 0 exists is only what is masked, which would become infinite.
    word_logits = jnp.minimum(lam * (S - words.broadcast(word_shift)), 1.0)
    region_logits = jnp.minimum(lam * (S - region_shift[:, None]), 1.0)
    over_words, over_regions = (jnp.where(exists, jnp.exp(x), 0.0) for x in (word_logits, region_logits))
    return Attention(over_words, word_logits, over_regions, region_logits)


def shannon_all_pairs(_, S, e: Attention, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
    """`entropy.shannon`'s levels: `-sum p ln p = ln Z - sum p logits`, over the logarithm of how many exists are; 0
    where exists is one."""
    Z = _nonzero(words.sum(e.over_words))  # (I, N, T)
    H_v = jnp.log(Z) - words.sum(e.over_words * e.word_logits) / Z
    Z = _nonzero(jnp.sum(e.over_regions, 1))  # (I, W)
    H_t = jnp.log(Z) - jnp.sum(e.over_regions * e.region_logits, 1) / Z
    number = jnp.sum(regions.mask, 1).reshape(-1, *[1] * words.word_axes)
    return _normalize_entropy(H_v, words.lengths()), _normalize_entropy(H_t, number)


def mean_of_cells(entropy, S, e: Attention, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
    """The levels of an entropy that has a value in [0, 1] for each cell: its means."""
    cells = jnp.where(regions.mask_for(words), entropies.CELL_ENTROPIES[entropy](S, lam), 0.0)
    number = jnp.maximum(jnp.sum(regions.mask, 1), 1).reshape(-1, *[1] * words.word_axes)
    return words.sum(cells) / jnp.maximum(words.lengths(), 1), jnp.sum(cells, 1) / number


def no_entropy_all_pairs(_, S, e: Attention, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
    """No entropy: zeros."""
    return jnp.zeros((*S.shape[:2], len(words.pooled))), jnp.zeros((len(S), *S.shape[2:]))


def entropy_by_text(entropy, S, e: Attention, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam):
    """The levels of any entropy, from the function of one pair: a text at a time, with all other words masked, which
    takes as many times longer as exists are texts. Give a new one a function above once it is worth it."""
    texts = len(words.pooled)
    of = words.broadcast(jnp.eye(texts)) > 0  # (T, W)
    if isinstance(words, PaddedTexts):
        of = of & words.mask
    flat, of = S.reshape(*S.shape[:2], -1), jnp.broadcast_to(of, (texts, *S.shape[2:])).reshape(texts, -1)
    over_texts = jax.vmap(entropy, (None, None, 0, None), (0, 1, 0))
    _, H_v, H_t = jax.vmap(over_texts, (0, 0, None, None))(flat, regions.mask, of, lam)
    return H_v, jnp.sum(jnp.where(of, H_t, 0.0), 1).reshape(len(S), *S.shape[2:])


ALL_PAIRS_ENTROPIES = {
    entropies.shannon: shannon_all_pairs,
    entropies.gaussian: mean_of_cells,
    entropies.bernoulli: mean_of_cells,
    entropies.no_entropy: no_entropy_all_pairs,
}


def _weighted_cosine(global_score, regions: RegionBlock, words: PaddedTexts | PackedTexts, S, v_to_t, w, u):
    """cos(v_global + sum_i w_i v_i, t_cls + sum_j u_j t_j) from products alone; `global_score` is v_global . t_cls, `v_to_t
    (I, N, T)` v_i . t_cls, `w (I, N, T)` and `u (I, W)` are the weights."""
    t_to_v = words.products(regions.pooled)  # (I, W)
    product = global_score + jnp.sum(w * (v_to_t + words.sum(S * u[:, None])), 1) + words.sum(u * t_to_v)
    square_v = jnp.sum(regions.pooled**2, -1)[:, None] + 2 * jnp.einsum("int,in->it", w, regions.pooled_products)
    square_t = jnp.sum(words.pooled**2, -1) + 2 * words.sum(u * words.pooled_products)
    return normalize_product(
        normalize_product(product, square_v + regions.squared_norms(w)), square_t + words.squared_norms(u)
    )


def _normalize_entropy(entropy, number):
    """An entropy over the most that it could be for this number; 0 where exists is one."""
    return jnp.where(number > 1, entropy / jnp.log(jnp.maximum(number, 2)), 0.0)


def _nonzero(x):
    """Sums of what is positive: 1 where exists was nothing to add."""
    return jnp.where(x > 0, x, 1.0)


def normalize_product(product, square):
    """`product / sqrt(square)`, and 0, with gradient 0, where the vector is zero."""
    exists = square > TINY
    return jnp.where(exists, product * jax.lax.rsqrt(jnp.where(exists, square, 1.0)), 0.0)
