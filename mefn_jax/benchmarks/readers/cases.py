"""Reader of compositional cases of a user's own: `cases.jsonl`, a line a case.

    {"image": "a.jpg", "true": ["a red cup"], "false": ["a blue cup"], "subset": "color"}
    {"images": ["a.jpg", "b.jpg"], "captions": ["a dog bites a man", "a man bites a dog"]}

All cases are of one of these kinds. `subset` may be left out.
"""

from mefn_jax.benchmarks.items import CaptionPool, Cases, Choice, ImagePool, Pairing
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, parse_json, read_text, require
from mefn_jax.errors import DataError

CASES_FILE = "cases.jsonl"


def read(request: Request) -> Cases:
    """Reads the cases; images are below `--images`, or the folder of the file. Raises DataError that names the
    malformed line."""
    path = request.find_file(CASES_FILE)
    folder = request.image_folder()
    images, captions, cases = ImagePool(), CaptionPool(), []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        entry = parse_json(line, where)
        subset = require(entry, "subset", str, where) if isinstance(entry, dict) and "subset" in entry else "all cases"

        def add_texts(key, entry=entry, where=where):
            return tuple(captions.add(clean_caption(text, where)) for text in _read_texts(entry, key, where))

        def add_image(name, where=where):
            return images.add(request.find_image(folder, name, where), name)

        if isinstance(entry, dict) and "images" in entry:
            pair, texts = tuple(map(add_image, _read_texts(entry, "images", where))), add_texts("captions")
            if len(set(pair)) != 2 or len(set(texts)) != 2:
                raise DataError(f"{where}: give two different images and two different captions")
            cases.append(Pairing(pair, texts, subset))
        else:
            image, true, false = add_image(require(entry, "image", str, where)), add_texts("true"), add_texts("false")
            if set(true) & set(false):
                raise DataError(f"{where}: a caption is both true and false; remove one")
            cases.append(Choice(image, tuple(dict.fromkeys(true)), tuple(dict.fromkeys(false)), subset))
        if type(cases[-1]) is not type(cases[0]):
            raise DataError(f"{where}: has other keys than the lines before; give one kind of cases in a file")
    if not cases:
        raise DataError(f"{path}: no cases")
    return Cases(images.to_split(request.benchmark), captions.to_list(), cases)


def _read_texts(entry: dict, key: str, where: str) -> list[str]:
    """Returns the texts of a list that is not empty. Raises DataError for anything else."""
    texts = require(entry, key, list, where)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {key!r} must be a list of texts, found {str(texts)[:60]!r}")
    return texts
