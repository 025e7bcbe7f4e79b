"""SFE's constants: from training items alone, before the first step, whatever the other splits hold."""

import jax
import numpy as np
import pytest
from sample_data import write_precomputed

from configs import precomputed
from mefn_jax.data.dataset import HELD_OUT, Dataset
from mefn_jax.data.from_config import make_tokenizer
from mefn_jax.data.tokenizer import train_tokenizer
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.matching import concepts
from mefn_jax.model import build_model
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training.cca_init import init_from_training_data

IMAGES, HELD = 20, 4


def write_data(root, seed=0):
    """Writes a data set; `seed` changes val, test and the last HELD images of train."""
    for split in ("train", "dev", "test"):
        write_precomputed(root, split, IMAGES, shape=(9, 7))
    rng = np.random.default_rng(seed)
    train = np.load(root / "train_ims.npy")
    captions = (root / "train_caps.txt").read_text().splitlines()
    if seed:
        train[-HELD:] = rng.normal(size=(HELD, 9, 7))
        captions[-5 * HELD :] = [f"Quite another thing {k}." for k in range(5 * HELD)]
        for split in ("dev", "test"):
            np.save(root / f"{split}_ims.npy", rng.normal(size=(IMAGES, 9, 7)).astype(np.float32))
            (root / f"{split}_caps.txt").write_text("Something else.\n" * (5 * IMAGES))
    np.save(root / "train_ims.npy", train)
    (root / "train_caps.txt").write_text("\n".join(captions) + "\n")
    return root


@pytest.fixture(scope="module")
def evaluator():
    config = precomputed.get_config("smoke,model=sfe,text=gru")
    config.image.regions.width, config.matcher.concepts = 7, 6
    captions = [f"A dog number {n} of train {k}." for k in range(IMAGES) for n in range(5)]
    tokenizer = make_tokenizer(config, train_tokenizer(captions, 100, True, "keep"))
    return Evaluator(build_model(config, tokenizer.vocab_size), tokenizer, config, make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def variables(evaluator):
    return jax.jit(evaluator.model.init)(jax.random.key(0), *dummy_inputs(evaluator.config))


def test_constants_are_those_of_kept_training_items(evaluator, variables, tmp_path):
    found = []
    for seed in (0, 1):
        dataset = Dataset(write_data(tmp_path / str(seed), seed), held_out_images=HELD)
        found.append(init_from_training_data(evaluator, variables, dataset.split("train")))
        assert dataset.split(HELD_OUT).num_images == HELD
    jax.tree.map(np.testing.assert_array_equal, *found)
    constants = found[0]["constants"]["matcher"]
    shapes = lambda tree: jax.tree.map(np.shape, tree)  # noqa: E731
    assert shapes(constants) == shapes(variables["constants"]["matcher"])
    # "0", which is in some captions; a word of every caption is zero: it differs in nothing from all of them.
    lengths = np.linalg.norm(constants["textual_nodes"]["initial"], axis=1)
    np.testing.assert_allclose(lengths, [0, 0, 0, 0, 0, 1], atol=1e-5)
    edges = constants["image_step"]
    assert set(edges) == {"patch", "instance", "neighbour"}
    for cue in edges.values():
        rows = np.asarray(cue).sum(1)
        assert np.all((np.abs(rows - 1) < 1e-5) | (rows == 0))
    whole = init_from_training_data(evaluator, variables, Dataset(tmp_path / "1").split("train"))
    changed = jax.tree.map(lambda a, b: np.any(a != b), whole["constants"]["matcher"], constants)
    assert all(jax.tree.leaves(changed["visual_nodes"]))


def test_constants_equal_their_parts(evaluator, variables, tmp_path):
    """Of a matcher with other options, from the encoded items alone."""
    split = Dataset(write_data(tmp_path)).split("train")
    captions, rng = split.all_captions(), np.random.default_rng(0)
    images = rng.normal(size=(IMAGES, 9, 4)).astype(np.float32)
    images /= np.linalg.norm(images, axis=2, keepdims=True)
    pooled = rng.normal(size=(IMAGES + 5 * IMAGES, 4)).astype(np.float32)
    mask = np.ones((IMAGES, 9), bool)
    items = Features(images, mask, pooled[:IMAGES]), Features(images, mask, pooled[IMAGES:])
    matcher = evaluator.model.matcher.clone(edges=2, cues=("patch", "neighbour"))
    found = matcher.initial_constants(*items, split.caption_image, captions, 3)
    centroids = concepts.cluster_regions(images.reshape(-1, 4), 6, 3)
    np.testing.assert_array_equal(found["visual_nodes"]["initial"], centroids)
    words = concepts.frequent_words(captions, 6)
    o = concepts.Occurrences(
        concepts.mark_clusters(images, mask, centroids, 6), concepts.mark_words(captions, words, 6), split.caption_image
    )
    weights = concepts.weigh_edges(*concepts.count_within(o.captions))
    np.fill_diagonal(weights, 0)
    np.testing.assert_array_equal(found["text_step"]["patch"], concepts.keep_strongest(weights, 2))
    nearest = concepts.nearest_images(items[0].pooled, items[1].pooled, o.image_index, 5)
    weights = concepts.weigh_edges(*concepts.count_across(o, nearest))
    np.testing.assert_array_equal(found["image_step"]["neighbour"], concepts.keep_strongest(weights, 2))
    np.testing.assert_array_equal(found["text_step"]["neighbour"], concepts.keep_strongest(weights.T, 2))
    assert set(found["image_step"]) == {"patch", "neighbour"}
