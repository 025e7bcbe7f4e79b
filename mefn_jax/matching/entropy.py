"""The entropy of the correspondence between image regions and words (DESIGN.md 3.1 and 3.2; MEFN, Eq. 1, Figure 2).

Every entropy is one pure function of one pair:

    entropy(S, region_mask, word_mask, lam) -> (H [N, M], H_regions [N], H_words [M])

S are cosines of N regions and M words, `lam` the inverse temperature lambda. H is the map; the other two are in
[0, 1], low where a fragment singles out few partners, and are what the weights are made from. Masked entries are 0.
To add one, write the function and name it in `ENTROPIES`.
"""

import jax
import jax.numpy as jnp


def masked_log_softmax(logits, mask, axis):
    """Log-softmax over the entries of `mask`; 0 elsewhere, also where a whole row is masked. Gradients stay finite."""
    mask = jnp.broadcast_to(mask, logits.shape)
    low = jnp.where(mask, logits, -1e30)
    return jnp.where(mask, low - jax.nn.logsumexp(low, axis=axis, keepdims=True), 0.0)


def _normalize_shannon(log_p, mask, axis):
    """Shannon entropy along `axis` over the log of the number of entries there; 0 where there is one entry."""
    p = jnp.where(mask, jnp.exp(log_p), 0.0)
    number = jnp.sum(mask, axis=axis)
    # ln 1 = 0 would divide by zero; a fragment with a single partner has no entropy.
    most = jnp.log(jnp.maximum(number, 2))
    return jnp.where(number > 1, -jnp.sum(p * log_p, axis=axis) / most, 0.0)


def shannon(S, region_mask, word_mask, lam):
    """Cells of the Shannon entropies, in nats: `P = softmax_j(lam S)`, `H_ij = -P_ij ln P_ij`. A row of H sums to
    the region's entropy over the words; words take theirs from the softmax over regions. S `(N, M)`."""
    mask = region_mask[:, None] & word_mask[None, :]  # (N, M)
    log_p = masked_log_softmax(lam * S, mask, axis=1)
    log_q = masked_log_softmax(lam * S, mask, axis=0)
    cells = jnp.where(mask, -jnp.exp(log_p) * log_p, 0.0)
    return cells, _normalize_shannon(log_p, mask, axis=1), _normalize_shannon(log_q, mask, axis=0)


def gaussian(S, region_mask, word_mask, lam):
    """Joint entropy of two unit-variance Gaussians with correlation `rho = clip(S, 0, 0.999)`:
    `ln(2 pi e) + ln(1 - rho^2) / 2` nats. A fragment's is the mean over its partners, rescaled to [0, 1]."""
    mask = region_mask[:, None] & word_mask[None, :]
    rho = jnp.clip(S, 0.0, 0.999)
    cells = jnp.log(2 * jnp.pi * jnp.e) + 0.5 * jnp.log1p(-rho * rho)
    return jnp.where(mask, cells, 0.0), *_mean_of_cells(_gaussian_cells(S, lam), mask)


def _gaussian_cells(S, lam):
    rho = jnp.clip(S, 0.0, 0.999)
    return 1 - jnp.log1p(-rho * rho) / jnp.log1p(-(0.999**2))


def bernoulli(S, region_mask, word_mask, lam):
    """Entropy, in nats, of "this word means this region", a coin with probability `p = sigmoid(lam S)`; `ln 2`
    where p is below one half, so that only evidence for a match lowers it. A fragment's is the mean over `ln 2`."""
    mask = region_mask[:, None] & word_mask[None, :]
    share = _bernoulli_cells(S, lam)
    return jnp.where(mask, share * jnp.log(2.0), 0.0), *_mean_of_cells(share, mask)


def _bernoulli_cells(S, lam):
    logit = jnp.maximum(lam * S, 0.0)
    return (jax.nn.softplus(logit) - jax.nn.sigmoid(logit) * logit) / jnp.log(2.0)


def no_entropy(S, region_mask, word_mask, lam):
    """No entropy: zero everywhere, hence uniform weights (the paper's -MFE ablation)."""
    return jnp.zeros_like(S), jnp.zeros_like(S[:, 0]), jnp.zeros_like(S[0])


def _mean_of_cells(cells, mask):
    cells = jnp.where(mask, cells, 0.0)
    return (
        jnp.sum(cells, 1) / jnp.maximum(jnp.sum(mask, 1), 1),
        jnp.sum(cells, 0) / jnp.maximum(jnp.sum(mask, 0), 1),
    )


ENTROPIES = {"shannon": shannon, "gaussian": gaussian, "bernoulli": bernoulli, "none": no_entropy}
# Where a fragment's entropy is the mean over its partners of something in [0, 1]: that, of `(S, lam)`, cell by cell.
CELL_ENTROPIES = {gaussian: _gaussian_cells, bernoulli: _bernoulli_cells}
