"""Augmentation for training: its options, random draws and pixel operations.

Every function draws the same number of random numbers whatever its options, so that switching one kind of augmentation
off does not change the draws of the others.
"""

import dataclasses
import math

import cv2
import numpy as np

CROP_TRIES = 10  # boxes drawn until one fits into the image, as in torchvision
CROP_RATIOS = (3 / 4, 4 / 3)  # smallest and largest width / height of a random crop
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])  # of red, green and blue: ITU-R 601, as in Pillow's mode "L"


@dataclasses.dataclass(frozen=True)
class Augment:
    """Options of augmentation (docs/data.md, Augmentation); all of it is off by default.

    Attributes:
        crop: smallest fraction of the image's area that a random crop keeps; 1 for no random crop.
        flip: probability that the image is mirrored.
        color_jitter: strength s; factors of brightness, contrast and saturation are uniform in [1 - s, 1 + s].
        word_noise: probability that a word is masked, replaced or dropped (`word_augment.add_word_noise`).
        region_dropout: probability that a region is left out (`encoders.regions.region_dropout`, on the device).
    """

    crop: float = 1.0
    flip: float = 0.0
    color_jitter: float = 0.0
    word_noise: float = 0.0
    region_dropout: float = 0.0

    @property
    def changes_pixels(self) -> bool:
        """Returns whether any option changes pixels."""
        return self.crop < 1 or self.flip > 0 or self.color_jitter > 0


def draw_crop_box(rng: np.random.Generator, sides: tuple[int, int], smallest: float) -> tuple[int, int, int, int]:
    """Draws a random box (left, top, right, bottom) in an image of `sides` (width, height).

    Its fraction of the image's area is uniform in [smallest, 1]. The logarithm of its aspect ratio is uniform between
    the logarithms of CROP_RATIOS. After CROP_TRIES boxes that do not fit into the image, returns the largest centered
    box whose ratio is allowed.
    """
    width, height = sides
    log_low, log_high = math.log(CROP_RATIOS[0]), math.log(CROP_RATIOS[1])
    for fraction, ratio, left, top in rng.random((CROP_TRIES, 4)).tolist():
        area = width * height * (smallest + (1 - smallest) * fraction)
        ratio = math.exp(log_low + (log_high - log_low) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * CROP_RATIOS[1]))), min(height, max(1, round(width / CROP_RATIOS[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def draw_flip(rng: np.random.Generator, probability: float) -> bool:
    """Draws whether an image is mirrored, with probability `probability`."""
    return rng.random() < probability


def draw_color_factors(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Draws factors of brightness, contrast and saturation, float64 `(3,)`, uniform in [1 - strength, 1 + strength]."""
    return 1 + strength * (2 * rng.random(3) - 1)


def apply_color_jitter(pixels: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Applies brightness, contrast (around the image's mean gray) and saturation (around each pixel's gray), in this
    order: uint8 `(H, W, 3)` to the same.

    All three are linear, so that one matrix applies them, and values are rounded and clipped once at the end. One after
    the other, values clipped by brightness would stay clipped, and the mean for contrast would be that of clipped
    values.
    """
    brightness, contrast, saturation = factors
    mean = GRAY_WEIGHTS @ np.array(cv2.mean(pixels)[:3])
    scale = brightness * contrast
    matrix = scale * (saturation * np.eye(3) + (1 - saturation) * GRAY_WEIGHTS)
    return cv2.transform(pixels, np.column_stack([matrix, np.full(3, brightness * (1 - contrast) * mean)]))
