"""MEFN's matcher (Liu & Fan 2025) as DESIGN.md 3 reads it.

`pair` is the mathematics of one image and one text, written out: read and change this first. `MEFN` scores all pairs
through `gram.all_pairs`, the same numbers without attended vectors. Letters: N regions, M words, D dimensions,
I images, T texts.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.features import Features, safe_norm, unit
from mefn_jax.matching import entropy as entropies
from mefn_jax.matching import gram
from mefn_jax.matching.entropy import masked_log_softmax
from mefn_jax.matching.hubness import HubnessBank
from mefn_jax.matching.matcher import Matcher
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, RegionBlock, region_block, to_padded

DIRECTIONS = ("both", "t2i", "i2t")
GLOBAL_INPUTS = ("weighted", "pooled")


def cosine(a, b):
    """Cosine along the last axis; 0 where either is a zero vector."""
    norms = safe_norm(a) * safe_norm(b)
    return jnp.sum(a * b, -1) / jnp.where(norms > 0, norms, 1.0)


def score_pair(image: Features, text: Features, *, lam, kappa, gate, entropy, local, global_input) -> dict:
    """Everything MEFN computes of one pair (Features without their batch axis; DESIGN.md 3.2 to 3.4).

    `lam` is lambda, `kappa` kappa, `gate` g in [0, 1] (see `fuse`), the rest are MEFN's attributes. Returns a
    dict: score, local, global (scalars); H `(N, M)` in nats; region_weights `(N,)`, word_weights `(M,)`, sum 1;
    word_attention alpha `(N, M)`, columns sum 1; region_attention beta `(N, M)`, rows sum 1; MFE, the sum of H;
    region_entropy `(N,)` and word_entropy `(M,)`, in [0, 1].
    """
    v, t = image.fragments, text.fragments  # (N, D), (M, D)
    S = v @ t.T  # (N, M), cosines since both are unit vectors
    mask = image.mask[:, None] & text.mask[None, :]
    H, H_v, H_t = entropy(S, image.mask, text.mask, lam)

    log_w = masked_log_softmax(-kappa * H_v, image.mask, axis=0)
    log_u = masked_log_softmax(-kappa * H_t, text.mask, axis=0)
    w = jnp.where(image.mask, jnp.exp(log_w), 0.0)  # (N,)
    u = jnp.where(text.mask, jnp.exp(log_u), 0.0)  # (M,)

    # The weight enters the attention's softmax because a cosine does not see the length of w_i v_i.
    alpha = jnp.where(mask, jnp.exp(masked_log_softmax(lam * S - kappa * H_v[:, None], mask, axis=0)), 0.0)
    beta = jnp.where(mask, jnp.exp(masked_log_softmax(lam * S - kappa * H_t[None, :], mask, axis=1)), 0.0)
    t2i = jnp.sum(u * cosine(alpha.T @ v, t))  # a_j against t_j
    i2t = jnp.sum(w * cosine(v, beta @ t))  # v_i against b_i
    local_score = {"both": 0.5 * (t2i + i2t), "t2i": t2i, "i2t": i2t}[local]

    if global_input == "weighted":
        global_score = cosine(image.pooled + w @ v, text.pooled + u @ t)
    else:
        global_score = cosine(image.pooled, text.pooled)
    return {
        "score": fuse(local_score, global_score, gate),
        "local": local_score,
        "global": global_score,
        "H": H,
        "MFE": jnp.sum(H),
        "region_entropy": H_v,
        "word_entropy": H_t,
        "region_weights": w,
        "word_weights": u,
        "word_attention": alpha,
        "region_attention": beta,
    }


def fuse(local_score, global_score, gate):
    """The cosine of the two unified embeddings: `(1 - g) global + g local` (DESIGN.md 3.4). With `gate` exactly 0 or 1
    (Python numbers, the ablations) the other branch is not computed at all."""
    if isinstance(gate, int):
        return local_score if gate else global_score
    return (1 - gate) * global_score + gate * local_score


def unified_embeddings(image: Features, text: Features, terms: dict, gate, local="both"):
    """f(v|t) and f(t|v), the weighted concatenations of DESIGN.md 3.4, for one pair: two unit vectors of the same
    size, whose inner product is the score of `pair` (whose result `terms` is)."""
    v, t = image.fragments, text.fragments
    w, u = terms["region_weights"], terms["word_weights"]
    a, b = unit(terms["word_attention"].T @ v), unit(terms["region_attention"] @ t)
    global_v, global_t = unit(image.pooled + w @ v), unit(text.pooled + u @ t)
    share = gate / 2 if local == "both" else gate
    words, regions = jnp.sqrt(share * u)[:, None], jnp.sqrt(share * w)[:, None]
    of_image, of_text = [jnp.sqrt(1 - gate) * global_v], [jnp.sqrt(1 - gate) * global_t]
    if local in ("both", "t2i"):
        of_image.append((words * a).ravel())
        of_text.append((words * t).ravel())
    if local in ("both", "i2t"):
        of_image.append((regions * v).ravel())
        of_text.append((regions * b).ravel())
    return jnp.concatenate(of_image), jnp.concatenate(of_text)


class MEFN(Matcher):
    """All pairs' MEFN scores, cosine lam, float32 `(I, T)`.

    Attributes:
        entropy: a name of `mefn_jax.matching.entropy.ENTROPIES` ("none": the -MFE ablation).
        attend: "both", "words" (words attend to regions) or "regions".
        global_input: "weighted" (pooled plus the weighted fragments) or "pooled".
        branches: "both", "local" (the -global ablation) or "global" (the -local ablation).
        init_lambda, init_kappa: initial lambda and kappa; both are learned as logarithms.
        background: how many vectors stand for all images, and for all texts; each side's level over the other's is
            taken from the score (see `background.py`). 0: none, as in DESIGN.md 3.
        init_hub_scale: of the levels, learned as a logarithm; the share of them that is taken begins at 1.
    """

    entropy: str = "shannon"
    local: str = "both"
    global_input: str = "weighted"
    branches: str = "both"
    init_lambda: float = 9.0
    init_kappa: float = 4.0
    hub_vectors: int = 0
    init_hub_scale: float = 20.0

    def setup(self):
        constant = nn.initializers.constant
        self.log_lambda = self.param("log_scale", constant(jnp.log(self.init_lambda)), ())
        if self.entropy != "none":
            self.log_kappa = self.param("log_sharpness", constant(jnp.log(self.init_kappa)), ())
        if self.branches == "both":
            self.gate_logit = self.param("gate_logit", constant(0.0), ())
        if self.hub_vectors:
            self.backgrounds = HubnessBank(self.hub_vectors)
            self.log_hub_scale = self.param("log_background_scale", constant(jnp.log(self.init_hub_scale)), ())
            self.hub_weight = self.param("background_share", constant(1.0), ())

    def _options(self) -> dict:
        kappa = 0.0 if self.entropy == "none" else jnp.exp(self.log_kappa)
        return {
            "lam": jnp.exp(self.log_lambda),
            "kappa": kappa,
            "entropy": entropies.ENTROPIES[self.entropy],
            "local": self.local,
            "global_input": self.global_input,
        }

    @property
    def gate(self):
        """g of DESIGN.md 3.4: the share of the local score."""
        return {"local": 1, "global": 0}.get(self.branches) if self.branches != "both" else nn.sigmoid(self.gate_logit)

    def __call__(self, images: Features, texts: Features):
        regions, words = region_block(images), to_padded(texts)
        scores = fuse(*gram.score_all_pairs(regions, words, stabilized=True, **self._options()), self.gate)
        of_images, of_texts = self.hub_offsets(images, texts)
        return scores - of_images[:, None] - of_texts

    def score_tile(self, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """The scores `(I, T)` of images and texts arranged for it, before `levels` are taken from them and without
        gradients: faster where lambda allows it."""
        options = self._options()
        # Backwards, such a choice would keep the arrays of both.
        plain, stabilized = (functools.partial(gram.score_all_pairs, stabilized=s, **options) for s in (False, True))
        return fuse(*jax.lax.cond(options["lam"] <= gram.MAX_PLAIN_SCALE, plain, stabilized, regions, words), self.gate)

    def hub_offsets(self, images: Features, texts: Features):
        """What is taken from all scores of an image, and of a text, `(...)` each; 0 without a background."""
        if not self.hub_vectors:
            return jnp.zeros(images.pooled.shape[:-1]), jnp.zeros(texts.pooled.shape[:-1])
        levels = self.backgrounds(images.pooled, texts.pooled, jnp.exp(self.log_hub_scale))
        return tuple(self.hub_weight * level for level in levels)

    def explain(self, image: Features, text: Features) -> dict:
        """The dict of `pair` for one image and one text (Features without batch axis), with the gate g, lambda and
        kappa beside it; the score is less the background, `image_hub_offset` and `text_hub_offset`."""
        terms = score_pair(image, text, gate=self.gate, **self._options()) | self.scalars()
        of_image, of_text = self.hub_offsets(image, text)
        terms["score"] -= of_image + of_text
        return terms | {"image_hub_offset": of_image, "text_hub_offset": of_text}

    def scalars(self) -> dict:
        """The matcher's learned scalars by name, for logs."""
        values = {"gate": jnp.asarray(self.gate, jnp.float32), "lambda": jnp.exp(self.log_lambda)}
        if self.entropy != "none":
            values["kappa"] = jnp.exp(self.log_kappa)
        if self.hub_vectors:
            values |= {"hub_weight": self.hub_weight, "hub_scale": jnp.exp(self.log_hub_scale)}
        return values

    def embed(self, features: Features):
        """The vector for shortlists `(B, D)`: pooled, or the unit mean of the fragments where pooled is not trained."""
        return unit(jnp.sum(features.fragments, 1)) if self.branches == "local" else features.pooled
