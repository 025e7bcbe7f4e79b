"""Reader of SugarCrepe (Hsieh et al. 2023): `{subset}.json` for each of seven subsets, an object of numbered entries
`{filename, caption, negative_caption}`, on photographs of COCO 2017's val split."""

from mefn_jax.benchmarks.items import CaptionPool, Cases, Choice, ImagePool
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, read_json, require
from mefn_jax.errors import DataError

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def read(request: Request) -> Cases:
    """Reads all seven subsets from the folder, or from `data/` in it as in the publishers' repository. Photographs are
    in `--images`, or in `val2017/`. Raises DataError that names the malformed entry."""
    folder = request.image_folder("val2017", "images/val2017")
    images, captions, cases = ImagePool(), CaptionPool(), []
    for subset in SUBSETS:
        path = request.find_file(f"{subset}.json", f"data/{subset}.json")
        entries = read_json(path)
        if not isinstance(entries, dict) or not entries:
            raise DataError(f"{path}: expected an object of numbered entries; restore the published file")
        for key, entry in entries.items():
            where = f"{path}: {key!r}"
            name = require(entry, "filename", str, where)
            image = images.add(request.find_image(folder, name, where), name)
            true, false = (
                captions.add(clean_caption(require(entry, field, str, where), where))
                for field in ("caption", "negative_caption")
            )
            if true == false:
                raise DataError(f"{where}: caption and negative_caption are the same; restore the published file")
            cases.append(Choice(image, (true,), (false,), subset))
    return Cases(images.to_split(request.benchmark), captions.to_list(), cases)
