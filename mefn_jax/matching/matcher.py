"""The contract of a matcher: how a system scores all pairs of encoded images and texts."""

import flax.linen as nn

from mefn_jax.features import Features
from mefn_jax.scoring.layouts import (
    PackedTexts,
    PaddedTexts,
    Products,
    RegionBlock,
    region_block,
    separate_vectors,
    to_padded,
)


class Matcher(nn.Module, kw_only=True):
    """Scores all pairs of images and texts. Subclass it, define `score` or `score_products`, and add a line to `MODELS`
    of `systems.py`.

    The fields of a subclass are its options (`config.matcher`); they are keyword-only and have defaults. A matcher
    whose scores follow from inner products defines `score_products`: training then takes less time and memory, and
    evaluation packs the captions. Any other defines `score`. Everything else is optional. Learned parameters are
    `self.param`s; what is computed once from training items and then stays as it is are variables of the collection
    `constants` (`initial_constants`).

    Attributes:
        hub_vectors: K, the learned hub vectors per side; 0 turns the hubness correction off.
        init_hub_scale: initial scale of its log-mean-exp.

    The hubness correction (docs/method.md, section 9) is subtracted by `Model`, so a matcher knows nothing of it.
    """

    hub_vectors: int = 0
    init_hub_scale: float = 20.0

    uses_pooled_products = False  # True if `score_products` takes products of pooled embeddings with fragments
    is_dual_encoder = False  # True if the score of a pair is the product of its two embeddings (`embed`)

    def __call__(self, images: Features, texts: Features):
        """Returns `score` of transformed items; `Model.init` calls it, so that every parameter is made."""
        return self.score(self.transform_images(images), self.transform_texts(texts))

    def transform_images(self, images: Features) -> Features:
        """Returns what `score` takes of images: the stage that depends on one item alone, computed once for each
        item."""
        return images

    def transform_texts(self, texts: Features) -> Features:
        """Returns what `score` takes of texts, as `transform_images` does."""
        return texts

    def score(self, images: Features, texts: Features):
        """Returns the scores of all pairs, float32 `(I, T)`: cosine scale, higher is better, differentiable."""
        layouts = region_block(images, self.project_regions), to_padded(texts, self.project_words)
        return self.score_products(*separate_vectors(*layouts, self.uses_pooled_products))

    def project_regions(self, vectors):
        """Returns a few numbers of each region, float32 `(..., G)`, that `score_products` takes beside products, from
        its vector `(..., D)` alone: `projections` of `RegionBlock`. None: there are none."""
        return None

    def project_words(self, vectors):
        """Returns a few numbers of each word, as `project_regions` does: `projections` of the texts' layouts."""
        return None

    def score_products(self, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the scores, float32 `(I, T)`, differentiable, from arrays without an axis of D dimensions: the
        products of images with texts, and the masks and Gram matrices of `regions` and `words`, whose vectors are None
        (docs/method.md, section 8), and their `projections`."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor score_products")

    def score_tile(self, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the scores `(I, T)` for evaluation, without gradients, from the arguments of `score_products`."""
        return self.score_products(products, regions, words)

    def embed(self, features: Features):
        """Returns one vector for each item, float32 `(B, D)`, for candidates and indexes: the pooled embedding."""
        return features.pooled

    def prepare_images(self, images: Features):
        """Returns a tree of arrays with a row for each image, which `score_pairs` takes: what depends on one image
        alone, in a form of this matcher's own."""
        raise NotImplementedError(f"{type(self).__name__} defines no prepare_images(images)")

    def prepare_texts(self, texts: Features):
        """Returns a tree of arrays with a row for each text, as `prepare_images` does."""
        raise NotImplementedError(f"{type(self).__name__} defines no prepare_texts(texts)")

    def score_pairs(self, images, texts):
        """Returns the scores, float32 `(...)`, of pairs of prepared items whose leading axes are broadcast: `(I, 1)`
        and `(T,)` for all pairs, `(P,)` and `(P,)` for pairs of a list. A matcher defines it, with the two methods
        above, if its scores do not follow from inner products and are dear to compute: evaluation then prepares an item
        once, and can score some of the pairs alone (`score_bound`)."""
        raise NotImplementedError(f"{type(self).__name__} defines no score_pairs(images, texts)")

    def floats_per_pair(self, images: Features, texts: Features) -> int:
        """Returns the largest number of float32 values that a pair takes at once while it is scored, from the shapes of
        Features: by default one for each region and word. It decides how many pairs a tile has."""
        return images.mask.shape[1] * texts.mask.shape[1]

    def score_bound(self) -> tuple[float, float]:
        """Returns a factor and a radius: every score is the factor times the product of the pair's two embeddings
        (`embed`), plus or minus at most the radius. With a bound and `score_pairs`, the first results of a ranking are
        found without scoring all pairs (`scoring/certificate.py`)."""
        raise NotImplementedError(f"{type(self).__name__} defines no score_bound()")

    def train_score(self, images: Features, texts: Features):
        """Returns the scores of all pairs that the loss takes in training, float32 `(I, T)`, where they are others than
        `score`, which is then too dear for all pairs of a batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no train_score(images, texts)")

    def fused_similarity(self, image_vectors, text_vectors):
        """Returns similarities `(...)` of pairs of embeddings `(..., D)`, for losses that compare a few pairs in this
        way (`fused_similarity` among the `needs` of a loss)."""
        raise NotImplementedError(f"{type(self).__name__} defines no fused_similarity(image_vectors, text_vectors)")

    def explain(self, image: Features, text: Features) -> dict:
        """Returns the terms of one pair (Features without batch axis), as `MEFN.explain` does, so that it can be
        drawn."""
        raise NotImplementedError(f"{type(self).__name__} defines no explain(image, text)")

    def attention(self, image: Features, text: Features):
        """Returns the attention of each word over the regions of one pair, float32 `(N, M)`; columns sum to 1."""
        raise NotImplementedError(f"{type(self).__name__} defines no attention(image, text)")

    def scalars(self) -> dict:
        """Returns learned scalars by name, for the log."""
        return {}

    def initial_constants(self, images: Features, texts: Features, image_index, captions: list[str], seed: int) -> dict:
        """Returns the collection `constants` of a new run, as NumPy arrays, from training items: Features of I images
        and of C captions before the transforms, the image `(C,)` of each caption, and the captions themselves. `seed`
        is `train.seed`. Process 0 alone calls it, and every process gets its result."""
        return {}

    @classmethod
    def defines(cls, name: str) -> bool:
        """Returns whether a subclass defines an optional method of this contract."""
        return getattr(cls, name) is not getattr(Matcher, name)
