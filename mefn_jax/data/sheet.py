"""A contact sheet of what the model sees of a batch: images as augmented, tokens, and which rows are positives."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mefn_jax.data.tokenizer import Tokenizer

_CELL, _PICTURE, _GAP, _LINE, _LINES = 230, 200, 10, 15, 5
_INK, _GREY, _ODD, _PAPER = (30, 30, 30), (120, 120, 120), (200, 20, 20), (255, 255, 255)
_FRAMES = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))


def draw_batch(batch: dict, tokenizer: Tokenizer, columns: int = 6) -> Image.Image:
    """The rows of a batch of `pipeline.training_dataset`, numbered. Rows of one image, positives of one another, have
    a frame of one colour. Unknown and masked tokens are red."""
    number = len(batch["text"])
    rows = -(-number // columns)
    height = _PICTURE + _LINE * (_LINES + 2) + _GAP
    sheet = Image.new("RGB", (columns * _CELL + _GAP, rows * height + _GAP), _PAPER)
    frames = _frames(batch["image_index"])
    for k in range(number):
        left, top = _GAP + k % columns * _CELL, _GAP + k // columns * height
        others = [int(j) for j in np.flatnonzero(batch["image_index"] == batch["image_index"][k]) if j != k]
        _cell(sheet, left, top, batch, k, tokenizer, others, frames.get(int(batch["image_index"][k])))
    return sheet


def _frames(owners: np.ndarray) -> dict[int, tuple]:
    """A colour for each image that has several rows."""
    images, counts = np.unique(owners, return_counts=True)
    return {int(i): _FRAMES[n % len(_FRAMES)] for n, i in enumerate(images[counts > 1])}


def _cell(sheet, left, top, batch, k, tokenizer, others, frame) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE - 3)
    if frame:
        pen.rectangle((left - 4, top - 4, left + _PICTURE + 3, top + _PICTURE + 3), fill=frame)
    sheet.paste(to_picture(batch["images"][k]).resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (left, top))
    title = f"row {k}: image {batch['owner'][k]}, caption {batch['caption'][k]}"
    pen.text((left, top + _PICTURE + 4), title, _INK, font)
    said = f"positives: rows {', '.join(map(str, others))}" if others else "positives: its own alone"
    pen.text((left, top + _PICTURE + 4 + _LINE), said, frame or _GREY, font)
    _words(pen, left, top + _PICTURE + 4 + 2 * _LINE, tokenizer.tokens(batch["text"][k][batch["text_mask"][k]]), font)


def to_picture(x: np.ndarray) -> Image.Image:
    """uint8 pixels `(H, W, 3)` as they are; regions `(N, C)` as grey cells, a row a region, wide ones averaged."""
    if x.dtype == np.uint8:
        return Image.fromarray(x)
    x = x.astype(np.float32)
    cells = np.stack([part.mean(1) for part in np.array_split(x, min(64, x.shape[1]), 1)], 1)
    low, high = np.percentile(cells, (1, 99))
    return Image.fromarray((255 * np.clip((cells - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)).convert("RGB")


def _words(pen, left, top, tokens: list[tuple[str, bool]], font) -> None:
    x, y = left, top
    for token, odd in tokens:
        width = pen.textlength(token + " ", font)
        if x > left and x + width > left + _CELL - _GAP:
            x, y = left, y + _LINE
        if y >= top + _LINE * _LINES:
            return
        pen.text((x, y), token, _ODD if odd else _INK, font)
        x += width
