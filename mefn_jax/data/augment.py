"""Random changes to training images."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is changed at random in training; by default nothing.

    Attributes:
        crop: the smallest share of an image's area that a random crop keeps; 1 for no random crop.
        flip: the chance that an image is mirrored, unless its caption speaks of left or right.
        colour: strength of the changes of brightness, contrast and saturation.
        words: the chance that a word is masked, replaced or dropped.
        regions: the chance that a region is left out.
    """

    crop: float = 1.0
    flip: float = 0.0
    colour: float = 0.0
    words: float = 0.0
    regions: float = 0.0

    @property
    def of_pixels(self) -> bool:
        """Whether anything changes pixels."""
        return self.crop < 1 or self.flip > 0 or self.colour > 0
