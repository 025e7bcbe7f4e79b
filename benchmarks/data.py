"""Times the reading of training examples on one core: images per second, and precomputed regions.

    python benchmarks/data.py [--images=FOLDER] [--number=64] [--repeats=15] [--crop=0.5] [--rows=1500]

Images are 500 x 375 JPEGs (quality 90, 4:2:0): mosaics of the photographs in FOLDER, or noise of all scales. Ours is
the training pipeline: it decodes, crops at random, scales to 224, mirrors, stacks uint8 batches (the cast happens on
the device) and encodes captions. It is compared with a torch DataLoader whose transform is written out below, without
captions, and with two bare decoders, ours and Pillow, which only decode the same JPEGs at full size.

Whole images, without a random crop, are 640 x 480: resized exactly as Pillow does it, as evaluation needs them, and at
a reduced scale, as training may. A decoder that knew the crop could save at most what lies between a bare decoder at
full size and one at 1/8, which has all bits to read but hardly a pixel to compute. Precomputed regions, 36 x 2048
float32, are read through the pipeline and by indexing the memory-mapped file.

Prints tables. The last line is a JSON object: our images per second over torch's and over our bare decoder's, those of
exact over those of reduced resizing (`exact`), and the rows of regions per second over those of bare indexing. Without
torch, `vs_torch` is null.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from mefn_jax.data import images, pipeline, tokenizer
from mefn_jax.data.augment import Augment
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.split import Split

SIZE = 224
BATCH = 32
SIDES, WHOLE_SIDES = (500, 375), (640, 480)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIOS = (3 / 4, 4 / 3)
WARM_UP = 2
CAPTION = "A black dog number {} runs with a stick through the high grass ."
IMAGES = 6000  # images of the split, as in Flickr8k; the JPEGs repeat
REGIONS, ROW_BATCH = (36, 2048), 128


def pin_to_one_core() -> None:
    """Keeps this process on one CPU, if the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def make_mosaic(photographs: list[Path], sides: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Returns photographs side by side at their own scale, so that a pixel holds as much detail as in a photograph."""
    canvas = Image.new("RGB", sides)
    for top in range(0, sides[1], SIZE):
        for left in range(0, sides[0], SIZE):
            canvas.paste(Image.open(photographs[rng.integers(len(photographs))]).convert("RGB"), (left, top))
    return canvas


def make_noise(sides: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Returns noise of all scales from one pixel to the whole image. As in photographs, coarse scales are stronger."""
    total = np.full((sides[1], sides[0], 3), 128.0)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        coarse = rng.integers(0, 256, (sides[1] // scale + 2, sides[0] // scale + 2, 3), np.uint8)
        total += (np.asarray(Image.fromarray(coarse).resize(sides, Image.Resampling.BICUBIC)) - 128.0) * scale**0.5 / 12
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def make_jpegs(folder: Path | None, number: int, sides: tuple[int, int]) -> list[bytes]:
    """Returns the encoded images, the same in every run."""
    rng = np.random.default_rng(0)
    photographs = sorted(folder.glob("*.jpg")) if folder else []
    if folder and not photographs:
        sys.exit(f"error: --images={folder}: holds no *.jpg")
    jpegs = []
    for _ in range(number):
        buffer = io.BytesIO()
        image = make_mosaic(photographs, sides, rng) if photographs else make_noise(sides, rng)
        image.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
        jpegs.append(buffer.getvalue())
    return jpegs


def make_tokenizer(number: int) -> tokenizer.Tokenizer:
    """Returns a tokenizer trained on the captions."""
    tokenizer_json = tokenizer.train_tokenizer([CAPTION.format(index) for index in range(number)], 1000, True, "keep")
    return tokenizer.Tokenizer(tokenizer_json, 32, True, "keep")


def make_pipeline_pass(jpegs: list[bytes], augment: Augment) -> Callable:
    """Returns a function that loads the number of images of `jpegs` in batches of the training pipeline, over a split
    of Flickr8k's size. Captions are encoded before, as in training from the second epoch on."""
    records = [
        {"image": jpegs[k % len(jpegs)], "captions": [CAPTION.format(5 * k + n) for n in range(5)], "image_id": str(k)}
        for k in range(IMAGES)
    ]
    split = Split("train", records, np.arange(IMAGES), 5 * np.arange(IMAGES + 1))
    batches = pipeline.training_dataset(split, make_tokenizer(1000), images.Resize(SIZE), BATCH, 0, augment=augment)

    def run_pass():
        for k in range(len(jpegs) // BATCH):
            batches[k]

    return run_pass


def make_decoder_pass(jpegs: list[bytes], decode: Callable) -> Callable:
    """Returns a function that decodes all JPEGs and nothing more."""

    def run_pass():
        for data in jpegs:
            decode(data)

    return run_pass


def make_whole_passes(jpegs: list[bytes]) -> dict[str, Callable]:
    """Returns functions for one pass over whole JPEGs: exactly, at a reduced scale, with Pillow alone, and decoders."""
    resize = images.Resize(SIZE)

    def resize_with_pillow(data):
        image = Image.fromarray(decode_with_pillow(data))
        width, height = (side * SIZE // min(image.size) for side in image.size)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))

    decoders = {
        "ours": lambda data: images.decode(data, resize, ""),
        "reduced": lambda data: images.decode(data, resize, "", may_reduce=True),
        "Pillow": resize_with_pillow,
        "bare decoder": simplejpeg.decode_jpeg,
        "bare, at 1/8": lambda data: simplejpeg.decode_jpeg(data, min_width=1, min_height=1),
    }
    return {name: make_decoder_pass(jpegs, decode) for name, decode in decoders.items()}


def decode_with_pillow(data: bytes) -> np.ndarray:
    """Decodes a JPEG to an array with Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def random_box(width: int, height: int, smallest: float) -> tuple:
    """Returns a random crop box as torchvision's RandomResizedCrop.get_params does, without its fallback, which images
    of this shape never need."""
    while True:
        area = width * height * random.uniform(smallest, 1)
        ratio = math.exp(random.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h


def make_torch_pass(jpegs: list[bytes], augment: Augment) -> Callable | None:
    """Returns a function for one pass of a torch DataLoader in this process: float32 `(B, 3, H, W)`, normalized. None
    without torch."""
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
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # as in torchvision's to_tensor
            return pixels.to(torch.float32).div(255).sub_(mean).div_(std)

    loader = torch.utils.data.DataLoader(Jpegs(), batch_size=BATCH, num_workers=0)

    def run_pass():
        collections.deque(loader, maxlen=0)

    return run_pass


def make_region_passes(root: Path, number: int) -> dict[str, Callable]:
    """Returns functions for one pass over all rows: through the training pipeline, and by indexing the mapped file with
    the same rows."""
    regions = np.lib.format.open_memmap(root / "train_ims.npy", "w+", np.float32, (number, *REGIONS))
    for k in range(number):
        regions[k] = np.random.default_rng(k).random(REGIONS, np.float32)
    (root / "train_caps.txt").write_text("".join(CAPTION.format(k) + "\n" for k in range(5 * number)))
    split, mapped = Dataset(root).split("train"), np.load(root / "train_ims.npy", mmap_mode="r")
    batches = pipeline.training_dataset(split, make_tokenizer(1000), images.Resize(SIZE), ROW_BATCH, 0)
    steps = range(number // ROW_BATCH)
    row_indices = [batches[k]["image_index"] for k in steps]

    def load_batches():
        for k in steps:
            batches[k]

    def index_rows():
        for rows in row_indices:
            mapped[rows]

    return {"ours": load_batches, "bare indexing": index_rows}


def measure_rates(passes: dict[str, Callable], number: int, repeats: int) -> dict[str, list[float]]:
    """Returns the images per second in each repeat. The passes alternate, so that other work on the machine affects all
    of them alike."""
    rates = {name: [] for name in passes}
    for _ in range(WARM_UP + repeats):
        for name, run_pass in passes.items():
            start = time.perf_counter()
            run_pass()
            rates[name].append(number / (time.perf_counter() - start))
    return {name: values[WARM_UP:] for name, values in rates.items()}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/data.py", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of photographs, *.jpg (default: noise)")
    parser.add_argument("--number", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes, after the warm-up (default: 15)")
    parser.add_argument("--crop", type=float, default=0.5, help="smallest share of the area kept (default: 0.5)")
    parser.add_argument("--rows", type=int, default=1500, help="number of rows of regions (default: 1500)")
    options = parser.parse_args(arguments)
    if options.number < BATCH or options.repeats < 1 or not 0 < options.crop < 1 or options.rows < ROW_BATCH:
        parser.error(
            f"--number must be {BATCH} or more, --rows {ROW_BATCH} or more, --repeats 1 or more, --crop between 0 and 1"
        )
    return options


def print_table(rates: dict[str, list[float]], unit: str) -> dict[str, float]:
    """Prints the rates. Returns the ratio of ours to each of them."""
    print(f"{'pass':<18} {unit:>9} {'ours / it':>10}")
    ratios = {}
    for name, values in rates.items():
        # Ratios of runs that follow each other: other work on the machine changes their median less than that of rates.
        ratios[name] = statistics.median(own / other for own, other in zip(rates["ours"], values, strict=True))
        print(f"{name:<18} {statistics.median(values):>9.0f} {ratios[name]:>10.2f}")
    print(flush=True)
    return ratios


def main() -> None:
    """Runs the benchmark."""
    options = parse_options()
    pin_to_one_core()
    jpegs = make_jpegs(options.images, options.number, SIDES)
    augment = Augment(crop=options.crop, flip=0.5)
    passes = {
        "ours": make_pipeline_pass(jpegs, augment),
        "ours, with color": make_pipeline_pass(jpegs, Augment(crop=options.crop, flip=0.5, color_jitter=0.4)),
        "bare decoder": make_decoder_pass(jpegs, simplejpeg.decode_jpeg),
        "bare Pillow": make_decoder_pass(jpegs, decode_with_pillow),
        "torch": make_torch_pass(jpegs, augment),
    }
    image_rates = measure_rates(
        {name: run_pass for name, run_pass in passes.items() if run_pass}, len(jpegs), options.repeats
    )
    size = statistics.mean(map(len, jpegs)) / 1000
    print(f"{len(jpegs)} JPEGs of {SIDES[0]} x {SIDES[1]}, {size:.0f} kB each, to {SIZE}; one core\n")
    ratios = print_table(image_rates, "images/s")
    result = {"vs_torch": ratios.get("torch"), "vs_decoder": ratios["bare decoder"]}
    whole_jpegs = make_jpegs(options.images, options.number, WHOLE_SIDES)
    whole_rates = measure_rates(make_whole_passes(whole_jpegs), len(whole_jpegs), options.repeats)
    print(f"{len(whole_jpegs)} whole JPEGs of {WHOLE_SIDES[0]} x {WHOLE_SIDES[1]} to {SIZE}; one core\n")
    result["exact"] = print_table(whole_rates, "images/s")["reduced"]
    with tempfile.TemporaryDirectory() as root:
        complete_rows = options.rows // ROW_BATCH * ROW_BATCH
        region_rates = measure_rates(make_region_passes(Path(root), options.rows), complete_rows, options.repeats)
        print(f"{options.rows} rows of {REGIONS[0]} x {REGIONS[1]} float32, {ROW_BATCH} a batch; one core\n")
        result["precomputed"] = print_table(region_rates, "rows/s")["bare indexing"]
    print(json.dumps({name: value and round(value, 2) for name, value in result.items()}))


if __name__ == "__main__":
    main()
