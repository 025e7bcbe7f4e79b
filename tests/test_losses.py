"""The losses against naive loops, and their invariants."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerical_gradient import check_gradient
from systems import make_matcher

from configs import default
from mefn_jax import losses
from mefn_jax.data.pipeline import digest_captions
from mefn_jax.errors import ConfigError
from mefn_jax.features import make_features
from mefn_jax.training.hyperparameters import hyperparameters_from_config
from mefn_jax.training.loss_inputs import LOSS_INPUTS


def naive_triplet(scores, positives, margin, hardest, anchors):
    size, total = len(scores), 0.0
    for a in range(size):
        for matrix, anchor in ((scores, "image"), (scores.T, "text")):
            if anchors in ("both", anchor):
                costs = [
                    max(0.0, margin + matrix[a, b] - matrix[a, a]) for b in range(size) if not positives[a, b]
                ] or [0.0]
                total += (1 - hardest) * sum(costs) + hardest * max(costs)
    return total / size


triplet = jax.jit(losses.triplet, static_argnames=("anchors",))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(losses.LOSS_CHOICES["loss.anchors"]),
)
def test_triplet_equals_naive_loop(seed, ids, hardest, anchors):
    scores = np.random.default_rng(seed).uniform(-1, 1, (6, 6)).astype(np.float32)
    positives = np.asarray(losses.positives_mask(np.array(ids)))
    ours = triplet(scores, positives, None, None, margin=0.2, hardest=hardest, anchors=anchors)
    assert float(ours) == pytest.approx(naive_triplet(scores, positives, 0.2, hardest, anchors), abs=1e-5)


def test_positives_mask_includes_equal_captions():
    ids, captions = [0, 0, 1, 2, 3], ["a dog", "a cat", "a dog", "two men", "A  cat"]
    mask = np.asarray(losses.positives_mask(np.array(ids), digest_captions(captions)))
    for a in range(5):
        for b in range(5):
            equal = captions[a].lower().split() == captions[b].lower().split()
            assert mask[a, b] == (ids[a] == ids[b] or equal)


@pytest.mark.parametrize("hardest", [0.0, 1.0])
def test_triplet_never_contrasts_captions_of_one_image(hardest):
    positives = losses.positives_mask(np.array([7, 7, 3]))

    def loss(scores):
        return triplet(scores, positives, None, None, margin=0.2, hardest=hardest, anchors="both")

    scores = np.array([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 0.9]], np.float32)
    gradient = np.asarray(jax.grad(loss)(scores))
    assert gradient[0, 1] == gradient[1, 0] == 0
    assert gradient[0, 2] > 0  # the other image's caption is a negative
    raised = scores.copy()
    raised[0, 1] = raised[1, 0] = 1.0
    assert float(loss(raised)) == float(loss(scores))


def test_triplet_is_zero_for_all_positive_batch():
    scores = np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32)
    positives = losses.positives_mask(np.zeros(4))
    for hardest in (0.0, 1.0):
        assert float(triplet(scores, positives, None, None, margin=0.2, hardest=hardest, anchors="both")) == 0


def test_triplet_of_equal_scores_is_twice_the_margin():
    value = losses.triplet(
        np.zeros((5, 5), np.float32), np.eye(5, dtype=bool), None, None, margin=0.2, hardest=1.0, anchors="both"
    )
    assert float(value) == pytest.approx(0.4)  # the margin, once for each direction


def test_hard_negative_weight_ramps_from_zero_to_one():
    assert [float(losses.hard_negative_weight(s, 10)) for s in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert float(losses.hard_negative_weight(99, -1)) == 0
    assert float(losses.hard_negative_weight(0, 0)) == 1


def naive_sel(scores, pair, image, hardest, anchors):
    """SEL with the lowest score in each pair's block, as published, divided by the rows."""
    total = 0.0
    for a in range(6):
        for matrix, anchor in ((scores, "image"), (scores.T, "text")):
            positive = min(matrix[a, b] for b in range(6) if pair[b] == pair[a])
            costs = [max(0.0, 0.2 + matrix[a, b] - positive) for b in range(6) if image[b] != image[a]] or [0.0]
            if anchors in ("both", anchor):
                total += (1 - hardest) * sum(costs) + hardest * max(costs)
    return total / 6


sel = jax.jit(jax.value_and_grad(losses.sel), static_argnames=("anchors",))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 3]),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(losses.LOSS_CHOICES["loss.anchors"]),
)
def test_sel_equals_naive_loop_with_gradient(seed, views, ids, hardest, anchors):
    scores = np.random.default_rng(seed).uniform(-1, 1, (6, 6)).astype(np.float32)
    pair = np.arange(6) // views
    image = np.array(ids)[pair]
    positives, same_pair = losses.positives_mask(image), pair[:, None] == pair
    options = {"margin": 0.2, "hardest": hardest, "anchors": anchors}
    found, gradient = sel(scores, positives, None, None, same_pair=same_pair, **options)
    reference = functools.partial(naive_sel, pair=pair, image=image, hardest=hardest, anchors=anchors)
    assert float(found) == pytest.approx(reference(scores), abs=1e-5)
    check_gradient(reference, scores, gradient, seed)
    if views == 1:
        np.testing.assert_array_equal(found, triplet(scores, positives, None, None, **options))


def test_sel_of_one_view_has_gradient_of_triplet():
    scores, ids = np.random.default_rng(0).uniform(-1, 1, (6, 6)).astype(np.float32), np.array([0, 1, 1, 2, 3, 4])
    options = {"margin": 0.2, "hardest": 0.5, "anchors": "both"}

    def differentiate(loss, **inputs):
        return jax.grad(lambda s: loss(s, losses.positives_mask(ids), None, None, **options, **inputs))(scores)

    expected = differentiate(triplet)
    np.testing.assert_array_equal(differentiate(losses.sel, same_pair=np.eye(6, dtype=bool)), expected)


def test_check_loss_refuses_local_negatives_of_loss_with_needs():
    config = types.SimpleNamespace(name="sel", negatives="local")
    with pytest.raises(ConfigError, match=r"loss.negatives=local: loss.name=sel needs same_pair of the whole batch"):
        losses.check_loss(config)
    losses.check_loss(types.SimpleNamespace(name="sel", negatives="global"))
    losses.check_loss(types.SimpleNamespace(name="triplet", negatives="local"))


def test_every_need_of_a_loss_is_a_loss_input():
    assert {need for loss in losses.LOSSES.values() for need in loss.needs} == LOSS_INPUTS.keys()


info_nce = jax.jit(losses.info_nce)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3), min_size=5, max_size=5), st.sampled_from([0.0, 2.7, 9.0]))
def test_info_nce_equals_naive_loop(seed, ids, scale):
    scores = np.random.default_rng(seed).uniform(-1, 1, (5, 5)).astype(np.float32)
    positives = np.asarray(losses.positives_mask(np.array(ids)))
    logits, total = min(np.exp(scale), 100.0) * scores.astype(float), 0.0
    for matrix in (logits, logits.T):
        for a in range(5):
            logits_of_anchor = [matrix[a, b] for b in range(5) if a == b or not positives[a, b]]
            total += np.log(np.sum(np.exp(logits_of_anchor))) - matrix[a, a]
    assert float(info_nce(scores, positives, scale, None)) == pytest.approx(total / 10, rel=1e-4, abs=1e-5)


def test_info_nce_has_gradient_beyond_scale_limit():
    scores = np.array([[0.5, 0.6], [0.1, 0.4]], np.float32)  # the first image prefers the other caption
    positives = np.eye(2, dtype=bool)
    assert float(jax.grad(losses.info_nce, 2)(scores, positives, 6.0, None)) > 0


siglip = jax.jit(losses.siglip)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.sampled_from([0.0, 2.3, 9.0]),
    st.sampled_from([-10.0, 0.5]),
)
def test_siglip_equals_naive_loop(seed, ids, scale, bias):
    scores = np.random.default_rng(seed).uniform(-1, 1, (5, 5)).astype(np.float32)
    positives, total = np.asarray(losses.positives_mask(np.array(ids))), 0.0
    for a in range(5):
        for b in range(5):
            if a == b or not positives[a, b]:
                z = (1 if a == b else -1) * (min(np.exp(scale), 100.0) * float(scores[a, b]) + bias)
                total += np.logaddexp(0.0, -z)
    assert float(siglip(scores, positives, scale, bias)) == pytest.approx(total / 5, rel=1e-4, abs=1e-5)


def test_losses_have_published_initial_parameters():
    initial = {name: loss.initial for name, loss in losses.LOSSES.items()}
    assert np.exp(initial["info_nce"]["scale"]) == pytest.approx(1 / 0.07)
    assert (np.exp(initial["siglip"]["scale"]), initial["siglip"]["bias"]) == (pytest.approx(10.0), -10.0)
    assert initial["triplet"] == {}


def test_info_nce_triplet_is_weighted_sum():
    scores = np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32)
    positives, hyper = np.asarray(losses.positives_mask(np.array([0, 1, 0, 2]))), hyperparameters(margin=0.3)
    config = types.SimpleNamespace(name="info_nce_triplet", anchors="both", triplet_weight=0.5)
    found = losses.make_loss(config)({"scale": 1.5}, scores, positives, hyper, 0)
    expected = float(info_nce(scores, positives, 1.5, None)) + 0.5 * naive_triplet(scores, positives, 0.3, 0.0, "both")
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert losses.LOSSES["info_nce_triplet"].initial == losses.LOSSES["info_nce"].initial


def hyperparameters(**options):
    config = default.get_config()
    config.loss.update(options)
    return hyperparameters_from_config(config, steps=100)


def test_make_loss_passes_hyperparameters_and_learned_parameters():
    scores = np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32)
    positives, hyper = np.eye(4, dtype=bool), hyperparameters(margin=0.3, hard_negative_ramp=10)
    for anchors in losses.LOSS_CHOICES["loss.anchors"]:
        loss = losses.make_loss(types.SimpleNamespace(name="triplet", anchors=anchors))
        for step, hardest in ((0, 0.0), (5, 0.5), (99, 1.0)):
            expected = naive_triplet(scores, positives, 0.3, hardest, anchors)
            assert float(loss({}, scores, positives, hyper, step)) == pytest.approx(expected, abs=1e-5)
    for name, params in (("info_nce", {"scale": 1.5}), ("siglip", {"scale": 1.5, "bias": -2.0})):
        found = losses.make_loss(types.SimpleNamespace(name=name))(params, scores, positives, hyper, 0)
        assert float(found) == float(losses.LOSSES[name].compute(scores, positives, 1.5, params.get("bias")))


LOSSES = {
    "sum of hinges": {"name": "triplet", "hard_negative_ramp": -1},
    "hardest": {"name": "triplet", "hard_negative_ramp": 60},
    "info_nce": {"name": "info_nce"},
    "siglip": {"name": "siglip"},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("model", ["vsepp", "scan_t2i_avg", "mefn"])
def test_losses_raise_recall_on_easy_data(name, model):
    """A loss that collapses to equal scores leaves recall at chance, 1 in 24."""
    recall = trained_recall(model, LOSSES[name], steps=200)
    assert recall[0] < 0.3, "recall is high before training, so the test shows nothing"
    assert recall[1] > 0.8


def trained_recall(model: str, options: dict, steps: int, pairs=24, width=12) -> tuple[float, float]:
    """R@1 before and after training linear maps of two noisy views of each pair's hidden vector."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(pairs, 1, width))
    views = [
        jnp.float32((hidden + 0.1 * rng.normal(size=(pairs, n, width))) @ rng.normal(size=(width, width)))
        for n in (4, 3)
    ]
    config = default.get_config()
    config.loss.update(options)
    matcher, loss, hyper = make_matcher(model), losses.make_loss(config.loss), hyperparameters(**options)

    def features(kernel, x):
        return make_features(x @ kernel, jnp.ones(x.shape[:2], bool), jnp.mean(x @ kernel, 1))

    def scores(params):
        sides = [features(kernel, x) for kernel, x in zip(params["kernels"], views, strict=True)]
        return matcher.apply({"params": params["matcher"]}, *sides)

    kernels = [jnp.float32(rng.normal(size=(width, width))) for _ in views]
    start = [features(kernel, x) for kernel, x in zip(kernels, views, strict=True)]
    scalars = {k: jnp.float32(v) for k, v in losses.LOSSES[config.loss.name].initial.items()}
    matcher_params = matcher.init(jax.random.key(0), *start).get("params", {})
    params = {"kernels": kernels, "matcher": matcher_params, "loss": scalars}
    optimizer, positives = optax.adam(0.02), losses.positives_mask(jnp.arange(pairs))

    def value(params, step):
        return loss(params["loss"], scores(params), positives, hyper, step)

    @jax.jit
    def step(params, state, number):
        updates, state = optimizer.update(jax.grad(value)(params, number), state)
        return optax.apply_updates(params, updates), state

    def recall(params):
        return float(np.mean(np.argmax(np.asarray(scores(params)), 1) == np.arange(pairs)))

    state, before = optimizer.init(params), recall(params)
    for number in range(steps):
        params, state = step(params, state, number)
    return before, recall(params)
