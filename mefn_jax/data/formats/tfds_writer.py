"""Any source of (image, captions) as a TFDS data set in array_record, in source order, without TensorFlow."""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

# `sources[split]` is (number of images, a function that yields {image: bytes, captions, image_id, scene: dict | None}).
Sources = dict[str, tuple[int, Callable[[], Iterator[dict]]]]

DATASET_NAME, DATASET_VERSION = "image_captions", "1.0.0"
SHARD = 2000  # examples a file
AT_ONCE = 200  # examples handed over at once, which is what is held in memory


def write_dataset(sources: Sources, facts: dict, directory: Path) -> None:
    """Writes `{image: JPEG, captions: [text], image_id: text, scene: JSON text or ""}` into the directory, which must
    exist, with a progress bar on a terminal. `facts` and the numbers of captions become its metadata."""
    counts = {split: [] for split in sources}
    info = _info(facts | {"caption_counts": counts}, directory)
    # TFDS's builder instead keeps a split in memory to shuffle it, and beyond 1,000 MiB needs TensorFlow for that.
    writer = tfds.core.SequentialWriter(info, SHARD, file_format="array_record")
    writer.initialize_splits(list(sources))
    for split, (number, examples) in sources.items():
        bar = iter(tqdm(examples(), split, number, unit=" images", disable=None))
        while chunk := list(itertools.islice(bar, AT_ONCE)):
            counts[split] += [len(example["captions"]) for example in chunk]
            writer.add_examples({split: [_example(example) for example in chunk]})
    writer.close_all()


def _info(metadata: dict, directory: Path) -> tfds.core.DatasetInfo:
    features = {
        # Bytes handed over as a file object are stored as they are: neither decoded nor encoded again.
        "image": tfds.features.Image(encoding_format="jpeg"),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "image_id": tfds.features.Text(),
        "scene": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(DATASET_NAME, tfds.core.Version(DATASET_VERSION), str(directory), __name__),
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # examples stand in source order (DESIGN.md 5)
        metadata=tfds.core.MetadataDict(metadata),
    )


def _example(example: dict) -> dict:
    scene = json.dumps(example["scene"]) if example.get("scene") else ""
    return example | {"image": io.BytesIO(example["image"]), "scene": scene}
