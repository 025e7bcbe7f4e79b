"""Reader of Winoground (Thrush et al. 2022): `examples.jsonl`, a line an example with two captions and the names of two
images without their ending, which are PNG files in `images/`."""

from mefn_jax.benchmarks.items import CaptionPool, Cases, ImagePool, Pairing
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, find_repeated, parse_json, read_text, require
from mefn_jax.errors import DataError

NO_TAG = "no tag"


def read(request: Request) -> Cases:
    """Reads the examples; their subset is `collapsed_tag`: Object, Relation or Both. Raises DataError that names the
    malformed line, or an id that occurs twice."""
    path = request.find_file("examples.jsonl", "data/examples.jsonl")
    folder = request.image_folder("images", "data/images")
    images, captions, cases, ids = ImagePool(), CaptionPool(), [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        entry = parse_json(line, where)
        ids.append(require(entry, "id", int, where))
        names = [f"{require(entry, f'image_{k}', str, where).removesuffix('.png')}.png" for k in range(2)]
        pair = tuple(images.add(request.find_image(folder, name, where), name) for name in names)
        texts = tuple(captions.add(clean_caption(require(entry, f"caption_{k}", str, where), where)) for k in range(2))
        if pair[0] == pair[1] or texts[0] == texts[1]:
            raise DataError(f"{where}: two images or two captions are the same; restore the published file")
        cases.append(Pairing(pair, texts, str(entry.get("collapsed_tag") or NO_TAG)))
    if (repeated := find_repeated(map(str, ids))) is not None:
        raise DataError(f"{path}: id {repeated} occurs twice; restore the published file")
    if not cases:
        raise DataError(f"{path}: no examples; restore the published file")
    return Cases(images.to_split(request.benchmark), captions.to_list(), cases)
