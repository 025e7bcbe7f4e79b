"""The two sides of a tile of pairs, as the Gram forms (`gram.py`, `scan.py`) take them: images with the products of
their regions, and the words of several texts beside one another.

Words stand in one of two arrangements with the same fields and methods, so that each formula is written once. `Padded`
is how an encoder gives them, in training; `Packed` has no padding, in evaluation. An array over the words has the axes
`(..., W)`, which are `(..., T, M)` for Padded and `(..., L)` for Packed, one over the texts `(..., T)`. Letters:
I images, T texts, N regions, M words of a text, L words of a group of texts, D dimensions.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mefn_jax.features import Features

# Sums over 0 and 1, which a TPU would otherwise make of bfloat16 values.
FULL_PRECISION = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class RegionBlock:
    """Images: `vectors` float32 `(I, N, D)`, zero where `mask` bool `(I, N)` is False, `pooled` `(I, D)`, and, made
    once an image, the products of its regions: `gram` `(I, N, N)`, with one another, `own` `(I, N)`, with `pooled`."""

    vectors: jax.Array
    mask: jax.Array
    pooled: jax.Array
    gram: jax.Array
    pooled_products: jax.Array

    def mask_for(self, words) -> jax.Array:
        """The mask `(I, N, 1...)`, to stand beside arrays `(I, N, W)`."""
        return self.mask.reshape(*self.mask.shape, *[1] * words.word_axes)

    def squared_norms(self, x):
        """`x' G x` of weights `x (I, N, W)`: the squared lengths `(I, W)` of what they sum the regions to."""
        flat = x.reshape(*x.shape[:2], -1)
        return jnp.sum(flat * jnp.einsum("ink,ikw->inw", self.gram, flat), 1).reshape(len(x), *x.shape[2:])


def region_block(images: Features) -> RegionBlock:
    """Regions of Features."""
    v = images.fragments
    gram, own = jnp.einsum("ind,ikd->ink", v, v), jnp.einsum("ind,id->in", v, images.pooled)
    return RegionBlock(v, images.mask, images.pooled, gram, own)


@flax.struct.dataclass
class PaddedTexts:
    """Texts of M words, of which those exist that `mask` bool `(T, M)` says; `vectors` float32 `(T, M, D)`, `pooled`
    `(T, D)`, `gram` `(T, M, M)`, the products of a text's words with one another, `own` `(T, M)`, with `pooled`."""

    vectors: jax.Array
    mask: jax.Array
    pooled: jax.Array
    gram: jax.Array
    pooled_products: jax.Array
    word_axes = 2  # of W

    def products(self, x):
        """Of vectors `(..., D)` with all words: `(..., T, M)`."""
        return jnp.einsum("...d,tmd->...tm", x, self.vectors)

    def products_with_pooled(self, x):
        """`products`, and those with the texts' pooled vectors, `(..., T)`."""
        return self.products(x), x @ self.pooled.T

    def sum(self, x):
        """Each text's sum `(..., T)` of `x (..., T, M)`."""
        return jnp.sum(jnp.where(self.mask, x, 0.0), -1)

    def broadcast(self, y):
        """A text's value `(..., T)` at each of its words `(..., T, M)`, to be broadcast."""
        return y[..., None]

    def squared_norms(self, x):
        """`x' G x` of weights `x (..., T, M)`: the squared lengths `(..., T)` of what they sum a text's words to."""
        return jnp.sum(x * jnp.einsum("...tm,tmk->...tk", x, self.gram), -1)

    def lengths(self):
        """How many words each text has, `(T,)`."""
        return jnp.sum(self.mask, -1)


def to_padded(texts: Features) -> PaddedTexts:
    """Padded of Features."""
    t = texts.fragments
    gram, own = jnp.einsum("tmd,tkd->tmk", t, t), jnp.einsum("tmd,td->tm", t, texts.pooled)
    return PaddedTexts(t, texts.mask, texts.pooled, gram, own)


@flax.struct.dataclass
class PackedTexts:
    """A group of texts whose words stand side by side: `vectors` float32 `(L, D)`; `of` float32 `(L, T)`, 1 where a
    word is a text's and 0 elsewhere, so that sums are matrix products; `pooled` `(T, D)`; `gram` `(L, L)`, the products
    of words of one text, 0 of others; `own` `(L,)`, of words with their text's `pooled`. What is left of L and T is
    zero."""

    vectors: jax.Array
    membership: jax.Array
    pooled: jax.Array
    gram: jax.Array
    pooled_products: jax.Array
    word_axes = 1  # of W

    def products(self, x):
        """As Padded's, `(..., L)`."""
        return x @ self.vectors.T

    def products_with_pooled(self, x):
        """As Padded's, `(..., L)` and `(..., T)`; by one product, so that `x` is read once."""
        both = x @ jnp.concatenate([self.vectors, self.pooled]).T
        return both[..., : len(self.vectors)], both[..., len(self.vectors) :]

    def sum(self, x):
        """As Padded's."""
        return jnp.matmul(x, self.membership, precision=FULL_PRECISION)

    def broadcast(self, y):
        """As Padded's, `(..., L)`."""
        return jnp.matmul(y, self.membership.T, precision=FULL_PRECISION)

    def squared_norms(self, x):
        """As Padded's."""
        return self.sum(x * (x @ self.gram))

    def lengths(self):
        """As Padded's."""
        return jnp.sum(self.membership, 0)


def to_packed(vectors, of, pooled) -> PackedTexts:
    """K groups as one Packed of arrays `(K, ...)`, of which a group is taken to be scored."""
    return jax.lax.map(lambda group: pack_group(*group), (vectors, of, pooled))


def pack_group(vectors, of, pooled) -> PackedTexts:
    """One group as Packed."""
    gram, own = (vectors @ vectors.T) * (of @ of.T), jnp.sum(of * (vectors @ pooled.T), -1)
    return PackedTexts(vectors, of, pooled, gram, own)
