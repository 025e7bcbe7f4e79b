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
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, RegionBlock, region_block, to_padded

DIRECTIONS = ("both", "words", "regions")
GLOBAL_INPUTS = ("weighted", "pooled")


def cosine(a, b):
    """Cosine along the last axis; 0 where either is a zero vector."""
    norms = safe_norm(a) * safe_norm(b)
    return jnp.sum(a * b, -1) / jnp.where(norms > 0, norms, 1.0)


def score_pair(image: Features, text: Features, *, scale, sharpness, gate, entropy, attend, global_input) -> dict:
    """Everything MEFN computes of one pair (Features without their batch axis; DESIGN.md 3.2 to 3.4).

    `scale` is lambda, `sharpness` kappa, `gate` g in [0, 1] (see `fuse`), the rest are MEFN's attributes. Returns a
    dict: score, local, global (scalars); H `(N, M)` in nats; region_weights `(N,)`, word_weights `(M,)`, sum 1;
    word_attention alpha `(N, M)`, columns sum 1; region_attention beta `(N, M)`, rows sum 1; MFE, the sum of H;
    region_entropy `(N,)` and word_entropy `(M,)`, in [0, 1].
    """
    v, t = image.fragments, text.fragments  # (N, D), (M, D)
    S = v @ t.T  # (N, M), cosines since both are unit vectors
    mask = image.mask[:, None] & text.mask[None, :]
    H, H_v, H_t = entropy(S, image.mask, text.mask, scale)

    log_w = masked_log_softmax(-sharpness * H_v, image.mask, axis=0)
    log_u = masked_log_softmax(-sharpness * H_t, text.mask, axis=0)
    w = jnp.where(image.mask, jnp.exp(log_w), 0.0)  # (N,)
    u = jnp.where(text.mask, jnp.exp(log_u), 0.0)  # (M,)

    # The weight enters the attention's softmax because a cosine does not see the length of w_i v_i.
    alpha = jnp.where(mask, jnp.exp(masked_log_softmax(scale * S - sharpness * H_v[:, None], mask, axis=0)), 0.0)
    beta = jnp.where(mask, jnp.exp(masked_log_softmax(scale * S - sharpness * H_t[None, :], mask, axis=1)), 0.0)
    words_attend = jnp.sum(u * cosine(alpha.T @ v, t))  # a_j against t_j
    regions_attend = jnp.sum(w * cosine(v, beta @ t))  # v_i against b_i
    local = {"both": 0.5 * (words_attend + regions_attend), "words": words_attend, "regions": regions_attend}[attend]

    if global_input == "weighted":
        whole = cosine(image.pooled + w @ v, text.pooled + u @ t)
    else:
        whole = cosine(image.pooled, text.pooled)
    return {
        "score": fuse(local, whole, gate),
        "local": local,
        "global": whole,
        "H": H,
        "MFE": jnp.sum(H),
        "region_entropy": H_v,
        "word_entropy": H_t,
        "region_weights": w,
        "word_weights": u,
        "word_attention": alpha,
        "region_attention": beta,
    }


def fuse(local, whole, gate):
    """The cosine of the two unified embeddings: `(1 - g) global + g local` (DESIGN.md 3.4). With `gate` exactly 0 or 1
    (Python numbers, the ablations) the other branch is not computed at all."""
    if isinstance(gate, int):
        return local if gate else whole
    return (1 - gate) * whole + gate * local


def unified_embeddings(image: Features, text: Features, parts: dict, gate, attend="both"):
    """f(v|t) and f(t|v), the weighted concatenations of DESIGN.md 3.4, for one pair: two unit vectors of the same
    size, whose inner product is the score of `pair` (whose result `parts` is)."""
    v, t = image.fragments, text.fragments
    w, u = parts["region_weights"], parts["word_weights"]
    a, b = unit(parts["word_attention"].T @ v), unit(parts["region_attention"] @ t)
    whole_v, whole_t = unit(image.pooled + w @ v), unit(text.pooled + u @ t)
    share = gate / 2 if attend == "both" else gate
    words, regions = jnp.sqrt(share * u)[:, None], jnp.sqrt(share * w)[:, None]
    of_image, of_text = [jnp.sqrt(1 - gate) * whole_v], [jnp.sqrt(1 - gate) * whole_t]
    if attend in ("both", "words"):
        of_image.append((words * a).ravel())
        of_text.append((words * t).ravel())
    if attend in ("both", "regions"):
        of_image.append((regions * v).ravel())
        of_text.append((regions * b).ravel())
    return jnp.concatenate(of_image), jnp.concatenate(of_text)


class MEFN(nn.Module):
    """All pairs' MEFN scores, cosine scale, float32 `(I, T)`.

    Attributes:
        entropy: a name of `mefn_jax.matching.entropy.ENTROPIES` ("none": the -MFE ablation).
        attend: "both", "words" (words attend to regions) or "regions".
        global_input: "weighted" (pooled plus the weighted fragments) or "pooled".
        branches: "both", "local" (the -global ablation) or "global" (the -local ablation).
        init_scale, init_sharpness: initial lambda and kappa; both are learned as logarithms.
        background: how many vectors stand for all images, and for all texts; each side's level over the other's is
            taken from the score (see `background.py`). 0: none, as in DESIGN.md 3.
        init_background_scale: of the levels, learned as a logarithm; the share of them that is taken begins at 1.
    """

    entropy: str = "shannon"
    attend: str = "both"
    global_input: str = "weighted"
    branches: str = "both"
    init_scale: float = 9.0
    init_sharpness: float = 4.0
    background: int = 0
    init_background_scale: float = 20.0

    def setup(self):
        constant = nn.initializers.constant
        self.log_scale = self.param("log_scale", constant(jnp.log(self.init_scale)), ())
        if self.entropy != "none":
            self.log_sharpness = self.param("log_sharpness", constant(jnp.log(self.init_sharpness)), ())
        if self.branches == "both":
            self.gate_logit = self.param("gate_logit", constant(0.0), ())
        if self.background:
            self.backgrounds = HubnessBank(self.background)
            self.log_background_scale = self.param(
                "log_background_scale", constant(jnp.log(self.init_background_scale)), ()
            )
            self.background_share = self.param("background_share", constant(1.0), ())

    def _options(self) -> dict:
        sharpness = 0.0 if self.entropy == "none" else jnp.exp(self.log_sharpness)
        return {
            "scale": jnp.exp(self.log_scale),
            "sharpness": sharpness,
            "entropy": entropies.ENTROPIES[self.entropy],
            "attend": self.attend,
            "global_input": self.global_input,
        }

    @property
    def gate(self):
        """g of DESIGN.md 3.4: the share of the local score."""
        return {"local": 1, "global": 0}.get(self.branches) if self.branches != "both" else nn.sigmoid(self.gate_logit)

    def __call__(self, images: Features, texts: Features):
        regions, words = region_block(images), to_padded(texts)
        scores = fuse(*gram.score_all_pairs(regions, words, steep=True, **self._options()), self.gate)
        of_images, of_texts = self.levels(images, texts)
        return scores - of_images[:, None] - of_texts

    def tile(self, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """The scores `(I, T)` of images and texts arranged for it, before `levels` are taken from them and without
        gradients: faster where lambda allows it."""
        options = self._options()
        # Backwards, such a choice would keep the arrays of both.
        gentle, steep = (functools.partial(gram.score_all_pairs, steep=steep, **options) for steep in (False, True))
        return fuse(*jax.lax.cond(options["scale"] <= gram.MAX_PLAIN_SCALE, gentle, steep, regions, words), self.gate)

    def levels(self, images: Features, texts: Features):
        """What is taken from all scores of an image, and of a text, `(...)` each; 0 without a background."""
        if not self.background:
            return jnp.zeros(images.pooled.shape[:-1]), jnp.zeros(texts.pooled.shape[:-1])
        levels = self.backgrounds(images.pooled, texts.pooled, jnp.exp(self.log_background_scale))
        return tuple(self.background_share * level for level in levels)

    def explain(self, image: Features, text: Features) -> dict:
        """The dict of `pair` for one image and one text (Features without batch axis), with the gate g, lambda and
        kappa beside it; the score is less the background, `image_background` and `text_background`."""
        parts = score_pair(image, text, gate=self.gate, **self._options()) | self.learned()
        of_image, of_text = self.levels(image, text)
        parts["score"] -= of_image + of_text
        return parts | {"image_background": of_image, "text_background": of_text}

    def learned(self) -> dict:
        """The matcher's learned scalars by name, for logs."""
        values = {"gate": jnp.asarray(self.gate, jnp.float32), "lambda": jnp.exp(self.log_scale)}
        if self.entropy != "none":
            values["kappa"] = jnp.exp(self.log_sharpness)
        if self.background:
            values |= {"background": self.background_share, "background_scale": jnp.exp(self.log_background_scale)}
        return values

    def coarse(self, features: Features):
        """The vector for shortlists `(B, D)`: pooled, or the unit mean of the fragments where pooled is not trained."""
        return unit(jnp.sum(features.fragments, 1)) if self.branches == "local" else features.pooled
