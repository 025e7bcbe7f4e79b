"""Reader of COCO's test split of Karpathy, 5,000 images with five captions each, with COCO's ids of both.

The images are those of `dataset_coco.json` (Karpathy), of TFDS `coco_captions`, or, as precomputed regions, of
`testall_ims.npy` and `testall_caps.txt` (SCAN), whose captions have the published order.
"""

import dataclasses
from pathlib import Path

import numpy as np

from mefn_jax.benchmarks.items import ImagePool
from mefn_jax.benchmarks.readers.positives import PositiveIds, read_positives
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.formats.coco_captions import CAPTIONS_PER_IMAGE
from mefn_jax.data.formats.tfds_records import TfdsRecords, open_builder
from mefn_jax.data.parsing import clean_caption, find_repeated, read_json, require
from mefn_jax.data.split import Split
from mefn_jax.errors import DataError
from mefn_jax.runtime.console import print0

UNREACHABLE = -1
KARPATHY_FILE, TFDS_FILE, REGION_FILE = "dataset_coco.json", "dataset_info.json", "testall_ims.npy"


@dataclasses.dataclass(frozen=True)
class CocoGallery:
    """A gallery with all positives of its queries.

    Attributes:
        images: the images.
        captions: the C captions, in the order of the images.
        caption_image: int64 `(C,)`, the image that each caption was written for.
        i2t, t2i: for the position of a query, the positions of its positives, int64; -1 for one that is not in the
            published gallery (ECCV Caption has two such captions), which counts as a positive that is never found.
        own_order: whether the images are in the published order, so that consecutive folds are COCO's 1K.
    """

    images: Split
    captions: list[str]
    caption_image: np.ndarray
    i2t: dict[int, np.ndarray]
    t2i: dict[int, np.ndarray]
    own_order: bool


def read_eccv(request: Request) -> CocoGallery:
    """Reads COCO's test split with the positives of ECCV Caption. Raises DataError (see `read_gallery`)."""
    return read_gallery(request, read_positives(request, "eccv"))


def read_cxc(request: Request) -> CocoGallery:
    """Reads COCO's test split with the positives of CxC. Raises DataError (see `read_gallery`)."""
    return read_gallery(request, read_positives(request, "cxc"))


def read_gallery(request: Request, positives: PositiveIds) -> CocoGallery:
    """Reads the gallery in the format that is in the folder. Raises DataError if there is none, if it is malformed, or
    if it lacks an image or a caption that the positives name."""
    request.find_file(KARPATHY_FILE, TFDS_FILE, REGION_FILE)
    reader = next(read for name, read in GALLERY_FORMATS.items() if (request.folder / name).is_file())
    images, image_ids, captions = reader(request, positives.order)
    entries = [(k, key, text) for k, of_image in enumerate(captions) for key, text in of_image]
    caption_image, caption_ids, texts = (list(column) for column in zip(*entries, strict=True))
    for kind, ids in (("image", image_ids), ("caption", caption_ids)):
        if (repeated := find_repeated(map(str, ids))) is not None:
            raise DataError(f"{request.folder}: the {kind} with COCO's id {repeated} occurs twice; keep one")
    image_position, caption_position = ({key: k for k, key in enumerate(ids)} for ids in (image_ids, caption_ids))
    caption_position |= dict.fromkeys(_find_unreachable(positives), UNREACHABLE)
    return CocoGallery(
        images,
        texts,
        np.array(caption_image),
        _to_positions(positives.i2t, image_position, caption_position, ("image", "caption"), request),
        _to_positions(positives.t2i, caption_position, image_position, ("caption", "image"), request),
        caption_ids == positives.order.tolist(),
    )


def _find_unreachable(positives: PositiveIds) -> set[int]:
    """Returns the ids of captions that are positives and not in the published gallery."""
    return {key for of in positives.i2t.values() for key in of} - set(positives.order.tolist())


def _to_positions(ids: dict, queries: dict, answers: dict, kinds: tuple[str, str], request: Request) -> dict:
    """Returns positives by position. Raises DataError that names an id that the gallery lacks."""
    named = {key: None for of in ids.values() for key in of}
    for kind, needed, present in zip(kinds, (ids, named), (queries, answers), strict=True):
        if (missing := next((key for key in needed if key not in present), None)) is not None:
            raise DataError(
                f"{request.folder}: the {kind} with COCO's id {missing} is not in it; give all of Karpathy's test split"
            )
    return {queries[key]: np.array([answers[x] for x in of]) for key, of in ids.items()}


def read_karpathy(request: Request, order: np.ndarray) -> tuple[Split, list[int], list[list[tuple[int, str]]]]:
    """Reads the images of `dataset_coco.json` whose split is test, with the captions whose ids are in `order`, at most
    five an image. Photographs are `{filepath}/{filename}` below `--images` or the folder.

    Returns the images, their ids, and the ids and texts of each image's captions. Raises DataError.
    """
    path, folder, known = request.folder / KARPATHY_FILE, request.image_folder("images"), set(order.tolist())
    pool, image_ids, captions = ImagePool(), [], []
    for k, entry in enumerate(require(read_json(path), "images", list, str(path))):
        where = f"{path}: images[{k}]"
        if require(entry, "split", str, where) != "test":
            continue
        image_ids.append(require(entry, "cocoid", int, where))
        name = f"{require(entry, 'filepath', str, where)}/{require(entry, 'filename', str, where)}"
        pool.add(request.find_image(folder, name, where), name)
        of_image = []
        for n, sentence in enumerate(require(entry, "sentences", list, where)):
            place = f"{where}.sentences[{n}]"
            key = require(sentence, "sentid", int, place)
            if key in known:
                of_image.append((key, clean_caption(require(sentence, "raw", str, place), place)))
        if not of_image:
            raise DataError(f"{where}: none of its captions is one of the published test split; restore the file")
        captions.append(of_image[:CAPTIONS_PER_IMAGE])
    if not image_ids:
        raise DataError(f"{path}: no image of the split test; give Karpathy's file of COCO")
    if len(pool.to_split("").records) < len(image_ids):
        raise DataError(f"{path}: two images of the split test have the same file; restore the file")
    return pool.to_split(request.benchmark), image_ids, captions


def read_tfds(request: Request, order: np.ndarray) -> tuple[Split, list[int], list[list[tuple[int, str]]]]:
    """Reads the test split of TFDS `coco_captions`, put into the published order; returns what `read_karpathy` does."""
    builder, _ = open_builder(request.folder)
    if builder.name != "coco_captions" or "test" not in builder.info.splits:
        raise DataError(f"{request.folder}: is {builder.name}, not TFDS coco_captions with a split test")
    place, known = {key: k for k, key in enumerate(order.tolist())}, set(order.tolist())
    records = TfdsRecords(builder, "test", _parse_ids)
    entries = []
    for row in range(len(records)):
        record = records[row]
        of_image = sorted((place[key], key, text) for key, text in record["texts"] if key in known)
        if not of_image:
            raise DataError(f"{request.folder}: image {record['image_id']} has no caption of the published test split")
        entries.append((of_image[0][0], row, int(record["image_id"]), [(key, text) for _, key, text in of_image]))
    entries.sort()
    rows = np.array([row for _, row, *_ in entries])
    split = Split(request.benchmark, records, rows, np.zeros(len(rows) + 1, np.int64))
    return split, [key for *_, key, _ in entries], [of_image[:CAPTIONS_PER_IMAGE] for *_, of_image in entries]


def _parse_ids(example: dict, where: str) -> dict:
    """Converts an example of TFDS to a record of `Split`, with the ids and texts of its captions as `texts`."""
    c = example["captions"]
    texts = [(int(key), clean_caption(text.decode(), where)) for key, text in zip(c["id"], c["text"], strict=True)]
    return {
        "image": example["image"],
        "captions": [],
        "texts": texts,
        "image_id": str(int(example["image/id"])),
        "scene": None,
    }


def read_regions(request: Request, order: np.ndarray) -> tuple[Split, list[int], list[list[tuple[int, str]]]]:
    """Reads `testall_ims.npy` and `testall_caps.txt`, whose captions get the ids of `order`, one after the other.

    Returns what `read_karpathy` does. Raises DataError if the number of captions is another."""
    split = Dataset(Path(request.folder)).split("testall")
    if split.num_captions != len(order):
        raise DataError(
            f"{request.folder}: testall has {split.num_captions} captions, but the published order {len(order)}; give "
            "all of Karpathy's test split"
        )
    print0("note: these regions come without COCO's ids; their captions are taken to be in the published order")
    ids, start, captions = order.tolist(), 0, []
    for _, texts in split.ids_and_captions:
        captions.append(list(zip(ids[start : start + len(texts)], texts, strict=True)))
        start += len(texts)
    return split, _image_ids_by_order(request, [of_image[0][0] for of_image in captions]), captions


def _image_ids_by_order(request: Request, first_captions: list[int]) -> list[int]:
    """Returns the id of the image of each caption id, from the package's list of COCO's own pairs."""
    own = read_positives(request, "original").t2i
    missing = next((key for key in first_captions if key not in own), None)
    if missing is not None:
        raise DataError(f"{request.benchmark}: caption {missing} is not in the package's list of COCO's pairs")
    return [own[key][0] for key in first_captions]


GALLERY_FORMATS = {KARPATHY_FILE: read_karpathy, TFDS_FILE: read_tfds, REGION_FILE: read_regions}
