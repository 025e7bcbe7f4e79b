"""Pictures of explanations: all kinds of captions and photographs, the words that are drawn, and heat maps."""

import io

import numpy as np
import pytest
from PIL import Image
from random_explanation import random_explanation

from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.reports import figures
from mefn_jax.reports.explanation import Explanation


def open_picture(x: Explanation) -> Image.Image:
    return Image.open(io.BytesIO(figures.to_png(figures.draw_explanation(x))))


@pytest.mark.parametrize(
    "x",
    [
        random_explanation(["dog"]),
        random_explanation([f"word{k}" for k in range(70)], regions=65),
        random_explanation(
            ["Überraschung", "日本語", "русский", "donaudampfschifffahrtsgesellschaftskapitän", ".", "🙂", "$x_", "<b>"]
        ),
        random_explanation(["a", "boat"], side=(400, 200)),
        random_explanation(["a", "boat"], side=None),
        random_explanation(["a", "boat"], side=None, boxes=False),
        random_explanation(["a", "the"]),
        random_explanation([f"word{k}" for k in range(14)], entropies=False),
    ],
    ids=["one word", "70 words", "scripts", "portrait", "no photograph", "no boxes", "no content word", "attention"],
)
def test_draw_explanation_draws_all_kinds_of_pairs(x):
    picture = open_picture(x)
    assert 1050 < picture.width < 1350
    assert 600 < picture.height < 2000
    figure = figures.draw_explanation(x)
    titles = [axes.get_title() for axes in figure.axes]
    panels = [figures.shorten(x.words[k]) for k in figures.content_words(x)]
    assert [title for title in titles if title in panels] == panels
    assert np.asarray(picture).std() > 10
    assert figures.to_pixels(figure).dtype == np.uint8


def test_content_words_have_largest_weights():
    x = random_explanation(["a", "dog", "runs", "on", "the", "grass", "."])
    assert [x.words[k] for k in figures.content_words(x)] == ["dog", "runs", "grass"]
    many = random_explanation([f"w{k}" for k in range(40)])
    drawn = figures.content_words(many)
    assert len(drawn) == 12
    assert drawn == sorted(drawn)
    assert min(many.word_weights[drawn]) >= max(np.delete(many.word_weights, drawn))


def test_attention_heatmap_sums_densities_of_boxes():
    """A pixel gets the densities of all boxes that contain it; equal weights of boxes that tile the image give 1."""
    boxes = np.concatenate([grid_boxes(3, 3), grid_boxes(2, 2)])
    np.testing.assert_allclose(
        figures.attention_heatmap(np.r_[np.full(9, 0.5 / 9), np.full(4, 0.5 / 4)], boxes), 1, rtol=1e-6
    )
    one = figures.attention_heatmap(np.eye(13)[4], boxes)  # the middle cell
    third = figures.MAP_PIXELS // 3
    assert one[third : 2 * third, third : 2 * third].min() == one.max() == 9
    assert one.mean() == pytest.approx(1)


def test_draw_explanation_colors_words_by_weight_and_shows_terms_with_shares():
    x = random_explanation(["a", "dog", "runs"])
    figure = figures.draw_explanation(x)
    texts = {text.get_text().strip(): text for axes in figure.axes for text in axes.texts}
    alphas = [texts[word].get_bbox_patch().get_facecolor()[3] for word in x.words]
    np.testing.assert_allclose(alphas, 0.55 * x.word_weights / x.word_weights.max(), rtol=1e-6)
    terms = [axes for axes in figure.axes for axes in axes.child_axes if axes.get_yticklabels()]
    (labels,) = [
        names for names in ([t.get_text() for t in a.get_yticklabels()] for a in terms) if "score 0.500" in names
    ]
    assert labels == ["global similarity", "local attention", "entropy (MFE)", "score 0.500"]
    inset_texts = [text.get_text().strip() for axes in terms for text in axes.texts]
    assert inset_texts == ["0.300  (44 %)", "0.200  (29 %)", "-0.180  (26 %)"]
