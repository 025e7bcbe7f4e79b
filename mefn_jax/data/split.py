"""Split of a data set: its images and captions by position, in source order, whatever format they are read from."""

import dataclasses
import functools

import numpy as np

SPLIT_ALIASES = {"dev": "val"}  # other accepted names of splits
SAMPLED_IMAGES = 500  # images whose captions are a sample of the split


def spread_positions(length: int, number: int) -> np.ndarray:
    """Returns at most `number` positions below `length`, int, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, length - 1, min(length, number)).astype(int))


@dataclasses.dataclass
class Split:
    """Split of a data set. Image k has captions `caption_offsets[k] : caption_offsets[k + 1]`, in source order.

    Attributes:
        name: "train", "val", "test", or another name that the source uses.
        records: random access to `{image: bytes | regions: (N, C), captions: [str], image_id: str, scene: dict or
            None}`; it is sent to the processes that read.
        record_ids: int64 `(I,)`, the record of each image (all records, unless undecodable images are left out).
        caption_offsets: int64 `(I + 1,)`, the number of captions before each image.
        skipped: names of images that are left out because they cannot be decoded.
        region_width: width C of precomputed regions; 0 for images.
        source_order: True if images are in the order of the source, so that consecutive folds are the published ones.
        cached_text: the captions' words as written by a frozen text tower (`CachedText`); None if captions are encoded
            by a text tower of the model.
    """

    name: str
    records: object
    record_ids: np.ndarray
    caption_offsets: np.ndarray
    skipped: list[str] = dataclasses.field(default_factory=list)
    region_width: int = 0
    source_order: bool = True
    cached_text: object = None

    @property
    def num_images(self) -> int:
        """Returns I, the number of images."""
        return len(self.record_ids)

    @property
    def num_captions(self) -> int:
        """Returns C, the number of captions."""
        return int(self.caption_offsets[-1])

    @functools.cached_property
    def caption_image(self) -> np.ndarray:
        """Returns the image that each caption describes, int32 `(C,)`."""
        return np.repeat(np.arange(self.num_images, dtype=np.int32), np.diff(self.caption_offsets))

    def record(self, image: int) -> dict:
        """Returns the record of the image at a position, `{image: bytes | regions: (N, C), captions, image_id,
        scene}`."""
        return self.records[int(self.record_ids[image])]

    def all_captions(self) -> list[str]:
        """Returns all captions in order; reads every record."""
        return [caption for k in range(self.num_images) for caption in self.record(k)["captions"]]

    @functools.cached_property
    def sampled_captions(self) -> list[str]:
        """Returns the captions of at most SAMPLED_IMAGES images, evenly spaced. Reading all records of a large data set
        takes minutes."""
        images = spread_positions(self.num_images, SAMPLED_IMAGES)
        return [caption for k in images for caption in self.record(k)["captions"]]

    @functools.cached_property
    def ids_and_captions(self) -> list[tuple[str, list[str]]]:
        """Returns the id and the captions of each image. The first access reads all records, which takes long if they
        hold images."""
        records = map(self.record, range(self.num_images))
        return [(record["image_id"], record["captions"]) for record in records]

    def twins(self) -> np.ndarray:
        """Returns the position of each drawn scene's twin, int64 `(I,)`, -1 for images without one."""
        twin = np.full(self.num_images, -1)
        for k in range(self.num_images):
            scene = self.record(k)["scene"]
            if scene and scene["twin"] and scene["twin"]["index"] < self.num_images:
                twin[k] = scene["twin"]["index"]
        return twin

    def first_images(self, number: int) -> "Split":
        """Returns the split of the first `number` images; of all images for 0."""
        return self.take(self.name, 0, number) if 0 < number < self.num_images else self

    def take(self, name: str, start: int, stop: int) -> "Split":
        """Returns the images `start : stop` as a split called `name`."""
        offsets = self.caption_offsets[start : stop + 1]
        cached_text = self.cached_text and self.cached_text.take(offsets[0], offsets[-1])
        return dataclasses.replace(
            self,
            name=name,
            record_ids=self.record_ids[start:stop],
            caption_offsets=offsets - offsets[0],
            cached_text=cached_text,
        )
