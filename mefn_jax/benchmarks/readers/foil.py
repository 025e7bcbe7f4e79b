"""Reader of FOIL-COCO (Shekhar et al. 2017): `foilv1.0_test_2017.json`, in the layout of COCO's captions, where every
annotation has `foil` (whether one noun was replaced) and shares its `id` with the caption that it was made from."""

from mefn_jax.benchmarks.items import CaptionPool, Cases, Choice, ImagePool
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, read_json, require
from mefn_jax.errors import DataError

FOIL_FILE = "foilv1.0_test_2017.json"


def read(request: Request) -> Cases:
    """Reads a case from each foil and its original. Photographs are in `--images` or `val2014/`. Raises DataError that
    names the malformed annotation, or an id without one original."""
    path = request.find_file(FOIL_FILE)
    content, folder = read_json(path), request.image_folder("val2014")
    names = {}
    for k, entry in enumerate(require(content, "images", list, str(path))):
        where = f"{path}: images[{k}]"
        names[require(entry, "id", int, where)] = require(entry, "file_name", str, where)
    originals, foils = {}, []
    for k, entry in enumerate(require(content, "annotations", list, str(path))):
        where = f"{path}: annotations[{k}]"
        key, image = require(entry, "id", int, where), require(entry, "image_id", int, where)
        caption = clean_caption(require(entry, "caption", str, where), where)
        if image not in names:
            raise DataError(f"{where}: image_id {image} is not among the images; restore the published file")
        if require(entry, "foil", bool, where):
            foils.append((key, image, caption, where))
        elif originals.setdefault(key, caption) != caption:
            raise DataError(f"{where}: id {key} has a second original; restore the published file")
    images, captions, cases = ImagePool(), CaptionPool(), []
    for key, image, caption, where in sorted(foils, key=lambda foil: foil[1]):
        if key not in originals:
            raise DataError(f"{where}: id {key} has no original; restore the published file")
        position = images.add(request.find_image(folder, names[image], where), names[image])
        cases.append(Choice(position, (captions.add(originals[key]),), (captions.add(caption),), request.benchmark))
    if not cases:
        raise DataError(f"{path}: no foils; restore the published file")
    return Cases(images.to_split(request.benchmark), captions.to_list(), cases)
