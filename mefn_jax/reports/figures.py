"""Figures of explanations (`explanation.py`), drawn with matplotlib.

Imported only where a figure is drawn, since matplotlib is slow to import. N regions, W words.
"""

import io
import warnings

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from mefn_jax.reports.contact_sheet import picture_mark
from mefn_jax.reports.explanation import TERM_NAMES, Explanation, score_terms, term_share

WIDTH, DPI = 12.0, 100  # inches, pixels per inch
PANELS_PER_ROW, PANEL_ROWS = 6, 2  # of the panels that draw the attention of a word
MAX_REGIONS = 16  # the most regions that the entropy map shows
MAP_PIXELS = 180  # side of an attention map
# Fonts for scripts that DejaVu Sans lacks.
FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans Arabic",
)
# English words that name nothing visible.
FUNCTION_WORDS = (
    "a an the and or but of in on at to by with from for as is are was were be been it its his her their he she they "
    "this that these those there which who while into onto out up down over off some"
)
SUMMARY_TOP = 0.67  # of the panel with the caption: below it are the terms of the score
INK, GRAY, BLUE, RED = "#222222", "#666666", "#3f6e9a", "#b5462f"


def draw_explanation(x: Explanation) -> Figure:
    """Draws an explanation (the paper's Figure 2): photograph, weights, attention of content words, entropy map. An
    explanation without entropies has the photograph and the attention alone."""
    options = {"font.family": font_families(), "text.parse_math": False}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of words that are measured
        return _lay_out_explanation(x)


def _lay_out_explanation(x: Explanation) -> Figure:
    panel_words = content_words(x)
    panel_rows = -(-len(panel_words) // PANELS_PER_ROW)
    heights = [3.1, *[2.2] * panel_rows]
    if x.H is not None:
        regions = top_regions(x)
        heights += [0.8, max(1.6, 0.42 * len(regions)), label_height(x.words)]
    figure = Figure((WIDTH, sum(heights) + 0.9), DPI)
    grid = GridSpec(len(heights), PANELS_PER_ROW, figure, height_ratios=heights, hspace=0.28, wspace=0.12)
    grid.update(left=0.06, right=0.95, top=1 - 0.3 / figure.get_figheight(), bottom=0.25 / figure.get_figheight())
    columns = (1, 2.4) if x.H is None else (1, 1, 1.4)
    top_row = grid[0, :].subgridspec(1, len(columns), width_ratios=columns, wspace=0.3)
    _draw_photo(figure.add_subplot(top_row[0]), x)
    _draw_summary(figure.add_subplot(top_row[-1]), x, len(panel_words))
    for n, k in enumerate(panel_words):
        axes = figure.add_subplot(grid[1 + n // PANELS_PER_ROW, n % PANELS_PER_ROW])
        _draw_over_photo(axes, x, x.attention[:, k])
        axes.set_title(shorten(x.words[k]), fontsize=11, color=INK, pad=15)
        weight = "" if x.word_weights is None else f"weight {x.word_weights[k]:.2f}, "
        subtitle = f"{weight}maximum {x.attention[:, k].max():.2f}"
        axes.text(0.5, 1.03, subtitle, transform=axes.transAxes, ha="center", fontsize=8, color=GRAY)
    if x.H is not None:
        _draw_region_weights(figure, figure.add_subplot(top_row[1]), x)
        word_axes = figure.add_subplot(grid[1 + panel_rows, :])
        map_axes = figure.add_subplot(grid[2 + panel_rows, :], sharex=word_axes)
        _draw_word_weights(word_axes, x)
        _draw_entropy_map(figure, map_axes, x, regions)
    return figure


def content_words(x: Explanation) -> list[int]:
    """Returns the positions of the words whose attention is drawn, in the order of the caption.

    They are all words but punctuation and FUNCTION_WORDS; if these are too many, those with the largest weights, or
    without weights the first. A caption without such words gets panels of all its words.
    """
    function_words = set(FUNCTION_WORDS.split())
    content = [k for k, w in enumerate(x.words) if any(map(str.isalnum, w)) and w.lower() not in function_words]
    content = content or list(range(len(x.words)))
    weights = np.zeros(len(x.words)) if x.word_weights is None else x.word_weights
    return sorted(sorted(content, key=lambda k: -weights[k])[: PANELS_PER_ROW * PANEL_ROWS])


def top_regions(x: Explanation) -> np.ndarray:
    """Returns the regions of the entropy map, in their order: the MAX_REGIONS with the largest weights."""
    return np.sort(np.argsort(-x.region_weights, kind="stable")[:MAX_REGIONS])


def attention_heatmap(values: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns a heat map `(MAP_PIXELS, MAP_PIXELS)` of region values `(N,)`, such as weights that sum to 1.

    Each value is spread evenly over its box `(N, 4)`, and overlapping boxes are added. Values that sum to 1 give 1
    everywhere if they are spread uniformly over the image.
    """
    x0, y0, x1, y1 = np.clip(np.round(boxes * MAP_PIXELS), 0, MAP_PIXELS).astype(int).T
    heatmap = np.zeros((MAP_PIXELS, MAP_PIXELS))
    for value, left, top, right, bottom in zip(values, x0, y0, x1, y1, strict=True):
        if right > left and bottom > top:
            heatmap[top:bottom, left:right] += value * MAP_PIXELS**2 / ((right - left) * (bottom - top))
    return heatmap


def to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file. A character that no font of this machine has is drawn as a box."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(
            out, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15, pil_kwargs={"exif": picture_mark()}
        )
    return out.getvalue()


def to_pixels(figure: Figure) -> np.ndarray:
    """Returns a figure as pixels, uint8 `(H, W, 3)`."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_pixels(x: Explanation) -> np.ndarray:
    """Returns the figure of `draw_explanation` as pixels, uint8 `(H, W, 3)`."""
    return to_pixels(draw_explanation(x))


def font_families() -> list[str]:
    """Returns DejaVu Sans and those of FONTS that this machine has."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FONTS if name in installed)]


def shorten(word: str, max_length: int = 16) -> str:
    """Returns a word, cut if it is longer than `max_length` characters."""
    return word if len(word) <= max_length else word[: max_length - 1] + "…"


def label_height(words: list[str]) -> float:
    """Returns the height below the entropy map for its words, which are written upright, in inches."""
    return 0.35 + 0.085 * max(len(shorten(word)) for word in words)


def _draw_photo(axes, x: Explanation) -> None:
    axes.set_axis_off()
    if x.photo is None:
        axes.text(0.5, 0.5, "precomputed features:\nno photograph", ha="center", va="center", color=GRAY)
        return
    axes.imshow(x.photo)
    axes.set_title(x.photo_title, fontsize=10, color=INK)


def _draw_region_weights(figure, axes, x: Explanation) -> None:
    colors = _draw_over_photo(axes, x, x.region_weights)
    unit = " / uniform" if colors is not None else ""
    axes.set_title(f"region weights w{unit}", fontsize=10, color=INK)
    if colors is not None:
        bar = figure.colorbar(colors, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
        bar.ax.tick_params(labelsize=8)


def _draw_over_photo(axes, x: Explanation, values: np.ndarray):
    """Draws the photograph with a brightness that grows with the value of each region, full at the largest one.

    Returns the color scale. Without boxes, draws bars by region number and returns None.
    """
    if x.boxes is None:
        axes.bar(np.arange(len(values)), values, color=RED)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("region", fontsize=7)
        return None
    heatmap = attention_heatmap(values, x.boxes)
    normalize, extent = Normalize(0, max(heatmap.max(), 1e-9)), (0, 1, 1, 0)
    brightness = normalize(heatmap)
    axes.set_axis_off()
    if x.photo is None:
        axes.imshow(brightness, extent=extent, cmap="gray", vmin=0, vmax=1)
    else:  # darkens the photograph, which leaves its hues as they are
        axes.imshow(x.photo, extent=extent)
        axes.imshow(np.zeros((*brightness.shape, 3)), extent=extent, alpha=0.85 * (1 - brightness))
    axes.set_aspect(1 if x.photo is None else x.photo.shape[0] / x.photo.shape[1])
    return ScalarMappable(normalize, "gray")


def _draw_summary(axes, x: Explanation, panels: int) -> None:
    axes.set_axis_off()
    v, lines = x.values, []
    if x.H is not None:
        lines.append(f"local {v['local']:.3f}   global {v['global']:.3f}   gate {v['gate']:.2f}")
        mean_entropy = f"MFE {v['MFE']:.3f} nats   mean entropy {v['mean_entropy']:.3f}"
        if "evidence_weight" in v:
            mean_entropy += f"   evidence weight {v['evidence_weight']:.2f}"
        kappa = f"   kappa {v['kappa']:.2f}" if "kappa" in v else "   uniform weights"
        lines += [mean_entropy, f"lambda {v['lambda']:.2f}{kappa}"]
    if panels < len(x.words):
        lines.append(f"below: the attention of {panels} of {len(x.words)} words")
    _draw_words(axes, x)
    axes.text(0.0, 0.0, "\n".join([x.title, *lines]), va="bottom", fontsize=9, color=GRAY, linespacing=1.5)
    _draw_terms(axes.inset_axes((0.3, 0.36, 0.7, 0.065 * (1 + len(score_terms(x))))), x)


def _draw_words(axes, x: Explanation) -> None:
    """Draws the words of the caption in lines from the top, on a color that grows with their weight."""
    weights = np.zeros(len(x.words)) if x.word_weights is None else x.word_weights / x.word_weights.max()
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    width, height = axes.get_window_extent(renderer).size
    left, top, gap, line = 0.0, 1.0, 9 / width, 23 / height
    for word, weight in zip(map(shorten, x.words), weights, strict=True):
        box = {"boxstyle": "round,pad=0.15", "facecolor": (*to_rgb(BLUE), 0.55 * weight), "edgecolor": "none"}
        text = axes.text(left, top, word, va="top", fontsize=11, color=INK, bbox=box)
        share = text.get_window_extent(renderer).width / width
        if left and left + share > 1:
            if top - line < SUMMARY_TOP:  # no room for another line
                text.set_text("…")
                return
            left, top = 0.0, top - line
            text.set_position((left, top))
        left += share + gap


def _draw_terms(axes, x: Explanation) -> None:
    """Draws the terms of the score as bars from zero, with their values and their shares, and their sum."""
    terms = score_terms(x)
    for row, (name, value) in enumerate(terms.items()):
        axes.barh(row, value, 0.7, color=RED if value < 0 else BLUE)
        share = f" {value:.3f}  ({100 * term_share(terms, name):.0f} %)"
        axes.text(max(value, 0), row, share, va="center", fontsize=8, color=INK)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    labels = [TERM_NAMES[name] for name in terms]
    axes.set_yticks(np.arange(len(terms) + 1), [*labels, f"score {x.values['score']:.3f}"], fontsize=9)
    axes.set_ylim(len(terms) + 0.5, -0.5)
    values = [*terms.values(), 0.0]
    axes.set_xlim(min(values), max(values) + 0.6 * (max(values) - min(values) or 1.0))
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)


def _draw_word_weights(axes, x: Explanation) -> None:
    axes.bar(np.arange(len(x.words)), x.word_weights, color=BLUE)
    axes.set_ylabel("u", rotation=0, labelpad=10, fontsize=9)
    axes.tick_params(labelbottom=False, bottom=False, labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # With an inverse temperature of its own, the evidence has a map of its own, and that one is drawn.
    own_lambda = x.values.get("evidence_lambda")
    whose = f" of the evidence, inverse temperature {own_lambda:.2f}," if own_lambda else ""
    title = f"word weights u, and the entropy map H{whose} in nats"
    axes.set_title(title, fontsize=10, color=INK, loc="left")


def _draw_entropy_map(figure, axes, x: Explanation, regions: np.ndarray) -> None:
    entropy_map = axes.imshow(x.H[regions], aspect="auto", cmap="viridis", interpolation="nearest")
    size = 10 if len(x.words) <= 30 else 7
    axes.set_xticks(np.arange(len(x.words)), [shorten(word) for word in x.words], rotation=90, fontsize=size)
    axes.set_yticks([])
    for row, region in enumerate(regions):
        _draw_thumbnail(axes, x, row, int(region), len(regions))
    is_cut = len(regions) < len(x.H)
    label = f"the {len(regions)} of {len(x.H)} regions with the largest weight" if is_cut else "regions"
    axes.set_ylabel(label, fontsize=9, labelpad=40)
    bar_axes = axes.inset_axes((1.008, 0, 0.012, 1))
    bar = figure.colorbar(entropy_map, cax=bar_axes)
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title("nats", fontsize=8)


def _draw_thumbnail(axes, x: Explanation, row: int, region: int, rows: int) -> None:
    """Draws the content of a region to the left of its row; without a photograph or boxes, its number."""
    if x.photo is None or x.boxes is None:
        axes.text(
            -0.012, 1 - (row + 0.5) / rows, str(region), transform=axes.transAxes, ha="right", va="center", fontsize=8
        )
        return
    height, width = x.photo.shape[:2]
    left, top, right, bottom = np.round(x.boxes[region] * (width, height, width, height)).astype(int)
    left, top = min(left, width - 1), min(top, height - 1)
    thumbnail_axes = axes.inset_axes((-0.036, 1 - (row + 0.96) / rows, 0.032, 0.92 / rows))
    thumbnail_axes.imshow(x.photo[top : max(bottom, top + 1), left : max(right, left + 1)])
    thumbnail_axes.set_axis_off()
