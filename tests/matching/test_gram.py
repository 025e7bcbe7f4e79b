"""The Gram form, which scores all pairs at once, against `MEFN.explain`, which scores one pair by attended vectors."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import masks, random_features

from mefn_jax.features import make_features
from mefn_jax.matching.entropy import ENTROPIES, Entropy, shannon
from mefn_jax.matching.mefn import DIRECTIONS, GLOBAL_INPUTS, MEFN
from mefn_jax.scoring.layouts import pack_group, region_block, separate_vectors
from mefn_jax.scoring.packing import gather_groups, plan_groups

N, M, D = 4, 5, 6
NAMES = "entropy", "local", "global_input", "init_kappa", "init_evidence_weight", "init_evidence_lambda"
DEFAULT_OPTIONS = "shannon", "both", "weighted", 4.0, 0.2, 0.0
OPTIONS = [
    *((*chosen, 4.0, 0.2, 0.0) for chosen in itertools.product(sorted(ENTROPIES), DIRECTIONS, GLOBAL_INPUTS)),
    ("shannon", "both", "pooled", 0.0, 0.0, 0.0),
    ("shannon", "both", "weighted", 0.0, 0.3, 16.0),
    *((entropy, "both", "pooled", 1.0, 0.4, 16.0) for entropy in sorted(ENTROPIES)),
]


def explain_all_pairs(module, params, images, texts):
    """The scores of all pairs, each by `MEFN.explain`."""

    def score(image, text):
        return module.apply(params, image, text, method="explain")["score"]

    return jax.vmap(jax.vmap(score, (None, 0)), (0, None))(images, texts)


@functools.cache
def both_forms(*options):
    """`(params, regions, words, images, texts) -> gradients, scores` of the Gram form and of `MEFN.explain`, compiled;
    and parameters."""
    module = MEFN(**dict(zip(NAMES, options, strict=True)))

    def compiled(form):
        def total(params, v, t, images, texts):
            # Through `make_features`: the Gram form uses that fragments have unit length.
            v, t = (make_features(x, f.mask, f.pooled) for x, f in ((v, images), (t, texts)))
            scores = form(params, v, t)
            return jnp.sum(scores * jnp.arange(9.0).reshape(3, 3)), scores

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))

    params = jax.jit(module.init)(jax.random.key(0), random_features(2, 3, N, D), random_features(3, 3, M, D))
    return compiled(module.apply), compiled(functools.partial(explain_all_pairs, module)), params


def check_forms(options, images, texts):
    """Compares scores to 1e-5, and gradients to 1e-5 of the largest gradient."""
    gram, explain, params = both_forms(*options)
    (gradients, scores), (expected_gradients, expected_scores) = (
        form(params, images.fragments, texts.fragments, images, texts) for form in (gram, explain)
    )
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected_gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(largest, 1.0))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_gram_form_equals_explain_with_gradients_for_all_options(options):
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    for repeat in ("", "fragments"):
        images = random_features(2, 3, N, D, mask[:, :N], repeat=repeat)
        check_forms(options, images, random_features(3, 3, M, D, mask, repeat=repeat))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), masks(3, N), masks(3, M), st.sampled_from(["", "fragments"]))
def test_gram_form_equals_explain_with_gradients_for_any_masks(seed, region_mask, word_mask, repeat):
    """The examples include one-word texts, one-region images and equal fragments."""
    images = random_features(seed, 3, N, D, region_mask, repeat=repeat)
    texts = random_features(seed + 1, 3, M, D, word_mask, repeat=repeat)
    check_forms(DEFAULT_OPTIONS, images, texts)


def three_by_three(repeat=""):
    """Three images, three texts of 1, 4 and 5 words, these texts packed into one group, and their slots in it."""
    images = random_features(2, 3, N, D, repeat=repeat)
    texts = random_features(4, 3, M, D, np.arange(M) < np.array([[1], [4], [M]]), repeat=repeat)
    words, captions, slots = plan_groups(texts.mask)
    assert len(words) == 1
    (group,) = zip(*map(jnp.asarray, gather_groups(texts, words, captions)), strict=True)
    return images, texts, pack_group(*group), slots


def score_tile(module, params, images, packed, slots):
    inputs = separate_vectors(region_block(images), packed, module.uses_pooled_products)
    return module.apply(params, *inputs, method="score_tile")[:, slots]


@pytest.mark.parametrize("scalar", ["lambda", "evidence_lambda"])
@pytest.mark.parametrize("entropy", sorted(ENTROPIES))
def test_gram_form_equals_explain_at_any_inverse_temperature(entropy, scalar):
    images, texts, packed, slots = three_by_three()
    module = MEFN(entropy=entropy, init_evidence_lambda=12.0 if scalar == "evidence_lambda" else 0.0)
    params = jax.jit(module.init)(jax.random.key(0), images, texts)

    @jax.jit
    def all_forms(params):
        tile = score_tile(module, params, images, packed, slots)
        return tile, module.apply(params, images, texts), explain_all_pairs(module, params, images, texts)

    for inverse_temperature in (1.0, 9.0, 31.0, 33.0, 200.0):
        params["params"][f"log_{scalar}"] = jnp.log(inverse_temperature)
        tile, plain, expected = all_forms(params)
        np.testing.assert_allclose(tile, expected, atol=2e-5, err_msg=inverse_temperature)
        np.testing.assert_allclose(plain, expected, atol=2e-5, err_msg=inverse_temperature)


@pytest.mark.parametrize("local", DIRECTIONS)
@pytest.mark.parametrize("global_input", GLOBAL_INPUTS)
def test_score_tile_equals_explain_for_all_options(local, global_input):
    images, texts, packed, slots = three_by_three("items")

    @functools.partial(jax.jit, static_argnums=0)
    def tile_and_explain(entropy):
        module = MEFN(entropy=entropy, local=local, global_input=global_input)
        params = module.init(jax.random.key(0), images, texts)
        tile = score_tile(module, params, images, packed, slots)
        return tile, explain_all_pairs(module, params, images, texts)

    for entropy in ENTROPIES:
        np.testing.assert_allclose(*tile_and_explain(entropy), atol=1e-5, err_msg=entropy)


def test_score_tile_of_image_without_regions_is_finite():
    images, texts, packed, slots = three_by_three("items")
    mask = images.mask & (np.arange(3) > 0)[:, None]
    images = dataclasses.replace(images, mask=mask, fragments=images.fragments * mask[..., None])
    module = MEFN()
    params = jax.jit(module.init)(jax.random.key(0), images, texts)
    tile = jax.jit(functools.partial(score_tile, module))(params, images, packed, slots)
    np.testing.assert_allclose(tile, jax.jit(module.apply)(params, images, texts), atol=1e-5)
    assert np.all(np.isfinite(tile))


def test_entropy_without_all_pairs_equals_that_with_it(monkeypatch):
    """A new entropy, which has only its function of one pair."""

    monkeypatch.setitem(ENTROPIES, "new", Entropy(shannon))
    images, texts, packed, slots = three_by_three()
    params = jax.jit(MEFN().init)(jax.random.key(0), images, texts)

    def tile_and_plain(entropy):
        module = MEFN(entropy=entropy)
        return score_tile(module, params, images, packed, slots), module.apply(params, images, texts)

    scores, expected = (jax.jit(tile_and_plain, static_argnums=0)(name) for name in ("new", "shannon"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scores, expected)
    np.testing.assert_allclose(*scores, atol=1e-5)
