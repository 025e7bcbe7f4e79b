"""Contract between encoders and matchers: `Features`, an encoded batch of images or texts."""

import flax.struct
import jax
import jax.numpy as jnp

MASKED_LOGIT = -1e30  # a logit so low that its softmax is exactly 0
EPS = 1e-12  # a vector whose squared length is at most this counts as zero


@flax.struct.dataclass
class Features:
    """Encoded images or texts (docs/method.md, Eq. 1): B items, L fragments, D dimensions.

    Attributes:
        fragments: float32 `(B, L, D)`, image regions or words (wordpieces without [CLS], [SEP]); unit length, exactly
            zero where masked.
        mask: bool `(B, L)`, which fragments exist.
        pooled: float32 `(B, D)`, the pooled embedding, unit length.
        extra: further arrays `(B, ...)` by name; whatever moves Features moves them too.
    """

    fragments: jax.Array
    mask: jax.Array
    pooled: jax.Array
    extra: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


def safe_norm(x, axis=-1, keepdims=False):
    """Returns the Euclidean norm along `axis`. Its gradient at a zero vector is zero instead of NaN."""
    square = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    positive = square > EPS
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def unit(x, axis=-1):
    """Returns `x` scaled to unit length along `axis`; zero vectors stay zero. Computed in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    norm = safe_norm(x, axis=axis, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1.0)


def make_features(fragments, mask, pooled, extra=None) -> Features:
    """Returns the Features of raw vectors: unit length, masked fragments exactly zero (docs/method.md, Eq. 1)."""
    return Features(unit(fragments) * mask[..., None], mask, unit(pooled), extra or {})
