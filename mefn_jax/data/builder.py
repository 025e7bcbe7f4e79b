"""Any source of (image, captions) as a TFDS data set in array_record, in source order, without TensorFlow."""

import io
import json
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from tqdm import tqdm

# `sources[split]` is (number of images, a function that yields {image: bytes, captions, image_id, scene: dict | None}).
Sources = dict[str, tuple[int, Callable[[], Iterator[dict]]]]


class ImageCaptions(tfds.core.GeneratorBasedBuilder):
    """`{image: JPEG, captions: [text], image_id: text, scene: JSON text or ""}`, examples keyed by their position."""

    VERSION = tfds.core.Version("1.0.0")
    name = "image_captions"

    def __init__(self, sources: Sources, facts: dict, **kwargs):
        self._sources, self._facts = sources, facts
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            # Bytes handed over as a file object are stored as they are: neither decoded nor encoded again.
            "image": tfds.features.Image(encoding_format="jpeg"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "image_id": tfds.features.Text(),
            "scene": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            # TFDS otherwise stores hash-shuffled examples, and consecutive folds would be wrong (DESIGN.md 5).
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self._facts | {"caption_counts": {}}),
        )

    def _split_generators(self, dl_manager) -> dict:
        return {split: self._generate_examples(split) for split in self._sources}

    def _generate_examples(self, split: str):
        number, examples = self._sources[split]
        counts = self.info.metadata["caption_counts"].setdefault(split, [])
        for key, example in enumerate(tqdm(examples(), split, number, unit=" images", disable=None)):
            counts.append(len(example["captions"]))
            scene = json.dumps(example["scene"]) if example.get("scene") else ""
            yield key, example | {"image": io.BytesIO(example["image"]), "scene": scene}
