"""Prepares a data set once: python -m mefn_jax.data.prepare --source=NAME --path=PATH [--images=DIR] --out=DIR

Sources: flickr8k (the folder as distributed), karpathy (dataset_*.json), coco (the folder of captions_*.json), table
(CSV or JSON lines of image and caption), shapes (drawn scenes). Each reader's docstring has its format.

Writes a TFDS data set in array_record and the tokenizer into --out. Everything is written beside it and renamed at
the end, so an interrupted run leaves nothing that could be read.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from absl import flags

from mefn_jax.config import require_local
from mefn_jax.data import tokenizer
from mefn_jax.data.scenes import draw
from mefn_jax.data.sources import coco, flickr8k, karpathy, table
from mefn_jax.errors import DataError
from mefn_jax.runtime.cli import run_command

READERS = {
    "flickr8k": lambda path, _: flickr8k.read(path),
    "karpathy": karpathy.read,
    "coco": coco.read,
    "table": table.read,
}
SHAPES_VERSION = 12  # raise it when the drawn scenes change, so that cached ones are made again


def prepare(
    source: str,
    path: str,
    out,
    *,
    images: str = "",
    captions_per_image: int = 5,
    vocab_size: int,
    lower_case: bool,
    punctuation: str,
    scenes,
    seed,
) -> list:
    """Writes the data set to the directory `out`, which must be new or empty. Returns lines to show the user. Of an
    image's captions the first `captions_per_image` are kept, all for 0.

    Raises DataError for malformed input, and if `out` holds something already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already and is not empty; choose another --out or remove it")
    if source == "shapes":
        splits, notes = _draw_splits(scenes, seed), []
    else:
        splits, notes = _read(source, path, images, captions_per_image)
    if "train" not in splits:
        raise DataError(f"{path}: no training split, which the tokenizer is trained on")
    facts = {"source": source, "lower_case": lower_case, "punctuation": punctuation, "vocab_size": vocab_size}
    captions = []

    def watched():
        for example in splits["train"][1]():
            captions.extend(example["captions"])
            yield example

    watching = {**splits, "train": (splits["train"][0], watched)}
    with _staging_directory(out) as work:
        from mefn_jax.data.formats.tfds_writer import (
            write_dataset,  # TFDS is slow to import, and --help does not need it
        )

        written = Path(work) / "data"
        written.mkdir()
        write_dataset(watching, facts, written)
        text = tokenizer.train_tokenizer(captions, vocab_size, lower_case, punctuation)
        (written / tokenizer.TOKENIZER_FILE).write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(written, out)
    counts = ", ".join(f"{name} {number} images" for name, (number, _) in splits.items())
    return [*notes, f"{out}: {counts}; {len(json.loads(text)['model']['vocab'])} wordpieces"]


@contextlib.contextmanager
def _staging_directory(out: Path):
    """A directory beside `out`, removed at the end, and locked until then: those that no process holds locked any more
    were left by one that was killed, and are removed."""
    prefix = f".{out.name}.incomplete-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), (left / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as work, (Path(work) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work


def _draw_splits(scenes, seed):
    numbers = dict(zip(("train", "val", "test"), scenes, strict=True))
    return {s: (n, functools.partial(draw.generate_examples, s, n, seed)) for s, n in numbers.items()}


def _read(source: str, path: str, images: str, captions_per_image: int):
    if not images:  # beside what is read
        images = Path(path) if Path(path).is_dir() else Path(path).parent
    splits, notes = READERS[source](path, images)
    most = captions_per_image
    long = [e for entries in splits.values() for e in entries if len(e["captions"]) > most] if most else []
    for entry in long:
        entry["captions"] = entry["captions"][:most]
    if long:
        notes.append(
            f"kept the first {most} captions of {len(long)} images that have more (all: --captions_per_image=0)"
        )

    def examples(entries):
        for entry in entries:
            yield entry | {"image": entry["image"].read_bytes()}

    return {s: (len(entries), functools.partial(examples, entries)) for s, entries in splits.items()}, notes


def open_drawn_scenes(scenes, seed: int) -> Path:
    """The directory of the drawn scenes with these numbers (train, val, test) and seed, made on first use.

    It lies in `$MEFN_CACHE`, or in `~/.cache/mefn_jax`.
    """
    facts = json.dumps([SHAPES_VERSION, [int(n) for n in scenes], int(seed)])
    cache = Path(os.environ.get("MEFN_CACHE") or Path.home() / ".cache" / "mefn_jax")
    out = cache / f"shapes-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    if not (out / tokenizer.TOKENIZER_FILE).is_file():
        try:
            prepare("shapes", "", out, vocab_size=1000, lower_case=True, punctuation="keep", scenes=scenes, seed=seed)
        except OSError:
            # Another process made it first; its rename is as good as ours.
            if not (out / tokenizer.TOKENIZER_FILE).is_file():
                raise
    return out


def define_flags() -> None:
    flags.DEFINE_enum("source", None, (*READERS, "shapes"), "Format of the source.", required=True)
    flags.DEFINE_string("path", "", "Folder or file of the source; not for shapes.")
    flags.DEFINE_string("images", "", "Folder of the images; by default beside what --path names. Not for flickr8k.")
    flags.DEFINE_integer("captions_per_image", 5, "Captions kept of each image, the first ones; 0: all.", lower_bound=0)
    flags.DEFINE_string("out", None, "Directory to write; must be new or empty.", required=True)
    flags.DEFINE_integer("vocab_size", tokenizer.VOCAB_SIZE, "Most wordpieces of the vocabulary.", lower_bound=100)
    flags.DEFINE_bool("lower_case", True, "Train the tokenizer on lower case (config: text.lower_case).")
    flags.DEFINE_enum("punctuation", "keep", ("keep", "drop"), "Punctuation for the tokenizer (text.punctuation).")
    flags.DEFINE_list("scenes", ["4000", "500", "500"], "shapes: scenes in train, val, test.")
    flags.DEFINE_integer("scene_seed", 0, "shapes: seed of the scenes.")


def main() -> None:
    f = flags.FLAGS
    try:
        _main(f)
    except OSError as e:
        raise DataError(f"--out={f.out}: cannot be written ({e}); free some space, or choose another") from e


def _main(f) -> None:
    for name in ("path", "images", "out"):
        require_local(f"--{name}", f[name].value)
    if f.source != "shapes" and not f.path:
        raise DataError(f"--source={f.source} needs --path, the folder or file to read")
    try:
        scenes = tuple(int(n) for n in f.scenes)
    except ValueError:
        raise DataError(f"--scenes={','.join(f.scenes)}: not three numbers") from None
    if len(scenes) != 3 or min(scenes) < 1:
        raise DataError(f"--scenes={','.join(f.scenes)}: give three numbers above 0, for train, val, test")
    notes = prepare(
        f.source,
        f.path,
        f.out,
        images=f.images,
        captions_per_image=f.captions_per_image,
        vocab_size=f.vocab_size,
        lower_case=f.lower_case,
        punctuation=f.punctuation,
        scenes=scenes,
        seed=f.scene_seed,
    )
    print("\n".join(notes))


if __name__ == "__main__":
    run_command(main, define_flags)
