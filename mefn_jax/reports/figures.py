"""Pictures drawn with matplotlib: what `explanation.py` found of a pair. Imported where a picture is asked for."""

import io
import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from mefn_jax.reports.explanation import Explanation

WIDTH, DPI = 12.0, 100  # inches, pixels an inch
PANELS_PER_ROW, PANEL_ROWS = 6, 2  # words whose attention is drawn, in a row, and how many rows
MAX_REGIONS = 16  # regions of the heat map, at most
MAP_PIXELS = 180  # of a map's side
FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans Arabic",
)
# English words that name nothing that could be seen.
FUNCTION_WORDS = (
    "a an the and or but of in on at to by with from for as is are was were be been it its his her their he she they "
    "this that these those there which who while into onto out up down over off some"
)
INK, GREY, BLUE = "#222222", "#666666", "#3f6e9a"


def draw_explanation(x: Explanation) -> Figure:
    """The photograph, the weights of its regions, what each content word attends to, and the entropy map (the paper's
    Figure 2)."""
    with matplotlib.rc_context({"font.family": font_families(), "text.parse_math": False}):
        return _lay_out_explanation(x)


def _lay_out_explanation(x: Explanation) -> Figure:
    shown = content_words(x)
    panels = -(-len(shown) // PANELS_PER_ROW)
    regions = top_regions(x)
    heights = [3.1, *[2.2] * panels, 0.8, max(1.6, 0.42 * len(regions)), label_height(x.words)]
    figure = Figure((WIDTH, sum(heights) + 0.9), DPI)
    grid = GridSpec(len(heights), PANELS_PER_ROW, figure, height_ratios=heights, hspace=0.28, wspace=0.12)
    grid.update(left=0.06, right=0.95, top=1 - 0.3 / figure.get_figheight(), bottom=0.25 / figure.get_figheight())
    first = grid[0, :].subgridspec(1, 3, width_ratios=(1, 1, 1.4), wspace=0.3)
    _photo(figure.add_subplot(first[0]), x)
    _weights(figure, figure.add_subplot(first[1]), x)
    _draw_summary(figure.add_subplot(first[2]), x, len(shown))
    for n, k in enumerate(shown):
        axes = figure.add_subplot(grid[1 + n // PANELS_PER_ROW, n % PANELS_PER_ROW])
        _over_photo(axes, x, x.attention[:, k])
        axes.set_title(shorten(x.words[k]), fontsize=11, color=INK, pad=15)
        said = f"weight {x.word_weights[k]:.2f}, at most {x.attention[:, k].max():.2f}"
        axes.text(0.5, 1.03, said, transform=axes.transAxes, ha="center", fontsize=8, color=GREY)
    words = figure.add_subplot(grid[1 + panels, :])
    heat = figure.add_subplot(grid[2 + panels, :], sharex=words)
    _word_weights(words, x)
    _heat_map(figure, heat, x, regions)
    return figure


def content_words(x: Explanation) -> list[int]:
    """The words whose attention is drawn, in their order: those that are neither punctuation nor FUNCTION_WORDS; of
    more than there is room for those of the largest weight."""
    unseen = set(FUNCTION_WORDS.split())
    named = [k for k, word in enumerate(x.words) if any(map(str.isalnum, word)) and word.lower() not in unseen]
    named = named or list(range(len(x.words)))
    return sorted(sorted(named, key=lambda k: -x.word_weights[k])[: PANELS_PER_ROW * PANEL_ROWS])


def top_regions(x: Explanation) -> np.ndarray:
    """The regions of the heat map, in their order: of more than ROWS those of the largest weight."""
    return np.sort(np.argsort(-x.region_weights, kind="stable")[:MAX_REGIONS])


def attention_heatmap(values: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Regions' shares `(N,)` spread over the pixels of their boxes `(N, 4)`, added up where boxes overlap: float
    `(PIXELS, PIXELS)`, relative to a share that is spread over the whole image."""
    x0, y0, x1, y1 = np.clip(np.round(boxes * MAP_PIXELS), 0, MAP_PIXELS).astype(int).T
    found = np.zeros((MAP_PIXELS, MAP_PIXELS))
    for value, a, b, c, d in zip(values, x0, y0, x1, y1, strict=True):
        if c > a and d > b:
            found[b:d, a:c] += value * MAP_PIXELS**2 / ((c - a) * (d - b))
    return found


def to_png(figure: Figure) -> bytes:
    """A picture as a PNG file. What no font of this machine has is a box."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(out, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    return out.getvalue()


def to_pixels(figure: Figure) -> np.ndarray:
    """A picture as uint8 `(H, W, 3)`."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_pixels(x: Explanation) -> np.ndarray:
    """Returns the picture of `draw_explanation` as uint8 `(H, W, 3)`."""
    return to_pixels(draw_explanation(x))


def font_families() -> list[str]:
    """DejaVu, and what this machine has for the scripts that it lacks."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FONTS if name in known)]


def shorten(word: str, most: int = 16) -> str:
    """A word, cut if it is long."""
    return word if len(word) <= most else word[: most - 1] + "…"


def label_height(words: list[str]) -> float:
    """Inches below the heat map that its upright words take."""
    return 0.35 + 0.085 * max(len(shorten(word)) for word in words)


def _photo(axes, x: Explanation) -> None:
    axes.set_axis_off()
    if x.photo is None:
        axes.text(0.5, 0.5, "precomputed features:\nno photograph", ha="center", va="center", color=GREY)
        return
    axes.imshow(x.photo)
    axes.set_title(x.photo_title, fontsize=10, color=INK)


def _weights(figure, axes, x: Explanation) -> None:
    shown = _over_photo(axes, x, x.region_weights)
    even = ", times an even share" if shown is not None else ""
    axes.set_title(f"region weights w{even}", fontsize=10, color=INK)
    if shown is not None:
        bar = figure.colorbar(shown, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
        bar.ax.tick_params(labelsize=8)


def _over_photo(axes, x: Explanation, values: np.ndarray):
    """The photograph, each region as bright as its share, the largest fully; without boxes bars, by region number."""
    if x.boxes is None:
        axes.bar(np.arange(len(values)), values, color="#b5462f")
        axes.tick_params(labelsize=7)
        axes.set_xlabel("region", fontsize=7)
        return None
    shares = attention_heatmap(values, x.boxes)
    colours, extent = Normalize(0, max(shares.max(), 1e-9)), (0, 1, 1, 0)
    light = colours(shares)
    axes.set_axis_off()
    if x.photo is None:
        axes.imshow(light, extent=extent, cmap="gray", vmin=0, vmax=1)
    else:  # darkened, so that colours stay what they are
        axes.imshow(x.photo, extent=extent)
        axes.imshow(np.zeros((*light.shape, 3)), extent=extent, alpha=0.85 * (1 - light))
    axes.set_aspect(1 if x.photo is None else x.photo.shape[0] / x.photo.shape[1])
    return ScalarMappable(colours, "gray")


def _draw_summary(axes, x: Explanation, panels: int) -> None:
    axes.set_axis_off()
    v = x.values
    lines = [f"score {v['score']:.3f}", f"local {v['local']:.3f}   global {v['global']:.3f}   gate {v['gate']:.2f}"]
    if v.get("image_hub_offset") or v.get("text_hub_offset"):
        lines.append(f"hubness offsets {v['image_hub_offset'] + v['text_hub_offset']:.3f}")
    kappa = f"   kappa {v['kappa']:.2f}" if "kappa" in v else ""
    lines.append(f"MFE {v['MFE']:.3f} nats   lambda {v['lambda']:.2f}{kappa}")
    if panels < len(x.words):
        lines.append(f"below: what {panels} of {len(x.words)} words attend to")
    caption = textwrap.fill(x.caption, 46, max_lines=9, placeholder=" …")
    axes.text(0.0, 1.0, caption, va="top", fontsize=11, color=INK, wrap=False)
    axes.text(0.0, 0.0, "\n".join([x.title, *lines]), va="bottom", fontsize=9, color=GREY, linespacing=1.5)


def _word_weights(axes, x: Explanation) -> None:
    axes.bar(np.arange(len(x.words)), x.word_weights, color=BLUE)
    axes.set_ylabel("u", rotation=0, labelpad=10, fontsize=9)
    axes.tick_params(labelbottom=False, bottom=False, labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title("word weights u, and the entropy map H in nats", fontsize=10, color=INK, loc="left")


def _heat_map(figure, axes, x: Explanation, regions: np.ndarray) -> None:
    shown = axes.imshow(x.H[regions], aspect="auto", cmap="viridis", interpolation="nearest")
    size = 10 if len(x.words) <= 30 else 7
    axes.set_xticks(np.arange(len(x.words)), [shorten(word) for word in x.words], rotation=90, fontsize=size)
    axes.set_yticks([])
    for row, region in enumerate(regions):
        _thumbnail(axes, x, row, int(region), len(regions))
    some = (
        f"{len(regions)} of {len(x.H)} regions, those of the largest weight" if len(regions) < len(x.H) else "regions"
    )
    axes.set_ylabel(some, fontsize=9, labelpad=40)
    inside = axes.inset_axes((1.008, 0, 0.012, 1))
    bar = figure.colorbar(shown, cax=inside)
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title("nats", fontsize=8)


def _thumbnail(axes, x: Explanation, row: int, region: int, rows: int) -> None:
    """What is in a region, left of its row, or its number."""
    box = (-0.036, 1 - (row + 0.96) / rows, 0.032, 0.92 / rows)
    if x.photo is None or x.boxes is None:
        axes.text(
            -0.012, 1 - (row + 0.5) / rows, str(region), transform=axes.transAxes, ha="right", va="center", fontsize=8
        )
        return
    height, width = x.photo.shape[:2]
    a, b, c, d = np.round(x.boxes[region] * (width, height, width, height)).astype(int)
    a, b = min(a, width - 1), min(b, height - 1)
    inside = axes.inset_axes(box)
    inside.imshow(x.photo[b : max(d, b + 1), a : max(c, a + 1)])
    inside.set_axis_off()
