"""`eval.py mine` and the batches of `data.negatives`: what is a negative, which are the hardest, and every order."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from commands import assert_equal_states, read_state, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import shapes
from mefn_jax.config import check_config
from mefn_jax.data import negatives as hard
from mefn_jax.data import pipeline
from mefn_jax.data.digests import digest_split
from mefn_jax.data.negatives import HardNegatives, arrange_groups, number_texts, read_negatives, write_negatives
from mefn_jax.data.order import GroupedCaptions, ShuffledCaptions, make_rng
from mefn_jax.data.pipeline import digest_captions
from mefn_jax.data.split import Split
from mefn_jax.errors import CheckpointError, ConfigError, DataError
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.retrieval import mine
from mefn_jax.retrieval.mine import choose_negatives, mine_negatives
from mefn_jax.scoring.rerank import Candidates
from mefn_jax.training import loop

# Captions of images: few texts, so that many are equal, in upper case and with other spaces too.
TEXTS = st.sampled_from(["a dog", "A  dog", "a cat", "two cats", "a red car", "grass", "a man ", "a boy", "snow", "x"])
GALLERY = st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=2, max_size=9)


def describe(gallery):
    """The captions of a gallery, normalised, and the image of each."""
    captions = [" ".join(text.lower().split()) for texts in gallery for text in texts]
    return captions, np.repeat(np.arange(len(gallery)), list(map(len, gallery)))


def may_be_negatives(a, b, captions, caption_image):
    """The definition, by sets of texts: other images, and neither caption is one of the other's image."""
    own, other = ({t for t, k in zip(captions, caption_image, strict=True) if k == caption_image[x]} for x in (a, b))
    return caption_image[a] != caption_image[b] and captions[a] not in other and captions[b] not in own


def number_captions(gallery):
    return number_texts(digest_captions([text for texts in gallery for text in texts]))


@given(GALLERY)
def test_negatives_are_no_captions_of_the_same_image_and_no_equal_ones(gallery):
    captions, caption_image = describe(gallery)
    texts = number_captions(gallery)
    assert texts.tolist() == [captions.index(caption) for caption in captions]
    found = HardNegatives(np.empty((len(captions), 0), np.int32), texts, caption_image)
    for a in range(len(captions)):
        for b in range(len(captions)):
            assert found.is_negative(a, b) == may_be_negatives(a, b, captions, caption_image)


@settings(deadline=None)
@given(gallery=GALLERY, seed=st.integers(0, 100), k=st.integers(1, 5), share=st.floats(0.3, 1))
def test_mined_negatives_are_the_hardest(gallery, seed, k, share):
    """Against loops: images by falling score, of each the caption that the own image scores highest."""
    captions, caption_image = describe(gallery)
    rng, number = np.random.default_rng(seed), max(1, round(share * len(gallery)))
    all_scores = rng.choice(20, (len(captions), len(gallery))).astype(np.float32)  # with ties
    images = np.stack([rng.permutation(len(gallery))[:number] for _ in captions]).astype(np.int32)
    found = Candidates(images, np.take_along_axis(all_scores, images, 1))
    negatives, scores = choose_negatives(found, caption_image, number_captions(gallery), k)
    for a in range(len(captions)):
        expected = []
        for image in sorted(images[a], key=lambda j, a=a: (-all_scores[a, j], j)):
            allowed = [
                b for b in np.flatnonzero(caption_image == image) if may_be_negatives(a, b, captions, caption_image)
            ]
            known = {b: all_scores[b, caption_image[a]] for b in allowed if caption_image[a] in images[b]}
            if allowed:
                best = min(allowed, key=lambda b, known=known: (-known.get(b, -np.inf), b))
                expected.append((best, all_scores[a, image]))
        row = [(c, s) for c, s in zip(negatives.captions[a], scores[a], strict=True) if c >= 0]
        assert row == expected[:k]


def random_negatives(gallery, seed, k=4):
    """Hard negatives of a gallery, random ones among those that may be."""
    captions, caption_image = describe(gallery)
    rng, texts = np.random.default_rng(seed), number_captions(gallery)
    rows = np.full((len(captions), k), -1, np.int32)
    for a in range(len(captions)):
        allowed = [b for b in range(len(captions)) if may_be_negatives(a, b, captions, caption_image)]
        chosen = rng.permutation(allowed)[:k]
        rows[a, : len(chosen)] = chosen
    return HardNegatives(rows, texts, caption_image)


@settings(deadline=None)
@given(GALLERY, st.integers(2, 5), st.integers(0, 2**31), st.integers(0, 4))
def test_order_has_every_caption_once_and_groups_are_pure(gallery, size, seed, lead):
    found = random_negatives(gallery, seed)
    captions, caption_image = describe(gallery)
    order = arrange_groups(found, size, np.random.default_rng(seed), lead)
    assert sorted(order) == list(range(len(captions)))
    np.testing.assert_array_equal(order, arrange_groups(found, size, np.random.default_rng(seed), lead))
    groups, partial = hard._form_groups(found, size, np.random.default_rng(seed).permutation(len(captions)).tolist())
    assert sorted(itertools.chain(*groups, *partial)) == list(range(len(captions)))
    for group in groups + partial:
        assert (len(group) == size) == (group in groups)
        assert set(group[1:]) <= set(found.captions[group[0]].tolist())
        for a in group:
            assert all(a == b or may_be_negatives(a, b, captions, caption_image) for b in group)
    # Groups stand at multiples of their size behind the lead, all but those that the lead takes apart.
    blocks = {tuple(order[k : k + size]) for k in range(min(lead, len(order)), len(order), size)}
    assert sum(tuple(group) not in blocks for group in groups) <= lead


@settings(deadline=None, max_examples=50)
@given(GALLERY, st.integers(2, 4), st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 30))
def test_sequence_follows_seed_and_position_and_batches_hold_whole_groups(gallery, size, seed, start, length):
    """Every epoch has every caption once, whatever is asked for first; groups begin at multiples of their size."""
    found = random_negatives(gallery, seed)
    number = len(found.texts)
    sequence = GroupedCaptions(found, size, seed)
    whole = sequence[np.arange(6 * number)]
    np.testing.assert_array_equal(
        GroupedCaptions(found, size, seed)[np.arange(start, start + length)], sequence[np.arange(start, start + length)]
    )
    for epoch in range(6):
        own = whole[epoch * number : (epoch + 1) * number]
        assert sorted(own) == list(range(number))
        lead = -epoch * number % size
        assert 0 <= lead < size
        expected = arrange_groups(found, size, make_rng(2**63 + seed, epoch), lead)
        np.testing.assert_array_equal(own, expected)


def test_captions_with_free_negatives_stand_beside_them():
    """Of many captions with ten random negatives each, nearly all stand beside one of their own."""
    others = np.random.default_rng(0).integers(1, 100, (500, 10))
    caption_image = np.arange(500) // 5
    rows = (5 * ((caption_image[:, None] + others) % 100) + others % 5).astype(np.int32)
    found = HardNegatives(rows, np.arange(500), caption_image)
    order = GroupedCaptions(found, 2, 0)[np.arange(1000)]
    assert np.mean([b in found.captions[a] or a in found.captions[b] for a, b in order.reshape(-1, 2)]) > 0.9
    order = GroupedCaptions(found, 4, 0)[np.arange(1000)]  # partial groups stay together
    hits = [any(b in found.captions[a] for a in group for b in group) for group in order.reshape(-1, 4)]
    assert np.mean(hits) > 0.9
    shuffled = ShuffledCaptions(np.arange(500)[:, None], 0)[np.arange(1000)].reshape(-1, 2)
    assert np.mean([b in found.captions[a] for a, b in shuffled]) < 0.1


# The command and the training.


@pytest.fixture(scope="module")
def mined(runs, tmp_path_factory):
    """A file of negatives of the drawn scenes, mined with MEFN."""
    path = tmp_path_factory.mktemp("mined") / "hard.safetensors"
    mine_negatives(TrainedRun(runs["mefn"], "latest"), str(path), k=3, candidates=20)
    return path


def test_mining_is_reproducible_and_is_that_of_all_scores(runs, mined, tmp_path, monkeypatch, loaded, capsys):
    """Two runs give equal bytes, in other parts too; with all images as candidates, negatives follow from the scores of
    all pairs."""
    run = TrainedRun(runs["mefn"], "latest")
    mine_negatives(run, str(tmp_path / "again.safetensors"), k=3, candidates=20)
    assert (tmp_path / "again.safetensors").read_bytes() == mined.read_bytes()
    evaluator, params, _ = run.load()
    monkeypatch.setattr(mine, "CAPTIONS_AT_ONCE", 100)
    mine_negatives(run, str(tmp_path / "all.safetensors"), k=3, candidates=10**6)
    printed = capsys.readouterr().out
    assert "mined 960 hard negatives of 320 captions, at most 3 each; 0 captions have none" in printed
    tensors = load_file(tmp_path / "all.safetensors")
    split = mine.open_split(evaluator, mine.Gallery("", "train")).split
    images, texts = evaluator.encode(params, split)
    scores = evaluator.scores(params, images, texts)(slice(0, 64), slice(0, 320)).T
    everything = Candidates(np.tile(np.arange(64, dtype=np.int32), (320, 1)), scores)
    expected, expected_scores = choose_negatives(everything, split.caption_image, tensors["texts"], 3)
    np.testing.assert_allclose(tensors["scores"], expected_scores, atol=1e-5)
    assert np.mean(tensors["captions"] == expected.captions) > 0.98  # equal scores but for rounding
    found = read_negatives(str(mined), split)
    captions = [" ".join(caption.lower().split()) for caption in split.all_captions()]
    for a, b in zip(np.repeat(np.arange(320), 3), found.captions.reshape(-1), strict=True):
        assert may_be_negatives(a, b, captions, split.caption_image)


def config_with(path, **data):
    """The smoke configuration of VSE++ with a file of negatives."""
    config = shapes.get_config("smoke,model=vsepp")
    with config.unlocked():
        config.data.update({"negatives": str(path), "negatives_per_pair": 3, "pair_twins": False, "workers": 0} | data)
        config.train.update(steps=6, eval_every=100, save_every=3, log_every=1)
        config.eval.update(batch_size=4)
    return config


@pytest.mark.slow  # what a batch holds follows from its position, which the tests above and below show
def test_run_with_negatives_resumes_to_the_bit_and_not_with_another_content(mined, tmp_path, capsys):
    path = tmp_path / "hard.safetensors"
    shutil.copy(mined, path)
    loop.train(config_with(path), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "6")
    # The file may have another name, and workers read it as threads do.
    loop.train(config_with(mined, threads=1), tmp_path / "broken")
    printed = capsys.readouterr().out
    assert "resuming after 3" in printed
    assert "note: data.negatives was" in printed
    assert_equal_states(read_state(tmp_path / "whole"), read_state(tmp_path / "broken"))
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        save_file(tensors | {"captions": np.roll(tensors["captions"], 1, 1)}, path, file.metadata())
    with pytest.raises(CheckpointError, match=r"holds a run with another content of data\.negatives="):
        loop.train(config_with(path), tmp_path / "whole")


def test_batches_of_a_run_hold_groups_of_its_negatives(mined, runs):
    """All rows of a batch of a configuration, on one host or two."""
    evaluator, _, _ = TrainedRun(runs["mefn"], "latest").load()
    split = mine.open_split(evaluator, mine.Gallery("", "train")).split
    found, config = read_negatives(str(mined), split), config_with(mined)
    whole = pipeline.training_dataset_from_config(config, split, evaluator.tokenizer)
    parts = [
        pipeline.training_dataset_from_config(config, split, evaluator.tokenizer, rows)
        for rows in (np.arange(0, 16, 2), np.arange(1, 16, 2))
    ]
    sequence = GroupedCaptions(found, 4, config.train.seed)
    for step in (0, 7, 19, 20, 33):
        captions = whole[step]["caption_index"]
        np.testing.assert_array_equal(captions, sequence[16 * step + np.arange(16)])
        np.testing.assert_array_equal(parts[0][step]["caption_index"], captions[::2])
        np.testing.assert_array_equal(parts[1][step]["caption_index"], captions[1::2])


def test_file_of_other_data_or_with_wrong_negatives_is_refused(mined, tmp_path):
    records = [{"image": b"", "captions": [f"c{k}{j}" for j in range(2)], "image_id": str(k)} for k in range(3)]
    split = Split("train", records, np.arange(3), np.array([0, 2, 4, 6]))
    with pytest.raises(DataError, match=r"was mined from other images or captions than train has here \(6 captions\)"):
        read_negatives(str(mined), split)
    path, metadata = tmp_path / "x.safetensors", {"split": digest_split(split)}
    good = HardNegatives(np.array([[2], [3], [4], [5], [0], [-1]], np.int32), np.arange(6), split.caption_image)
    write_negatives(path, good, np.zeros((6, 1)), metadata)
    assert read_negatives(str(path), split).captions[4] == 0
    changed = dataclasses.replace(split, records=[records[0], records[1] | {"image_id": "y"}, records[2]])
    with pytest.raises(DataError, match="was mined from other images or captions"):
        read_negatives(str(path), changed)
    for caption, message in ((1, "caption 1 is no negative of caption 0"), (6, "names captions that do not exist")):
        rows = np.array([[caption], *good.captions[1:]], np.int32)
        write_negatives(path, dataclasses.replace(good, captions=rows), np.zeros((6, 1)), metadata)
        with pytest.raises(DataError, match=message):
            read_negatives(str(path), split)
    write_negatives(path, good, np.zeros((6, 1)), metadata | {"format": 2})
    with pytest.raises(DataError, match="has format 2, written by a newer version"):
        read_negatives(str(path), split)
    for content in (b"", b"\x80\x04K\x01.", path.read_bytes()[:-1], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as hard negatives"):
            read_negatives(str(path), split)
    path.unlink()
    with pytest.raises(DataError, match=r"no such file; make it with python eval\.py mine"):
        read_negatives(str(path), split)


def test_options_that_do_not_fit_negatives_are_refused():
    with pytest.raises(ConfigError, match=r"set --config\.data\.pair_twins=False"):
        check_config(config_with("x", pair_twins=True), {})
    with pytest.raises(ConfigError, match="groups of 5 pairs do not divide the 16 pairs of a batch"):
        check_config(config_with("x", negatives_per_pair=4), {})
    check_config(config_with("", pair_twins=True, negatives_per_pair=4), {})


def test_mine_refuses_files_and_models_in_one_line(runs, tmp_path, command):
    (tmp_path / "mine.safetensors").write_text("notes")
    run = ("eval.py", "mine", f"--workdir={runs['mate']}", "--step=latest")
    assert "exists and was not written by this command" in refusal(
        command, *run, f"--out={tmp_path / 'mine.safetensors'}"
    )
    assert "give a .safetensors file" in refusal(command, *run, f"--out={tmp_path / 'x.npz'}")
    assert "by which candidates are scored" in refusal(command, *run, f"--out={tmp_path / 'x.safetensors'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.safetensors"]
