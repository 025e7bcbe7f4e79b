"""Reader of compositional cases of a user's own: `cases.jsonl`, a line a case.

    {"image": "a.jpg", "true": ["a red cup"], "false": ["a blue cup"], "subset": "color"}
    {"images": ["a.jpg", "b.jpg"], "captions": ["a dog bites a man", "a man bites a dog"]}

All cases are of one of these kinds. `subset` may be left out.
"""

from mefn_jax.benchmarks.items import ALL_CASES, MEAN_OF_SUBSETS, SAME_WORDS, Cases
from mefn_jax.benchmarks.readers.builder import CaseBuilder
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import read_json_lines, require
from mefn_jax.errors import DataError

CASES_FILE, NO_SUBSET = "cases.jsonl", "cases"


def read(request: Request) -> Cases:
    """Reads the cases; images are below `--images`, or the folder of the file. Raises DataError that names the
    malformed line."""
    path = request.find_file(CASES_FILE)
    builder = CaseBuilder(request, request.image_folder())
    for where, entry in read_json_lines(path):
        add_case = _add_pairing if isinstance(entry, dict) and "images" in entry else _add_choice
        add_case(builder, entry, where)
        if type(builder.cases[-1]) is not type(builder.cases[0]):
            raise DataError(f"{where}: has other keys than the lines before; give one kind of cases in a file")
    return builder.build()


def _add_choice(builder: CaseBuilder, entry: dict, where: str) -> None:
    """Adds the case of an image with true and untrue captions."""
    image = builder.add_image(require(entry, "image", str, where), where)
    true, false = (_add_texts(builder, entry, key, where) for key in ("true", "false"))
    if set(true) & set(false):
        raise DataError(f"{where}: a caption is both true and false; remove one")
    builder.add_choice(image, true, false, _read_subset(entry, where))


def _add_pairing(builder: CaseBuilder, entry: dict, where: str) -> None:
    """Adds the case of two images and two captions."""
    images = tuple(builder.add_image(name, where) for name in _read_list(entry, "images", where))
    captions = _add_texts(builder, entry, "captions", where)
    if len(set(images)) != 2 or len(images) != 2 or len(captions) != 2:
        raise DataError(f"{where}: give two different images and two different captions")
    builder.add_pairing(images, captions, _read_subset(entry, where))


def _add_texts(builder: CaseBuilder, entry: dict, key: str, where: str) -> tuple[int, ...]:
    """Adds the captions of a list and returns their positions, each once."""
    texts = _read_list(entry, key, where)
    return tuple(dict.fromkeys(builder.add_caption({key: text}, key, where) for text in texts))


def _read_list(entry: dict, key: str, where: str) -> list[str]:
    """Returns the texts of a list that is not empty. Raises DataError for anything else."""
    texts = require(entry, key, list, where)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {key!r} must be a list of texts, found {str(texts)[:60]!r}")
    return texts


def _read_subset(entry: dict, where: str) -> str:
    """Returns the subset that a case names, or NO_SUBSET. Raises DataError for the name of another row of the table."""
    subset = require(entry, "subset", str, where) if "subset" in entry else NO_SUBSET
    if subset in (ALL_CASES, MEAN_OF_SUBSETS, SAME_WORDS):
        raise DataError(f"{where}: subset {subset!r} is the name of another row of the table; choose another name")
    return subset
