"""TODO."""

import numpy as np

from mefn_jax import metrics
from mefn_jax.data.split import Split
from mefn_jax.runtime.console import print0


def describe_protocol(config, split: Split, folds: int) -> dict:
    """What the numbers were made from (DESIGN.md 8)."""
    number = np.diff(split.caption_offsets)
    each = str(number.min()) if number.min() == number.max() else f"{number.min()} to {number.max()}"
    t = config.text
    case = "lower case" if t.lower_case else "case kept"
    text = f"{case}, punctuation {t.punctuation}"
    if t.pretrained:
        text = "as the checkpoint's tokenizer has it"
    if t.arch == "cached":
        text = "words cached"
    return {
        "split": split.name,
        "images": split.num_images,
        "captions": split.num_captions,
        "folds": folds,
        "captions_per_image": each,
        "ties": "against the model",
        "text": f"{text}, at most {config.text.max_tokens} wordpieces",
    }


def print_table(rows: dict, protocol: dict, split: Split, folds: int) -> None:
    """Prints the protocol and the table."""
    p = protocol
    fold = f"{folds} consecutive folds of {split.num_images // folds} images, averaged" if folds > 1 else "one gallery"
    print0(
        f"\n{p['split']}: {p['images']} images, {p['captions']} captions ({p['captions_per_image']} an image), {fold}; "
        f"ties {p['ties']}; text {p['text']}"
    )
    if "ambiguous_captions" in p:
        print0(
            f"{p['ambiguous_captions']:.1f} % of the captions are true of more than one scene. Twins: which of "
            "two twin scenes does a caption describe (%, a tie is one half)"
        )
    columns = ("r1", "r5", "r10", "medr", "meanr", "map")
    has_twins = any("twins" in result for result, _ in rows.values())
    width = max(map(len, [*rows, "chance"]))
    print0(f"{'':{width}} {'image to text':^42}  {'text to image':^42}")
    titles = "".join(f"{t:>7}" for t in ("R@1", "R@5", "R@10", "medR", "meanR", "mAP"))
    print0(f"{'':{width}} {titles}  {titles}  {'rSum':>6}" + (f" {'twins':>6}" if has_twins else ""))
    for name, (result, _) in rows.items():
        sides = "  ".join("".join(f"{result[d][c]:7.1f}" for c in columns) for d in ("i2t", "t2i"))
        twin = f" {result['twins']['all']:6.1f}" if has_twins else ""
        print0(f"{name:{width}} {sides}  {result['rsum']:6.1f}{twin}")
    size = split.num_images // folds
    expected = metrics.chance_recalls(size, split.caption_image[: split.caption_offsets[size]])
    sides = "  ".join("".join(f"{expected[d][c]:7.1f}" for c in columns[:3]) + " " * 21 for d in ("i2t", "t2i"))
    total = sum(sum(e.values()) for e in expected.values())
    print0(f"{'chance':{width}} {sides}  {total:6.1f}" + (f" {50:6.1f}" if has_twins else ""))
    if has_twins:
        kinds = next(iter(rows.values()))[0]["twins"]
        print0("twins by what was swapped: " + ", ".join(f"{k} {v:.1f}" for k, v in kinds.items() if k != "all"))


def print_pointing(found: dict | None) -> None:
    """Prints the pointing accuracy."""
    if found and found["all"] is not None:
        print0(
            f"pointing: the region that a word attends to most lies in what the word names in {found['all']:.1f} % "
            f"(chance {found['chance']:.1f})"
        )
