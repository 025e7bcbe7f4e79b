"""The page in a browser: clicks, keys, links and pictures on the trained smoke run, and what a checker of accessibility
finds on it."""

import json

import numpy as np
import pytest
from chromium import Chromium, find_faults
from PIL import Image
from random_explanation import random_explanation

from mefn_jax.reports.explanation import TERM_NAMES, score_terms
from mefn_jax.reports.figures import MAP_PIXELS, attention_heatmap
from mefn_jax.serving.answers import describe_explanation

PAIR = "document.querySelector('.matrix')"
FOUND = "document.querySelectorAll('.result').length && !document.querySelector('#status').textContent.includes('…')"
PICTURES = "[...document.images].every((image) => image.complete)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def easy(server):
    """A caption that finds its own scene first, its results, and the explanation of both."""
    lines = json.loads(server.request("GET", "/api/setup")[2])["models"][0]["lines"]
    for position in range(lines):
        own = server.query("/api/lines", position=position, top_k=100)["results"]
        for line in (x["name"] for x in own if x["position"] // 5 == position):
            results = server.query("/api/search", caption=line)["results"]
            if results[0]["position"] == position:
                pair = server.query("/api/explain", caption=line, position=position)
                return line, results, pair
    raise AssertionError("no caption finds its scene first")


@pytest.fixture
def tab(browser, server):
    opened = browser.open(server.url)
    opened.wait_for("document.querySelectorAll('.example').length == 3")
    yield opened
    opened.close()


def search(tab, caption) -> None:
    """Types a caption and clicks on Search."""
    tab.click("#caption")
    tab.type(caption)
    tab.click("#search button.main")
    tab.wait_for(FOUND)


def read_lit(tab, kind) -> list[int]:
    """Returns the regions, or words, that are lit."""
    return tab.evaluate(f"[...document.querySelectorAll('[data-{kind}].lit')].map((e) => Number(e.dataset.{kind}))")


def find_lit(values) -> list[int]:
    """Returns the positions of values of at least half the largest one."""
    return np.flatnonzero(np.asarray(values) >= 0.5 * np.max(values)).tolist()


def test_caption_finds_its_scene_first_and_click_shows_the_pair(tab, easy):
    caption, results, pair = easy
    search(tab, caption)
    shown = tab.evaluate("[...document.querySelectorAll('.result')].map((e) => Number(e.dataset.position))")
    assert shown == [x["position"] for x in results]
    tab.click(".result")
    tab.wait_for(PAIR)
    assert tab.evaluate("[...document.querySelectorAll('.pair .word')].map((e) => e.textContent)") == pair["words"]
    cells = tab.evaluate("[...document.querySelectorAll('.matrix td[style]')].map((e) => e.textContent)")
    assert cells == [f"{value:.2f}" for row in pair["H"] for value in row] or np.allclose(
        np.array(cells, float), np.ravel(pair["H"]), atol=0.0051
    )
    weights = tab.evaluate(
        "[...document.querySelectorAll('.pair .word')].map((e) => Number(e.style.getPropertyValue('--share')))"
    )
    np.testing.assert_allclose(weights, np.array(pair["word_weights"]) / max(pair["word_weights"]), atol=1e-4)
    terms = tab.evaluate("[...document.querySelectorAll('.terms td:nth-child(2)')].map((e) => e.textContent)")
    expected = [*(term["value"] for term in pair["terms"]), pair["values"]["score"]]
    np.testing.assert_allclose([float(x.replace("\N{MINUS SIGN}", "-")) for x in terms], expected, atol=5.1e-4)
    assert read_map(tab) == pytest.approx(brightness(pair["region_weights"], pair["boxes"]), abs=0.01)


def read_map(tab) -> np.ndarray:
    """Returns the brightness of the map over the photograph, in [0, 1]."""
    alpha = tab.evaluate(
        "[...document.querySelector('.map canvas').getContext('2d').getImageData(0, 0, 180, 180).data]"
        ".filter((_, k) => k % 4 === 3)"
    )
    return (1 - np.array(alpha).reshape(MAP_PIXELS, MAP_PIXELS) / 255 / 0.85).ravel()


def brightness(values, boxes) -> np.ndarray:
    """Returns what the static picture shows of region values."""
    heatmap = attention_heatmap(np.array(values), np.array(boxes))
    return (heatmap / heatmap.max()).ravel()


def test_hover_lights_the_regions_of_a_word_and_the_words_of_a_region(tab, easy):
    caption, _, pair = easy
    search(tab, caption)
    tab.click(".result")
    tab.wait_for(PAIR)
    attention = np.array(pair["attention"])
    for word in (0, len(pair["words"]) - 1):
        tab.hover(f".pair [data-word='{word}']")
        assert read_lit(tab, "region") == find_lit(attention[:, word])
        assert read_lit(tab, "word") == [word]
        assert read_map(tab) == pytest.approx(brightness(attention[:, word], pair["boxes"]), abs=0.01)
        assert f"“{pair['words'][word]}”" in tab.evaluate("document.querySelector('.reading').textContent")
    region = len(attention) // 2
    tab.hover(f".map [data-region='{region}']")
    assert read_lit(tab, "word") == find_lit(attention[region])
    assert read_lit(tab, "region") == [region]
    tab.hover("h1")
    assert read_lit(tab, "region") == read_lit(tab, "word") == []


VIEW = (
    "[location.hash, document.querySelector('#caption').value, document.querySelector('#answers').innerText,"
    " [...document.querySelectorAll('.lit')].map((e) => e.dataset.region ?? e.dataset.word ?? ''),"
    " document.querySelector('.result[aria-pressed=true]').dataset.position]"
)


def test_link_opens_the_same_view(tab, easy, browser):
    search(tab, easy[0])
    tab.click(".result:first-child")
    tab.wait_for(PAIR)
    tab.click(".pair [data-word='1']")
    tab.hover("h1")
    first = tab.evaluate(VIEW)
    other = browser.open(tab.evaluate("location.href"))
    other.wait_for(PAIR)
    assert other.evaluate(VIEW) == first
    assert "word=1" in first[0]
    other.close()
    tab.evaluate("history.back()")  # before the click on the result
    tab.wait_for("!document.querySelector('.matrix')")
    assert tab.evaluate("document.querySelector('#caption').value") == easy[0]


def test_two_models_answer_side_by_side(browser, start_server, trained, easy):
    """The same run twice: both columns show the same, and what is held in one is held in the other."""
    server = start_server(f"--workdir={trained[0]},{trained[0]}", "--split=val")
    tab = browser.open(server.url)
    tab.wait_for("document.querySelectorAll('.example').length == 3")
    search(tab, easy[0])
    tab.click("[data-model='1'] .result")
    tab.wait_for("document.querySelectorAll('.matrix').length == 2")
    tab.hover("h1")  # the pair may have come to stand under the mouse
    first, second = tab.evaluate("[...document.querySelectorAll('section.model')].map((e) => e.innerText)")
    assert first == second
    tab.click("[data-model='0'] [data-word='1']")
    tab.hover("h1")
    lit = find_lit(np.array(easy[2]["attention"])[:, 1])
    assert read_lit(tab, "region") == lit + lit
    tab.evaluate("location.hash = '#'")
    tab.wait_for("!document.querySelector('.matrix')")
    tab.close()


def test_page_is_used_with_keys_alone(tab, easy):
    """Tab to the field, type, Enter; Tab to the first result, Enter; Tab to the words, arrows among them."""
    go_to(tab, "#caption")
    tab.type(easy[0])
    tab.press("Enter")
    tab.wait_for(FOUND)
    go_to(tab, ".result")
    tab.press("Enter")
    tab.wait_for(PAIR)
    tab.evaluate("document.querySelector('#file').focus()")
    go_to(tab, ".pair .word")
    tab.press("ArrowRight")
    assert read_lit(tab, "word") == [1]
    assert read_lit(tab, "region") == find_lit(np.array(easy[2]["attention"])[:, 1])
    tab.press("Tab")  # the words are one stop, and so are the regions
    assert tab.evaluate("document.activeElement.dataset.region") == "0"
    tab.press("ArrowRight")
    assert read_lit(tab, "region") == [1]
    tab.press("Enter")
    assert "region=1" in tab.evaluate("location.hash")


def go_to(tab, selector) -> None:
    """Presses Tab until an element of a selector has the focus."""
    for _ in range(40):
        if tab.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
            return
        tab.press("Tab")
    raise AssertionError(f"{selector} is never reached")


def test_given_image_finds_captions_and_explains_one(tab, server, tmp_path):
    """An image file that is chosen, as one that is dropped."""
    path = tmp_path / "one.png"
    Image.new("RGB", (90, 60), (200, 30, 30)).save(path)
    document = tab.send("DOM.getDocument")["root"]["nodeId"]
    node = tab.send("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    tab.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
    tab.wait_for("document.querySelectorAll('.lines .result').length == 20")
    expected = json.loads(server.request("POST", "/api/lines", path.read_bytes(), {"Content-Type": "image/png"})[2])
    shown = tab.evaluate("[...document.querySelectorAll('.lines .text')].map((e) => e.textContent)")
    assert shown == [x["name"] for x in expected["results"]]
    tab.click(".lines .result")
    tab.wait_for(PAIR)
    assert tab.evaluate("document.querySelector('.pair h3').textContent") == "the image that was sent"


def test_page_loads_nothing_from_elsewhere_and_logs_no_error(tab, easy, browser, server):
    search(tab, easy[0])
    tab.click(".result")
    tab.wait_for(PAIR)
    tab.wait_for(PICTURES)
    loaded = tab.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(loaded) > 20
    assert all(name.startswith((server.url, "data:")) for name in loaded)
    events = []
    while not browser.events.empty():
        events.append(browser.events.get())
    exceptions = [e for e in events if e["method"] == "Runtime.exceptionThrown"]
    errors = [e for e in events if e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]
    assert exceptions == errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_accessible_and_as_wide_as_the_screen(width, scheme, browser, server, easy):
    link = f"{server.url}#caption={easy[0].replace(' ', '+')}&image={easy[1][0]['position']}&word=1"
    opened = browser.open(link, width=width, prefers_color_scheme=scheme)
    opened.wait_for(PAIR)
    assert find_faults(opened) == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    opened.close()


def test_print_has_the_pair_and_not_the_form(browser, server, easy):
    opened = browser.open(f"{server.url}#caption={easy[0].replace(' ', '+')}&image=0", prefers_color_scheme="dark")
    opened.wait_for(PAIR)
    opened.send("Emulation.setEmulatedMedia", media="print")
    assert opened.evaluate("document.querySelector('#search').getBoundingClientRect().height") == 0
    assert opened.evaluate("document.querySelector('.pair').getBoundingClientRect().height") > 100
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    opened.close()


@pytest.mark.parametrize(
    "x",
    [
        random_explanation([f"word{k}" for k in range(14)], entropies=False),
        random_explanation([f"word{k}" for k in range(70)], regions=65),
        random_explanation(["a", "boat"], side=None),
        random_explanation(["a", "boat"], side=None, boxes=False, entropies=False),
    ],
    ids=["attention", "70 words and 65 regions", "no photograph", "no boxes"],
)
def test_all_kinds_of_pairs_are_shown(x, browser, server):
    """Of matchers without entropies, with regions that overlap, and of precomputed regions."""
    tab = browser.open(server.url, width=390)
    tab.wait_for("document.querySelectorAll('.example').length == 3")
    pair = json.dumps(describe_explanation(x))
    tab.evaluate(
        "import('/pair.js').then(({ showPair }) => { const e = document.createElement('section'); e.className = 'pair';"
        f" document.querySelector('#answers').append(e); showPair(e, {pair}, {{}}, () => {{}}); }})"
    )
    assert tab.evaluate("document.querySelectorAll('.region').length") == len(x.attention)
    assert tab.evaluate("document.querySelectorAll('.matrix tbody tr').length") == min(16, len(x.attention))
    assert find_faults(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.hover(".pair [data-word='1']")
    assert read_lit(tab, "region") == find_lit(np.round(x.attention[:, 1], 6))
    matrix = x.attention if x.H is None else x.H
    shown = float(tab.evaluate("document.querySelector('.matrix td[style]').textContent"))
    rows = tab.evaluate("[...document.querySelectorAll('.matrix [data-row]')].map((e) => Number(e.dataset.row))")
    assert shown == pytest.approx(matrix[rows[0], 0], abs=0.0051)
    names = tab.evaluate("[...document.querySelectorAll('.terms [data-term]')].map((e) => e.dataset.term)")
    assert names == [TERM_NAMES[name] for name in score_terms(x)]
    tab.close()
