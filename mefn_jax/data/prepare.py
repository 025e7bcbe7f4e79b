"""Prepares a data set once: python -m mefn_jax.data.prepare --source=NAME --path=PATH [--images=DIR] --out=DIR

Sources: flickr8k (the folder as distributed), karpathy (dataset_*.json), coco (the folder of captions_*.json), table
(CSV or JSON lines of image and caption), parquet and imagefolder (as Hugging Face has them), webdataset (tars, also
img2dataset's), shapes (drawn scenes). docs/data.md describes their formats.

Writes a TFDS data set in array_record and the tokenizer into --out. Everything is written into a hidden directory next
to --out and renamed at the end, so that an interrupted run leaves nothing that could be mistaken for data. The same
command goes on with what an interrupted one has converted, in --workers processes.
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
from tqdm import tqdm

from mefn_jax.config import require_local
from mefn_jax.data import conversion, tokenizer
from mefn_jax.data.scenes import draw
from mefn_jax.data.sources import coco, flickr8k, imagefolder, karpathy, parquet, table, webdataset
from mefn_jax.data.sources.shard import Columns, Example, Shard, list_image_shards
from mefn_jax.errors import DamagedEntriesError, DataError, LockError, reason
from mefn_jax.runtime.cli import define_count_flag, define_path_flag, run_command
from mefn_jax.runtime.lock import take_flock
from mefn_jax.runtime.storage import cache_directory

READERS = {
    "flickr8k": lambda path, _: flickr8k.read(path),
    "karpathy": karpathy.read,
    "coco": coco.read,
    "table": table.read,
}
# Sources that are read shard by shard: `read(path, images, columns)` returns the shards and notes to show the user.
SHARD_READERS = {
    "parquet": parquet.read,
    "webdataset": webdataset.read,
    "imagefolder": imagefolder.read,
}
NO_TRAINING = "no training split; add one, since the tokenizer is trained on its captions"
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
    workers: int = 1,
    skip_damaged: bool = False,
    columns: Columns | None = None,
) -> list:
    """Writes the data set to the directory `out`, which must be new or empty. Returns lines to show the user.

    The first `captions_per_image` captions of each image are kept, all of them for 0. `scenes` and `seed` are options
    of drawn scenes (`source="shapes"`). `workers` processes convert (1: this one), which changes no file.
    `skip_damaged` leaves out entries that cannot be used and lists them in `left_out.txt`. `columns` are the names of
    the columns of a source that is read shard by shard. Raises DataError for malformed input, and if `out` is not
    empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already and is not empty; choose another --out or remove it")
    shards, notes = _list_shards(source, path, images, columns or Columns(), scenes, seed)
    if {shard.split for shard in shards}.isdisjoint({"train", None}):
        raise DataError(f"{path}: {NO_TRAINING}")
    facts = {"source": source, "lower_case": lower_case, "punctuation": punctuation, "vocab_size": vocab_size}
    with _staging_directory(out) as staging_dir:
        with tqdm(desc="images", unit="", disable=None) as progress:
            parts = conversion.convert_shards(
                shards, staging_dir / "parts", captions_per_image, workers, skip_damaged, progress.update
            )
        if source in SHARD_READERS:
            conversion.check_ids(parts)
        if not any("train" in part.splits for part in parts):
            raise DataError(f"{path}: {NO_TRAINING}")
        data_dir = staging_dir / "data"
        shutil.rmtree(data_dir, ignore_errors=True)  # of a run that was killed here
        data_dir.mkdir()
        counts = conversion.join_parts(parts, facts, data_dir)
        captions = conversion.Captions(parts, "train")
        text = tokenizer.train_tokenizer(captions, vocab_size, lower_case, punctuation)
        (data_dir / tokenizer.TOKENIZER_FILE).write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(data_dir, out)
    notes += _describe_parts(parts, captions_per_image)
    numbers = ", ".join(f"{name} {number} images" for name, number in counts.items())
    return [*notes, f"{out}: {numbers}; {len(json.loads(text)['model']['vocab'])} wordpieces"]


def _describe_parts(parts: list[conversion.Part], limit: int) -> list[str]:
    """Returns lines on captions and entries that were left out."""
    shortened, faults = sum(part.num_shortened for part in parts), [f for part in parts for f in part.faults]
    lines = []
    if shortened:
        lines.append(
            f"kept the first {limit} captions of {shortened} images that have more (all: --captions_per_image=0)"
        )
    if faults:
        shown = "; ".join(faults[: conversion.FAULTS_SHOWN])
        lines.append(f"left out {len(faults)} damaged entries, listed in {conversion.LEFT_OUT_FILE}: {shown}")
    return lines


@contextlib.contextmanager
def _staging_directory(out: Path):
    """Yields a directory next to `out` that is locked while it is used and removed at the end.

    A directory of a killed run, on which no process holds a lock, is used again with its content; further ones are
    removed. It stays after an interruption, and after an error that the next run can go on from.
    """
    prefix, removed = f".{out.name}.incomplete-", f".{out.name}.removed-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f"{glob.escape(removed)}*"):
        shutil.rmtree(leftover, ignore_errors=True)

    def remove(directory: Path) -> None:  # by another name, so that no other process takes it up meanwhile
        with contextlib.suppress(OSError):
            directory = directory.rename(directory.with_name(directory.name.replace(prefix, removed)))
        shutil.rmtree(directory, ignore_errors=True)

    with contextlib.ExitStack() as stack:
        work = None
        for leftover in sorted(out.parent.glob(f"{glob.escape(prefix)}*")):
            with contextlib.suppress(OSError, LockError), contextlib.ExitStack() as lock:
                lock.enter_context(take_flock(leftover / "lock"))
                if work is None:
                    work = leftover
                    stack.enter_context(lock.pop_all())
                else:
                    remove(leftover)
        if work is None:
            # It gets the name by which others find it when it is locked, so that none takes it for one of a killed run.
            unlocked = Path(tempfile.mkdtemp(prefix=f".{out.name}.unlocked-", dir=out.parent))
            work = out.parent / unlocked.name.replace(".unlocked-", ".incomplete-")
            stack.callback(shutil.rmtree, unlocked, ignore_errors=True)
            stack.enter_context(take_flock(unlocked / "lock"))
            unlocked.rename(work)
        try:
            yield work
        except DamagedEntriesError:
            raise
        except Exception:
            remove(work)
            raise
        remove(work)


def _list_shards(source: str, path: str, image_folder: str, columns: Columns, scenes, seed) -> tuple[list[Shard], list]:
    """Returns the shards of a source, and notes to show the user. Raises DataError as its reader does."""
    if source == "shapes":
        numbers = dict(zip(("train", "val", "test"), scenes, strict=True))
        return [
            Shard(f"scenes of {s}", s, [SHAPES_VERSION, int(n), int(seed)], functools.partial(_draw_scenes, s, n, seed))
            for s, n in numbers.items()
        ], []
    if not image_folder:  # the images lie in the folder of --path
        image_folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if source in SHARD_READERS:
        return SHARD_READERS[source](path, image_folder, columns)
    splits, notes = READERS[source](path, image_folder)
    return list_image_shards(str(path), splits, []), notes


def _draw_scenes(split: str, number: int, seed: int):
    """Yields the examples of a split of the drawn scenes."""
    for example in draw.generate_examples(split, number, seed):
        yield Example(split, example["image"], example["image_id"], example["captions"], example["scene"])


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
    flags.DEFINE_enum("source", None, (*READERS, *SHARD_READERS, "shapes"), "Format of the source.", required=True)
    define_path_flag("path", "", "Folder or file of the source; not for shapes.")
    define_path_flag("images", "", "Folder of the images; by default the folder of --path. Not for flickr8k.")
    flags.DEFINE_integer("captions_per_image", 5, "Keep the first N captions of each image; 0: all.", lower_bound=0)
    define_path_flag("out", None, "Directory to write; must be new or empty.", required=True)
    flags.DEFINE_integer("vocab_size", tokenizer.VOCAB_SIZE, "Largest number of wordpieces.", lower_bound=100)
    flags.DEFINE_bool("lower_case", True, "Train the tokenizer on lower case (config: text.lower_case).")
    flags.DEFINE_enum("punctuation", "keep", ("keep", "drop"), "Punctuation for the tokenizer (text.punctuation).")
    define_count_flag("workers", 1, "Number of processes that convert.")
    flags.DEFINE_bool("skip_damaged", False, "Leave out entries that cannot be used; they are counted and listed.")
    flags.DEFINE_list("caption_columns", [], "parquet, webdataset, imagefolder: caption columns; default: detected.")
    flags.DEFINE_string("image_column", "", "parquet, webdataset, imagefolder: image column; default: detected.")
    flags.DEFINE_string("id_column", "", "parquet: column of the image's id; row: number the rows; default: detected.")
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
        workers=f.workers,
        skip_damaged=f.skip_damaged,
        columns=Columns(f.image_column, tuple(f.caption_columns), f.id_column),
    )
    print("\n".join(notes))


if __name__ == "__main__":
    run_command(main, define_flags)
