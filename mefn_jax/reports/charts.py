"""Charts of a run and of several, drawn with matplotlib: what pages show. Imported where one is asked for."""

import textwrap

import numpy as np
from matplotlib.figure import Figure

from mefn_jax.reports.figures import BLUE, DPI, GREY, INK, WIDTH

ORANGE, GREEN = "#c8702a", "#2a8f3c"
# What of metrics.jsonl a panel shows: a title, and the names, those that are there.
PANELS = (
    ("loss", ("loss",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("R@1 on {val}, %", ("{val}.i2t.r1", "{val}.t2i.r1")),
    ("rSum on {val}", ("{val}.rsum", "ema.rsum")),
    ("what the matcher has learned", ("matcher.lambda", "matcher.kappa", "matcher.gate")),
    ("entropies of 16 pairs of {val}, 0 to 1", ("pairs.region_entropy", "pairs.word_entropy")),
)
LABELS = {"i2t.r1": "image to text", "t2i.r1": "text to image", "ema.rsum": "averaged parameters", "rsum": "as trained"}
SERIES_COLORS = (BLUE, ORANGE, GREEN)


def training_curves(lines: list[dict]) -> Figure:
    """A run's metrics over its steps, from the lines of `metrics.jsonl`."""
    val = "held_out" if any("held_out.rsum" in line for line in lines) else "val"
    panels = [(title.format(val=val), [name.format(val=val) for name in names]) for title, names in PANELS]
    panels = [(t, n) for t, names in panels if (n := [name for name in names if any(name in x for x in lines)])]
    rows = -(-len(panels) // 3)
    figure = Figure((WIDTH, 2.6 * rows), DPI, layout="constrained")
    for k, (title, names) in enumerate(panels):
        both = len(names) > 1
        axes = figure.add_subplot(rows, 3, k + 1)
        for name, colour in zip(names, SERIES_COLORS, strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = curve_label(name, both)
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                label=label or None,
                marker="o" if len(points) < 12 else "",
                ms=3,
            )
        style_axes(axes, title)
        axes.set_xlabel("step", fontsize=8)
        if both:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.4 * (high - low))  # room for the legend above all lines
            axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def curve_label(name: str, among_others: bool) -> str:
    """What a curve is called in its panel; nothing where it is alone."""
    found = [label for key, label in LABELS.items() if name.endswith(key)]
    return (found[0] if found else name.split(".")[-1].replace("_", " ")) if among_others else ""


def score_histograms(own: np.ndarray, of_images: np.ndarray, of_captions: np.ndarray) -> Figure:
    """The scores of right pairs `(C,)`, and the hardest wrong ones of each image and each caption; NaN is left out."""
    figure = Figure((WIDTH, 3.0), DPI, layout="constrained")
    kinds = (("captions, and the image scored highest of all others", of_captions),)
    kinds += (("images, and the caption scored highest of all others'", of_images),)
    everything = np.concatenate([x[np.isfinite(x)] for x in (own, of_images, of_captions)]).astype(float)
    bins = np.linspace(everything.min(), everything.max() + 1e-3, 50)
    for k, (title, wrong) in enumerate(kinds):
        axes = figure.add_subplot(1, 2, k + 1)
        axes.hist(own, bins, color=GREEN, alpha=0.6, density=True, label="right pairs")
        if len(wrong := wrong[np.isfinite(wrong)]):
            axes.hist(wrong, bins, color=ORANGE, alpha=0.6, density=True, label="hardest wrong ones")
        style_axes(axes, title)
        axes.set_xlabel("score", fontsize=8)
        axes.set_yticks([])
        axes.legend(fontsize=8, frameon=False)
    return figure


def recall_by_length(names: list[str], sizes: list[int], recalls: dict[str, list[float]]) -> Figure:
    """Text-to-image recall, in percent, of captions in groups by length."""
    figure = Figure((WIDTH * 0.6, 3.0), DPI, layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(recalls)
    for k, (name, values) in enumerate(recalls.items()):
        at = np.arange(len(names)) + (k - (len(recalls) - 1) / 2) * width
        bars = axes.bar(at, values, width, color=SERIES_COLORS[k], label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    labels = [f"{n} word{'' if n == '1' else 's'}\n{size:,} captions" for n, size in zip(names, sizes, strict=True)]
    axes.set_xticks(np.arange(len(names)), labels, fontsize=8)
    axes.set_ylim(0, 108)
    style_axes(axes, "text to image, %")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def comparison_chart(rows: list[dict]) -> Figure:
    """Rows of a comparison, from top to bottom: `{name, means, spreads, interval}`, `means` and `spreads` by metric,
    `interval` of the difference of rSum to the first row's: (low, high), None in the first. Bars of the means with
    their spread over seeds, and the differences with their intervals."""
    titles = {"i2t.r1": "R@1 image to text", "t2i.r1": "R@1 text to image", "rsum": "rSum"}
    figure = Figure((WIDTH, 1.0 + 0.5 * len(rows)), DPI, layout="constrained")
    panels = figure.subplots(1, len(titles) + 1, sharey=True)
    at = np.arange(len(rows))
    for axes, (key, title) in zip(panels, titles.items(), strict=False):
        means = [row["means"][key] for row in rows]
        spreads = [np.nan_to_num(row["spreads"][key]) for row in rows]
        bars = axes.barh(at, means, 0.6, xerr=spreads, color=BLUE, error_kw={"elinewidth": 1, "capsize": 3})
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
    axes.axvline(0, color=GREY, linewidth=1)
    style_axes(axes, "rSum to the first, 95 %")
    panels[0].set_yticks(at, [textwrap.fill(row["name"], 34, max_lines=3) for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    return figure


def style_axes(axes, title: str) -> None:
    """A title, and no more frame than needed."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
