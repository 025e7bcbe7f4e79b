"""Builds the cases of a compositional benchmark from the entries of its files."""

import dataclasses
from pathlib import Path

from mefn_jax.benchmarks.items import Box, CaptionPool, Cases, Choice, ImagePool, Pairing
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.parsing import clean_caption, require
from mefn_jax.errors import DataError


class CaseBuilder:
    """Collects images, captions and cases; the images are below `folder`."""

    def __init__(self, request: Request, folder: Path):
        self.request, self.folder = request, folder
        self.images, self.captions, self.cases = ImagePool(), CaptionPool(), []

    def add_image(self, name: str, where: str, box: Box | None = None, folder: Path | None = None) -> int:
        """Adds an image, or a box of one, and returns its position. Raises DataError if the file is missing."""
        path = self.request.find_image(folder or self.folder, name, where)
        return self.images.add(path, name if box is None else f"{name} {box}", box)

    def add_caption(self, entry: dict, key: str, where: str) -> int:
        """Adds the caption `entry[key]` and returns its position. Raises DataError if it is none."""
        return self.captions.add(clean_caption(require(entry, key, str, where), where))

    def add_choice(self, image: int, true: tuple[int, ...], false: tuple[int, ...], subset: str) -> None:
        """Adds the case of an image with true and untrue captions."""
        self.cases.append(Choice(image, true, false, subset))

    def add_pairing(self, images: tuple[int, int], captions: tuple[int, int], subset: str) -> None:
        """Adds the case of two images and two captions."""
        self.cases.append(Pairing(images, captions, subset))

    def build(self) -> Cases:
        """Returns the cases. Raises DataError if there are none."""
        if not self.cases:
            raise DataError(f"{self.request.folder}: no cases in its files; restore them; {self.request.published}")
        order, place = self._sort_captions()
        captions = self.captions.to_list()
        cases = [_move_captions(case, place) for case in self.cases]
        return Cases(self.images.to_split(self.request.benchmark), [captions[k] for k in order], cases)

    def _sort_captions(self) -> tuple[list[int], dict[int, int]]:
        """Returns the captions in the order of the first image that is scored with each, so that few tiles hold all
        pairs, and the place of each caption in it."""
        first = {}
        for case in self.cases:
            is_choice = isinstance(case, Choice)
            image = case.image if is_choice else min(case.images)
            for caption in case.true + case.false if is_choice else case.captions:
                first[caption] = min(image, first.get(caption, image))
        order = sorted(first, key=lambda caption: (first[caption], caption))
        return order, {caption: place for place, caption in enumerate(order)}


def _move_captions(case: Choice | Pairing, place: dict[int, int]) -> Choice | Pairing:
    """Returns a case whose captions have other positions, `place` by the old ones."""
    keys = ("true", "false") if isinstance(case, Choice) else ("captions",)
    return dataclasses.replace(case, **{key: tuple(place[k] for k in getattr(case, key)) for key in keys})
