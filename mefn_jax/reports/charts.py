"""Charts of one run and of several, drawn with matplotlib for the pages.

Imported only where a chart is drawn, since matplotlib is slow to import.
"""

import itertools
import textwrap

import numpy as np
from matplotlib.figure import Figure

from mefn_jax.reports.figures import BLUE, DPI, GRAY, INK, WIDTH

ORANGE, GREEN = "#c8702a", "#2a8f3c"
# Panels of the training curves: a title, and names in metrics.jsonl; "name." stands for all names that begin so, and
# names that the file lacks are left out.
PANELS = (
    ("loss", ("loss",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("R@1 on {val}, %", ("{val}.i2t.r1", "{val}.t2i.r1")),
    ("rSum on {val}", ("{val}.rsum", "ema.rsum")),
    ("learned scalars of the matcher", ("matcher.",)),
    ("mean entropies of 16 pairs of {val}, 0 to 1", ("pairs.region_entropy", "pairs.word_entropy")),
)
LABELS = {"i2t.r1": "image to text", "t2i.r1": "text to image", "ema.rsum": "averaged parameters", "rsum": "as trained"}
SERIES_COLORS = (BLUE, ORANGE, GREEN, "#8a5aa8", "#a83a5a", "#7a6a4f", "#2f8f9d", "#b59a1f")


def find_panels(lines: list[dict]) -> list[tuple[str, list[str]]]:
    """Returns the panels of the training curves for which there are numbers: title and names of metrics."""
    found = list(dict.fromkeys(name for line in lines for name in line))
    val = "held_out" if "held_out.rsum" in found else "val"
    panels = []
    for title, names in PANELS:
        names = [name.format(val=val) for name in names]
        names = [x for name in names for x in found if x == name or (name.endswith(".") and x.startswith(name))]
        if names:
            panels.append((title.format(val=val), names))
    return panels


def training_curves(lines: list[dict]) -> Figure:
    """Draws a run's metrics over its steps, from the lines of `metrics.jsonl`."""
    panels = find_panels(lines)
    rows = -(-len(panels) // 3)
    figure = Figure((WIDTH, 2.6 * rows), DPI, layout="constrained")
    for k, (title, names) in enumerate(panels):
        # The title names a single metric, but not which scalar a matcher has.
        has_legend = len(names) > 1 or names[0].startswith("matcher.")
        axes = figure.add_subplot(rows, 3, k + 1)
        for name, color in zip(names, itertools.cycle(SERIES_COLORS), strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = curve_label(name, has_legend)
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                label=label or None,
                marker="o" if len(points) < 12 else "",
                ms=3,
            )
        style_axes(axes, title)
        axes.set_xlabel("step", fontsize=8)
        if has_legend:
            low, high = axes.get_ylim()
            rows_of_legend = -(-len(names) // 2)
            room = 0.1 + 0.15 * rows_of_legend  # above all lines, as a share of the axis without it
            axes.set_ylim(low, high + room * (high - low))
            axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    return figure


def curve_label(name: str, has_legend: bool) -> str:
    """Returns the label of a curve in its panel; empty in one without a legend."""
    labels = [label for key, label in LABELS.items() if name.endswith(key)]
    return (labels[0] if labels else name.split(".")[-1].replace("_", " ")) if has_legend else ""


def score_histograms(positives: np.ndarray, image_negatives: np.ndarray, caption_negatives: np.ndarray) -> Figure:
    """Draws histograms of the positive scores `(C,)` and of the scores of hardest negatives.

    These are given for each image `(I,)` and for each caption `(C,)`; NaN is left out.
    """
    figure = Figure((WIDTH, 3.0), DPI, layout="constrained")
    panels = (("text to image: captions with their hardest negative image", caption_negatives),)
    panels += (("image to text: images with their hardest negative caption", image_negatives),)
    finite = np.concatenate([x[np.isfinite(x)] for x in (positives, image_negatives, caption_negatives)]).astype(float)
    bins = np.linspace(finite.min(), finite.max() + 1e-3, 50)
    for k, (title, negatives) in enumerate(panels):
        axes = figure.add_subplot(1, 2, k + 1)
        axes.hist(positives, bins, color=GREEN, alpha=0.6, density=True, label="positive pairs")
        if len(negatives := negatives[np.isfinite(negatives)]):
            axes.hist(negatives, bins, color=ORANGE, alpha=0.6, density=True, label="hardest negatives")
        style_axes(axes, title)
        axes.set_xlabel("score", fontsize=8)
        axes.set_yticks([])
        axes.legend(fontsize=8, frameon=False)
    return figure


def recall_by_length(names: list[str], sizes: list[int], recalls: dict[str, list[float]]) -> Figure:
    """Draws the text-to-image recalls, in percent, of captions grouped by length."""
    figure = Figure((WIDTH * 0.6, 3.0), DPI, layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(recalls)
    for k, (name, values) in enumerate(recalls.items()):
        positions = np.arange(len(names)) + (k - (len(recalls) - 1) / 2) * width
        bars = axes.bar(positions, values, width, color=SERIES_COLORS[k], label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    labels = [f"{n} word{'' if n == '1' else 's'}\n{size:,} captions" for n, size in zip(names, sizes, strict=True)]
    axes.set_xticks(np.arange(len(names)), labels, fontsize=8)
    axes.set_ylim(0, 108)
    style_axes(axes, "text to image, %")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def comparison_chart(rows: list[dict]) -> Figure:
    """Draws the rows of a comparison, from top to bottom: means with their spreads, and differences with intervals.

    A row is `{name, means, spreads, interval}`. `means` and `spreads` (over seeds) are by metric; `interval` is
    `(low, high)` of the difference in rSum to the first row, and None for the first row.
    """
    titles = {"i2t.r1": "R@1 image to text", "t2i.r1": "R@1 text to image", "rsum": "rSum"}
    figure = Figure((WIDTH, 1.0 + 0.5 * len(rows)), DPI, layout="constrained")
    panels = figure.subplots(1, len(titles) + 1, sharey=True)
    positions = np.arange(len(rows))
    for axes, (key, title) in zip(panels, titles.items(), strict=False):
        means = [row["means"][key] for row in rows]
        spreads = [np.nan_to_num(row["spreads"][key]) for row in rows]
        bars = axes.barh(positions, means, 0.6, xerr=spreads, color=BLUE, error_kw={"elinewidth": 1, "capsize": 3})
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=4)
        axes.margins(x=0.25)
        style_axes(axes, title)
    axes = panels[-1]
    for k, row in enumerate(rows):
        if row["interval"]:
            low, high = row["interval"]
            difference = row["means"]["rsum"] - rows[0]["means"]["rsum"]
            axes.plot([low, high], [k, k], color=ORANGE, linewidth=2)
            axes.plot([difference], [k], "o", color=ORANGE)
    axes.axvline(0, color=GRAY, linewidth=1)
    style_axes(axes, "rSum minus the first row, 95 %")
    panels[0].set_yticks(positions, [textwrap.fill(row["name"], 34, max_lines=3) for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    return figure


def style_axes(axes, title: str) -> None:
    """Adds a title and removes the frame at the top and at the right."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
