"""Layouts of images and texts for matchers whose scores follow from inner products alone (`Matcher.score_products`).

Texts come in two layouts with the same fields and methods, so that each formula is written once: `PaddedTexts`, from
what encoders return (training), and `PackedTexts`, several texts side by side without padding (evaluation). W stands
for the word axes: `(M, T)` padded, `(L,)` packed. An array over words is `(..., W)`, an array over texts `(..., T)`.
docs/method.md, section 8, has a picture of both. Letters: I images, T texts, N regions, M words of a text, L words of a
group of texts, D dimensions.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mefn_jax.features import MASKED_LOGIT, Features

# For products with matrices of 0 and 1, which are sums: a TPU would otherwise round their terms to bfloat16.
FULL_PRECISION = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class Products:
    """Inner products of images with texts, which have no axis of D dimensions.

    Attributes:
        S: float32 `(I, N, W)`, regions with words: cosines, since both are unit vectors.
        regions_pooled: float32 `(I, N, T)`, regions with the texts' pooled embeddings; None for a matcher without
            `uses_pooled_products`.
        pooled_words: float32 `(I, W)`, the images' pooled embeddings with words; None as well.
        pooled: float32 `(I, T)`, pooled embeddings with one another.
    """

    S: jax.Array
    regions_pooled: jax.Array | None
    pooled_words: jax.Array | None
    pooled: jax.Array


def no_projection(*_):
    """Returns None in place of `Matcher.project_regions` and `project_words`: for matchers that take no projections."""
    return None


def replace_zeros(x):
    """Returns sums of positive numbers, with 1 in place of an empty sum."""
    return jnp.where(x > 0, x, 1.0)


def squared_norms(multiply, multiply_pairs, axis: int, gram, x):
    """Returns the squared lengths of sums with weights x, `x' G x` along `axis`, for symmetric matrices `gram`.

    `multiply(gram, x)` is `G x`, and `multiply_pairs(y, x)` the sum of `y x'` over all that have one matrix in common.
    That G is symmetric spares one of the gradient's three products.
    """

    @jax.custom_vjp
    def compute(gram, x):
        return jnp.sum(x * multiply(gram, x), axis)

    def forward(gram, x):
        y = multiply(gram, x)
        return jnp.sum(x * y, axis), (x, y)

    def backward(residuals, gradient):
        x, y = residuals
        gradient = jnp.expand_dims(gradient, axis)
        return multiply_pairs(gradient * x, x), 2 * gradient * y

    compute.defvjp(forward, backward)
    return compute(gram, x)


def multiply_grams(multiply, multiply_pairs, gram, x):
    """Returns `multiply(gram, x)`, the products `G x` with symmetric matrices; arguments as for `squared_norms`. The
    gradient is `G y` and the pairs of x and y for a gradient y of the result: JAX's own is slow for plain sums."""

    @jax.custom_vjp
    def compute(gram, x):
        return multiply(gram, x)

    def backward(inputs, gradient):
        gram, x = inputs
        return multiply_pairs(x, gradient), multiply(gram, gradient)

    compute.defvjp(lambda gram, x: (compute(gram, x), (gram, x)), backward)
    return compute(gram, x)


def inner_products(x, y):
    """Returns the inner products of all vectors `x (A..., D)` with all `y (B..., D)`, `(A..., B...)`.

    The gradient is written out because JAX's own makes a transposed copy of an array `(A..., B...)`, the largest here.
    """

    @jax.custom_vjp
    def compute(x, y):
        return jnp.tensordot(x, y, (-1, -1))

    def backward(vectors, gradient):
        x, y = vectors
        axes = tuple(range(x.ndim - 1))
        y_gradient = jnp.tensordot(x, gradient, (axes, axes))  # (D, B...)
        return jnp.tensordot(gradient, y, y.ndim - 1), jnp.moveaxis(y_gradient, 0, -1)

    compute.defvjp(lambda x, y: (compute(x, y), (x, y)), backward)
    return compute(x, y)


def gram_matrices(x):
    """Returns the Gram matrices `(B, L, L)` of vectors `x (B, L, D)`. Their gradient is one product instead of two."""

    @jax.custom_vjp
    def compute(x):
        return jnp.einsum("bld,bkd->blk", x, x)

    def backward(x, gradient):
        return (jnp.einsum("blk,bkd->bld", gradient + jnp.swapaxes(gradient, 1, 2), x),)

    compute.defvjp(lambda x: (compute(x), x), backward)
    return compute(x)


@flax.struct.dataclass
class RegionBlock:
    """Images laid out for a Gram form; the products are made once for each image.

    Attributes:
        vectors: float32 `(I, N, D)`, the regions, zero where masked; None where only products are at hand.
        pooled: float32 `(I, D)`, the pooled embeddings; None as well.
        mask: bool `(I, N)`, which regions exist.
        gram: float32 `(I, N, N)`, inner products of an image's regions with one another.
        pooled_products: float32 `(I, N)`, inner products of the regions with their image's `pooled`.
        pooled_squares: float32 `(I,)`, squared lengths of `pooled`.
        projections: float32 `(I, N, G)`, each region's `Matcher.project_regions`; None for a matcher without it.
    """

    vectors: jax.Array | None
    pooled: jax.Array | None
    mask: jax.Array
    gram: jax.Array
    pooled_products: jax.Array
    pooled_squares: jax.Array
    projections: jax.Array | None = None

    def log_mask_for(self, words) -> jax.Array:
        """Returns the mask as a term to add to logits, `(I, N, 1...)` like `mask_for`: 0 for regions that exist,
        MASKED_LOGIT for masked ones, whose exponential is then exactly 0. To set exponentials to 0 afterwards would
        take a pass more, forwards and backwards."""
        return jnp.where(self.mask_for(words), 0.0, MASKED_LOGIT)

    def mask_for(self, words) -> jax.Array:
        """Returns the mask `(I, N, 1...)`, which broadcasts to arrays `(I, N, W)` over the layout of `words`."""
        return self.mask.reshape(*self.mask.shape, *[1] * words.word_axes)

    def multiply_gram(self, x):
        """Returns the products `(I, N, W)` of each image's Gram matrix with `x (I, N, W)`: `G x`."""
        flat = x.reshape(*x.shape[:2], -1)
        return multiply_grams(jnp.matmul, _multiply_region_pairs, self.gram, flat).reshape(x.shape)

    def squared_norms(self, x):
        """Returns the squared lengths `(I, W)` of each image's sums of regions with weights `x (I, N, W)`: `x' G x`."""
        flat = x.reshape(*x.shape[:2], -1)
        squares = squared_norms(jnp.matmul, _multiply_region_pairs, 1, self.gram, flat)
        return squares.reshape(len(x), *x.shape[2:])


def _multiply_region_pairs(y, x):
    """Returns `(I, N, N)`, the sums over words of products of `y (I, N, W)` and `x (I, N, W)`, W one axis."""
    return jnp.einsum("inw,ikw->ink", y, x)


def region_block(images: Features, project=no_projection) -> RegionBlock:
    """Returns the RegionBlock of encoded images; `project` is the matcher's `project_regions`."""
    v, pooled = images.fragments, images.pooled
    products, squares = jnp.einsum("ind,id->in", v, pooled), jnp.sum(pooled**2, -1)
    return RegionBlock(v, pooled, images.mask, gram_matrices(v), products, squares, project(v))


@flax.struct.dataclass
class PaddedTexts:
    """Texts padded to M words: `W = (M, T)`. Texts are the last axis because all sums run over other axes, so that a
    processor adds up whole vectors of texts.

    Attributes:
        vectors: float32 `(M, T, D)`, the words, zero where masked; None where only products are at hand.
        pooled: float32 `(T, D)`, the pooled embeddings; None as well.
        mask: bool `(M, T)`, which words exist.
        gram: float32 `(M, M, T)`, inner products of a text's words with one another.
        pooled_products: float32 `(M, T)`, inner products of the words with their text's `pooled`.
        pooled_squares: float32 `(T,)`, squared lengths of `pooled`.
        projections: float32 `(G, M, T)`, each word's `Matcher.project_words`; None for a matcher without it.
        word_axes: the number of axes in W.
    """

    vectors: jax.Array | None
    pooled: jax.Array | None
    mask: jax.Array
    gram: jax.Array
    pooled_products: jax.Array
    pooled_squares: jax.Array
    projections: jax.Array | None = None
    word_axes = 2

    def multiply(self, regions: RegionBlock, with_pooled: bool) -> Products:
        """Returns the Products with images; without `with_pooled` those of pooled embeddings with fragments are
        None."""

        pooled, S = inner_products(regions.pooled, self.pooled), inner_products(regions.vectors, self.vectors)
        if not with_pooled:
            return Products(S, None, None, pooled)
        regions_pooled = inner_products(regions.vectors, self.pooled)
        return Products(S, regions_pooled, inner_products(regions.pooled, self.vectors), pooled)

    def sum(self, x):
        """Returns the sum `(..., T)` of `x (..., M, T)` over the words of each text."""
        return jnp.sum(jnp.where(self.mask, x, 0.0), -2)

    def sum_unmasked(self, x):
        """Returns the same as `sum`, without applying the mask: `x (..., M, T)` must be 0 at masked words, as products
        with their vectors are. This saves a pass over the largest arrays."""
        return jnp.sum(x, -2)

    def near_maximum(self, x, scale):
        """Returns the largest of cosines `x (..., M, T)` among the words of each text, `(..., T)`. `scale` is not used
        (see `PackedTexts.near_maximum`)."""
        return jnp.max(jnp.where(self.mask, x, -1.0), -2)

    def broadcast(self, y):
        """Returns the value of each text, `y (..., T)`, for its words: `(..., 1, T)`, which broadcasts to W."""
        return y[..., None, :]

    def multiply_gram(self, x):
        """Returns the products `(..., M, T)` of each text's Gram matrix with `x (..., M, T)`: `G x`."""
        return multiply_grams(_add_word_grams, _multiply_word_pairs, self.gram, x)

    def squared_norms(self, x):
        """Returns the squared lengths `(..., T)` of each text's sum of words with weights `x (..., M, T)`: `x' G x`."""
        return squared_norms(_multiply_word_grams, _multiply_word_pairs, -2, self.gram, x)

    def lengths(self):
        """Returns the number of words of each text, `(T,)`."""
        return jnp.sum(self.mask, 0)

    def single_masks(self):
        """Returns the mask of the words of each text alone, bool `(T, M, T)`."""
        return self.mask & jnp.eye(self.mask.shape[1], dtype=bool)[:, None]


def _multiply_word_grams(gram, x):
    """Returns the products `(..., M, T)` of the texts' Gram matrices `(M, M, T)` with `x (..., M, T)`.

    The matrices are small, and the axis of texts is the last. A CPU is fastest with plain sums, for which nothing is
    transposed; other platforms have matrix units.
    """
    return jax.lax.platform_dependent(
        gram,
        x,
        cpu=lambda gram, x: jnp.sum(x[..., :, None, :] * gram, -3),
        default=lambda gram, x: jnp.einsum("kmt,...kt->...mt", gram, x),
    )


def _add_word_grams(gram, x):
    """Returns `_multiply_word_grams(gram, x)`, faster on a CPU for a result that is not summed at once: a term for each
    word. XLA would otherwise compute x anew for every word of the result."""
    return jax.lax.platform_dependent(
        gram,
        x,
        cpu=lambda gram, x: sum(x[..., k, None, :] * gram[k] for k in range(len(gram))),
        default=_multiply_word_grams,
    )


def _multiply_word_pairs(y, x):
    """Returns `(M, M, T)`, the sums over the leading axes of products of `y (..., M, T)` and `x (..., M, T)`. As in
    `_multiply_word_grams`, a CPU is fastest without transposed arrays."""
    y, x = (z.reshape(-1, *z.shape[-2:]) for z in (y, x))

    def product(y, x, k):
        return y[k, :, None] * x[k]

    def add_products(y, x):
        return jax.lax.fori_loop(1, len(y), lambda k, total: total + product(y, x, k), product(y, x, 0))

    return jax.lax.platform_dependent(y, x, cpu=add_products, default=lambda y, x: jnp.einsum("bkt,bmt->kmt", y, x))


def to_padded(texts: Features, project=no_projection) -> PaddedTexts:
    """Returns the PaddedTexts of encoded texts; `project` is the matcher's `project_words`."""
    t, pooled = jnp.swapaxes(texts.fragments, 0, 1), texts.pooled
    gram, products = jnp.moveaxis(gram_matrices(texts.fragments), 0, -1), jnp.einsum("mtd,td->mt", t, pooled)
    projections = _move_projections(project(t))
    return PaddedTexts(t, pooled, texts.mask.T, gram, products, jnp.sum(pooled**2, -1), projections)


def _move_projections(projections):
    """Returns the projections of words `(W, G)` as `(G, W)`."""
    return None if projections is None else jnp.moveaxis(projections, -1, 0)


@flax.struct.dataclass
class PackedTexts:
    """Texts of one group, packed side by side without padding: `W = (L,)`. Unused rows and columns are zero.

    Attributes:
        vectors: float32 `(L, D)`, the words; None where only products are at hand.
        pooled: float32 `(T, D)`, the pooled embeddings; None as well.
        membership: float32 `(L, T)`, 1 where word l belongs to text t, so that sums per text are matrix products.
        gram: float32 `(L, L)`, inner products of words of the same text, 0 elsewhere.
        pooled_products: float32 `(L,)`, inner products of the words with their text's `pooled`.
        pooled_squares: float32 `(T,)`, squared lengths of `pooled`.
        projections: float32 `(G, L)`, each word's `Matcher.project_words`; None for a matcher without it.
        word_axes: the number of axes in W.
    """

    vectors: jax.Array | None
    pooled: jax.Array | None
    membership: jax.Array
    gram: jax.Array
    pooled_products: jax.Array
    pooled_squares: jax.Array
    projections: jax.Array | None = None
    word_axes = 1

    def multiply(self, regions: RegionBlock, with_pooled: bool) -> Products:
        """Returns the Products with images, as `PaddedTexts.multiply` does."""
        return self.multiply_words(regions, regions.vectors @ self.pooled.T if with_pooled else None)

    def multiply_words(self, regions: RegionBlock, regions_pooled) -> Products:
        """Returns the Products with images, given `regions_pooled (I, N, T)`, the products of regions with the texts'
        pooled embeddings: a caller with many texts makes them in one matrix product. If None, the result has no
        products of pooled embeddings with words either."""
        pooled_words = None if regions_pooled is None else regions.pooled @ self.vectors.T
        S, pooled = regions.vectors @ self.vectors.T, regions.pooled @ self.pooled.T
        return Products(S, regions_pooled, pooled_words, pooled)

    def sum(self, x):
        """Returns the sum `(..., T)` of `x (..., L)` over the words of each text."""
        return jnp.matmul(x, self.membership, precision=FULL_PRECISION)

    def sum_unmasked(self, x):
        """Returns the same as `sum`: packed texts have no masked words."""
        return self.sum(x)

    def near_maximum(self, x, scale):
        """Returns a value near the largest of cosines `x (..., L)` among the words of each text, `(..., T)`: the
        log-sum-exp of `scale x` divided by `scale`, at most ln(M) / scale above it. Packed words have sums per text,
        but no maxima."""
        return jnp.log(replace_zeros(self.sum(jnp.exp(scale * x)))) / scale

    def broadcast(self, y):
        """Returns the value of each text, `y (..., T)`, at each of its words, `(..., L)`."""
        return jnp.matmul(y, self.membership.T, precision=FULL_PRECISION)

    def multiply_gram(self, x):
        """Returns the products `(..., L)` of the words' Gram matrix with `x (..., L)`: `G x`."""
        return x @ self.gram

    def squared_norms(self, x):
        """Returns the squared lengths `(..., T)` of each text's sum of words with weights `x (..., L)`: `x' G x`."""
        return self.sum(x * self.multiply_gram(x))

    def lengths(self):
        """Returns the number of words of each text, `(T,)`."""
        return jnp.sum(self.membership, 0)

    def single_masks(self):
        """Returns the mask of the words of each text alone, bool `(T, L)`."""
        return self.membership.T > 0


def to_packed(vectors, membership, pooled, project=no_projection) -> PackedTexts:
    """Returns K groups as one PackedTexts whose arrays are `(K, ...)`; scoring takes one group out of it at a time."""
    return jax.lax.map(lambda group: pack_group(*group, project), (vectors, membership, pooled))


def pack_group(vectors, membership, pooled, project=no_projection) -> PackedTexts:
    """Returns the PackedTexts of one group: `vectors (L, D)`, `membership (L, T)`, `pooled (T, D)`; `project` is the
    matcher's `project_words`."""
    gram = (vectors @ vectors.T) * (membership @ membership.T)
    products, squares = jnp.sum(membership * (vectors @ pooled.T), -1), jnp.sum(pooled**2, -1)
    return PackedTexts(vectors, pooled, membership, gram, products, squares, _move_projections(project(vectors)))


def separate_vectors(regions: RegionBlock, words: PaddedTexts | PackedTexts, with_pooled: bool) -> tuple:
    """Returns the arguments of `Matcher.score_products`: the Products of images with texts (see `multiply` for
    `with_pooled`), and `regions` and `words` without their vectors."""
    return words.multiply(regions, with_pooled), *map(remove_vectors, (regions, words))


def remove_vectors(layout):
    """Returns a RegionBlock or texts without vectors, as `Matcher.score_products` takes them."""
    return layout.replace(vectors=None, pooled=None)
