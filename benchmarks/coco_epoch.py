"""Reads an epoch of a data set of COCO's size: start-up time, resident memory, and whether reading slows down.

    python benchmarks/coco_epoch.py [--images=113287] [--steps=0] [--region_steps=500] [--dir=DIR]

Two data sets are made below --dir (about 3 GB, removed at the end): a prepared one that repeats 64 photographs of
noise, 320 x 240, and one of precomputed regions, 36 x 2048 float32, in a sparse file of 33 GB. A fresh process opens
each and reads as training does, without a model, at batch size 128: every step of an epoch, or --steps; for regions,
which are slow to read from a disk, --region_steps. Slowing down is measured by the CPU time of all threads, which other
work on the machine hardly changes. Prints a table; the last line is one JSON object of its figures.
"""

import argparse
import functools
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH, SIZE, THREADS = 128, 112, 2
SUBJECTS, VERBS = ("man", "woman", "dog", "cat", "child", "horse"), ("runs", "sits", "sleeps", "plays", "stands")


def make_caption(k: int) -> str:
    """Returns one of some thousands of captions of COCO's length."""
    a, b = SUBJECTS[k % 6], SUBJECTS[k // 6 % 6]
    return f"A {a} {VERBS[k % 5]} near a {b} number {k % 997} in front of a house."


def make_prepared(out: Path, number: int) -> None:
    """Writes a data set as `prepare` does."""
    from mefn_jax.data import conversion, tokenizer
    from mefn_jax.data.sources.shard import Example, Shard

    photographs = [make_jpeg(seed) for seed in range(64)]

    def examples(split, count):
        for k in range(count):
            texts = [make_caption(5 * k + n) for n in range(5)]
            yield Example(split, photographs[k % 64], str(k), texts)

    metadata = {"source": "synthetic", "lower_case": True, "punctuation": "keep", "vocab_size": 8000}
    numbers = {"train": number, "val": 5}
    shards = [Shard(split, split, n, functools.partial(examples, split, n)) for split, n in numbers.items()]
    out.mkdir()
    with tempfile.TemporaryDirectory(dir=out.parent) as parts:
        converted = conversion.convert_shards(shards, Path(parts), 0, 1, False, lambda _: None)
        conversion.join_parts(converted, metadata, out)
    texts = [make_caption(k) for k in range(20_000)]
    (out / tokenizer.TOKENIZER_FILE).write_text(tokenizer.train_tokenizer(texts, 8000, True, "keep"), encoding="utf-8")


def make_regions(out: Path, number: int) -> None:
    """Writes a directory in SCAN's format. The features stay unwritten and take no space on the disk."""
    from mefn_jax.data import tokenizer

    out.mkdir()
    np.lib.format.open_memmap(out / "train_ims.npy", "w+", np.float32, (number, 36, 2048))
    (out / "train_caps.txt").write_text("".join(make_caption(k) + "\n" for k in range(5 * number)))
    texts = [make_caption(k) for k in range(20_000)]
    (out / tokenizer.TOKENIZER_FILE).write_text(tokenizer.train_tokenizer(texts, 8000, True, "keep"), encoding="utf-8")


def make_jpeg(seed: int) -> bytes:
    """Returns a JPEG of noise of several scales, about 20 KB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    noise = rng.integers(-20, 20, (240, 320, 1))
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def read_epoch(directory: str, steps: int) -> dict:
    """Reads an epoch in this process. Returns the figures of the table."""
    start = time.perf_counter()
    from mefn_jax.data import pipeline
    from mefn_jax.data.augment import Augment
    from mefn_jax.data.dataset import Dataset
    from mefn_jax.data.images import Resize
    from mefn_jax.data.tokenizer import Tokenizer

    dataset = Dataset(directory)
    split = dataset.split("train")
    tokenizer = Tokenizer(dataset.tokenizer_json, 32, True, "keep")
    augment = Augment(crop=0.5, flip=0.5, word_noise=0.2)
    batches = pipeline.training_dataset(split, tokenizer, Resize(SIZE), BATCH, 0, augment=augment)
    iterator = pipeline.iterate(batches, 0, THREADS, 0, lambda batch: batch)
    first = next(iterator)
    startup, peak_mb, step_seconds = time.perf_counter() - start, 0, []
    steps = steps or split.num_captions // BATCH
    seen_captions = np.zeros(split.num_captions, bool)
    seen_captions[first["caption_index"]] = True
    for step in range(1, steps):
        start_times = time.perf_counter(), time.process_time()
        batch = next(iterator)
        step_seconds.append((time.perf_counter() - start_times[0], time.process_time() - start_times[1]))
        seen_captions[batch["caption_index"]] = True
        if step % 50 == 0 or step == steps - 1:
            peak_mb = max(peak_mb, resident_mb())
    iterator.close()
    tenth = max(1, len(step_seconds) // 10)
    wall_seconds, cpu_seconds = np.array(step_seconds).T
    return {
        "images": split.num_images,
        "steps": steps,
        "startup_s": round(startup, 2),
        "resident_mb": peak_mb,
        "ms_a_step": round(1000 * float(wall_seconds.mean()), 1),
        "cpu_ms_a_step": round(1000 * float(cpu_seconds.mean()), 1),
        "last_over_first_tenth": round(float(cpu_seconds[-tenth:].mean() / cpu_seconds[:tenth].mean()), 3),
        "no_caption_twice": bool(seen_captions.sum() == steps * BATCH),
        # 0.289 for a uniform draw.
        "first_batch_spread": round(float(np.std(first["image_index"]) / split.num_images), 3),
    }


def resident_mb() -> int:
    """Returns the resident memory of this process in MB, including mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("needs Linux's /proc")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=113_287)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--region_steps", type=int, default=500)
    parser.add_argument("--dir", default="")
    parser.add_argument("--read", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read_epoch(options.read, options.steps)))
        return
    with tempfile.TemporaryDirectory(dir=options.dir or None) as root:
        figures = {}
        kinds = (("prepared", make_prepared, options.steps), ("regions", make_regions, options.region_steps))
        for name, make_data, steps in kinds:
            start = time.perf_counter()
            make_data(Path(root) / name, options.images)
            print(f"{name}: made in {time.perf_counter() - start:.0f} s", flush=True)
            arguments = [sys.executable, __file__, f"--read={Path(root) / name}", f"--steps={steps}"]
            figures[name] = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
            for key, value in figures[name].items():
                print(f"  {key:24}{value}", flush=True)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
