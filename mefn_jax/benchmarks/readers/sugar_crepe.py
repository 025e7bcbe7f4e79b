"""Reader of SugarCrepe (Hsieh et al. 2023): `{subset}.json` for each of seven subsets, an object of numbered entries
`{filename, caption, negative_caption}`, on photographs of COCO 2017's val split."""

from mefn_jax.benchmarks.items import Cases
from mefn_jax.benchmarks.readers.builder import CaseBuilder
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import read_json, require
from mefn_jax.errors import DataError

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def read(request: Request) -> Cases:
    """Reads all seven subsets from the folder, or from `data/` in it as in the publishers' repository. Photographs are
    in `--images`, or in `val2017/`. Raises DataError that names the malformed entry."""
    builder = CaseBuilder(request, request.image_folder("val2017", "images/val2017"))
    for subset in SUBSETS:
        path = request.find_file(f"{subset}.json", f"data/{subset}.json")
        entries = read_json(path)
        if not isinstance(entries, dict) or not entries:
            raise DataError(f"{path}: expected an object of numbered entries; restore the published file")
        for key, entry in entries.items():
            where = f"{path}: {key!r}"
            image = builder.add_image(require(entry, "filename", str, where), where)
            true, false = (builder.add_caption(entry, field, where) for field in ("caption", "negative_caption"))
            builder.add_choice(image, (true,), (false,), subset)
    return builder.build()
