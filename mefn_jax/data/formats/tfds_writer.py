"""Writer of TFDS data sets in array_record from any source of images with captions, without TensorFlow.

Examples are stored in the order of the source.
"""

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
SHARD = 2000  # examples in a file
AT_ONCE = 200  # examples written at once and held in memory


def write_dataset(sources: Sources, facts: dict, directory: Path) -> None:
    """Writes examples `{image: JPEG, captions: [text], image_id: text, scene: JSON text or ""}` into the directory.

    The directory must exist. `facts` and the number of captions of each image become its metadata. Shows a progress bar
    on a terminal.
    """
    counts = {split: [] for split in sources}
    info = _describe_dataset(facts | {"caption_counts": counts}, directory)
    # TFDS's builder would keep a split in memory to shuffle it, and would need TensorFlow for more than 1,000 MiB.
    writer = tfds.core.SequentialWriter(info, SHARD, file_format="array_record")
    writer.initialize_splits(list(sources))
    for split, (num_images, examples) in sources.items():
        progress = iter(tqdm(examples(), split, num_images, unit=" images", disable=None))
        while chunk := list(itertools.islice(progress, AT_ONCE)):
            counts[split] += [len(example["captions"]) for example in chunk]
            writer.add_examples({split: [_encode_example(example) for example in chunk]})
    writer.close_all()


def _describe_dataset(metadata: dict, directory: Path) -> tfds.core.DatasetInfo:
    """Returns TFDS's description of the data set."""
    features = {
        # Bytes that are given as a file object are stored unchanged, neither decoded nor encoded again.
        "image": tfds.features.Image(encoding_format="jpeg"),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "image_id": tfds.features.Text(),
        "scene": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(DATASET_NAME, tfds.core.Version(DATASET_VERSION), str(directory), __name__),
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # keep the source's order, because the folds of COCO 1K are consecutive images
        metadata=tfds.core.MetadataDict(metadata),
    )


def _encode_example(example: dict) -> dict:
    """Returns an example in the form that TFDS stores."""
    scene = json.dumps(example["scene"]) if example.get("scene") else ""
    return example | {"image": io.BytesIO(example["image"]), "scene": scene}
