"""Prints the results of an evaluation: the protocol, the table of recalls, twin accuracy and the pointing game."""

import numpy as np

from mefn_jax import metrics
from mefn_jax.data.split import Split
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.runtime.console import print0


def describe_protocol(config, split: Split, folds: int, tokenizer: Tokenizer | None) -> dict:
    """Returns the protocol: what the numbers were computed from (docs/evaluation.md). `tokenizer` is the model's."""
    counts = np.diff(split.caption_offsets)
    captions_per_image = str(counts.min()) if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    return {
        "split": split.name,
        "images": split.num_images,
        "captions": split.num_captions,
        "folds": folds,
        "captions_per_image": captions_per_image,
        "ties": "against the model",
        **describe_reading(config, tokenizer),
    }


def describe_reading(config, tokenizer: Tokenizer | None) -> dict:
    """Returns how a model reads captions and images: `{text, pixels}`."""
    return {"text": _describe_text(config.text, tokenizer), "pixels": _describe_pixels(config.image)}


def _describe_text(t, tokenizer: Tokenizer | None) -> str:
    """Returns how captions are read: tokens, case, punctuation, their largest number, and padding that a tower sees."""
    length = f"at most {t.max_tokens} wordpieces"
    if t.arch == "cached" or tokenizer is None:
        return f"cached, {length}"
    case = "lower case" if tokenizer.is_lower_case else "case kept"
    punctuation = "removed" if tokenizer.drops_punctuation else "kept"
    source = "the checkpoint's tokenizer" if t.pretrained else "a tokenizer"
    padding = f", padded to {t.siglip.max_positions} without a mask" if t.arch == "siglip" else ""
    return f"by {source} of {tokenizer.vocab_size:,} tokens, {case}, punctuation {punctuation}, {length}{padding}"


def _describe_pixels(image) -> str:
    """Returns how images are resized; how precomputed regions were made is not known."""
    if image.arch == "regions":
        return "precomputed regions"
    kept = f" {100 * image.crop:.1f} %" if image.resize != "squash" else ""
    return f"{image.resize}{kept} to {image.size} x {image.size}, {image.resample}"


def print_table(rows: dict, protocol: dict, split: Split, folds: int) -> None:
    """Prints the protocol and the table: the rows `{name: (metrics, ranks)}`, and chance (docs/method.md, Eq. 61)."""
    p = protocol
    fold = f"{folds} consecutive folds of {split.num_images // folds} images, averaged" if folds > 1 else "one gallery"
    print0(
        f"\n{p['split']}: {p['images']} images, {p['captions']} captions ({p['captions_per_image']} per image), {fold}"
        f"; ties {p['ties']}\ntext {p['text']}; images {p['pixels']}"
    )
    if "ambiguous_captions" in p:
        print0(
            f"{p['ambiguous_captions']:.1f} % of the captions are ambiguous: true of more than one scene. Twins: how "
            "often a caption scores higher with its scene than with the twin (%, a tie is one half)"
        )
    columns = ("r1", "r5", "r10", "medr", "meanr", "map")
    has_twins = any("twins" in result for result, _ in rows.values())
    width = max(map(len, [*rows, "chance"]))
    print0(f"{'':{width}} {'image to text':^42}  {'text to image':^42}")
    titles = "".join(f"{t:>7}" for t in ("R@1", "R@5", "R@10", "medR", "meanR", "mAP"))
    print0(f"{'':{width}} {titles}  {titles}  {'rSum':>6}" + (f" {'twins':>6}" if has_twins else ""))
    for name, (result, _) in rows.items():
        cells = "  ".join("".join(_format_cell(result[side].get(c)) for c in columns) for side in ("i2t", "t2i"))
        twin_cell = f" {result['twins']['all']:6.1f}" if has_twins else ""
        print0(f"{name:{width}} {cells}  {result['rsum']:6.1f}{twin_cell}")
    size = split.num_images // folds
    chance = metrics.chance_recalls(size, split.caption_image[: split.caption_offsets[size]])
    cells = "  ".join("".join(f"{chance[side][c]:7.1f}" for c in columns[:3]) + " " * 21 for side in ("i2t", "t2i"))
    rsum = sum(sum(recalls.values()) for recalls in chance.values())
    print0(f"{'chance':{width}} {cells}  {rsum:6.1f}" + (f" {50:6.1f}" if has_twins else ""))
    if has_twins:
        accuracy = next(iter(rows.values()))[0]["twins"]
        print0("twins by what was swapped: " + ", ".join(f"{k} {v:.1f}" for k, v in accuracy.items() if k != "all"))


def _format_cell(value: float | None) -> str:
    """Returns a cell of the table; a metric that is not known is a dash."""
    return f"{'-':>7}" if value is None else f"{value:7.1f}"


def print_pointing(result: dict | None) -> None:
    """Prints the result of the pointing game, unless the regions have no boxes or the matcher has no attention."""
    if result and result["all"] is not None:
        print0(
            f"pointing game: the region that a word attends to most lies in what the word names for "
            f"{result['all']:.1f} % of the words (chance {result['chance']:.1f})"
        )
