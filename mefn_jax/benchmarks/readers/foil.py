"""Reader of FOIL-COCO (Shekhar et al. 2017): `foilv1.0_test_2017.json`, in the layout of COCO's captions, where every
annotation has `foil` (whether one noun was replaced) and shares its `id` with the caption that it was made from."""

from mefn_jax.benchmarks.items import Cases
from mefn_jax.benchmarks.readers.builder import CaseBuilder
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import read_json, require
from mefn_jax.errors import DataError

FOIL_FILE = "foilv1.0_test_2017.json"


def read(request: Request) -> Cases:
    """Reads a case from each foil and its original. Photographs are in `--images` or `val2014/`. Raises DataError that
    names the malformed annotation, or an id without one original."""
    path = request.find_file(FOIL_FILE)
    content, builder = read_json(path), CaseBuilder(request, request.image_folder("val2014"))
    names = {}
    for k, entry in enumerate(require(content, "images", list, str(path))):
        where = f"{path}: images[{k}]"
        names[require(entry, "id", int, where)] = require(entry, "file_name", str, where)
    originals, foils = {}, []
    for k, entry in enumerate(require(content, "annotations", list, str(path))):
        where = f"{path}: annotations[{k}]"
        key, image = require(entry, "id", int, where), require(entry, "image_id", int, where)
        if image not in names:
            raise DataError(f"{where}: image_id {image} is not among the images; restore the published file")
        if require(entry, "foil", bool, where):
            foils.append((image, key, entry, where))
        elif originals.setdefault(key, entry) is not entry:
            raise DataError(f"{where}: id {key} has a second original; restore the published file")
    for image, key, entry, where in sorted(foils, key=lambda foil: foil[0]):  # side by side, images are scored together
        if key not in originals:
            raise DataError(f"{where}: id {key} has no original; restore the published file")
        position = builder.add_image(names[image], where)
        true, false = (builder.add_caption(x, "caption", where) for x in (originals[key], entry))
        builder.add_choice(position, (true,), (false,), request.benchmark)
    return builder.build()
