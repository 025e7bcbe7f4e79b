"""Packed texts: nothing is lost, groups keep their bounds, and what is scored is what the padded form scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.features import make_features
from mefn_jax.matching.entropy import ENTROPIES, shannon
from mefn_jax.matching.mefn import DIRECTIONS, GLOBAL_INPUTS, MEFN
from mefn_jax.model import MODELS
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.layouts import region_block, to_packed
from mefn_jax.scoring.packing import GROUP_TEXTS, LOOKAHEAD, best_fit_decreasing, pack, plan_groups
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TiledScores, compile_tile_scorer, even_slices, plan_tiles


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(30, 64))
def test_groups_hold_every_text_once(lengths, size):
    lengths = np.array(lengths)
    group, slot, start = best_fit_decreasing(lengths, size)
    for k in range(group.max() + 1):
        here = np.flatnonzero(group == k)
        assert sorted(slot[here]) == list(range(len(here)))
        assert len(here) <= GROUP_TEXTS
        here = here[np.argsort(slot[here])]
        np.testing.assert_array_equal(start[here], np.cumsum(lengths[here]) - lengths[here])
        assert lengths[here].sum() <= size
    # No two groups that are not full of texts could be one.
    used = np.bincount(group, lengths)
    room = (size - used)[np.bincount(group) < GROUP_TEXTS]
    assert np.sum(room > size / 2) <= 1 or lengths.sum() == 0


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_an_order_is_nearly_kept(data, lengths):
    """Every word has its place and every text its slot; a text comes at most so much earlier as there is choice."""
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    mask = np.arange(40) < np.array(lengths)[:, None]
    words, texts, place = plan_groups(mask, order)
    np.testing.assert_array_equal(np.sort(words[words >= 0]), np.flatnonzero(mask))
    np.testing.assert_array_equal(texts.ravel()[place], np.arange(len(lengths)))
    owner = np.where(words >= 0, words // 40, -1)
    for here, of_words in zip(texts, owner, strict=True):
        assert set(of_words) - {-1} <= set(here)
    rank = np.argsort(order)[np.argsort(place)]  # in which place of the order is what comes first, second, ...
    assert np.all(rank <= np.arange(len(rank)) + LOOKAHEAD - 1)


N, M, D = 4, 7, 6


def features(seed, mask):
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(*mask.shape, D)).astype(np.float32)
    if seed % 2:
        raw[1:] = raw[:1]  # duplicates
    pooled = rng.normal(size=(len(mask), D)).astype(np.float32)
    return jax.tree.map(np.asarray, make_features(raw, jnp.asarray(mask), pooled))


def masks(number, length):
    one = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    return st.lists(one, min_size=number, max_size=number).map(np.array)


@pytest.fixture(scope="module")
def scorers():
    """The compiled tile, the plain form and the parameters of every matcher, on one device."""
    mesh, found = make_mesh(devices=jax.devices()[:1]), {}
    some = features(0, np.ones((2, N), bool)), features(1, np.ones((2, M), bool))
    for name, (matcher, options) in MODELS.items():
        module = matcher(**options)
        params = module.init(jax.random.key(0), *some)

        def tile(params, regions, words, module=module):
            return module.apply(params, regions, words, method="score_tile")

        found[name] = params, compile_tile_scorer(tile, mesh, 1.0), jax.jit(module.apply)
    return mesh, found


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), masks(5, N), masks(9, M))
def test_packed_scores_are_the_plain_ones(scorers, seed, regions, words):
    mesh, found = scorers
    images, texts = features(seed, regions), features(seed + 1, words)
    for name, (params, step, plain) in found.items():
        scores = TiledScores(lambda *x, s=step, p=params: s(p, *x), images, texts, mesh)
        expected = np.asarray(plain(params, images, texts))
        np.testing.assert_allclose(scores(slice(0, 5), slice(0, 9)), expected, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(scores(slice(1, 4), slice(2, 9)), expected[1:4, 2:9], atol=1e-5, err_msg=name)


def three_by_three(seed):
    """Images, texts (one of a single word, one padded), and the texts packed, with their places."""
    images, texts = features(seed, np.ones((3, N), bool)), features(seed + 2, np.arange(M) < np.array([[1], [4], [M]]))
    groups, number, place = pack(texts)
    assert number == 1
    return images, texts, jax.tree.map(lambda x: x[0], to_packed(*map(jnp.asarray, groups))), place


@pytest.mark.parametrize("entropy", sorted(ENTROPIES))
def test_any_scale_is_that_of_the_readable_form(entropy):
    module, (images, texts, words, place) = MEFN(entropy=entropy), three_by_three(2)
    params = jax.jit(module.init)(jax.random.key(0), images, texts)

    @jax.jit
    def forms(params):
        def readable(image, text):
            return module.apply(params, image, text, method="explain")["score"]

        tile = module.apply(params, region_block(images), words, method="score_tile")[:, place]
        pairs = jax.vmap(jax.vmap(readable, (None, 0)), (0, None))(images, texts)
        return tile, module.apply(params, images, texts), pairs

    for scale in (1.0, 9.0, 31.0, 33.0, 200.0):
        params["params"]["log_scale"] = jnp.log(scale)
        tile, plain, pairs = forms(params)
        np.testing.assert_allclose(tile, pairs, atol=2e-5, err_msg=scale)
        np.testing.assert_allclose(plain, pairs, atol=2e-5, err_msg=scale)


@pytest.mark.parametrize("attend", DIRECTIONS)
@pytest.mark.parametrize("global_input", GLOBAL_INPUTS)
def test_packed_is_readable_with_all_options(attend, global_input):
    images, texts, words, place = three_by_three(3)

    @functools.partial(jax.jit, static_argnums=0)
    def forms(name):
        module = MEFN(entropy=name, local=attend, global_input=global_input)
        params = module.init(jax.random.key(0), images, texts)

        def readable(image, text):
            return module.apply(params, image, text, method="explain")["score"]

        tile = module.apply(params, region_block(images), words, method="score_tile")[:, place]
        return tile, jax.vmap(jax.vmap(readable, (None, 0)), (0, None))(images, texts)

    for name in ENTROPIES:
        np.testing.assert_allclose(*forms(name), atol=1e-5, err_msg=name)


def test_an_image_without_regions_has_a_score():
    images, texts, words, place = three_by_three(3)
    mask = images.mask & (np.arange(3) > 0)[:, None]
    images = dataclasses.replace(images, mask=mask, fragments=images.fragments * mask[..., None])
    module = MEFN()
    params = jax.jit(module.init)(jax.random.key(0), images, texts)
    tile = jax.jit(functools.partial(module.apply, method="score_tile"))(params, region_block(images), words)[:, place]
    np.testing.assert_allclose(tile, jax.jit(module.apply)(params, images, texts), atol=1e-5)
    assert np.all(np.isfinite(tile))


def test_an_entropy_that_is_not_known_here_is_computed_pair_by_pair(monkeypatch):
    def mine(S, region_mask, word_mask, scale):
        return shannon(S, region_mask, word_mask, scale)

    monkeypatch.setitem(ENTROPIES, "mine", mine)
    images, texts, words, place = three_by_three(2)
    params = jax.jit(MEFN().init)(jax.random.key(0), images, texts)

    def forms(name):
        module = MEFN(entropy=name)
        tile = module.apply(params, region_block(images), words, method="score_tile")[:, place]
        return tile, module.apply(params, images, texts)

    found, expected = (jax.jit(forms, static_argnums=0)(name) for name in ("mine", "shannon"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_long_text_gets_a_longer_group():
    mask = np.zeros((2, 200), bool)
    mask[0, :150], mask[1, 3:5] = True, True
    (vectors, of, _), number, place = pack(features(0, mask))
    assert vectors.shape[1] == of.shape[1] == 192
    assert number == 1
    assert of[0].sum(0)[place].tolist() == [150, 2]


def test_tiles_keep_the_budget():
    assert plan_tiles(250, 36, 128, 1.0) == (5, 50)
    assert plan_tiles(3, 10_000, 128, 1.0) == (3, 1)
    assert even_slices(1000, 256) == [slice(0, 250), slice(250, 500), slice(500, 750), slice(750, 1000)]


@pytest.mark.parametrize("name", ["mefn", "scan_i2t_lse", "vsepp"])
def test_devices_change_no_rank(name):
    """With 1, 3 and 8 devices, on tiles that do not divide, and images whose scores are equal."""
    module = MODELS[name][0](**MODELS[name][1])
    rng = np.random.default_rng(0)
    images, texts = features(2, np.ones((21, N), bool)), features(4, np.arange(M) < rng.integers(1, M + 1, (40, 1)))
    images = jax.tree.map(lambda x: np.concatenate([x, x[:3]]), images)
    owner = np.arange(40) % 24
    params = module.init(jax.random.key(0), images, texts)

    def tile(params, regions, words):
        return module.apply(params, regions, words, method="score_tile")

    found = []
    for devices in (1, 3, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        step = functools.partial(compile_tile_scorer(tile, mesh, 0.005), params)  # two or three images a tile
        found.append(rank(TiledScores(step, images, texts, mesh), owner, best=5))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other.counts, found[0].counts)
        np.testing.assert_array_equal(other.top_captions.positions, found[0].top_captions.positions)
        np.testing.assert_array_equal(other.top_images.positions, found[0].top_images.positions)
