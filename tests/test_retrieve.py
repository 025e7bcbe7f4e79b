"""An index of a folder and queries, by the command and against brute force."""

import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import shapes
from mefn_jax import evaluator, index, retrieve, training
from mefn_jax.data.images import decode, resize_of
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.index import build, open_index, search
from mefn_jax.sharding import make_mesh

IMAGES = 11


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained runs: MEFN, and VSE++ whose coarse vectors are its score."""
    found = {}
    for name in ("mefn", "vsepp"):
        config = shapes.get_config(f"smoke,model={name}")
        with config.unlocked():
            config.train.steps, config.train.eval_every, config.eval.batch_size = 2, 2, 4
        found[name] = tmp_path_factory.mktemp(name)
        training.train(config, found[name])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in two folders, one of them broken, and a file that is none."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    (root / "below").mkdir()
    for k in range(IMAGES):
        pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((70 + k, 50)).save(root / f"{'below/' if k % 2 else ''}{k}.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    (root / "notes.txt").write_text("no image")
    return root


CAPTION = "a red circle is left of a blue square"


@pytest.mark.parametrize("name", ["mefn", "vsepp"])
def test_a_query_finds_what_scoring_all_images_finds(name, runs, folder, tmp_path, capsys):
    workdir = runs[name]
    retrieve.index_images(workdir, "latest", folder, tmp_path / "index")
    assert "left out 1 images that cannot be decoded: broken.jpg" in capsys.readouterr().out
    best = retrieve.query(workdir, "latest", tmp_path / "index", CAPTION, 5, out=str(tmp_path / "found.png"))
    said = capsys.readouterr().out
    assert f"{IMAGES} images" in said
    model, params, _ = evaluator.load(workdir, "latest")
    names = [n for n in index.listed(folder) if n != "broken.jpg"]
    pixels = np.stack([decode((folder / n).read_bytes(), resize_of(model.config.image), n) for n in names])
    images = model.model.encode_images(params, pixels)
    texts = model.model.encode_texts(params, *model.tokenizer([CAPTION]))
    scores = np.asarray(model.model.score(params, images, texts))[:, 0]
    order = np.argsort(-scores)[:5]
    assert [n for _, n in best] == [names[k] for k in order]
    np.testing.assert_allclose([s for s, _ in best], scores[order], atol=1e-5)
    assert all(f"{names[k]}" in said for k in order)
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 5 * 200
    assert (tmp_path / "index" / "fragments.npy").is_file() == (name == "mefn")
    assert np.load(tmp_path / "index" / "coarse.npy").shape[0] == IMAGES + 1


def test_a_shortlist_is_what_the_matcher_scores(runs, folder, tmp_path, capsys):
    retrieve.index_images(runs["mefn"], "latest", folder, tmp_path / "index")
    retrieve.query(runs["mefn"], "latest", tmp_path / "index", CAPTION, 2, shortlist=4)
    assert "4 of them scored by the matcher" in capsys.readouterr().out


def test_a_stopped_index_goes_on_and_ends_the_same(runs, folder, tmp_path, monkeypatch):
    model, params, made_by = retrieve.opened(runs["mefn"], "latest", False)
    build(model, params, made_by, folder, tmp_path / "whole")
    monkeypatch.setattr(index, "SAVE_SECONDS", 0.0)
    read = index.batches

    def stopping(*args):
        for number, batch in enumerate(read(*args)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(index, "batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(model, params, made_by, folder, tmp_path / "stopped")
    with pytest.raises(ConfigError, match="8 of 12 images are encoded; run --index_images again"):
        open_index(tmp_path / "stopped", made_by)
    monkeypatch.setattr(index, "batches", read)
    build(model, params, made_by, folder, tmp_path / "stopped")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


def test_what_does_not_belong_together_is_refused(runs, folder, tmp_path):
    built = tmp_path / "index"
    retrieve.index_images(runs["mefn"], "latest", folder, built)
    with pytest.raises(
        ConfigError, match=rf"was made by step 2 of {runs['mefn']}, which is not step 2 of {runs['vsepp']}"
    ):
        retrieve.query(runs["vsepp"], "latest", built, CAPTION, 1)
    with pytest.raises(ConfigError, match="was made by step 2"):
        retrieve.index_images(runs["vsepp"], "latest", folder, built)
    shutil.copytree(folder, tmp_path / "more")
    with pytest.raises(ConfigError, match="is of other images"):
        retrieve.index_images(runs["mefn"], "latest", tmp_path / "more", built)
    with pytest.raises(ConfigError, match="no index; make one"):
        retrieve.query(runs["mefn"], "latest", tmp_path / "nowhere", CAPTION, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        retrieve.index_images(runs["mefn"], "latest", tmp_path / "empty", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is not empty and holds no index\.json"):
        retrieve.index_images(runs["mefn"], "latest", folder, tmp_path / "more")
    with pytest.raises(ConfigError, match="a caption without words"):
        retrieve.query(runs["mefn"], "latest", built, "  ", 1)
    with pytest.raises(ConfigError, match=r"give a \.png or \.jpg file"):
        retrieve.query(runs["mefn"], "latest", built, CAPTION, 1, out=str(tmp_path / "x.doc"))


def test_a_caption_that_is_too_long_is_cut_with_a_warning(runs, folder, tmp_path, capsys):
    retrieve.index_images(runs["mefn"], "latest", folder, tmp_path / "index")
    most = shapes.get_config("smoke").text.max_words
    long = " ".join(["red"] * (most + 3))
    best = retrieve.query(runs["mefn"], "latest", tmp_path / "index", long, 3)
    assert f"{most + 3} wordpieces, of which the model takes the first {most}" in capsys.readouterr().out
    assert best == retrieve.query(runs["mefn"], "latest", tmp_path / "index", " ".join(["red"] * most), 3)


def test_the_commands(runs, folder, tmp_path, command):
    """By an image the lines of a file; the index with eight devices and one finds the same."""
    options, made = (f"--workdir={runs['mefn']}", "--step=latest"), tmp_path / "index"
    command("eval.py", *options, f"--index_images={folder}", f"--index={made}", devices=8)
    said = command("eval.py", *options, f"--index={made}", f"--query={CAPTION}", "--topk=3").stdout
    one = retrieve.query(runs["mefn"], "latest", made, CAPTION, 3)
    assert all(f"{score:.4f}  {name}" in said for score, name in one)
    lines = tmp_path / "captions.txt"
    lines.write_text("a red circle\n\nblue squares\na large dotted star\n")
    said = command("eval.py", *options, f"--query_image={folder / '0.png'}", f"--captions={lines}", "--topk=2").stdout
    assert "0.png in 3 captions" in said
    assert len([line for line in said.splitlines() if line.strip()[:1] in ("1", "2")]) == 2
    refused = command("eval.py", *options, f"--query={CAPTION}", check=False)
    assert "--index=INDEX is missing" in refused.stderr


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 12), st.sampled_from([3, 8, 64]), st.sampled_from([1, 8])
)
def test_search_is_numpys_sort(seed, number, k, chunk, devices):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (number, 4)).astype(np.float32)  # with many ties
    query, readable = rng.integers(-2, 3, 4).astype(np.float32), rng.random(number) < 0.8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK", chunk)
        positions, products = search(vectors, query, k, make_mesh(devices=jax.devices()[:devices]), readable)
    expected = [j for j in np.argsort(-(vectors @ query), kind="stable") if readable[j]][:k]
    assert positions.tolist() == expected
    np.testing.assert_array_equal(products, (vectors @ query)[expected])


def test_the_index_says_what_it_is(runs, folder, tmp_path):
    retrieve.index_images(runs["mefn"], "latest", folder, tmp_path / "index")
    facts = json.loads((tmp_path / "index" / "index.json").read_text())
    assert facts["checkpoint"]["workdir"] == str(runs["mefn"])
    assert (facts["images"], facts["done"], facts["skipped"]) == (IMAGES + 1, IMAGES + 1, ["broken.jpg"])
