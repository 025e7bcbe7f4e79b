"""MEFN's matcher (Liu & Fan 2025) as read in docs/method.md, sections 3 to 7.

`score_pair` is the mathematics of one image and one text, written out: read and change this first. `MEFN` scores all
pairs through `score_all_pairs` of `gram.py`: the same numbers without attended vectors. Letters: N regions, M words,
D dimensions, I images, T texts.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mefn_jax.features import Features, safe_norm, unit
from mefn_jax.matching import entropy as entropies
from mefn_jax.matching import gram
from mefn_jax.matching.entropy import average_fragments, masked_log_softmax
from mefn_jax.matching.matcher import Matcher
from mefn_jax.scoring.layouts import PackedTexts, PaddedTexts, Products, RegionBlock

DIRECTIONS = ("both", "t2i", "i2t")
GLOBAL_INPUTS = ("weighted", "pooled")
BRANCHES = ("both", "local", "global")


def cosine(a, b):
    """Returns the cosine along the last axis; 0 where either is a zero vector."""
    norms = safe_norm(a) * safe_norm(b)
    return jnp.sum(a * b, -1) / jnp.where(norms > 0, norms, 1.0)


def score_pair(
    image: Features, text: Features, *, lam, kappa, evidence_lam, entropy, local, global_input, gate, evidence_weight
) -> dict:
    """Computes everything of one pair (Features without their batch axis; docs/method.md, Eqs. 12 to 25).

    `lam` is lambda, `entropy` an entry of `ENTROPIES` in `matching/entropy.py`, and `local` and `global_input` are
    attributes of `MEFN`. `kappa` None: uniform weights. `evidence_lam` is the inverse temperature of the evidence, None
    if it is `lam`. `gate` is g, and `evidence_weight` is c (see `fuse`). Returns a dict of

        score, local, global: scalars.
        H: the entropy map `(N, M)` in nats; MFE, its sum; region_entropy `(N,)`, word_entropy `(M,)`, in [0, 1], and
            mean_entropy, a scalar: all at the inverse temperature of the evidence.
        evidence: -c mean_entropy, a term of the score.
        region_weights `(N,)`, word_weights `(M,)`: sum 1.
        word_attention: alpha `(N, M)`, columns sum 1; region_attention: beta `(N, M)`, rows sum 1.
    """
    v, t = image.fragments, text.fragments  # (N, D), (M, D)
    S = v @ t.T  # (N, M), cosines since both are unit vectors
    mask = image.mask[:, None] & text.mask[None, :]
    H, h_v, h_t = entropy.pair(S, image.mask, text.mask, lam)  # (N, M), h_i (N,), h_j (M,)

    log_w, log_u = (0.0 * h if kappa is None else -kappa * h for h in (h_v, h_t))
    log_w = masked_log_softmax(log_w, image.mask, axis=0)
    log_u = masked_log_softmax(log_u, text.mask, axis=0)
    w = jnp.where(image.mask, jnp.exp(log_w), 0.0)  # (N,)
    u = jnp.where(text.mask, jnp.exp(log_u), 0.0)  # (M,)

    # Inside the softmax the weight decides how much region i contributes to a_j. Scaling v_i before a cosine would
    # change nothing.
    alpha = jnp.where(mask, jnp.exp(masked_log_softmax(lam * S + log_w[:, None], mask, axis=0)), 0.0)
    beta = jnp.where(mask, jnp.exp(masked_log_softmax(lam * S + log_u[None, :], mask, axis=1)), 0.0)
    t2i = jnp.sum(u * cosine(alpha.T @ v, t))  # a_j against t_j
    i2t = jnp.sum(w * cosine(v, beta @ t))  # v_i against b_i
    local_score = {"both": 0.5 * (t2i + i2t), "t2i": t2i, "i2t": i2t}[local]

    if global_input == "weighted":
        global_score = cosine(image.pooled + w @ v, text.pooled + u @ t)
    else:
        global_score = cosine(image.pooled, text.pooled)

    if evidence_lam is not None:
        H, h_v, h_t = entropy.pair(S, image.mask, text.mask, evidence_lam)
    mean_entropy = average_fragments(h_v, h_t, image.mask, text.mask)
    return {
        "score": fuse(local_score, global_score, mean_entropy, gate, evidence_weight),
        "local": local_score,
        "global": global_score,
        "H": H,
        "MFE": jnp.sum(H),
        "mean_entropy": mean_entropy,
        "evidence": -evidence_weight * mean_entropy,
        "region_entropy": h_v,
        "word_entropy": h_t,
        "region_weights": w,
        "word_weights": u,
        "word_attention": alpha,
        "region_attention": beta,
    }


def fuse(local_score, global_score, mean_entropy, gate, evidence_weight):
    """Returns `(1 - g) global + g local - c mean_entropy` (docs/method.md, Eq. 25).

    A `gate` that is the Python integer 0 or 1 ignores the other branch, and an `evidence_weight` that is the integer 0
    the entropy (in the ablations; jit then drops what is ignored).
    """
    if isinstance(gate, int):
        score = local_score if gate else global_score
    else:
        score = (1 - gate) * global_score + gate * local_score
    return score if isinstance(evidence_weight, int) else score - evidence_weight * mean_entropy


def unified_embeddings(image: Features, text: Features, terms: dict, gate, local="both", global_input="pooled"):
    """Computes f(v|t) and f(t|v) of one pair, the weighted concatenations of docs/method.md, Eq. 26. Both have the same
    size and length, and their squared distance is `2 - 2 score` (Eq. 28); `terms` is the result of `score_pair`."""
    v, t = image.fragments, text.fragments
    w, u = terms["region_weights"], terms["word_weights"]
    a, b = unit(terms["word_attention"].T @ v), unit(terms["region_attention"] @ t)
    z_v, z_t = image.pooled, text.pooled
    if global_input == "weighted":
        z_v, z_t = unit(z_v + w @ v), unit(z_t + u @ t)
    share = gate / 2 if local == "both" else gate
    word_factors, region_factors = jnp.sqrt(share * u)[:, None], jnp.sqrt(share * w)[:, None]
    image_blocks, text_blocks = [jnp.sqrt(1 - gate) * z_v], [jnp.sqrt(1 - gate) * z_t]
    if local in ("both", "t2i"):
        image_blocks.append((word_factors * a).ravel())
        text_blocks.append((word_factors * t).ravel())
    if local in ("both", "i2t"):
        image_blocks.append((region_factors * v).ravel())
        text_blocks.append((region_factors * b).ravel())
    # Two more coordinates; where one embedding has a length, the other has 0. So the inner product stays as it is, and
    # the distance grows.
    length = jnp.sqrt(jnp.maximum(-terms["evidence"], 0.0))
    image_blocks.append(jnp.stack([length, 0.0]))
    text_blocks.append(jnp.stack([0.0, length]))
    return jnp.concatenate(image_blocks), jnp.concatenate(text_blocks)


class MEFN(Matcher, kw_only=True):
    """Matcher of MEFN: the scores of all pairs, at most 1 (docs/method.md, Eq. 25).

    Attributes:
        entropy: a name of `ENTROPIES` in `matching/entropy.py`.
        local: "both", "t2i" (words attend to regions) or "i2t" (regions attend to words); Eq. 22.
        global_input: "weighted" (pooled plus the weighted fragments, Eq. 23) or "pooled" (Eq. 24).
        branches: "both", "local" (`mefn_no_global`) or "global" (`mefn_no_local`).
        init_lambda: initial lambda, learned as a logarithm.
        init_kappa: initial kappa, learned as well; 0: uniform weights (`mefn_no_weights`).
        init_evidence_weight: initial weight c of the evidence, learned as well; 0: no evidence (`mefn_no_evidence`).
        init_evidence_lambda: initial inverse temperature of the evidence, learned as well; 0: it is lambda.
    """

    entropy: str = "shannon"
    local: str = "both"
    global_input: str = "pooled"
    branches: str = "both"
    init_lambda: float = 9.0
    init_kappa: float = 1.0
    init_evidence_weight: float = 0.2
    init_evidence_lambda: float = 20.0

    def setup(self):
        """Creates the learned scalars."""
        for name in self._learned_logarithms():
            initial_value = nn.initializers.constant(jnp.log(getattr(self, f"init_{name}")))
            setattr(self, f"log_{name}", self.param(f"log_{name}", initial_value, ()))
        if self.branches == "both":
            self.gate_logit = self.param("gate_logit", nn.initializers.constant(0.0), ())

    def _learned_logarithms(self) -> list[str]:
        """Returns the names of the scalars that are learned as logarithms: lambda, and those that are in use."""
        names = ["lambda"]
        if self.init_kappa:
            names.append("kappa")
        if self.init_evidence_weight:
            names.append("evidence_weight")
            if self.init_evidence_lambda:
                names.append("evidence_lambda")
        return names

    def _build_options(self) -> dict:
        """Returns the arguments that `score_pair` and `score_all_pairs` have in common."""
        learned = self._exponentials()
        return {
            "lam": learned["lambda"],
            "kappa": learned.get("kappa"),
            "evidence_lam": learned.get("evidence_lambda"),
            "entropy": entropies.ENTROPIES[self.entropy],
            "local": self.local,
            "global_input": self.global_input,
        }

    def _exponentials(self) -> dict:
        return {name: jnp.exp(getattr(self, f"log_{name}")) for name in self._learned_logarithms()}

    @property
    def gate(self):
        """Returns g of docs/method.md, Eq. 25, the share of the local score: the integer 0 or 1 in the ablations."""
        if self.branches == "local":
            return 1
        if self.branches == "global":
            return 0
        return nn.sigmoid(self.gate_logit)

    @property
    def evidence_weight(self):
        """Returns c of docs/method.md, Eq. 25: the integer 0 without evidence."""
        return self._exponentials().get("evidence_weight", 0)

    @property
    def uses_pooled_products(self) -> bool:
        """Returns whether the score takes products of pooled embeddings with fragments (docs/method.md, Eq. 31)."""
        return self.branches != "local" and self.global_input == "weighted"

    def score_products(self, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the scores, float32 `(I, T)`, by stabilized softmaxes: finite and differentiable for any lambda."""
        return self._score_products(True, products, regions, words)

    def score_tile(self, products: Products, regions: RegionBlock, words: PaddedTexts | PackedTexts):
        """Returns the scores `(I, T)` for evaluation. Uses the cheaper, plain softmax while all inverse temperatures
        are at most MAX_PLAIN_SCALE (docs/method.md, Eq. 33)."""
        # Not in training: the backward pass of `lax.cond` keeps the arrays of both branches.
        plain, stabilized = (functools.partial(self._score_products, stabilized) for stabilized in (False, True))
        learned = self._exponentials()
        largest = jnp.maximum(learned["lambda"], learned.get("evidence_lambda", 0.0))
        return jax.lax.cond(largest <= gram.MAX_PLAIN_SCALE, plain, stabilized, products, regions, words)

    def _score_products(self, stabilized: bool, *inputs):
        options = self._build_options()
        if not self.uses_pooled_products:
            options["global_input"] = "pooled"  # without the global branch, its score is not used
        terms = gram.score_all_pairs(*inputs, stabilized=stabilized, **options)
        return fuse(*terms, self.gate, self.evidence_weight)

    def explain(self, image: Features, text: Features) -> dict:
        """Returns the terms of one image and one text (Features without batch axis): the dict of `score_pair` and the
        learned scalars."""
        factors = {"gate": self.gate, "evidence_weight": self.evidence_weight}
        return score_pair(image, text, **factors, **self._build_options()) | self.scalars()

    def attention(self, image: Features, text: Features):
        """Returns alpha of docs/method.md, Eq. 19, float32 `(N, M)`."""
        return self.explain(image, text)["word_attention"]

    def scalars(self) -> dict:
        """Returns the learned scalars by name, for logs: the gate and those that `setup` creates."""
        return {"gate": jnp.asarray(self.gate, jnp.float32)} | self._exponentials()

    def embed(self, features: Features):
        """Returns one vector for each item, `(B, D)`, for candidates and indexes: the pooled embedding, or the unit
        mean of the fragments where the pooled embedding is not trained."""
        return unit(jnp.sum(features.fragments, 1)) if self.branches == "local" else features.pooled
