"""Pictures for people: what a query found."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, PICTURE, GAP, LINE = 230, 210, 12, 18
INK, GREY, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


def ranked(title: str, found: list[tuple[float, Path]], columns: int = 5) -> Image.Image:
    """A contact sheet of `(score, image file)`, best first, under a title."""
    columns = min(columns, len(found))
    rows, height = -(-len(found) // columns), PICTURE + 2 * LINE + GAP
    width = max(columns, 2) * CELL + GAP
    sheet = Image.new("RGB", (width, rows * height + 2 * GAP + LINE), PAPER)
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3), ImageFont.load_default(LINE - 6)
    pen.text((GAP, GAP), fitting(pen, title, width - 2 * GAP, font), INK, font)
    for k, (score, path) in enumerate(found):
        left, top = GAP + k % columns * CELL, 2 * GAP + LINE + k // columns * height
        with Image.open(path) as image:
            picture = ImageOps.contain(ImageOps.exif_transpose(image).convert("RGB"), (PICTURE, PICTURE))
        sheet.paste(picture, (left + (PICTURE - picture.width) // 2, top + (PICTURE - picture.height) // 2))
        pen.text((left, top + PICTURE + 2), f"{k + 1}.  {score:.4f}", INK, font)
        pen.text((left, top + PICTURE + 2 + LINE), fitting(pen, path.name, PICTURE, small), GREY, small)
    return sheet


def fitting(pen, text: str, width: int, font) -> str:
    """The text, cut with dots if it is wider."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
