"""Reader of Winoground (Thrush et al. 2022): `examples.jsonl`, a line an example with two captions and the names of two
images without their ending, which are PNG files in `images/`."""

from mefn_jax.benchmarks.items import Cases
from mefn_jax.benchmarks.readers.builder import CaseBuilder
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import read_json_lines, require
from mefn_jax.errors import DataError

NO_TAG = "no tag"


def read(request: Request) -> Cases:
    """Reads the examples; their subset is `collapsed_tag`: Object, Relation or Both. Raises DataError that names the
    malformed line, or an id that occurs twice."""
    path = request.find_file("examples.jsonl", "data/examples.jsonl")
    builder, places = CaseBuilder(request, request.image_folder("images", "data/images")), {}
    for where, entry in read_json_lines(path):
        key = require(entry, "id", int, where)
        if places.setdefault(key, where) != where:
            raise DataError(f"{where}: id {key} is that of {places[key]} already; remove one line")
        names = (f"{require(entry, f'image_{k}', str, where).removesuffix('.png')}.png" for k in range(2))
        images = tuple(builder.add_image(name, where) for name in names)
        captions = tuple(builder.add_caption(entry, f"caption_{k}", where) for k in range(2))
        builder.add_pairing(images, captions, str(entry.get("collapsed_tag") or NO_TAG))
    return builder.build()
