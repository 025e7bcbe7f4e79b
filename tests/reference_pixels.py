"""Pixels of image processors that need torchvision: the reference of `encoders/pretrained/test_preprocessor.py`.

    python tests/reference_pixels.py     # needs open_clip, torchvision, transformers; writes tests/fixtures/pixels/

Each file holds what a processor makes of the pictures of `SIDES`, float32 `(12, 12, 3)`, and the content of the
checkpoint's file that asks for this processor.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "fixtures" / "pixels"
SIZE = 12
# Width and height. Scaled to 12, the longer sides are 17, 19, 51, 16 and 12.
SIDES = ((64, 43), (37, 61), (21, 90), (17, 24), (20, 20))
COLORS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def draw_picture(sides) -> Image.Image:
    """Returns a picture without pixels so bright or dark that a filter's overshoot would be cut off between its
    passes."""
    noise = np.random.default_rng(0).integers(70, 190, (sides[1] // 4, sides[0] // 4, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize(sides, Image.Resampling.BICUBIC)


def write(name: str, settings: dict, process) -> None:
    """Writes the file of one processor; `process(picture)` returns its pixels, a tensor `(3, 12, 12)`."""
    arrays = {"settings": np.array(json.dumps(settings))}
    for k, sides in enumerate(SIDES):
        arrays[f"pixels_{k}"] = process(draw_picture(sides)).numpy().transpose(1, 2, 0)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def main() -> None:
    import transformers
    from open_clip.transform import PreprocessCfg, image_transform_v2

    FOLDER.mkdir(exist_ok=True)
    for mode, interpolation in (("shortest", "bicubic"), ("squash", "bicubic"), ("squash", "bilinear")):
        given = {"size": SIZE, "resize_mode": mode, "interpolation": interpolation, **COLORS}
        process = image_transform_v2(PreprocessCfg(**given), is_train=False)
        write(f"open_clip_{mode}_{interpolation}", {"preprocess_cfg": given}, process)
    given = {"image_processor_type": "DINOv3ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}}
    processor = transformers.DINOv3ViTImageProcessor(**given)
    write("dinov3", given, lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0])


if __name__ == "__main__":
    sys.exit(main())
