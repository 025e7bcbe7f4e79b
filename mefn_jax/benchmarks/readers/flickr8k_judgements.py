"""Reader of the human judgements of Flickr8k (Hodosh et al. 2013): `ExpertAnnotations.txt` and
`CrowdFlowerAnnotations.txt`, with the captions of `Flickr8k.token.txt`.

Both name a photograph and the caption `<photograph>#<number>` of any photograph, separated by tabs. Three experts rate
a pair from 1 to 4. The crowd says whether the caption describes the photograph: the share of yes, the number of yes, of
no.
"""

import math
from pathlib import Path

import numpy as np

from mefn_jax.benchmarks.items import CaptionPool, ImagePool, RatedPairs
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, read_text
from mefn_jax.errors import DataError

TOKEN_NAMES = ("Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
FLICKR8K_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images")  # the first, misspelled, is the distributed one
EXPERT_RATINGS = (1, 2, 3, 4)


def read_expert(request: Request) -> RatedPairs:
    """Reads the experts' judgements. Pairs of a photograph with a caption of its own are left out, as is usual since
    SPICE (Anderson et al. 2016). Raises DataError that names the malformed line."""
    return _read_pairs(request, "ExpertAnnotations.txt", _parse_experts, skip_own=True)


def read_crowd(request: Request) -> RatedPairs:
    """Reads the crowd's judgements, one a pair: the share of yes. Raises DataError that names the malformed line."""
    return _read_pairs(request, "CrowdFlowerAnnotations.txt", _parse_crowd, skip_own=False)


def _parse_experts(fields: list[str], where: str) -> list[float]:
    """Returns three ratings. Raises DataError."""
    ratings = [float(field) if field in map(str, EXPERT_RATINGS) else math.nan for field in fields]
    if len(ratings) != 3 or any(map(math.isnan, ratings)):
        raise DataError(f"{where}: expected three ratings from 1 to 4, found {fields}; restore the published file")
    return ratings


def _parse_crowd(fields: list[str], where: str) -> list[float]:
    """Returns the share of yes. Raises DataError, also if it is not that of the numbers of yes and of no."""
    try:
        share, yes, no = float(fields[0]), *map(int, fields[1:])
        is_share = yes >= 0 and no >= 0 and abs(share - yes / (yes + no)) < 1e-5
    except (ValueError, IndexError, ZeroDivisionError):
        is_share = False
    if not is_share:
        raise DataError(
            f"{where}: expected a share and numbers of yes and no, found {fields}; restore the published file"
        )
    return [share]


def _read_pairs(request: Request, file: str, parse, skip_own: bool) -> RatedPairs:
    """Reads the judgements of a file, whose fields after photograph and caption `parse` reads."""
    path = request.find_file(file, f"Flickr8k_text/{file}")
    texts = _read_tokens(request.find_file(*TOKEN_NAMES))
    own = {}
    for key, text in texts.items():
        own.setdefault(key.partition("#")[0], set()).add(text)
    folder = request.image_folder(*FLICKR8K_FOLDERS)
    images, captions, rows, skipped, seen = ImagePool(), CaptionPool(), [], 0, {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        name, key, *fields = line.strip().split("\t") if line.count("\t") else (line, "")
        if key not in texts:
            raise DataError(f"{where}: caption {key!r} is not in {TOKEN_NAMES[0]}; restore the published files")
        if seen.setdefault((name, key), where) != where:
            raise DataError(f"{where}: {name} with {key} was judged in {seen[name, key]} already; remove one line")
        ratings = parse(fields, where)
        if skip_own and texts[key] in own.get(name, ()):
            skipped += 1
            continue
        rows.append((images.add(request.find_image(folder, name, where), name), captions.add(texts[key]), ratings))
    if not rows:
        raise DataError(f"{path}: no judgements; restore the published file")
    image, caption, ratings = zip(*rows, strict=True)
    split = images.to_split(request.benchmark)
    return RatedPairs(split, captions.to_list(), *map(np.array, (image, caption, ratings)), skipped)


def _read_tokens(path: Path) -> dict[str, str]:
    """Returns all captions by `<photograph>#<number>`. Raises DataError that names the malformed line."""
    texts = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        key, tab, text = line.partition("\t")
        if not tab or "#" not in key:
            raise DataError(f"{path}:{number}: not '<image>#<number><tab><caption>': {line[:80]!r}; correct the line")
        if key in texts:
            raise DataError(f"{path}:{number}: caption {key} occurs a second time; remove one")
        texts[key] = clean_caption(text, f"{path}:{number}")
    return texts
