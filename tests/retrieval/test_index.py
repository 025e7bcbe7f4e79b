"""An index of a folder and queries, by the command and against brute force."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import shapes
from mefn_jax.data.images import decode, resize_from_config
from mefn_jax.errors import ConfigError, DataError, TrainingError
from mefn_jax.evaluation import evaluator
from mefn_jax.reports import contact_sheet
from mefn_jax.retrieval import index, search
from mefn_jax.retrieval.index import build_index, open_index, search_embeddings
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training import loop

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
        loop.train(config, found[name])
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
    search.index_images(workdir, "latest", folder, tmp_path / "index")
    assert "left out 1 images that cannot be decoded: broken.jpg" in capsys.readouterr().out
    best = search.search_images(workdir, "latest", tmp_path / "index", CAPTION, 5, out=str(tmp_path / "found.png"))
    said = capsys.readouterr().out
    assert f"{IMAGES} images" in said
    model, params, _ = evaluator.load_checkpoint(workdir, "latest")
    names = [n for n in index.list_images(folder) if n != "broken.jpg"]
    pixels = np.stack([decode((folder / n).read_bytes(), resize_from_config(model.config.image), n) for n in names])
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
    search.index_images(runs["mefn"], "latest", folder, tmp_path / "index")
    for asked in ("4", "0.34"):
        search.search_images(runs["mefn"], "latest", tmp_path / "index", CAPTION, 2, rerank=asked)
        assert "4 of them scored by the matcher" in capsys.readouterr().out
    for asked in ("0", "13", "few"):
        with pytest.raises(ConfigError, match=f"--rerank={asked}: give a share"):
            search.search_images(runs["mefn"], "latest", tmp_path / "index", CAPTION, 2, rerank=asked)


def test_a_stopped_index_goes_on_and_ends_the_same(runs, folder, tmp_path, monkeypatch):
    model, params, made_by = search.load_model(runs["mefn"], "latest", False)
    build_index(model, params, made_by, folder, tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / ".images.json.new").write_text('["hal')  # what a first moment's kill leaves
    monkeypatch.setattr(index, "SAVE_SECONDS", 0.0)
    read = index.load_batches

    def stopping(*args):
        for number, batch in enumerate(read(*args)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(index, "batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_index(model, params, made_by, folder, tmp_path / "stopped")
    with pytest.raises(ConfigError, match="8 of 12 images are encoded; run --index_images again"):
        open_index(tmp_path / "stopped", made_by)
    monkeypatch.setattr(index, "batches", read)
    build_index(model, params, made_by, folder, tmp_path / "stopped")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


def test_what_does_not_belong_together_is_refused(runs, folder, tmp_path):
    built = tmp_path / "index"
    search.index_images(runs["mefn"], "latest", folder, built)
    with pytest.raises(
        ConfigError, match=rf"was made by step 2 of {runs['mefn']}, which is not step 2 of {runs['vsepp']}"
    ):
        search.search_images(runs["vsepp"], "latest", built, CAPTION, 1)
    with pytest.raises(ConfigError, match="was made by step 2"):
        search.index_images(runs["vsepp"], "latest", folder, built)
    shutil.copytree(folder, tmp_path / "more")
    with pytest.raises(ConfigError, match="is of other images"):
        search.index_images(runs["mefn"], "latest", tmp_path / "more", built)
    with pytest.raises(ConfigError, match="no index; make one"):
        search.search_images(runs["mefn"], "latest", tmp_path / "nowhere", CAPTION, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        search.index_images(runs["mefn"], "latest", tmp_path / "empty", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is not empty and holds no index\.json"):
        search.index_images(runs["mefn"], "latest", folder, tmp_path / "more")
    for caption in ("  ", "!!!", "..."):
        with pytest.raises(ConfigError, match="a caption without words"):
            search.search_images(runs["mefn"], "latest", built, caption, 1)
    with pytest.raises(ConfigError, match="--query=caf\ufffd red: is not UTF-8"):
        search.search_images(runs["mefn"], "latest", built, os.fsdecode(b"caf\xe9 red"), 1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "images.json").write_text('["mine"]')
    with pytest.raises(ConfigError, match=r"is not empty and holds no index\.json"):
        search.index_images(runs["mefn"], "latest", folder, tmp_path / "own")
    assert (tmp_path / "own" / "images.json").read_text() == '["mine"]'
    (tmp_path / "x.png").mkdir()
    for out, why in (("x.doc", r"give a \.png or \.jpg file"), ("x.psd", "give a"), ("x.png", "is a directory")):
        with pytest.raises(ConfigError, match=why):
            search.search_images(runs["mefn"], "latest", built, CAPTION, 1, out=str(tmp_path / out))
    for arguments in ((folder, "gs://bucket/index"), ("gs://bucket/images", tmp_path / "other")):
        with pytest.raises(ConfigError, match="must be in a local or mounted directory"):
            search.index_images(runs["mefn"], "latest", *arguments)
    (folder / "new.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "0.png").rename(folder / "renamed.png")
    try:
        with pytest.raises(ConfigError, match=r"is of other images: .* has 2 more and 1 fewer than when it was begun"):
            search.index_images(runs["mefn"], "latest", folder, built)
    finally:
        (folder / "renamed.png").rename(folder / "0.png")
        (folder / "new.png").unlink()


def test_other_parameters_of_the_same_step_are_refused(runs, folder, tmp_path):
    model, params, made_by = search.load_model(runs["vsepp"], "latest", False)
    build_index(model, params, made_by, folder, tmp_path / "index")
    with pytest.raises(ConfigError, match=r"was made by step 2 of .*, with other parameters \(trained anew"):
        open_index(tmp_path / "index", made_by | {"parameters": "others"})


def test_names_of_any_bytes_stand_beside_their_own_scores(runs, tmp_path, capsys):
    folder, rng = tmp_path / "names", np.random.default_rng(0)
    folder.mkdir()
    names = ["a.png", "b\u2028c.png", "d\re.png", "f\x85g.png", "h\ni.png", os.fsdecode(b"caf\xe9.png"), "k\u202fl.png"]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name, "png")
    search.index_images(runs["vsepp"], "latest", folder, tmp_path / "index")
    found = search.search_images(runs["vsepp"], "latest", tmp_path / "index", CAPTION, 10, out=str(tmp_path / "x.png"))
    model, params, _ = evaluator.load_checkpoint(runs["vsepp"], "latest")
    texts = model.encode_captions(params, [CAPTION])
    assert sorted(name for _, name in found) == sorted(names)
    for score, name in found:
        pixels = decode((folder / name).read_bytes(), resize_from_config(model.config.image), name)[None]
        pixels = np.repeat(pixels, model.mesh.size, 0)
        image = model.encode_pixels(params, pixels, 1)
        np.testing.assert_allclose(model.embed(params, image) @ model.embed(params, texts).T, score, atol=1e-5)
    said = capsys.readouterr().out
    assert "7 images" in said
    assert all(shown in said for shown in ("b\ufffdc.png", "caf\ufffd.png", "k\u202fl.png"))
    search.index_images(runs["vsepp"], "latest", folder, tmp_path / "index")
    assert "all images are encoded already" in capsys.readouterr().out


def test_a_picture_has_a_place_for_an_image_that_is_gone(runs, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    search.index_images(runs["vsepp"], "latest", tmp_path / "images", tmp_path / "index")
    best = search.search_images(runs["vsepp"], "latest", tmp_path / "index", CAPTION, 3)
    (tmp_path / "images" / best[0][1]).unlink()
    two_lines = CAPTION.replace(" is", "\n\tis")
    search.search_images(runs["vsepp"], "latest", tmp_path / "index", two_lines, 3, out=str(tmp_path / "found.png"))
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.getpixel((contact_sheet._GAP + 100, 100)) == contact_sheet._PALE


def test_a_folder_of_broken_images_is_refused(runs, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no image in it can be decoded"):
        search.index_images(runs["vsepp"], "latest", tmp_path / "images", tmp_path / "index")
    assert "left out 1 images" in capsys.readouterr().out
    with pytest.raises(DataError, match="no image in it can be decoded"):  # nor is it well when asked again
        search.index_images(runs["vsepp"], "latest", tmp_path / "images", tmp_path / "index")
    with pytest.raises(DataError, match="none of its images could be decoded"):
        search.search_images(runs["vsepp"], "latest", tmp_path / "index", CAPTION, 1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("coarse.npy", None, "cannot be read as an array"),
        ("coarse.npy", b"", "cannot be read as an array"),
        ("fragments.npy", b"\x93NUMPY\x01\x00v", "cannot be read as an array"),
        ("mask.npy", None, "cannot be read as an array"),
        ("images.json", b"[]", "is not a list of 12 names"),
        ("images.json", None, "no such file"),
        ("index.json", b"{}", "the key 'checkpoint' is missing"),
        ("index.json", b"{", "not JSON"),
    ],
)
def test_a_damaged_index_says_which_file(file, content, message, runs, folder, tmp_path):
    model, params, made_by = search.load_model(runs["mefn"], "latest", False)
    build_index(model, params, made_by, folder, tmp_path / "index")
    path = tmp_path / "index" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        open_index(tmp_path / "index", made_by)
    assert file in str(refused.value)


def test_what_is_not_finite_is_an_error(runs, folder, tmp_path):
    model, params, made_by = search.load_model(runs["vsepp"], "latest", False)
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(TrainingError, match=r"0\.png: its features are not finite"):
        build_index(model, broken, made_by, folder, tmp_path / "index")
    vectors = np.ones((5, 3), np.float32)
    vectors[3, 1] = np.nan
    with pytest.raises(TrainingError, match=r"b\.png: its score is not finite"):
        search.check_finite(np.array([1.0, np.inf]), ["a.png", "b.png"])
    with pytest.raises(TrainingError, match="is not finite"):
        search_embeddings(vectors, np.ones(3), 2, make_mesh())
    readable = np.arange(5) != 3  # as what stands for an image that could not be decoded
    assert search_embeddings(vectors, np.ones(3), 2, make_mesh(), readable)[0].tolist() == [0, 1]


def test_a_caption_that_is_too_long_is_cut_with_a_warning(runs, folder, tmp_path, capsys):
    search.index_images(runs["mefn"], "latest", folder, tmp_path / "index")
    most = shapes.get_config("smoke").text.max_tokens
    long = " ".join(["red"] * (most + 3))
    best = search.search_images(runs["mefn"], "latest", tmp_path / "index", long, 3)
    assert f"{most + 3} wordpieces, of which the model takes the first {most}" in capsys.readouterr().out
    assert best == search.search_images(runs["mefn"], "latest", tmp_path / "index", " ".join(["red"] * most), 3)


def test_the_commands(runs, folder, tmp_path, command):
    """By an image the lines of a file; the index with eight devices and one finds the same."""
    options, made = (f"--workdir={runs['mefn']}", "--step=latest"), tmp_path / "index"
    command("eval.py", *options, f"--index_images={folder}", f"--index={made}", devices=8)
    said = command("eval.py", *options, f"--index={made}", f"--query={CAPTION}", "--topk=3").stdout
    one = search.search_images(runs["mefn"], "latest", made, CAPTION, 3)
    assert all(f"{score:.4f}  {name}" in said for score, name in one)
    lines = tmp_path / "captions.txt"
    lines.write_text("a red circle\n\nblue squares\n!!!\na large dotted star\n")
    said = command("eval.py", *options, f"--query_image={folder / '0.png'}", f"--captions={lines}", "--topk=2").stdout
    assert "0.png in 3 captions" in said
    assert len([line for line in said.splitlines() if line.strip()[:1] in ("1", "2")]) == 2
    refused = command("eval.py", *options, f"--query={CAPTION}", check=False)
    assert "--index=INDEX is missing" in refused.stderr
    refused = command("eval.py", *options, f"--query_image={lines}", f"--captions={lines}", "--rerank=5", check=False)
    assert "--rerank is of one run's evaluation, or of --query" in refused.stderr


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
        positions, products = search_embeddings(vectors, query, k, make_mesh(devices=jax.devices()[:devices]), readable)
    expected = [j for j in np.argsort(-(vectors @ query), kind="stable") if readable[j]][:k]
    assert positions.tolist() == expected
    np.testing.assert_array_equal(products, (vectors @ query)[expected])


def test_the_index_says_what_it_is(runs, folder, tmp_path):
    search.index_images(runs["mefn"], "latest", folder, tmp_path / "index")
    facts = json.loads((tmp_path / "index" / "index.json").read_text())
    assert facts["checkpoint"]["workdir"] == str(runs["mefn"])
    assert (facts["images"], facts["done"], facts["skipped"]) == (IMAGES + 1, IMAGES + 1, ["broken.jpg"])
