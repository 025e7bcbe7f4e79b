"""MEFN's scores of all pairs without attended vectors (DESIGN.md 3.5): the form that training and evaluation use.

A cosine is scale-free in the attention, so `t_j . a_j = sum_i alpha_ij S_ij` and `|a_j|^2 = alpha_j' G alpha_j` need
no normaliser and no vector: G, the products of an image's regions with one another, is made once an image. Equal to
`mefn.pair`, which is the one to read first; a test holds the two together. Letters: I images, T texts, N regions,
M words, D dimensions.
"""

import jax
import jax.numpy as jnp

from mefn_jax.matching.entropy import masked_log_softmax
from mefn_jax.matching.features import EPS, Features


def all_pairs(images: Features, texts: Features, *, scale, sharpness, entropy, attend, global_input):
    """All pairs' local and global scores, float32 `(I, T)` each; arguments as for `mefn.pair`, with a batch axis."""
    v, t = images.fragments, texts.fragments  # (I, N, D), (T, M, D)
    S = jnp.einsum("ind,tmd->itnm", v, t)
    gram_v, gram_t = jnp.einsum("ind,ikd->ink", v, v), jnp.einsum("tmd,tkd->tmk", t, t)
    over_texts = jax.vmap(entropy, (0, None, 0, None))
    _, H_v, H_t = jax.vmap(over_texts, (0, 0, None, None))(S, images.mask, texts.mask, scale)
    w = _weights(-sharpness * H_v, images.mask[:, None])  # (I, T, N)
    u = _weights(-sharpness * H_t, texts.mask[None])  # (I, T, M)

    mask = images.mask[:, None, :, None] & texts.mask[None, :, None, :]
    alpha = attention(scale * S - sharpness * H_v[..., :, None], mask, axis=2)
    beta = attention(scale * S - sharpness * H_t[..., None, :], mask, axis=3)
    words = cosine(jnp.sum(alpha * S, 2), jnp.sum(alpha * jnp.einsum("ink,itkm->itnm", gram_v, alpha), 2))
    regions = cosine(jnp.sum(beta * S, 3), jnp.sum(beta * jnp.einsum("itnm,tmk->itnk", beta, gram_t), 3))
    words, regions = jnp.sum(u * words, -1), jnp.sum(w * regions, -1)
    local = {"both": 0.5 * (words + regions), "words": words, "regions": regions}[attend]

    whole = images.pooled @ texts.pooled.T
    if global_input == "weighted":
        whole = _weighted_cosine(whole, images, texts, S, gram_v, gram_t, w, u)
    return local, whole


def _weighted_cosine(whole, images, texts, S, gram_v, gram_t, w, u):
    """cos(v_global + sum_i w_i v_i, t_cls + sum_j u_j t_j) from products alone; `whole` is v_global . t_cls."""
    v_to_t = jnp.einsum("ind,td->itn", images.fragments, texts.pooled)
    t_to_v = jnp.einsum("tmd,id->itm", texts.fragments, images.pooled)
    v_to_v = jnp.einsum("ind,id->in", images.fragments, images.pooled)[:, None]
    t_to_t = jnp.einsum("tmd,td->tm", texts.fragments, texts.pooled)[None]
    both = jnp.einsum("itn,itnm,itm->it", w, S, u)
    product = whole + jnp.sum(w * v_to_t, -1) + jnp.sum(u * t_to_v, -1) + both
    square_v = jnp.sum(images.pooled**2, -1)[:, None] + 2 * jnp.sum(w * v_to_v, -1)
    square_t = jnp.sum(texts.pooled**2, -1)[None] + 2 * jnp.sum(u * t_to_t, -1)
    square_v += jnp.einsum("itn,ink,itk->it", w, gram_v, w)
    square_t += jnp.einsum("itm,tmk,itk->it", u, gram_t, u)
    return cosine(cosine(product, square_v), square_t)


def attention(logits, mask, axis):
    """Softmax along `axis` but for its normaliser: the largest entry is 1, so that nothing underflows."""
    highest = jax.lax.stop_gradient(jnp.max(logits, axis, keepdims=True, where=mask, initial=-1e30))
    return jnp.where(mask, jnp.exp(jnp.where(mask, logits - highest, 0.0)), 0.0)


def _weights(logits, mask):
    """Softmax over the last axis where `mask`, 0 elsewhere."""
    return jnp.where(mask, jnp.exp(masked_log_softmax(logits, mask, axis=-1)), 0.0)


def cosine(product, square):
    """`product / sqrt(square)`, and 0, with gradient 0, where the vector is zero."""
    exists = square > EPS
    return jnp.where(exists, product * jax.lax.rsqrt(jnp.where(exists, square, 1.0)), 0.0)
