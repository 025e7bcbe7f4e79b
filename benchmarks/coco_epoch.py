"""An epoch over a data set of COCO's size: start-up, resident memory, and whether it gets slower.

    python benchmarks/coco_epoch.py [--images=113287] [--steps=0] [--region_steps=500] [--dir=DIR]

Two data sets are made below --dir (about 3 GB; removed at the end): one that is prepared, of 64 photographs of noise in
320 x 240, repeated, and one of precomputed regions, 36 x 2048 float32, in a sparse file of 33 GB. A fresh process opens
each and reads as training does, without a model, at batch size 128: every step of an epoch, or --steps; of regions,
which are slow to come from a disk, --region_steps. Slowing down is told by the time that all threads worked, which
other work on the machine hardly moves. Prints a table and, as its last line, one JSON object of its figures.
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


def caption(k: int) -> str:
    """One of some thousands of captions of COCO's length."""
    a, b = SUBJECTS[k % 6], SUBJECTS[k // 6 % 6]
    return f"A {a} {VERBS[k % 5]} near a {b} number {k % 997} in front of a house."


def make_prepared(out: Path, number: int) -> None:
    """A data set as `prepare` writes it."""
    from mefn_jax.data import tokenizer
    from mefn_jax.data.formats.tfds_writer import write_dataset

    photographs = [jpeg(seed) for seed in range(64)]

    def examples(count):
        for k in range(count):
            texts = [caption(5 * k + n) for n in range(5)]
            yield {"image": photographs[k % 64], "captions": texts, "image_id": str(k)}

    facts = {"source": "synthetic", "lower_case": True, "punctuation": "keep", "vocab_size": 8000}
    splits = {"train": (number, functools.partial(examples, number)), "val": (5, functools.partial(examples, 5))}
    out.mkdir()
    write_dataset(splits, facts, out)
    texts = [caption(k) for k in range(20_000)]
    (out / tokenizer.TOKENIZER_FILE).write_text(tokenizer.train_tokenizer(texts, 8000, True, "keep"), encoding="utf-8")


def make_regions(out: Path, number: int) -> None:
    """A directory in SCAN's format; what is not written of its features takes no room on the disk."""
    from mefn_jax.data import tokenizer

    out.mkdir()
    np.lib.format.open_memmap(out / "train_ims.npy", "w+", np.float32, (number, 36, 2048))
    (out / "train_caps.txt").write_text("".join(caption(k) + "\n" for k in range(5 * number)))
    texts = [caption(k) for k in range(20_000)]
    (out / tokenizer.TOKENIZER_FILE).write_text(tokenizer.train_tokenizer(texts, 8000, True, "keep"), encoding="utf-8")


def jpeg(seed: int) -> bytes:
    """Noise of many scales, about 20 KB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    noise = rng.integers(-20, 20, (240, 320, 1))
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def read(directory: str, steps: int) -> dict:
    """Reads an epoch, in this process."""
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
    startup, most, seconds = time.perf_counter() - start, 0, []
    steps = steps or split.num_captions // BATCH
    seen = np.zeros(split.num_captions, bool)
    seen[first["caption_index"]] = True
    for step in range(1, steps):
        begun = time.perf_counter(), time.process_time()
        batch = next(iterator)
        seconds.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        seen[batch["caption_index"]] = True
        if step % 50 == 0 or step == steps - 1:
            most = max(most, resident_mb())
    iterator.close()
    tenth = max(1, len(seconds) // 10)
    waited, worked = np.array(seconds).T
    return {
        "images": split.num_images,
        "steps": steps,
        "startup_s": round(startup, 2),
        "resident_mb": most,
        "ms_a_step": round(1000 * float(waited.mean()), 1),
        "cpu_ms_a_step": round(1000 * float(worked.mean()), 1),
        "last_over_first_tenth": round(float(worked[-tenth:].mean() / worked[:tenth].mean()), 3),
        "no_caption_twice": bool(seen.sum() == steps * BATCH),
        "first_batch_spread": round(
            float(np.std(first["image_index"]) / split.num_images), 3
        ),  # of a uniform draw: 0.289
    }


def resident_mb() -> int:
    """Memory of this process that is in RAM, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("needs Linux's /proc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=113_287)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--region_steps", type=int, default=500)
    parser.add_argument("--dir", default="")
    parser.add_argument("--read", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read, args.steps)))
        return
    with tempfile.TemporaryDirectory(dir=args.dir or None) as root:
        found = {}
        kinds = (("prepared", make_prepared, args.steps), ("regions", make_regions, args.region_steps))
        for name, make, steps in kinds:
            start = time.perf_counter()
            make(Path(root) / name, args.images)
            print(f"{name}: made in {time.perf_counter() - start:.0f} s", flush=True)
            words = [sys.executable, __file__, f"--read={Path(root) / name}", f"--steps={steps}"]
            found[name] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            for key, value in found[name].items():
                print(f"  {key:24}{value}", flush=True)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
