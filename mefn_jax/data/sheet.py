"""Contact sheet of a training batch as the model sees it: augmented images, tokens, and which rows are positives."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mefn_jax.data.tokenizer import Tokenizer

_CELL, _PICTURE, _GAP, _LINE, _LINES = 230, 200, 10, 15, 5
_INK, _GRAY, _ODD, _PAPER = (30, 30, 30), (120, 120, 120), (200, 20, 20), (255, 255, 255)
_FRAMES = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))


def draw_batch(batch: dict, tokenizer: Tokenizer, columns: int = 6) -> Image.Image:
    """Draws the rows of a batch of `pipeline.training_dataset`, numbered.

    Rows of the same image, which are positives of each other, have a frame of the same color. Unknown and masked tokens
    are red.
    """
    number = len(batch["text"])
    rows = -(-number // columns)
    height = _PICTURE + _LINE * (_LINES + 2) + _GAP
    sheet = Image.new("RGB", (columns * _CELL + _GAP, rows * height + _GAP), _PAPER)
    frames = _choose_frames(batch["image_index"])
    for k in range(number):
        left, top = _GAP + k % columns * _CELL, _GAP + k // columns * height
        same_image = [int(j) for j in np.flatnonzero(batch["image_index"] == batch["image_index"][k]) if j != k]
        _draw_cell(sheet, left, top, batch, k, tokenizer, same_image, frames.get(int(batch["image_index"][k])))
    return sheet


def _choose_frames(image_index: np.ndarray) -> dict[int, tuple]:
    """Returns a color for each image that has several rows."""
    images, counts = np.unique(image_index, return_counts=True)
    return {int(i): _FRAMES[n % len(_FRAMES)] for n, i in enumerate(images[counts > 1])}


def _draw_cell(sheet, left, top, batch, k, tokenizer, same_image, frame) -> None:
    """Draws row k of the batch; `same_image` are the other rows of its image, and `frame` is its color or None."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE - 3)
    if frame:
        pen.rectangle((left - 4, top - 4, left + _PICTURE + 3, top + _PICTURE + 3), fill=frame)
    sheet.paste(to_picture(batch["images"][k]).resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (left, top))
    title = f"row {k}: image {batch['image_index'][k]}, caption {batch['caption_index'][k]}"
    title += f", view {batch['view'][k]}" if batch["view"].any() else ""
    pen.text((left, top + _PICTURE + 4), title, _INK, font)
    positives = f"positives: rows {', '.join(map(str, same_image))}" if same_image else "positives: none in other rows"
    pen.text((left, top + _PICTURE + 4 + _LINE), positives, frame or _GRAY, font)
    _draw_tokens(
        pen, left, top + _PICTURE + 4 + 2 * _LINE, tokenizer.tokens(batch["text"][k][batch["text_mask"][k]]), font
    )


def to_picture(x: np.ndarray) -> Image.Image:
    """Returns a picture of uint8 pixels `(H, W, 3)`, or of regions `(N, C)` as gray cells: a region is a row, and
    channels are averaged to at most 64 columns."""
    if x.dtype == np.uint8:
        return Image.fromarray(x)
    x = x.astype(np.float32)
    cells = np.stack([part.mean(1) for part in np.array_split(x, min(64, x.shape[1]), 1)], 1)
    low, high = np.percentile(cells, (1, 99))
    return Image.fromarray((255 * np.clip((cells - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)).convert("RGB")


def _draw_tokens(pen, left, top, tokens: list[tuple[str, bool]], font) -> None:
    """Draws tokens in lines that fit into a cell; those marked True are red."""
    x, y = left, top
    for token, odd in tokens:
        width = pen.textlength(token + " ", font)
        if x > left and x + width > left + _CELL - _GAP:
            x, y = left, y + _LINE
        if y >= top + _LINE * _LINES:
            return
        pen.text((x, y), token, _ODD if odd else _INK, font)
        x += width
