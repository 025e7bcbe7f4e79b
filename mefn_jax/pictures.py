"""Pictures for people: what a query found, and where they may be written."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mefn_jax.config import check_local
from mefn_jax.data.images import rgb
from mefn_jax.errors import ConfigError
from mefn_jax.logs import printable

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
CELL, PICTURE, GAP, LINE = 230, 210, 12, 18
INK, GREY, PALE, PAPER = (30, 30, 30), (110, 110, 110), (225, 225, 225), (255, 255, 255)


def ranked(title: str, found: list[tuple[float, Path]], columns: int = 5) -> Image.Image:
    """A contact sheet of `(score, image file)`, best first, under a title; a file that is gone leaves its place
    empty."""
    columns = min(columns, len(found))
    rows, height = -(-len(found) // columns), PICTURE + 2 * LINE + GAP
    width = max(columns, 2) * CELL + GAP
    sheet = Image.new("RGB", (width, rows * height + 2 * GAP + LINE), PAPER)
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3), ImageFont.load_default(LINE - 6)
    pen.text((GAP, GAP), fitting(pen, printable(title), width - 2 * GAP, font), INK, font)
    for k, (score, path) in enumerate(found):
        left, top = GAP + k % columns * CELL, 2 * GAP + LINE + k // columns * height
        picture = shrunk(path)
        sheet.paste(picture, (left + (PICTURE - picture.width) // 2, top + (PICTURE - picture.height) // 2))
        pen.text((left, top + PICTURE + 2), f"{k + 1}.  {score:.4f}", INK, font)
        pen.text((left, top + PICTURE + 2 + LINE), fitting(pen, printable(path.name), PICTURE, small), GREY, small)
    return sheet


def shrunk(path: Path) -> Image.Image:
    """An image file's picture for a cell; grey if it can no longer be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.contain(rgb(ImageOps.exif_transpose(image)), (PICTURE, PICTURE))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Image.new("RGB", (PICTURE, PICTURE), PALE)


def checked(out: str) -> Path:
    """The path `--out` of a picture to write, whose folder is made. Raises ConfigError if it cannot be written."""
    check_local("--out", out)
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out={out}: cannot be written as an image; give a .png or .jpg file")
    if path.is_dir():
        raise ConfigError(f"--out={out}: is a directory; give a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out={out}: {e.strerror}") from None
    return path


def save(picture: Image.Image, path: Path) -> None:
    """Writes a picture. Raises ConfigError."""
    try:
        picture.save(path)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--out={path}: cannot be written ({e})") from None


def fitting(pen, text: str, width: int, font) -> str:
    """The text, cut with dots if it is wider."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
