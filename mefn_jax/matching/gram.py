"""MEFN's scores of all pairs without attended vectors (docs/method.md, section 8): used by training, evaluation and
retrieval.

A cosine does not change with the length of a vector, so the attention needs no denominator, and a_j itself is never
formed: `t_j . a_j = sum_i alpha_ij S_ij` and `|a_j|^2 = alpha_j' G alpha_j` with the Gram matrix G of an image's
regions, made once for each image (Eqs. 29 and 30). The scores equal those of `score_pair` in `mefn.py`, which is the
form to read first; tests check that both agree. Letters and word axes W are those of `scoring/layouts.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mefn_jax.matching.entropy import average_fragments_all_pairs
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, Products, RegionBlock, replace_zeros

# Up to this lambda, exp(lambda S) and its square fit into float32, so that the softmax need not subtract a maximum.
MAX_PLAIN_SCALE = 32.0
# The smallest ln(weight / largest possible weight): squares of smaller weights could vanish in float32.
MIN_LOG_WEIGHT = -20.0
TINY = 1e-36  # a vector whose squared length is at most this counts as zero


class Attention(NamedTuple):
    """Unnormalized softmaxes of `lambda S`, `(I, N, W)` each, 0 at masked regions.

    `over_words` is the exponential of `over_words_logits`: the attention of each region over the words of each text.
    `over_regions` is that of `over_regions_logits`: the attention of each word over the regions of each image.
    """

    over_words: jax.Array
    over_words_logits: jax.Array
    over_regions: jax.Array
    over_regions_logits: jax.Array


def score_all_pairs(
    products: Products,
    regions: RegionBlock,
    words: PaddedTexts | PackedTexts,
    *,
    lam,
    kappa,
    evidence_lam,
    entropy,
    local,
    global_input,
    stabilized: bool,
):
    """Computes the local scores, the global scores and the mean entropies of all pairs, float32 `(I, T)` each
    (docs/method.md, Eqs. 12 and 22 to 24, computed by Eqs. 29 to 32). Arguments are those of `score_pair` in `mefn.py`.
    `stabilized=False` is right only for inverse temperatures up to MAX_PLAIN_SCALE; then one exponential serves both
    directions."""
    S = products.S  # (I, N, W)
    attention = compute_attention(S, regions, words, lam, stabilized)
    h_v, h_t = entropy.compute_all_pairs(S, attention, regions, words, lam)
    # h_v (I, N, T) and h_t (I, W) are h_i and h_j of Eqs. 13 and 14, or of 15 and 16.
    w, u = _compute_weights(h_v, h_t, regions, kappa)  # (I, N, T), (I, W)
    w_sum, u_sum = replace_zeros(jnp.sum(w, 1)), replace_zeros(words.sum(u))  # (I, T)

    directions = []
    if local in ("both", "t2i"):
        alpha = attention.over_regions * words.broadcast(w)
        cosines = normalize_product(jnp.sum(alpha * S, 1), regions.squared_norms(alpha))  # (I, W)
        directions.append(words.sum(u * cosines) / u_sum)
    if local in ("both", "i2t"):
        beta = attention.over_words * u[:, None]
        cosines = normalize_product(words.sum_unmasked(beta * S), words.squared_norms(beta))  # (I, N, T)
        directions.append(jnp.sum(w * cosines, 1) / w_sum)

    global_score = products.pooled
    if global_input == "weighted":
        # sum_ij w_i S_ij u_j, summed over regions first, because the local branch has made words.broadcast(w) already.
        cross = words.sum(u * jnp.sum(words.broadcast(w) * S, 1)) / (w_sum * u_sum)  # (I, T)
        # Unused columns of packed words belong to no text: words.broadcast gives them 0, which is replaced.
        w, u = w / w_sum[:, None], u / replace_zeros(words.broadcast(u_sum))
        global_score = _compute_weighted_cosine(products, regions, words, w, u, cross)
    if evidence_lam is not None:
        attention = compute_attention(S, regions, words, evidence_lam, stabilized)
        h_v, h_t = entropy.compute_all_pairs(S, attention, regions, words, evidence_lam)
    return sum(directions) / len(directions), global_score, average_fragments_all_pairs(h_v, h_t, regions, words)


def _compute_weights(h_v, h_t, regions: RegionBlock, kappa):
    """Returns the weights of regions `(I, N, T)` and words `(I, W)` without their denominators (docs/method.md, Eqs. 17
    and 18). Only those of regions are masked: sums over regions are plain sums, but `words.sum` leaves out masked
    words."""
    if kappa is None:
        return jnp.broadcast_to(1.0 * regions.mask[..., None], h_v.shape), jnp.ones_like(h_t)
    # No maximum is subtracted, since h lies in [0, 1].
    w, u = (jnp.exp(jnp.maximum(-kappa * h, MIN_LOG_WEIGHT)) for h in (h_v, h_t))
    return w * regions.mask[..., None], u


def compute_attention(S, regions: RegionBlock, words: PaddedTexts | PackedTexts, lam, stabilized: bool) -> Attention:
    """Computes both softmaxes of `lam S`. If `stabilized`, a value at or close to each row's maximum is subtracted
    first, so that any `lam` is safe (docs/method.md, Eq. 33)."""
    mask = regions.mask_for(words)
    if not stabilized:
        plain = jnp.where(mask, jnp.exp(lam * S), 0.0)
        return Attention(plain, lam * S, plain, lam * S)
    # Any shift cancels in the softmax, so it carries no gradient.
    fixed = jax.lax.stop_gradient(S)
    word_shift = words.near_maximum(fixed, jax.lax.stop_gradient(jnp.minimum(lam, MAX_PLAIN_SCALE)))
    region_shift = jnp.max(jnp.where(mask, fixed, -1.0), 1)
    # The limit is for masked entries, whose exponentials could become infinite. All others are at most 0 except for
    # rounding, so that a limit of 1 never touches them.
    over_words_logits = jnp.minimum(lam * (S - words.broadcast(word_shift)), 1.0)
    over_regions_logits = jnp.minimum(lam * (S - region_shift[:, None]), 1.0)
    over_words, over_regions = (jnp.where(mask, jnp.exp(x), 0.0) for x in (over_words_logits, over_regions_logits))
    return Attention(over_words, over_words_logits, over_regions, over_regions_logits)


def _compute_weighted_cosine(products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts, w, u, cross):
    """Computes cos(v_g + sum_i w_i v_i, t_g + sum_j u_j t_j), `(I, T)`, from the weights `w (I, N, T)` and `u (I, W)`,
    `cross = sum_ij w_i S_ij u_j (I, T)`, and products alone (docs/method.md, Eq. 31)."""
    with_pooled = jnp.sum(w * products.regions_pooled, 1) + words.sum(u * products.pooled_words)
    product = products.pooled + with_pooled + cross
    left = regions.pooled_squares[:, None] + 2 * jnp.einsum("int,in->it", w, regions.pooled_products)
    right = words.pooled_squares + 2 * words.sum(u * words.pooled_products)
    # One length at a time: each is compared with TINY, and the two squares are never multiplied.
    product = normalize_product(product, left + regions.squared_norms(w))
    return normalize_product(product, right + words.squared_norms(u))


def normalize_product(product, square):
    """Returns `product / sqrt(square)`, and 0, with gradient 0, where `square`, the squared length of the vector, is at
    most TINY (docs/method.md, Eqs. 29 to 31)."""
    return product * inverse_sqrt(square, TINY)


def inverse_sqrt(square, limit: float):
    """Returns one over the square root, and 0, with gradient 0, where `square` is at most `limit`."""
    nonzero = square > limit
    return jnp.where(nonzero, jax.lax.rsqrt(jnp.where(nonzero, square, 1.0)), 0.0)


def limit_scale(log_scale):
    """Returns the exponential of a learned logarithm, at most MAX_PLAIN_SCALE, so that the exponentials of scaled
    cosines and their squares fit into float32. The gradient passes through the limit (docs/method.md, Eq. 46)."""
    excess = jnp.maximum(log_scale - jnp.log(MAX_PLAIN_SCALE), 0.0)
    return jnp.exp(log_scale - jax.lax.stop_gradient(excess))
