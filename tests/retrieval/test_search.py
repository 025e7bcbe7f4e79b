"""Search by caption and by image against scoring all images, by functions and by the command."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from configs import shapes
from mefn_jax.data.images import decode, resize_from_config
from mefn_jax.errors import ConfigError, UserError
from mefn_jax.evaluation import evaluator
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.retrieval import index, search, searcher

CAPTION = "a red circle is left of a blue square"
NUM_IMAGES = 11  # in `folder`, besides the broken one


@pytest.mark.parametrize("name", ["mefn", "vsepp", "mate"])
def test_search_images_equals_scoring_all_images(name, runs, folder, tmp_path, capsys):
    workdir = runs[name]
    index.index_images(TrainedRun(workdir, "latest"), folder, tmp_path / "index")
    assert "left out 1 images that cannot be decoded: broken.jpg" in capsys.readouterr().out
    best = search.search_images(
        TrainedRun(workdir, "latest"), tmp_path / "index", CAPTION, 5, out=str(tmp_path / "found.png")
    )
    printed = capsys.readouterr().out
    assert f"{NUM_IMAGES} images" in printed
    model, params, _ = evaluator.load_checkpoint(workdir, "latest")
    names = [n for n in index.find_images(folder).names if n != "broken.jpg"]
    pixels = np.stack([decode((folder / n).read_bytes(), resize_from_config(model.config.image), n) for n in names])
    images = model.model.encode_images(params, pixels)
    texts = model.model.encode_texts(params, *model.tokenizer([CAPTION]))
    scores = np.asarray(model.model.score(params, images, texts))[:, 0]
    order = np.argsort(-scores)[:5]
    assert [n for _, n in best] == [names[k] for k in order]
    np.testing.assert_allclose([s for s, _ in best], scores[order], atol=1e-5)
    assert all(f"{names[k]}" in printed for k in order)
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 5 * 200
    assert (tmp_path / "index" / "fragments.npy").is_file() == (name != "vsepp")
    assert np.load(tmp_path / "index" / "embeddings.npy").shape[0] == NUM_IMAGES + 1


def test_search_with_bound_scores_no_more_than_it_needs(runs, folder, tmp_path, monkeypatch, capsys):
    """The results of all images, whatever the number of images that are scored first."""
    run = TrainedRun(runs["mate"], "latest")
    index.index_images(run, folder, tmp_path / "index")
    whole = search.search_images(run, tmp_path / "index", CAPTION, 2)
    assert f"{NUM_IMAGES} of them scored by the matcher, which cannot miss one" in capsys.readouterr().out
    monkeypatch.setattr(searcher, "FIRST_CANDIDATES", 2)
    monkeypatch.setattr(searcher.certificate, "MOST", 1.0)
    for radius in (0.0, 0.1323):
        monkeypatch.setattr("mefn_jax.model.Model.score_bound", lambda self, radius=radius: (0.81, radius))
        found = search.search_images(run, tmp_path / "index", CAPTION, 2)
        number = int(capsys.readouterr().out.split(" of them scored")[0].split()[-1])
        assert 2 <= number <= NUM_IMAGES
        if radius:
            np.testing.assert_allclose([s for s, _ in found], [s for s, _ in whole], atol=1e-6)
            assert [n for _, n in found] == [n for _, n in whole]
        else:
            assert number == 2  # so that the test sees when more are scored


def test_search_images_reranks_as_many_candidates_as_asked(runs, folder, tmp_path, capsys):
    index.index_images(TrainedRun(runs["mefn"], "latest"), folder, tmp_path / "index")
    for candidates in ("4", "0.34"):
        search.search_images(TrainedRun(runs["mefn"], "latest"), tmp_path / "index", CAPTION, 2, rerank=candidates)
        assert "4 of them scored by the matcher" in capsys.readouterr().out
    for candidates in ("0", "13", "few"):
        with pytest.raises(ConfigError, match=f"--rerank={candidates}: give a share"):
            search.search_images(TrainedRun(runs["mefn"], "latest"), tmp_path / "index", CAPTION, 2, rerank=candidates)


def test_search_images_prints_file_names_of_any_bytes(runs, tmp_path, capsys):
    folder, rng = tmp_path / "names", np.random.default_rng(0)
    folder.mkdir()
    names = ["a.png", "b\u2028c.png", "d\re.png", "f\x85g.png", "h\ni.png", os.fsdecode(b"caf\xe9.png"), "k\u202fl.png"]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name, "png")
    index.index_images(TrainedRun(runs["vsepp"], "latest"), folder, tmp_path / "index")
    found = search.search_images(
        TrainedRun(runs["vsepp"], "latest"), tmp_path / "index", CAPTION, 10, out=str(tmp_path / "x.png")
    )
    model, params, _ = evaluator.load_checkpoint(runs["vsepp"], "latest")
    texts = model.encode_captions(params, [CAPTION])
    assert sorted(name for _, name in found) == sorted(names)
    for score, name in found:
        pixels = decode((folder / name).read_bytes(), resize_from_config(model.config.image), name)[None]
        pixels = np.repeat(pixels, model.mesh.size, 0)
        image = model.encode_pixels(params, pixels, 1)
        np.testing.assert_allclose(model.embed(params, image) @ model.embed(params, texts).T, score, atol=1e-5)
    printed = capsys.readouterr().out
    assert "7 images" in printed
    assert all(shown in printed for shown in ("b\ufffdc.png", "caf\ufffd.png", "k\u202fl.png"))
    index.index_images(TrainedRun(runs["vsepp"], "latest"), folder, tmp_path / "index")
    assert "all images are encoded already" in capsys.readouterr().out


def test_search_images_truncates_long_caption_with_warning(runs, folder, tmp_path, capsys):
    index.index_images(TrainedRun(runs["mefn"], "latest"), folder, tmp_path / "index")
    max_tokens = shapes.get_config("smoke").text.max_tokens
    long = " ".join(["red"] * (max_tokens + 3))
    best = search.search_images(TrainedRun(runs["mefn"], "latest"), tmp_path / "index", long, 3)
    assert f"{max_tokens + 3} wordpieces, but the model reads only the first {max_tokens}" in capsys.readouterr().out
    assert best == search.search_images(
        TrainedRun(runs["mefn"], "latest"), tmp_path / "index", " ".join(["red"] * max_tokens), 3
    )


def test_eval_command_indexes_and_answers_queries(runs, folder, tmp_path, command):
    """Searches by caption and by image; an index made on eight devices gives the same results on one."""
    options, index_folder = (f"--workdir={runs['mefn']}", "--step=latest"), tmp_path / "index"
    command("eval.py", "index", *options, f"--images={folder}", f"--out={index_folder}", devices=8)
    printed = command(
        "eval.py", "search", *options, f"--index={index_folder}", f"--caption={CAPTION}", "--top_k=3"
    ).stdout
    expected = search.search_images(TrainedRun(runs["mefn"], "latest"), index_folder, CAPTION, 3)
    assert all(f"{score:.4f}  {name}" in printed for score, name in expected)
    lines = tmp_path / "captions.txt"
    lines.write_text("a red circle\n\nblue squares\n!!!\na large dotted star\n")
    printed = command(
        "eval.py", "search", *options, f"--image={folder / '0.png'}", f"--captions={lines}", "--top_k=2"
    ).stdout
    assert "0.png in 3 captions" in printed
    assert len([line for line in printed.splitlines() if line.strip()[:1] in ("1", "2")]) == 2
    many = command("eval.py", "search", *options, f"--index={index_folder}", f"--queries={lines}", check=False)
    assert f"{lines}:4: a caption without words" in many.stderr
    lines.write_text(f"a red circle\n{CAPTION}\n")
    many = command("eval.py", "search", *options, f"--index={index_folder}", f"--queries={lines}", "--top_k=3")
    found = [json.loads(line) for line in many.stdout.splitlines()][3:]
    assert [line["image"] for line in found] == [file for _, file in expected]
    refused = command("eval.py", "search", *options, f"--caption={CAPTION}", check=False)
    assert "--index is missing: directory of an index" in refused.stderr


QUERIES = ["a red circle", "two blue squares above a large star", CAPTION, "a small dotted circle", "a star", CAPTION]


@pytest.fixture(scope="module")
def indexes(runs, folder, tmp_path_factory):
    """An index of `folder` by each of three models."""
    root = tmp_path_factory.mktemp("indexes")
    for name, workdir in runs.items():
        index.index_images(TrainedRun(workdir, "latest"), folder, root / name)
    return root


@pytest.mark.parametrize("name", ["mefn", "vsepp", "mate"])
def test_search_queries_equals_single_searches(name, runs, indexes, tmp_path, monkeypatch, capsys):
    """Also for queries whose candidates differ, in batches of which the last is not full."""
    run = TrainedRun(runs[name], "latest")
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES[:3]) + "\n\n" + "\n".join(QUERIES[3:]))
    monkeypatch.setattr(search, "MAX_QUERIES", 4)
    monkeypatch.setattr(searcher, "SHARED_QUERIES", 2)
    monkeypatch.setattr(searcher, "TILE_IMAGES", 2)
    rerank = "" if name == "mate" else "4"
    search.search_queries(run, indexes / name, tmp_path / "queries.txt", 3, rerank)
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert "6 queries in 11 images" in printed.err
    assert [(line["query"], line["rank"]) for line in lines] == [(q, rank) for q in QUERIES for rank in (1, 2, 3)]
    monkeypatch.undo()
    for n, caption in enumerate(QUERIES[:3]):
        found = search.search_images(run, indexes / name, caption, 3, rerank)
        assert [line["image"] for line in lines[3 * n : 3 * n + 3]] == [file for _, file in found]
        np.testing.assert_allclose([x["score"] for x in lines[3 * n : 3 * n + 3]], [s for s, _ in found], atol=1e-6)
    search.search_queries(run, indexes / name, tmp_path / "queries.txt", 3, rerank, str(tmp_path / "found.jsonl"))
    assert f"6 queries in 11 images: wrote {tmp_path}/found.jsonl" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    for line, expected in zip(written, lines, strict=True):
        assert (line["query"], line["image"]) == (expected["query"], expected["image"])
        assert line["score"] == pytest.approx(expected["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", b"a red circle\n\n !!! \n", r"q\.txt:3: a caption without words"),
        ("q.txt", b"a red circle\ncaf\xe9\n", r"q\.txt: not UTF-8"),
        ("q.txt", b"\n \n", r"q\.txt: no query in it"),
        ("q.jsonl", b'{"caption": "a red circle"}\n{"text": "x"}\n', r"q\.jsonl:2: the key 'caption' is missing"),
        ("q.jsonl", b'{"caption": "a red circle"}\n\n{"caption": 3}\n', r"q\.jsonl:3: 'caption' must be of type str"),
        ("q.jsonl", b'{"caption": "a"}\n{"caption"', r"q\.jsonl:2: not JSON"),
        ("q.jsonl", b'{"caption": "\\ud800"}\n', r"q\.jsonl:1: caption .* holds half of a character"),
        ("q.jsonl", b'{"caption": " "}\n', r"q\.jsonl:1: empty caption"),
        ("q.jsonl", None, r"q\.jsonl: no such file"),
    ],
)
def test_search_queries_names_the_bad_line_before_it_searches(
    name, content, message, runs, indexes, tmp_path, monkeypatch
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(search, "answer_queries", lambda *args: pytest.fail("searched"))
    with pytest.raises(UserError, match=message):
        search.search_queries(TrainedRun(runs["vsepp"], "latest"), indexes / "vsepp", tmp_path / name)


def test_search_queries_keeps_files_of_others(runs, indexes, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"caption": "a red circle"}\n')
    run = TrainedRun(runs["vsepp"], "latest")
    for out, message in (("q.jsonl", "was not written by this command"), ("found.png", r"give a \.jsonl file")):
        with pytest.raises(ConfigError, match=message):
            search.search_queries(run, indexes / "vsepp", tmp_path / "q.jsonl", out=str(tmp_path / out))
    assert (tmp_path / "q.jsonl").read_text() == '{"caption": "a red circle"}\n'


def test_searcher_reports_progress_and_can_be_ended(runs, indexes, monkeypatch):
    monkeypatch.setattr(searcher, "TILE_IMAGES", 4)
    search_it = search.load_searcher(TrainedRun(runs["mefn"], "latest"), indexes / "mefn")
    texts, reports = search_it.evaluator.encode_captions(search_it.params, [CAPTION]), []
    at_once = 4 * search_it.evaluator.mesh.size
    positions = np.arange(3 * at_once - 1) % 11
    scores = search_it.score_images(positions, texts, lambda *report: reports.append(report))
    assert reports == [(done, len(positions)) for done in (0, at_once, 2 * at_once)]
    np.testing.assert_allclose(scores, scores[positions], atol=1e-6)

    def end(done, total):
        raise TimeoutError

    with pytest.raises(TimeoutError):
        search_it.search(texts, 3, end)
