"""Converts the shards of a source to parts of a data set, in one process or in several, and joins the parts.

A part is a folder with the array_record files of one shard, the ids and captions of its images, and `part.json`, which
says what it was made from. It gets its final name when it is complete, so a conversion that was killed continues with
the shards that have no part yet, and ends with the same files. Only a few images are in memory at a time.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mefn_jax.data.sources.shard import SPLITS, Fault, Shard
from mefn_jax.errors import DamagedEntriesError, DataError, reason
from mefn_jax.runtime.processes import set_up_worker

CONVERSION = 1  # increase it when parts change, so that earlier ones are made again
PART_FILE = "part.json"
LEFT_OUT_FILE = "left_out.txt"  # of a data set: what is wrong with the entries that are left out, one a line
FAULTS_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class SplitOfPart:
    """Examples of one split in a part.

    Attributes:
        lengths: the number of examples of each file.
        num_bytes: the size of all examples.
        caption_counts: the number of captions of each image.
    """

    lengths: list[int]
    num_bytes: int
    caption_counts: list[int]


@dataclasses.dataclass(frozen=True)
class Part:
    """Converted shard.

    Attributes:
        folder: its files.
        splits: by name, in the order of SPLITS.
        faults: what is wrong with the entries that are left out.
        num_shortened: the number of images that had more captions than are kept.
    """

    folder: Path
    splits: dict[str, SplitOfPart]
    faults: list[str]
    num_shortened: int

    @property
    def num_images(self) -> int:
        """Returns the number of images of all splits."""
        return sum(len(split.caption_counts) for split in self.splits.values())

    def read_entries(self, split: str) -> Iterator[tuple[str, list[str]]]:
        """Yields the id and the captions of each image of a split."""
        if split in self.splits:
            with _entries_file(self.folder, split).open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)


def convert_shards(
    shards: list[Shard], folder: Path, limit: int, workers: int, skips: bool, advance: Callable[[int], object]
) -> list[Part]:
    """Converts the shards that have no part in `folder` yet, and returns the parts of all shards in order.

    `limit` is the number of captions that are kept of an image, 0: all; `workers` the number of processes, 1: this one.
    `advance` is called with the numbers of images that are done. Raises DamagedEntriesError for an entry that cannot be
    used unless `skips`, and DataError as the shards' readers do, or if a process ends.
    """
    folder.mkdir(exist_ok=True)
    parts: list[Part | None] = []
    names = [f"{k:06}" for k in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        parts.append(_open_part(folder / name, _describe_shard(shard, limit)))
    for leftover in set(folder.iterdir()) - {p.folder for p in parts if p}:
        shutil.rmtree(leftover)
    missing = [k for k, part in enumerate(parts) if part is None]

    def finish(k: int, part: Part) -> None:
        if part.faults and not skips:
            raise DamagedEntriesError(
                f"{_list_faults(part.faults)}: correct {'it' if len(part.faults) == 1 else 'them'}, or leave such "
                "entries out with --skip_damaged; the same command goes on from here"
            )
        parts[k] = part

    for k, part in enumerate(parts):
        if part:
            finish(k, part)
            advance(part.num_images)
    if workers > 1 and len(missing) > 1:
        jobs = [(k, shards[k], folder / names[k], limit) for k in missing]
        with contextlib.closing(_convert_in_processes(jobs, min(workers, len(missing)))) as converted:
            for k, part in converted:
                finish(k, part)
                advance(part.num_images)
    else:
        for k in missing:
            finish(k, convert_shard(shards[k], folder / names[k], limit, advance))
    return parts


def _list_faults(faults: list[str]) -> str:
    """Returns the first faults and their number."""
    shown = "; ".join(faults[:FAULTS_SHOWN])
    more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    return f"{shown}{more} ({len(faults)} damaged in this shard)" if len(faults) > 1 else shown


def convert_shard(shard: Shard, folder: Path, limit: int, advance: Callable[[int], object] = lambda _: None) -> Part:
    """Converts a shard to the part `folder`. Raises DataError as the shard's reader does."""
    # TFDS is slow to import, and --help does not need it.
    from mefn_jax.data.formats.tfds_writer import ExampleFiles

    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    writers, counts, faults, num_shortened = {}, {}, [], 0
    try:
        with contextlib.ExitStack() as stack:
            entries = {}
            for item in shard.read():
                if isinstance(item, Fault):
                    faults.append(item.message)
                    continue
                captions = item.captions[:limit] if limit else item.captions
                num_shortened += len(captions) < len(item.captions)
                if item.split not in writers:
                    name = functools.partial(_file_of_part, work, item.split)
                    writers[item.split], counts[item.split] = ExampleFiles(name), []
                    stream = _entries_file(work, item.split).open("w", encoding="utf-8")
                    entries[item.split] = stack.enter_context(stream)
                writers[item.split].add(vars(item) | {"captions": captions})
                counts[item.split].append(len(captions))
                entries[item.split].write(json.dumps([item.image_id, captions]) + "\n")
                advance(1)
        for writer in writers.values():
            writer.close()
        splits = {
            s: SplitOfPart(writers[s].lengths, writers[s].num_bytes, counts[s])
            for s in sorted(writers, key=_rank_split)
        }
        facts = {"made_from": _describe_shard(shard, limit), "faults": faults, "num_shortened": num_shortened}
        facts["splits"] = {name: dataclasses.asdict(split) for name, split in splits.items()}
        (work / PART_FILE).write_text(json.dumps(facts), encoding="utf-8")
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Part(folder, splits, faults, num_shortened)


def _rank_split(name: str) -> int:
    return SPLITS.index(name) if name in SPLITS else len(SPLITS)


def _file_of_part(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05}"


def _entries_file(folder: Path, split: str) -> Path:
    """Returns the file of the ids and captions of a split, a line for each image."""
    return folder / f"{split}.jsonl"


def _describe_shard(shard: Shard, limit: int) -> str:
    """Returns a text that changes with the content of the shard and with how it is converted."""
    text = json.dumps([CONVERSION, shard.name, shard.split, shard.identity, limit])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _open_part(folder: Path, made_from: str) -> Part | None:
    """Returns the part in a folder; None if there is none that was made from this shard."""
    try:
        facts = json.loads((folder / PART_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or facts.get("made_from") != made_from:
        return None
    splits = {name: SplitOfPart(**split) for name, split in facts["splits"].items()}
    return Part(folder, splits, facts["faults"], facts["num_shortened"])


def _convert_in_processes(jobs: list[tuple], workers: int) -> Iterator[tuple[int, Part]]:
    """Yields the positions and parts of jobs (position, and arguments of `convert_shard`) as they are completed. Raises
    DataError as these do, or if a process ends, and stops the other processes then."""
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, _set_up_converter)
    others = set(multiprocessing.active_children())
    try:
        futures = {executor.submit(convert_shard, *job): k for k, *job in jobs}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except concurrent.futures.process.BrokenProcessPool as e:
        raise DataError(f"a process of --workers={workers} ended ({reason(e)}); is there too little memory?") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _set_up_converter() -> None:
    """Sets up a process that converts: it ends with its parent, or by its SIGTERM."""
    set_up_worker(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check_ids(parts: list[Part]) -> None:
    """Raises DataError, naming it, if two images of the data set have one id: a photograph in two splits would let
    training see what is tested, and one in two rows would be a false negative of itself."""
    digests = [
        np.frombuffer(b"".join(_digest_id(name) for name, _ in part.read_entries(split)), "<u8").reshape(-1, 2)
        for part in parts
        for split in part.splits
    ]
    sorted_digests = np.concatenate([np.empty((0, 2), "<u8"), *digests])
    sorted_digests = sorted_digests[np.lexsort(sorted_digests.T)]
    equal = np.flatnonzero((sorted_digests[1:] == sorted_digests[:-1]).all(1))
    if not len(equal):
        return
    repeated, places = sorted_digests[equal[0]].tobytes(), []
    for k, part in enumerate(parts):
        for split in part.splits:
            for name, _ in part.read_entries(split):
                if _digest_id(name) == repeated:
                    places.append(f"{split}, shard {k + 1}")
                    image_id = name
    raise DataError(
        f"image {image_id!r} is in the data {len(places)} times ({'; '.join(places[:3])}): keep one, with its rows one "
        "after the other, or name the images by another column with --id_column, by their rows with --id_column=row"
    )


def _digest_id(image_id: str) -> bytes:
    return hashlib.blake2b(image_id.encode(), digest_size=16).digest()


class Captions:
    """Captions of a split in all parts, which are read from the disk anew each time they are iterated over."""

    def __init__(self, parts: list[Part], split: str):
        self.parts, self.split = parts, split

    def __iter__(self):
        return (text for part in self.parts for _, texts in part.read_entries(self.split) for text in texts)


def join_parts(parts: list[Part], facts: dict, directory: Path) -> dict[str, int]:
    """Makes a data set of parts in a directory that exists; returns the numbers of images by split. The files of the
    parts are linked, or copied where the disk has no links."""
    from mefn_jax.data.formats.tfds_writer import describe_dataset, name_of_file

    counts, files = {}, {}
    for split in sorted({split for part in parts for split in part.splits}, key=_rank_split):
        counts[split], lengths, num_bytes = [], [], 0
        for part in parts:
            if split in part.splits:
                content = part.splits[split]
                for number in range(len(content.lengths)):
                    _link(_file_of_part(part.folder, split, number), directory / name_of_file(split, len(lengths)))
                    lengths.append(content.lengths[number])
                num_bytes += content.num_bytes
                counts[split] += content.caption_counts
        files[split] = lengths, num_bytes
    describe_dataset(directory, facts | {"caption_counts": counts}, files)
    faults = [fault for part in parts for fault in part.faults]
    if faults:
        lines = "".join(f"{' '.join(fault.split())}\n" for fault in faults)
        (directory / LEFT_OUT_FILE).write_text(lines, encoding="utf-8", errors="backslashreplace")
    return {split: len(numbers) for split, numbers in counts.items()}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
