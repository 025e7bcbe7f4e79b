"""Augmentation for training: what may be done to an example, and the random draws and pixel operations behind it.

Every function draws the same number of random numbers whatever its options, so that switching one kind of augmentation
off leaves the draws of the others as they were.
"""

import dataclasses
import math

import cv2
import numpy as np

CROP_TRIES = 10  # for a box that fits into the image, as in torchvision
CROP_RATIOS = (3 / 4, 4 / 3)  # width over height
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's and torchvision's "L"


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is done to a training example; all off by default.

    Attributes:
        crop: the smallest share of the image's area that a random crop keeps; 1: no random crop.
        flip: the chance that the image is mirrored.
        color_jitter: strength s of brightness, contrast and saturation, whose factors are uniform in [1 - s, 1 + s].
        word_noise: the chance that a word is masked, replaced or dropped (`words.alter`).
        region_dropout: the chance that a region is left out (`encoders.regions.leave_out`, on the device).
    """

    crop: float = 1.0
    flip: float = 0.0
    color_jitter: float = 0.0
    word_noise: float = 0.0
    region_dropout: float = 0.0

    @property
    def changes_pixels(self) -> bool:
        """Whether anything changes pixels."""
        return self.crop < 1 or self.flip > 0 or self.color_jitter > 0


def draw_crop_box(rng: np.random.Generator, sides: tuple[int, int], smallest: float) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) in an image of `sides` (width, height): its share of the area is uniform
    in [smallest, 1], the logarithm of its ratio uniform in that of RATIOS. After ten boxes that do not fit, the
    largest in the centre whose ratio is allowed."""
    width, height = sides
    low, high = math.log(CROP_RATIOS[0]), math.log(CROP_RATIOS[1])
    for share, ratio, left, top in rng.random((CROP_TRIES, 4)).tolist():
        area = width * height * (smallest + (1 - smallest) * share)
        ratio = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * CROP_RATIOS[1]))), min(height, max(1, round(width / CROP_RATIOS[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def draw_flip(rng: np.random.Generator, chance: float) -> bool:
    """Whether an image is mirrored."""
    return rng.random() < chance


def draw_color_factors(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Factors of brightness, contrast and saturation, float64 `(3,)`."""
    return 1 + strength * (2 * rng.random(3) - 1)


def apply_color_jitter(pixels: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Brightness, contrast (about the image's mean grey) and saturation (about each pixel's grey), in this order: uint8
    `(H, W, 3)` to the same. They are linear, so one matrix does all three and values are rounded and clipped once at
    the end; done in turn, what brightness clips would stay clipped, and contrast's mean be that of the clipped."""
    brightness, contrast, saturation = factors
    mean = GRAY_WEIGHTS @ np.array(cv2.mean(pixels)[:3])
    scale = brightness * contrast
    matrix = scale * (saturation * np.eye(3) + (1 - saturation) * GRAY_WEIGHTS)
    return cv2.transform(pixels, np.column_stack([matrix, np.full(3, brightness * (1 - contrast) * mean)]))
