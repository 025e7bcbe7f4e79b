"""Writer of TFDS data sets in array_record from any source of images with captions, without TensorFlow.

Examples are stored in the order of the source. `ExampleFiles` writes the examples of a part of a split, and
`describe_dataset` the description of the whole, when the files of all parts have their final names.
"""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

DATASET_NAME, DATASET_VERSION = "image_captions", "1.0.0"
SHARD = 2000  # examples in a file, at most


class ExampleFiles:
    """Files of examples `{image: bytes, captions: [text], image_id: text, scene: dict or None}`, SHARD in each.

    Attributes:
        name: returns the path of the file with a number.
        lengths: the number of examples of each file.
        num_bytes: the size of all examples.
    """

    def __init__(self, name: Callable[[int], Path]):
        self.name, self.lengths, self.num_bytes = name, [], 0
        self._writer, features = None, _make_features()
        self._encode = features.encode_example
        self._serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())

    def add(self, example: dict) -> None:
        """Writes an example."""
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self.name(len(self.lengths))), "group_size:1")
            self.lengths.append(0)
        scene = json.dumps(example["scene"]) if example.get("scene") else ""
        # Bytes that are given as a file object are stored unchanged, neither decoded nor encoded again.
        fields = {"image": io.BytesIO(example["image"]), "scene": scene}
        encoded = self._encode({key: example[key] for key in ("captions", "image_id")} | fields)
        # Otherwise the fields would stand in another order in each process.
        data = self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
        self._writer.write(data)
        self.lengths[-1] += 1
        self.num_bytes += len(data)
        if self.lengths[-1] == SHARD:
            self.close()

    def close(self) -> None:
        """Completes the last file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def name_of_file(split: str, number: int) -> str:
    """Returns the name of a file of a split in the finished data set."""
    return f"{DATASET_NAME}-{split}.array_record-{number:05}"


def describe_dataset(directory: Path, facts: dict, files: dict[str, tuple[Iterable[int], int]]) -> None:
    """Writes `dataset_info.json`, `features.json` and `metadata.json`. `facts` are the metadata; `files[split]` are the
    numbers of examples of its files and the size of all its examples."""
    identity = tfds.core.DatasetIdentity(
        DATASET_NAME, tfds.core.Version(DATASET_VERSION), str(directory), "mefn_jax.data.formats.tfds_writer"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=_make_features(),
        disable_shuffling=True,  # keep the source's order, because the folds of COCO 1K are consecutive images
        metadata=tfds.core.MetadataDict(facts),
    )
    info.set_file_format("array_record")
    splits = []
    for split, (lengths, num_bytes) in files.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=DATASET_NAME,
            data_dir=directory,
            split=split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        )
        splits.append(tfds.core.SplitInfo(split, list(lengths), num_bytes, template))
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(directory)


def _make_features() -> tfds.features.FeaturesDict:
    """Returns the fields of an example."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "image_id": tfds.features.Text(),
            "scene": tfds.features.Text(),
        }
    )
