"""Reader of ARO's two sets with published files (Yuksekgonul et al. 2023): `visual_genome_relation.json` and
`visual_genome_attribution.json`, lists of `{image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption, false_caption,
...}`.

A case is about the box in its photograph. The orders of COCO's and Flickr30K's words have no published file: they are
shuffled anew in every run (`cases` reads a file of one's own).
"""

from mefn_jax.benchmarks.items import Cases
from mefn_jax.benchmarks.readers.builder import CaseBuilder
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import read_json, require
from mefn_jax.errors import DataError

ARO_FILES = {"relation": "visual_genome_relation.json", "attribution": "visual_genome_attribution.json"}
BOX_KEYS = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")


def read(request: Request) -> Cases:
    """Reads both sets, the subsets. Photographs are in `--images`, or in `images/`. Raises DataError that names the
    malformed entry."""
    builder = CaseBuilder(request, request.image_folder("images"))
    for subset, file in ARO_FILES.items():
        path = request.find_file(file)
        entries = read_json(path)
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{path}: expected a list of entries; restore the published file")
        for k, entry in enumerate(entries):
            where = f"{path}: [{k}]"
            name = require(entry, "image_path", str, where)
            x, y, width, height = (require(entry, key, int, where) for key in BOX_KEYS)
            image = builder.add_image(name, where, (x, y, x + width, y + height))
            true, false = (builder.add_caption(entry, key, where) for key in ("true_caption", "false_caption"))
            builder.add_choice(image, (true,), (false,), subset)
    return builder.build()
