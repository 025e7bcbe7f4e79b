"""Reader of VALSE (Parcalabescu et al. 2022): `{piece}.json` for each linguistic phenomenon, an object of entries
`{image_file, caption, foil, mturk: {caption, foil, other}, ...}`.

As its authors count, a case is valid if at least two of three annotators found the caption, and not the foil, to be
true. The photographs are of several data sets, in a folder each.
"""

from mefn_jax.benchmarks.items import Cases
from mefn_jax.benchmarks.readers.builder import CaseBuilder
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import read_json, require
from mefn_jax.errors import DataError

PIECES = (
    *("existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial", "relations"),
    *("action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it"),
)
VALID_VOTES = 2


def read(request: Request) -> Cases:
    """Reads the pieces that are there. A photograph is `image_file`, in `--images` or in the folder named after its
    `dataset` below that. Raises DataError that names the malformed entry, or if no piece is there."""
    places = {piece: [f"{piece}.json", f"data/{piece}.json"] for piece in PIECES}
    request.find_file(*(name for names in places.values() for name in names))
    builder = CaseBuilder(request, request.image_folder("images"))
    for piece, names in places.items():
        for path in [request.folder / name for name in names if (request.folder / name).is_file()][:1]:
            entries = read_json(path)
            if not isinstance(entries, dict):
                raise DataError(f"{path}: expected an object of entries; restore the published file")
            for key, entry in entries.items():
                _add_case(builder, piece, entry, f"{path}: {key!r}")
    return builder.build()


def _add_case(builder: CaseBuilder, piece: str, entry: dict, where: str) -> None:
    """Adds the case of an entry, unless annotators did not find it valid."""
    votes = require(require(entry, "mturk", dict, where), "caption", int, f"{where}: mturk")
    if votes < VALID_VOTES:
        return
    caption = entry.get("caption")
    if isinstance(caption, list) and len(caption) == 1:  # as some versions of the files have it
        entry = entry | {"caption": caption[0]}
    name, own = require(entry, "image_file", str, where), builder.folder / str(entry.get("dataset", ""))
    image = builder.add_image(name, where, folder=own if (own / name).is_file() else None)
    true, false = (builder.add_caption(entry, key, where) for key in ("caption", "foil"))
    builder.add_choice(image, (true,), (false,), piece)
