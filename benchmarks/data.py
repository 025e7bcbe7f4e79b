"""Times the reading of training examples on one core: images per second, and precomputed regions.

    python benchmarks/data.py [--images=FOLDER] [--number=64] [--repeats=15] [--crop=0.5]

Images are 500 x 375 JPEGs (quality 90, 4:2:0): mosaics of the photographs in FOLDER, or else noise of all scales. Ours
decodes, crops at random, scales to 224, mirrors, and stacks uint8 batches (the cast happens on the device). It is
compared with a torch DataLoader whose transform is spelled out below, and with the bare decoder: the same JPEGs to
arrays at full size and nothing more. Prints a table, and as the last line a JSON object: our images per second over
torch's, over the bare decoder's, and the precomputed reading over `np.load(mmap)`. Without torch `vs_torch` is null.
"""

import argparse
import io
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from mefn_jax.data import images
from mefn_jax.data.augment import Augment

SIZE = 224
BATCH = 32
SIDES = (500, 375)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIOS = (3 / 4, 4 / 3)
WARM_UP = 2


def one_core() -> None:
    """Keeps this process on one CPU, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def mosaic(photographs: list[Path], rng: np.random.Generator) -> Image.Image:
    """Photographs side by side at their own scale, so that a pixel holds as much detail as it does in a photograph."""
    canvas = Image.new("RGB", SIDES)
    for top in range(0, SIDES[1], SIZE):
        for left in range(0, SIDES[0], SIZE):
            canvas.paste(Image.open(photographs[rng.integers(len(photographs))]).convert("RGB"), (left, top))
    return canvas


def noise(rng: np.random.Generator) -> Image.Image:
    """Noise of every scale from one pixel to the whole, the coarse ones stronger, as photographs have it."""
    total = np.full((SIDES[1], SIDES[0], 3), 128.0)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        small = rng.integers(0, 256, (SIDES[1] // scale + 2, SIDES[0] // scale + 2, 3), np.uint8)
        total += (np.asarray(Image.fromarray(small).resize(SIDES, Image.Resampling.BICUBIC)) - 128.0) * scale**0.5 / 12
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def make_jpegs(folder: Path | None, number: int) -> list[bytes]:
    """The encoded images, the same in every run."""
    rng = np.random.default_rng(0)
    photographs = sorted(folder.glob("*.jpg")) if folder else []
    if folder and not photographs:
        sys.exit(f"error: {folder}: no *.jpg in it")
    found = []
    for _ in range(number):
        out = io.BytesIO()
        image = mosaic(photographs, rng) if photographs else noise(rng)
        image.save(out, "JPEG", quality=90, subsampling="4:2:0")
        found.append(out.getvalue())
    return found


def ours(jpegs: list[bytes], augment: Augment) -> Callable:
    """One pass over the images in batches, uint8 `(B, H, W, 3)`."""
    resize = images.Resize(SIZE)

    def once():
        # To become pipeline.training_dataset once that takes an Augment; its decoding is this call.
        for start in range(0, len(jpegs), BATCH):
            rows = [
                images.decode(data, resize, "benchmark", augment, np.random.default_rng((0, 0, start + k)))
                for k, data in enumerate(jpegs[start : start + BATCH])
            ]
            np.stack(rows)

    return once


def bare(jpegs: list[bytes]) -> Callable:
    """Our decoder alone."""

    def once():
        for data in jpegs:
            simplejpeg.decode_jpeg(data)

    return once


def random_box(width: int, height: int, smallest: float) -> tuple:
    """torchvision's RandomResizedCrop.get_params, without its fallback, which images of these sides never need."""
    while True:
        area = width * height * random.uniform(smallest, 1)
        ratio = math.exp(random.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h


def theirs(jpegs: list[bytes], augment: Augment) -> Callable | None:
    """One pass of a torch DataLoader in this process: float32 `(B, 3, H, W)`, normalised. None without torch."""
    try:
        import torch
    except ImportError as e:
        print(f"torch cannot be imported ({e}); vs_torch needs it: pip install torch")
        return None
    torch.set_num_threads(1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    class Jpegs(torch.utils.data.Dataset):
        def __len__(self):
            return len(jpegs)

        def __getitem__(self, k):
            image = Image.open(io.BytesIO(jpegs[k])).convert("RGB")
            image = image.crop(random_box(*image.size, augment.crop))
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            if random.random() < augment.flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # as torchvision's to_tensor
            return pixels.to(torch.float32).div(255).sub_(mean).div_(std)

    loader = torch.utils.data.DataLoader(Jpegs(), batch_size=BATCH, num_workers=0)

    def once():
        for _ in loader:
            pass

    return once


def precomputed(repeats: int) -> float | None:
    """To be written: reading precomputed regions through the pipeline over `np.load(mmap)` and fancy indexing."""
    return None


def rates(passes: dict[str, Callable], number: int, repeats: int) -> dict[str, list[float]]:
    """Images per second in each repeat; the passes take turns, so that whatever else the machine does meets all."""
    found = {name: [] for name in passes}
    for _ in range(WARM_UP + repeats):
        for name, once in passes.items():
            start = time.perf_counter()
            once()
            found[name].append(number / (time.perf_counter() - start))
    return {name: values[WARM_UP:] for name, values in found.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/data.py", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of photographs, *.jpg (default: noise)")
    parser.add_argument("--number", type=int, default=64, help="how many images (default: 64)")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes, after warm-up (default: 15)")
    parser.add_argument("--crop", type=float, default=0.5, help="smallest share of the area kept (default: 0.5)")
    options = parser.parse_args(arguments)
    if options.number < 1 or options.repeats < 1 or not 0 < options.crop < 1:
        parser.error("--number and --repeats must be 1 or more, --crop between 0 and 1")
    return options


def main() -> None:
    options = parse()
    one_core()
    jpegs = make_jpegs(options.images, options.number)
    augment = Augment(crop=options.crop, flip=0.5)
    passes = {
        "ours": ours(jpegs, augment),
        "ours, colour too": ours(jpegs, Augment(crop=options.crop, flip=0.5, colour=0.4)),
        "bare decoder": bare(jpegs),
        "torch": theirs(jpegs, augment),
    }
    found = rates({name: once for name, once in passes.items() if once}, len(jpegs), options.repeats)
    size = statistics.mean(map(len, jpegs)) / 1000
    print(f"{len(jpegs)} JPEGs of {SIDES[0]} x {SIDES[1]}, {size:.0f} kB each, to {SIZE}; one core\n")
    print(f"{'pass':<18} {'images/s':>9} {'ours / it':>10}")
    ratios = {}
    for name, values in found.items():
        # The ratio of neighbours in time, whose median other work on the machine moves less than that of rates.
        ratios[name] = statistics.median(our / it for our, it in zip(found["ours"], values, strict=True))
        print(f"{name:<18} {statistics.median(values):>9.0f} {ratios[name]:>10.2f}")
    print()
    result = {"vs_torch": ratios.get("torch"), "vs_decoder": ratios["bare decoder"], "precomputed": None}
    result["precomputed"] = precomputed(options.repeats)
    print(json.dumps({name: value and round(value, 2) for name, value in result.items()}))


if __name__ == "__main__":
    main()
