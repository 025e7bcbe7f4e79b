"""Reader of VALSE (Parcalabescu et al. 2022): `{piece}.json` for each linguistic phenomenon, an object of entries
`{image_file, caption, foil, mturk: {caption, foil, other}, ...}`.

As its authors count, a case is valid if at least two of three annotators found the caption, and not the foil, to be
true. The photographs are of several data sets, in a folder each."""

from pathlib import Path

from mefn_jax.benchmarks.items import CaptionPool, Cases, Choice, ImagePool
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, read_json, require
from mefn_jax.errors import DataError

# Files of the publishers' repository.
PIECES = (
    *("existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial", "relations"),
    *("action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it"),
)
VALID_VOTES = 2


def read(request: Request) -> Cases:
    """Reads the pieces that are there. A photograph is `image_file`, in `--images` or in the folder named after its
    `dataset` below that. Raises DataError that names the malformed entry, or if no piece is there."""
    request.find_file(*(name for piece in PIECES for name in (f"{piece}.json", f"data/{piece}.json")))
    folder = request.image_folder("images")
    images, captions, cases = ImagePool(), CaptionPool(), []
    for piece in PIECES:
        paths = [
            p for p in (request.folder / f"{piece}.json", request.folder / "data" / f"{piece}.json") if p.is_file()
        ]
        for path in paths[:1]:
            entries = read_json(path)
            if not isinstance(entries, dict) or not entries:
                raise DataError(f"{path}: expected an object of entries; restore the published file")
            for key, entry in entries.items():
                where = f"{path}: {key!r}"
                votes = require(require(entry, "mturk", dict, where), "caption", int, f"{where}: mturk")
                if votes < VALID_VOTES:
                    continue
                name = require(entry, "image_file", str, where)
                image = images.add(_find_photograph(request, folder, entry, name, where), name)
                true = captions.add(_read_caption(entry, where))
                false = captions.add(clean_caption(require(entry, "foil", str, where), where))
                cases.append(Choice(image, (true,), (false,), piece))
    if not cases:
        raise DataError(f"{request.folder}: no valid case; restore the published files")
    return Cases(images.to_split(request.benchmark), captions.to_list(), cases)


def _read_caption(entry: dict, where: str) -> str:
    """Returns the caption of an entry, a text or a list of one."""
    caption = entry.get("caption")
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    return clean_caption(require({"caption": caption}, "caption", str, where), where)


def _find_photograph(request: Request, folder: Path, entry: dict, name: str, where: str) -> Path:
    """Returns the path of an entry's photograph, in the folder of its data set if there is one."""
    own = folder / str(entry.get("dataset", ""))
    return request.find_image(own if (own / name).is_file() else folder, name, where)
