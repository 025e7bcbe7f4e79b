"""The page about a run: what it picks, that it needs nothing beside itself, and what captions can do to it."""

import html.parser
import re

import numpy as np
import pytest
from conftest import SMOKE, write_flickr8k
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mefn_jax.reports import charts, report

NASTY = (
    "<script>alert('x')</script> a dog & a \"cat\" 🐕",
    "犬が草の上を走る",
    " ".join(f"word{k}" for k in range(70)),
    "Hund",
    "</style><img src=x onerror=alert(1)> costs $5 or $6",
)


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text outside of the style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory, command):
    """The folder and page of a run on photographs in all shapes, whose captions are nasty; val has six images."""
    root = tmp_path_factory.mktemp("report")
    source = write_flickr8k(root / "source", numbers=(40, 6))
    tokens = source / "Flickr8k.token.txt"
    lines = tokens.read_text().splitlines()
    nasty = [
        f"{line.split(chr(9))[0]}\t{NASTY[int(line.split('#')[1][0])]}" if "dev_" in line else line for line in lines
    ]
    tokens.write_text("\n".join(nasty) + "\n")
    for k, path in enumerate(sorted((source / "Images").glob("dev_*"))):
        Image.open(path).resize((60, 200) if k % 2 else (300, 40)).save(path)
    command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={source}", f"--out={root / 'out'}")
    command("train.py", *SMOKE, f"--config.data.dir={root / 'out'}", f"--workdir={root / 'run'}")
    text = command("eval.py", f"--workdir={root / 'run'}", "--split=val", "--report").stdout
    folder = root / "run" / "eval" / "val"
    assert f"wrote {folder}/report.html" in text
    return folder, (folder / "report.html").read_text()


def test_a_page_needs_nothing_beside_itself(page):
    folder, text = page
    found = Page(text)
    kinds = {tag for tag, _ in found.tags}
    assert not kinds & {"script", "link", "iframe", "object", "a"}
    sources = [a["src"] for tag, a in found.tags if tag == "img"]
    assert len(sources) > 10
    assert all(source.startswith("data:image/") for source in sources)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert not re.search(r"https?://|url\(", text)
    assert "default-src 'none'" in text
    assert len(text) < 2_000_000  # the queries shown are as many for a large split
    assert {path.name for path in (folder / "report").iterdir()} >= {"curves.png", "scores.png", "lengths.png"}


def test_captions_are_shown_as_they_are(page):
    _, text = page
    found = Page(text)
    shown = [caption for caption in NASTY if caption in found.text]
    assert NASTY[0] in shown
    assert len(shown) >= 3


def test_a_page_says_what_was_evaluated(page):
    _, text = page
    found = Page(text).text
    for said in (
        "6 images, 30 captions (5 an image)",
        "Recall",
        "Training",
        "Scores",
        "Length of the caption",
        "Configuration",
    ):
        assert said in found, said
    assert "text.max_tokens" in found


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_what_is_picked(seed):
    """Hardest negatives, best and worst queries, and groups by length, against loops."""
    rng = np.random.default_rng(seed)
    owner = np.sort(np.r_[np.arange(6), rng.integers(0, 6, 9)])
    scores = rng.permutation(6 * 15).reshape(6, 15).astype(np.float32)
    top = np.argsort(-scores, 1)[:, :10], np.argsort(-scores, 0)[:5].T
    ranks = {"caption_image": owner, "positive_scores": scores[owner, np.arange(15)]}
    ranks |= {"i2t_top": top[0], "i2t_top_scores": np.take_along_axis(scores, top[0], 1)}
    ranks |= {"t2i_top": top[1], "t2i_top_scores": np.take_along_axis(scores.T, top[1], 1)}
    of_images, of_captions = report.hardest_negative_scores(ranks)
    for c in range(15):
        assert of_captions[c] == max(scores[i, c] for i in range(6) if i != owner[c])
    for i in range(6):
        others = [scores[i, c] for c in top[0][i] if owner[c] != i]
        assert of_images[i] == max(others) if others else np.isnan(of_images[i])
    place = 1 + np.sum(scores > ranks["positive_scores"], 0)
    margins = ranks["positive_scores"] - of_captions
    best, worst = report.best_and_worst(place, margins)
    assert list(best) == sorted(np.flatnonzero(place == 1), key=lambda c: -margins[c])[: report.QUERIES_SHOWN]
    assert (
        list(worst) == sorted(np.flatnonzero(place > 1), key=lambda c: (-place[c], margins[c]))[: report.QUERIES_SHOWN]
    )
    captions = ["a " * int(n) for n in rng.integers(1, 9, 15)]
    names, sizes, recalls = report.recall_by_caption_length(captions, place)
    assert sum(sizes) == 15
    ends = [int(name.split()[-1]) for name in names]
    for k, end in enumerate(ends):
        low = ends[k - 1] if k else 0
        group = [place[c] for c in range(15) if low < len(captions[c].split()) <= end]
        assert len(group) == sizes[k]
        assert recalls["R@1"][k] == pytest.approx(100 * np.mean(np.array(group) == 1))


def test_what_a_page_cannot_be_of_is_said(page, command):
    run = f"--workdir={page[0].parent.parent}"
    for words, said in (
        ((run, "--report", "--folds=2,1"), "put 1 first"),
        (("--config=configs/shapes.py", "--report"), "are of one run: give --workdir"),
        ((f"--compare={page[0]}", "--out=x", "--explain=2"), "are of one run: give --workdir"),
        ((run, "--report", "--boxes=x.npy"), "--boxes and --photos say where the regions of --explain=N lie"),
    ):
        result = command("eval.py", *words, check=False)
        assert result.returncode == 1
        assert said in result.stderr
        assert "Traceback" not in result.stderr


def test_charts_of_little():
    """One line of a log; a comparison of one row; scores without a wrong one."""
    charts.training_curves([{"step": 1, "loss": 1.0}]).draw_without_rendering()
    row = {"name": "x" * 100, "means": {"i2t.r1": 1.0, "t2i.r1": 2.0, "rsum": 9.0}, "interval": None}
    row["spreads"] = dict.fromkeys(row["means"], float("nan"))
    charts.comparison_chart([row, row | {"interval": (-3.0, 2.0)}]).draw_without_rendering()
    charts.score_histograms(np.array([0.5, 0.5]), np.array([np.nan]), np.array([0.1, np.nan])).draw_without_rendering()
