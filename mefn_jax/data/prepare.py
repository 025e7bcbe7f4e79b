"""Prepares a data set once: python -m mefn_jax.data.prepare --source=NAME --path=PATH [--images=DIR] --out=DIR

Sources: flickr8k (the folder as distributed), karpathy (dataset_*.json), coco (the folder of captions_*.json), table
(CSV or JSON lines of image and caption), shapes (drawn scenes). docs/data.md describes their formats.

Writes a TFDS data set in array_record and the tokenizer into --out. Everything is written into a hidden directory next
to --out and renamed at the end, so that an interrupted run leaves nothing that could be mistaken for data.
"""

import contextlib
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
from mefn_jax.errors import DataError, LockError, reason
from mefn_jax.runtime.cli import define_path_flag, run_command
from mefn_jax.runtime.lock import take_flock
from mefn_jax.runtime.storage import cache_directory

READERS = {
    "flickr8k": lambda path, _: flickr8k.read(path),
    "karpathy": karpathy.read,
    "coco": coco.read,
    "table": table.read,
}
SHAPES_VERSION = 12  # increase it when the drawn scenes change, so that cached ones are made again


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
    """Writes the data set to the directory `out`, which must be new or empty. Returns lines to show the user.

    The first `captions_per_image` captions of each image are kept, all of them for 0. `scenes` and `seed` are options
    of drawn scenes (`source="shapes"`). Raises DataError for malformed input, and if `out` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already and is not empty; choose another --out or remove it")
    if source == "shapes":
        splits, notes = _draw_splits(scenes, seed), []
    else:
        splits, notes = _read_source(source, path, images, captions_per_image)
    if "train" not in splits:
        raise DataError(f"{path}: no training split; add one, since the tokenizer is trained on its captions")
    metadata = {"source": source, "lower_case": lower_case, "punctuation": punctuation, "vocab_size": vocab_size}
    captions = []

    def collect_captions():
        for example in splits["train"][1]():
            captions.extend(example["captions"])
            yield example

    sources = {**splits, "train": (splits["train"][0], collect_captions)}
    with _staging_directory(out) as staging_dir:
        # TFDS is slow to import, and --help does not need it.
        from mefn_jax.data.formats.tfds_writer import write_dataset

        data_dir = Path(staging_dir) / "data"
        data_dir.mkdir()
        write_dataset(sources, metadata, data_dir)
        text = tokenizer.train_tokenizer(captions, vocab_size, lower_case, punctuation)
        (data_dir / tokenizer.TOKENIZER_FILE).write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(data_dir, out)
    counts = ", ".join(f"{name} {number} images" for name, (number, _) in splits.items())
    return [*notes, f"{out}: {counts}; {len(json.loads(text)['model']['vocab'])} wordpieces"]


@contextlib.contextmanager
def _staging_directory(out: Path):
    """Creates a directory next to `out` that is locked while it is used and removed at the end.

    Such directories that no process holds a lock on were left behind by a killed run, and are removed too.
    """
    prefix = f".{out.name}.incomplete-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError, LockError), take_flock(leftover / "lock"):
            shutil.rmtree(leftover, ignore_errors=True)
    # It gets the name by which others find it when it is locked, so that none takes it for one of a killed run.
    unlocked = Path(tempfile.mkdtemp(prefix=f".{out.name}.unlocked-", dir=out.parent))
    work = out.parent / unlocked.name.replace(".unlocked-", ".incomplete-")
    try:
        with take_flock(unlocked / "lock"):
            unlocked.rename(work)
            yield work
    finally:
        for directory in (unlocked, work):
            shutil.rmtree(directory, ignore_errors=True)


def _draw_splits(scenes, seed):
    """Returns the splits of the drawn scenes as `write_dataset` takes them."""
    numbers = dict(zip(("train", "val", "test"), scenes, strict=True))
    return {s: (n, functools.partial(draw.generate_examples, s, n, seed)) for s, n in numbers.items()}


def _read_source(source: str, path: str, image_folder: str, captions_per_image: int):
    """Returns the splits of a source as `write_dataset` takes them, and notes to show the user."""
    if not image_folder:  # the images lie in the folder of --path
        image_folder = Path(path) if Path(path).is_dir() else Path(path).parent
    splits, notes = READERS[source](path, image_folder)
    limit = captions_per_image
    shortened = [e for entries in splits.values() for e in entries if len(e["captions"]) > limit] if limit else []
    for entry in shortened:
        entry["captions"] = entry["captions"][:limit]
    if shortened:
        notes.append(
            f"kept the first {limit} captions of {len(shortened)} images that have more (all: --captions_per_image=0)"
        )

    def read_examples(entries):
        for entry in entries:
            yield entry | {"image": entry["image"].read_bytes()}

    return {s: (len(entries), functools.partial(read_examples, entries)) for s, entries in splits.items()}, notes


def open_drawn_scenes(scenes, seed: int) -> Path:
    """Returns the directory of the drawn scenes with these numbers (train, val, test) and this seed.

    It is made on first use and lies in `$MEFN_CACHE`, or in `~/.cache/mefn_jax`. Raises DataError if it is damaged, or
    cannot be written there.
    """
    cache_key = json.dumps([SHAPES_VERSION, [int(n) for n in scenes], int(seed)])
    try:
        cache = cache_directory()
    except RuntimeError as e:
        raise DataError(f"the drawn scenes need a cache ({e}): set MEFN_CACHE to a directory") from None
    out = cache / f"shapes-{hashlib.sha256(cache_key.encode()).hexdigest()[:12]}"
    made = out / tokenizer.TOKENIZER_FILE
    if out.is_dir() and any(out.iterdir()) and not made.is_file():
        raise DataError(f"{out}: drawn scenes without {made.name}; remove this directory, and they are drawn again")
    if not made.is_file():
        try:
            prepare("shapes", "", out, vocab_size=1000, lower_case=True, punctuation="keep", scenes=scenes, seed=seed)
        except (OSError, DataError) as e:
            # If another process was faster, its data set is the same as ours.
            if made.is_file():
                return out
            if isinstance(e, DataError):
                raise
            raise DataError(
                f"{cache}: the drawn scenes cannot be written ({reason(e)}); set MEFN_CACHE to another directory"
            ) from e
    return out


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("source", None, (*READERS, "shapes"), "Format of the source.", required=True)
    define_path_flag("path", "", "Folder or file of the source; not for shapes.")
    define_path_flag("images", "", "Folder of the images; by default the folder of --path. Not for flickr8k.")
    flags.DEFINE_integer("captions_per_image", 5, "Keep the first N captions of each image; 0: all.", lower_bound=0)
    define_path_flag("out", None, "Directory to write; must be new or empty.", required=True)
    flags.DEFINE_integer("vocab_size", tokenizer.VOCAB_SIZE, "Largest number of wordpieces.", lower_bound=100)
    flags.DEFINE_bool("lower_case", True, "Train the tokenizer on lower case (config: text.lower_case).")
    flags.DEFINE_enum("punctuation", "keep", ("keep", "drop"), "Punctuation for the tokenizer (text.punctuation).")
    flags.DEFINE_list("scenes", ["4000", "500", "500"], "shapes: scenes in train, val, test.")
    flags.DEFINE_integer("scene_seed", 0, "shapes: seed of the scenes.")


def main() -> None:
    """Runs the command. Raises DataError for malformed input, and if `--out` cannot be written."""
    f = flags.FLAGS
    try:
        _prepare_from_flags(f)
    except OSError as e:
        raise DataError(f"--out={f.out}: cannot be written ({e}); free some space, or choose another directory") from e


def _prepare_from_flags(f) -> None:
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
