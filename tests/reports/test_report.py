"""The page about a run: its selections, its independence of other files, and captions that contain markup."""

import html.parser
import json
import re

import numpy as np
import pytest
from chromium import Chromium, find_faults
from commands import SMOKE_FLICKR8K
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_data import write_flickr8k

from mefn_jax.reports import charts, report

CAPTIONS = (
    "<script>alert('x')</script> a dog & a \"cat\" 🐕",
    "犬が草の上を走る",
    " ".join(f"word{k}" for k in range(70)),
    "Hund",
    "</style><img src=x onerror=alert(1)> costs $5 or $6",
)


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text without the style sheet."""

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
    """The folder and page of a run on images of all shapes, whose six val images have captions with markup."""
    root = tmp_path_factory.mktemp("report")
    source = write_flickr8k(root / "source", numbers=(40, 6))
    tokens = source / "Flickr8k.token.txt"
    lines = tokens.read_text().splitlines()
    marked_up = [
        f"{line.split(chr(9))[0]}\t{CAPTIONS[int(line.split('#')[1][0])]}" if "dev_" in line else line for line in lines
    ]
    tokens.write_text("\n".join(marked_up) + "\n")
    for k, path in enumerate(sorted((source / "Images").glob("dev_*"))):
        Image.open(path).resize((60, 200) if k % 2 else (300, 40)).save(path)
    command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={source}", f"--out={root / 'out'}")
    command("train.py", *SMOKE_FLICKR8K, f"--config.data.dir={root / 'out'}", f"--workdir={root / 'run'}")
    text = command("eval.py", "report", f"--workdir={root / 'run'}", "--split=val").stdout
    folder = root / "run" / "eval" / "val"
    assert f"wrote {folder}/report.html" in text
    return folder, (folder / "report.html").read_text()


def test_report_page_is_self_contained(page):
    folder, text = page
    parsed = Page(text)
    kinds = {tag for tag, _ in parsed.tags}
    assert not kinds & {"script", "link", "iframe", "object", "a"}
    sources = [a["src"] for tag, a in parsed.tags if tag == "img"]
    assert len(sources) > 10
    assert all(source.startswith("data:image/") for source in sources)
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert not re.search(r"https?://|url\(", text)
    assert "default-src 'none'" in text
    assert len(text) < 2_000_000  # a large split shows no more queries
    assert {path.name for path in (folder / "report").iterdir()} >= {"curves.png", "scores.png", "lengths.png"}


def test_report_page_is_accessible_in_light_and_dark_and_printed(page, tmp_path):
    """On a narrow screen, with captions and words of explained pairs that are markup."""
    with Chromium(tmp_path) as browser:
        for scheme in ("light", "dark"):
            tab = browser.open((page[0] / "report.html").as_uri(), width=390, prefers_color_scheme=scheme)
            assert find_faults(tab) == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
            assert tab.evaluate("document.querySelectorAll('.pair .word').length") > 3
            paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        tab.send("Emulation.setEmulatedMedia", media="print")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_report_page_shows_terms_of_scores_of_explained_pairs(page):
    """They sum to the score, and the colors of words to those of the largest weights."""
    parsed = re.findall(r'<section class="pair">(.*?)</section>', page[1], re.DOTALL)
    assert len(parsed) == 3
    for pair in parsed:
        text = pair.replace("\N{MINUS SIGN}", "-")
        values = [float(x) for x in re.findall(r"<td>(-?[\d.]+)</td>", text)]
        assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.003)
        names = re.findall(r'<th scope="row">(.*?)</th>', pair)
        assert names == ["global similarity", "local attention", "entropy (MFE)", "score"]
        shares = [float(x) for x in re.findall(r'class="word" style="--share: ([\d.]+)"', pair)]
        assert max(shares) == 1
        assert min(shares) > 0


def test_report_page_escapes_captions(page):
    _, text = page
    parsed = Page(text)
    shown = [caption for caption in CAPTIONS if caption in parsed.text]
    assert CAPTIONS[0] in shown
    assert len(shown) >= 3


def test_report_page_shows_protocol_and_sections(page):
    _, text = page
    parsed = Page(text).text
    for message in (
        "6 images, 30 captions (5 per image)",
        "Recall",
        "Training",
        "Scores",
        "What is wrong with it",
        "Hubs: the 10 images",
        "relation words: with",
        "Length of the caption",
        "Configuration",
    ):
        assert message in parsed, message
    assert "text.max_tokens" in parsed


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_report_selections_equal_naive_loops(seed):
    """Compares hardest negatives, best and worst queries, and groups by caption length with loops."""
    rng = np.random.default_rng(seed)
    image_index = np.sort(np.r_[np.arange(6), rng.integers(0, 6, 9)])
    scores = rng.permutation(6 * 15).reshape(6, 15).astype(np.float32)
    top = np.argsort(-scores, 1)[:, :10], np.argsort(-scores, 0)[:5].T
    ranks = {"caption_image": image_index, "positive_scores": scores[image_index, np.arange(15)]}
    ranks |= {"i2t_top": top[0], "i2t_top_scores": np.take_along_axis(scores, top[0], 1)}
    ranks |= {"t2i_top": top[1], "t2i_top_scores": np.take_along_axis(scores.T, top[1], 1)}
    image_negatives, caption_negatives = report.hardest_negative_scores(ranks)
    for c in range(15):
        assert caption_negatives[c] == max(scores[i, c] for i in range(6) if i != image_index[c])
    for i in range(6):
        others = [scores[i, c] for c in top[0][i] if image_index[c] != i]
        assert image_negatives[i] == max(others) if others else np.isnan(image_negatives[i])
    rank = 1 + np.sum(scores > ranks["positive_scores"], 0)
    margins = ranks["positive_scores"] - caption_negatives
    best, worst = report.best_and_worst(rank, margins)
    assert list(best) == sorted(np.flatnonzero(rank == 1), key=lambda c: -margins[c])[: report.QUERIES_SHOWN]
    assert list(worst) == sorted(np.flatnonzero(rank > 1), key=lambda c: (-rank[c], margins[c]))[: report.QUERIES_SHOWN]
    captions = ["a " * int(n) for n in rng.integers(1, 9, 15)]
    names, sizes, recalls = report.recall_by_caption_length(captions, rank)
    assert sum(sizes) == 15
    ends = [int(name.split()[-1]) for name in names]
    for k, end in enumerate(ends):
        low = ends[k - 1] if k else 0
        group = [rank[c] for c in range(15) if low < len(captions[c].split()) <= end]
        assert len(group) == sizes[k]
        assert recalls["R@1"][k] == pytest.approx(100 * np.mean(np.array(group) == 1))


def test_eval_refuses_report_options_that_do_not_fit(page, command):
    run = f"--workdir={page[0].parent.parent}"
    for words, status, message in (
        (("report", run, "--folds=2,1"), 1, "put 1 first"),
        (("report", run, "--boxes=x.npy"), 2, "Unknown command line flag 'boxes'"),
    ):
        result = command("eval.py", *words, check=False)
        assert result.returncode == status
        assert message in result.stderr
        assert "Traceback" not in result.stderr


LINE = b'{"step": 2, "loss": 0.5}'


@pytest.mark.parametrize(
    ("content", "steps", "note"),
    [
        (LINE + b"\n" + LINE + b"\n", [2, 2], ""),
        (LINE + b"\n" + LINE[:9], [2], ""),  # half a line of a killed run
        (b"\n" + LINE + b"\r\n  \n", [2], ""),
        (b"\xff\xfe\n" + LINE + b"\n", [2], "left out 1 lines that are damaged, the first is line 1"),
        (LINE + b'\n{"loss": 1}\n[]\nnull\n{"step": "3"}\n{"step": true}\n' + LINE + b"\n", [2, 2], "left out 5 lines"),
        (b"[" * 100_000 + b"\n" + LINE + b"\n", [2], "left out 1 lines"),
        (b'{"step": 1e400}\n' + LINE + b"\n", [2], "left out 1 lines"),
        (b"", [], ""),
    ],
)
def test_read_metrics_log_leaves_out_damaged_lines_with_a_note(content, steps, note, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert [line["step"] for line in report.read_metrics_log(epath.Path(tmp_path))] == steps
    printed = capsys.readouterr().out
    assert note in printed
    assert bool(note) == bool(printed)


def test_read_metrics_log_of_a_directory_or_of_nothing_is_empty(tmp_path, capsys):
    assert report.read_metrics_log(epath.Path(tmp_path)) == []
    (tmp_path / "metrics.jsonl").mkdir()
    assert report.read_metrics_log(epath.Path(tmp_path)) == []
    assert "cannot be read" in capsys.readouterr().out


@given(
    st.binary(max_size=60) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_parse_log_line_raises_nothing(text):
    line = report.parse_log_line(text)
    assert line is None or all(isinstance(value, int | float) for value in line.values())


def test_training_curves_show_known_metrics_and_the_scalars_of_every_matcher():
    assert charts.find_panels([{"step": 1, "foreign": 2.0}]) == []
    assert [names for _, names in charts.find_panels([{"step": 1, "loss": 2.0}])] == [["loss"]]
    scalars = [{"step": 1, "matcher.eta": 8.0}, {"step": 2, "matcher.eta": 9.0, "matcher.lambda": 9.0}]
    assert [names for _, names in charts.find_panels(scalars)] == [["matcher.eta", "matcher.lambda"]]
