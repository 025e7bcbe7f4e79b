"""Contact sheets: a picture of a query's results, and the file that it is written to."""

import io
from pathlib import Path

from etils import epath
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

from mefn_jax.config import require_local
from mefn_jax.data.images import to_rgb
from mefn_jax.errors import ConfigError
from mefn_jax.runtime.console import printable
from mefn_jax.runtime.outputs import check_output_file
from mefn_jax.runtime.storage import write_atomic

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
MARK = "mefn_jax"  # in the EXIF tag Software of every picture
# Pixels: the width of a cell, the sides of the photograph in it, the gap between cells, the height of a line of text.
_CELL, _PICTURE, _GAP, _LINE = 230, 210, 12, 18
_INK, _GRAY, _PALE, _PAPER = (30, 30, 30), (110, 110, 110), (225, 225, 225), (255, 255, 255)


def draw_ranking(title: str, ranking: list[tuple[float, Path]], columns: int = 5) -> Image.Image:
    """Draws a contact sheet of `(score, image file)`, best first, under a title.

    A file that no longer exists leaves its place empty.
    """
    columns = min(columns, len(ranking))
    rows, height = -(-len(ranking) // columns), _PICTURE + 2 * _LINE + _GAP
    width = max(columns, 2) * _CELL + _GAP
    sheet = Image.new("RGB", (width, rows * height + 2 * _GAP + _LINE), _PAPER)
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE - 3), ImageFont.load_default(_LINE - 6)
    pen.text((_GAP, _GAP), truncate(pen, printable(title), width - 2 * _GAP, font), _INK, font)
    for k, (score, path) in enumerate(ranking):
        left, top = _GAP + k % columns * _CELL, 2 * _GAP + _LINE + k // columns * height
        picture = thumbnail(path)
        sheet.paste(picture, (left + (_PICTURE - picture.width) // 2, top + (_PICTURE - picture.height) // 2))
        pen.text((left, top + _PICTURE + 2), f"{k + 1}.  {score:.4f}", _INK, font)
        pen.text((left, top + _PICTURE + 2 + _LINE), truncate(pen, printable(path.name), _PICTURE, small), _GRAY, small)
    return sheet


def thumbnail(path: Path) -> Image.Image:
    """Returns the picture of an image file for a cell; a gray one if the file can no longer be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.contain(to_rgb(ImageOps.exif_transpose(image)), (_PICTURE, _PICTURE))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Image.new("RGB", (_PICTURE, _PICTURE), _PALE)


def check_picture_path(out: str) -> Path:
    """Returns the path of a picture, `--out`. Raises ConfigError if it cannot be written, or would replace a file that
    is no picture of this project."""
    require_local("--out", out)
    return Path(check_output_file("--out", out, FORMATS, is_own_picture))


def is_own_picture(path: Path) -> bool:
    """Returns whether a file is a picture that this project drew, by the mark of `picture_mark`."""
    with Image.open(path) as picture:
        return picture.getexif().get(ExifTags.Base.Software) == MARK


def picture_mark() -> Image.Exif:
    """Returns the metadata that every picture of this project gets, so that no other is ever replaced."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = MARK
    return exif


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture. Raises ConfigError if that is not possible."""
    data = io.BytesIO()
    picture.save(data, Image.registered_extensions()[path.suffix.lower()], exif=picture_mark())
    try:
        write_atomic(epath.Path(path), data.getvalue())
    except OSError as e:
        raise ConfigError(f"--out={path}: cannot be written ({e})") from None


def truncate(pen, text: str, width: int, font) -> str:
    """Returns the text, cut and ended with dots if it is wider than `width` pixels."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
