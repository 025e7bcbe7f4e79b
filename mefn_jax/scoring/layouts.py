"""Layouts of a tile of images x texts for the Gram-matrix matchers (`matching/gram.py`, `matching/scan.py`).

Texts come in two layouts with the same fields and methods, so that each formula is written once: `PaddedTexts`, as
encoders return them (training), and `PackedTexts`, several texts side by side without padding (evaluation). W stands
for the word axes: `(T, M)` padded, `(L,)` packed. An array over words is `(..., W)`, an array over texts `(..., T)`.
docs/method.md, section 8, has a picture of both. Letters: I images, T texts, N regions, M words of a text, L words of a
group of texts, D dimensions.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mefn_jax.features import Features

# For products with matrices of 0 and 1, which are sums: a TPU would otherwise round their terms to bfloat16.
FULL_PRECISION = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class RegionBlock:
    """Images laid out for a Gram form; the products are made once for each image.

    Attributes:
        vectors: float32 `(I, N, D)`, the regions, zero where masked.
        mask: bool `(I, N)`, which regions exist.
        pooled: float32 `(I, D)`, the pooled embeddings.
        gram: float32 `(I, N, N)`, inner products of an image's regions with one another.
        pooled_products: float32 `(I, N)`, inner products of the regions with their image's `pooled`.
    """

    vectors: jax.Array
    mask: jax.Array
    pooled: jax.Array
    gram: jax.Array
    pooled_products: jax.Array

    def mask_for(self, words) -> jax.Array:
        """Returns the mask `(I, N, 1...)`, which broadcasts to arrays `(I, N, W)` over the layout of `words`."""
        return self.mask.reshape(*self.mask.shape, *[1] * words.word_axes)

    def squared_norms(self, x):
        """Returns the squared lengths `(I, W)` of each image's sums of regions with weights `x (I, N, W)`: `x' G x`."""
        flat = x.reshape(*x.shape[:2], -1)
        return jnp.sum(flat * jnp.einsum("ink,ikw->inw", self.gram, flat), 1).reshape(len(x), *x.shape[2:])


def region_block(images: Features) -> RegionBlock:
    """Returns the RegionBlock of encoded images."""
    v = images.fragments
    gram, pooled_products = jnp.einsum("ind,ikd->ink", v, v), jnp.einsum("ind,id->in", v, images.pooled)
    return RegionBlock(v, images.mask, images.pooled, gram, pooled_products)


@flax.struct.dataclass
class PaddedTexts:
    """Texts padded to M words, as encoders return them: `W = (T, M)`.

    Attributes:
        vectors: float32 `(T, M, D)`, the words, zero where masked.
        mask: bool `(T, M)`, which words exist.
        pooled: float32 `(T, D)`, the pooled embeddings.
        gram: float32 `(T, M, M)`, inner products of a text's words with one another.
        pooled_products: float32 `(T, M)`, inner products of the words with their text's `pooled`.
        word_axes: the number of axes in W.
    """

    vectors: jax.Array
    mask: jax.Array
    pooled: jax.Array
    gram: jax.Array
    pooled_products: jax.Array
    word_axes = 2

    def products(self, x):
        """Returns the inner products `(..., T, M)` of vectors `x (..., D)` with all words."""
        return jnp.einsum("...d,tmd->...tm", x, self.vectors)

    def products_with_pooled(self, x):
        """Returns `products(x)`, and the inner products `(..., T)` of `x` with the pooled embeddings."""
        return self.products(x), x @ self.pooled.T

    def sum(self, x):
        """Returns the sum `(..., T)` of `x (..., T, M)` over the words of each text."""
        return jnp.sum(jnp.where(self.mask, x, 0.0), -1)

    def broadcast(self, y):
        """Returns the value of each text, `y (..., T)`, for its words: `(..., T, 1)`, which broadcasts to W."""
        return y[..., None]

    def squared_norms(self, x):
        """Returns the squared lengths `(..., T)` of each text's sum of words with weights `x (..., T, M)`: `x' G x`."""
        return jnp.sum(x * jnp.einsum("...tm,tmk->...tk", x, self.gram), -1)

    def lengths(self):
        """Returns the number of words of each text, `(T,)`."""
        return jnp.sum(self.mask, -1)


def to_padded(texts: Features) -> PaddedTexts:
    """Returns the PaddedTexts of encoded texts."""
    t = texts.fragments
    gram, pooled_products = jnp.einsum("tmd,tkd->tmk", t, t), jnp.einsum("tmd,td->tm", t, texts.pooled)
    return PaddedTexts(t, texts.mask, texts.pooled, gram, pooled_products)


@flax.struct.dataclass
class PackedTexts:
    """Texts of one group, packed side by side without padding: `W = (L,)`. Unused rows and columns are zero.

    Attributes:
        vectors: float32 `(L, D)`, the words.
        membership: float32 `(L, T)`, 1 where word l belongs to text t, so that sums per text are matrix products.
        pooled: float32 `(T, D)`, the pooled embeddings.
        gram: float32 `(L, L)`, inner products of words of the same text, 0 elsewhere.
        pooled_products: float32 `(L,)`, inner products of the words with their text's `pooled`.
        word_axes: the number of axes in W.
    """

    vectors: jax.Array
    membership: jax.Array
    pooled: jax.Array
    gram: jax.Array
    pooled_products: jax.Array
    word_axes = 1

    def products(self, x):
        """Returns the inner products `(..., L)` of vectors `x (..., D)` with all words."""
        return x @ self.vectors.T

    def products_with_pooled(self, x):
        """Returns `products(x)`, `(..., L)`, and the inner products `(..., T)` of `x` with the pooled embeddings, by
        one matrix product, so that `x` is read once."""
        both = x @ jnp.concatenate([self.vectors, self.pooled]).T
        return both[..., : len(self.vectors)], both[..., len(self.vectors) :]

    def sum(self, x):
        """Returns the sum `(..., T)` of `x (..., L)` over the words of each text."""
        return jnp.matmul(x, self.membership, precision=FULL_PRECISION)

    def broadcast(self, y):
        """Returns the value of each text, `y (..., T)`, at each of its words, `(..., L)`."""
        return jnp.matmul(y, self.membership.T, precision=FULL_PRECISION)

    def squared_norms(self, x):
        """Returns the squared lengths `(..., T)` of each text's sum of words with weights `x (..., L)`: `x' G x`."""
        return self.sum(x * (x @ self.gram))

    def lengths(self):
        """Returns the number of words of each text, `(T,)`."""
        return jnp.sum(self.membership, 0)


def to_packed(vectors, membership, pooled) -> PackedTexts:
    """Returns K groups as one PackedTexts whose arrays are `(K, ...)`; scoring takes one group out of it at a time."""
    return jax.lax.map(lambda group: pack_group(*group), (vectors, membership, pooled))


def pack_group(vectors, membership, pooled) -> PackedTexts:
    """Returns the PackedTexts of one group: `vectors (L, D)`, `membership (L, T)`, `pooled (T, D)`."""
    gram, pooled_products = (
        (vectors @ vectors.T) * (membership @ membership.T),
        jnp.sum(membership * (vectors @ pooled.T), -1),
    )
    return PackedTexts(vectors, membership, pooled, gram, pooled_products)
