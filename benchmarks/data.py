"""Times the reading of training examples on one core: images per second, and precomputed regions.

    python benchmarks/data.py [--images=FOLDER] [--number=64] [--repeats=15] [--crop=0.5] [--rows=1500]

Images are 500 x 375 JPEGs (quality 90, 4:2:0): mosaics of the photographs in FOLDER, or else noise of all scales. Ours
is the training pipeline: it decodes, crops at random, scales to 224, mirrors, stacks uint8 batches (the cast happens on
the device) and encodes captions. It is compared with a torch DataLoader whose transform is spelled out below, without
captions, and with bare decoders: the same JPEGs to arrays at full size and nothing more, by our decoder and by Pillow.
Precomputed regions, 36 x 2048 float32, are read through the pipeline and by indexing the memory-mapped file.

Prints a table, and as the last line a JSON object: our images per second over torch's, over our bare decoder's, and the
rows of regions per second over those of bare indexing. Without torch `vs_torch` is null.
"""

import argparse
import collections
import io
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from mefn_jax.data import images, pipeline, tokenizer
from mefn_jax.data.augment import Augment
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.split import Split

SIZE = 224
BATCH = 32
SIDES = (500, 375)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIOS = (3 / 4, 4 / 3)
WARM_UP = 2
CAPTION = "A black dog number {} runs with a stick through the high grass ."
IMAGES = 6000  # of the split that they stand for
REGIONS, ROW_BATCH = (36, 2048), 128


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


def trained(number: int) -> tokenizer.Tokenizer:
    """A tokenizer of the captions."""
    text = tokenizer.train_tokenizer([CAPTION.format(k) for k in range(number)], 1000, True, "keep")
    return tokenizer.Tokenizer(text, 32, True, "keep")


def ours(jpegs: list[bytes], augment: Augment) -> Callable:
    """As many images as there are, in batches of the training pipeline over a split of Flickr8k's size. Captions are
    encoded already, as they are in training from the second pass on."""
    records = [
        {"image": jpegs[k % len(jpegs)], "captions": [CAPTION.format(5 * k + n) for n in range(5)], "image_id": str(k)}
        for k in range(IMAGES)
    ]
    split = Split("train", records, np.arange(IMAGES), 5 * np.arange(IMAGES + 1))
    batches = pipeline.training_dataset(split, trained(1000), images.Resize(SIZE), BATCH, 0, augment=augment)

    def once():
        for k in range(len(jpegs) // BATCH):
            batches[k]

    return once


def bare(jpegs: list[bytes], decode: Callable) -> Callable:
    """A decoder alone."""

    def once():
        for data in jpegs:
            decode(data)

    return once


def pillow(data: bytes) -> np.ndarray:
    """A JPEG to an array by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


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
        collections.deque(loader, maxlen=0)

    return once


def precomputed(root: Path, number: int) -> dict[str, Callable]:
    """One pass over all rows: through the training pipeline, and by indexing the mapped file with the same rows."""
    written = np.lib.format.open_memmap(root / "train_ims.npy", "w+", np.float32, (number, *REGIONS))
    for k in range(number):
        written[k] = np.random.default_rng(k).random(REGIONS, np.float32)
    (root / "train_caps.txt").write_text("".join(CAPTION.format(k) + "\n" for k in range(5 * number)))
    split, mapped = Dataset(root).split("train"), np.load(root / "train_ims.npy", mmap_mode="r")
    batches = pipeline.training_dataset(split, trained(1000), images.Resize(SIZE), ROW_BATCH, 0)
    steps = range(number // ROW_BATCH)
    owners = [batches[k]["image_index"] for k in steps]

    def through_pipeline():
        for k in steps:
            batches[k]

    def by_index():
        for rows in owners:
            mapped[rows]

    return {"ours": through_pipeline, "bare indexing": by_index}


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
    parser.add_argument("--rows", type=int, default=1500, help="how many rows of regions (default: 1500)")
    options = parser.parse_args(arguments)
    if options.number < BATCH or options.repeats < 1 or not 0 < options.crop < 1 or options.rows < ROW_BATCH:
        parser.error(
            f"--number must be {BATCH} or more, --rows {ROW_BATCH} or more, --repeats 1 or more, --crop between 0 and 1"
        )
    return options


def table(found: dict[str, list[float]], unit: str) -> dict[str, float]:
    """Prints the rates; returns the ratio of ours over each."""
    print(f"{'pass':<18} {unit:>9} {'ours / it':>10}")
    ratios = {}
    for name, values in found.items():
        # The ratio of neighbours in time, whose median other work on the machine moves less than that of rates.
        ratios[name] = statistics.median(our / it for our, it in zip(found["ours"], values, strict=True))
        print(f"{name:<18} {statistics.median(values):>9.0f} {ratios[name]:>10.2f}")
    print(flush=True)
    return ratios


def main() -> None:
    options = parse()
    one_core()
    jpegs = make_jpegs(options.images, options.number)
    augment = Augment(crop=options.crop, flip=0.5)
    passes = {
        "ours": ours(jpegs, augment),
        "ours, colour too": ours(jpegs, Augment(crop=options.crop, flip=0.5, color_jitter=0.4)),
        "bare decoder": bare(jpegs, simplejpeg.decode_jpeg),
        "bare Pillow": bare(jpegs, pillow),
        "torch": theirs(jpegs, augment),
    }
    found = rates({name: once for name, once in passes.items() if once}, len(jpegs), options.repeats)
    size = statistics.mean(map(len, jpegs)) / 1000
    print(f"{len(jpegs)} JPEGs of {SIDES[0]} x {SIDES[1]}, {size:.0f} kB each, to {SIZE}; one core\n")
    ratios = table(found, "images/s")
    result = {"vs_torch": ratios.get("torch"), "vs_decoder": ratios["bare decoder"]}
    with tempfile.TemporaryDirectory() as root:
        whole = options.rows // ROW_BATCH * ROW_BATCH
        rows = rates(precomputed(Path(root), options.rows), whole, options.repeats)
        print(f"{options.rows} rows of {REGIONS[0]} x {REGIONS[1]} float32, {ROW_BATCH} a batch; one core\n")
        result["precomputed"] = table(rows, "rows/s")["bare indexing"]
    print(json.dumps({name: value and round(value, 2) for name, value in result.items()}))


if __name__ == "__main__":
    main()
