"""Writes frozen towers' features to disk, once: regions in SCAN's format, words beside them.

    python -m mefn_jax.precompute --config=FILE.py --config.data.dir=DIR --config.image.pretrained=DIR \\
        --config.text.pretrained=DIR --out=DIR [--splits=train,val,test]
    python -m mefn_jax.precompute --workdir=RUN --out=DIR        # the towers of a training run

For each split (val is called dev, as SCAN does): `_ims.npy` float32 (rows, N, C), `_caps.txt` a caption a line,
`_ids.txt` the image of each row, `_words.npy` float16 (all words, C) with `_word_offsets.npy` int64 (captions + 1,).
With five captions an image a row is an image, else a row is a caption. The same command goes on where it was stopped.
"""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from mefn_jax.config import require_local
from mefn_jax.data import pipeline
from mefn_jax.data.formats.precomputed import SPLIT_FILES
from mefn_jax.data.from_config import make_tokenizer, open_dataset
from mefn_jax.data.images import resize_from_config
from mefn_jax.data.split import SPLIT_ALIASES, Split
from mefn_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from mefn_jax.encoders.pretrained import towers
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation import evaluator
from mefn_jax.model import build_image_encoder, build_text_encoder
from mefn_jax.resolve import check_options
from mefn_jax.runtime.checkpoint import params_digest, versions
from mefn_jax.runtime.cli import define_config_flag, run_command
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.sharding import batch_sharding, from_local_rows, make_mesh, replicated, round_up
from mefn_jax.runtime.storage import SAVE_SECONDS, resolve_directory


@dataclasses.dataclass(frozen=True)
class FrozenTowers:
    """What is computed: Linen encoders with a method `states`, their parameters, and the tokenizer; None for a tower
    whose features are not wanted."""

    config: ConfigDict
    image: nn.Module | None
    text: nn.Module | None
    params: dict
    tokenizer: Tokenizer | None


def from_config(config: ConfigDict) -> FrozenTowers:
    """The pretrained towers that a configuration names. Raises ConfigError without any."""
    check_options(config)
    config, found, text = towers.load_pretrained(config)
    if not found:
        raise ConfigError("give image.pretrained, text.pretrained or both: only trained towers are worth keeping")
    tokenizer = make_tokenizer(config, text) if text else None
    if tokenizer:
        towers.check_vocabulary(config, tokenizer.vocab_size)
    image = build_image_encoder(config) if "image" in found else None
    words = build_text_encoder(config, tokenizer.vocab_size) if tokenizer else None
    return FrozenTowers(config, image, words, {k: {"backbone": tower.params} for k, tower in found.items()}, tokenizer)


def from_run(workdir) -> FrozenTowers:
    """Both towers of a training run's best checkpoint."""
    loaded, params, _ = evaluator.load_checkpoint(workdir, "best")
    if loaded.config.image.arch == "regions":
        raise ConfigError(f"--workdir={workdir}: was trained on precomputed regions; it has no image tower")
    if loaded.config.text.arch == "cached":
        raise ConfigError(f"--workdir={workdir}: was trained on cached words; it has no text tower")
    return FrozenTowers(loaded.config, loaded.model.image, loaded.model.text, params, loaded.tokenizer)


def precompute(found: FrozenTowers, out: Path, splits: list[str]) -> None:
    """Writes the features of these splits into the directory `out`. Raises ConfigError if it holds others."""
    if jax.process_count() > 1:
        raise ConfigError("features are written by one process; run the command on one machine")
    mesh = make_mesh()
    params = jax.device_put(found.params, replicated(mesh))
    progress = Progress(out, feature_settings(found))
    dataset = open_dataset(found.config)
    opened = [dataset.split(name) for name in splits]
    if found.image and any(split.region_width for split in opened):
        raise ConfigError(f"data.dir={found.config.data.dir} holds precomputed regions; an image tower needs images")
    for split in opened:
        texts = [(r["image_id"], r["captions"]) for r in map(split.record, range(split.num_images))]
        progress.begin(split.name, texts)
        prefix = out / SPLIT_FILES.get(split.name, split.name)
        write_lines(split, texts, prefix)
        if found.image:
            write_regions(found, params, mesh, split, prefix, progress)
        if found.text:
            write_words(found, params, mesh, [c for _, captions in texts for c in captions], prefix, progress)
    if found.tokenizer:
        (out / TOKENIZER_FILE).write_text(found.tokenizer.json, encoding="utf-8")
    print0(f"wrote {', '.join(splits)} into {out}")


def feature_settings(found: FrozenTowers) -> dict:
    """What the features follow from: a run goes on only with the same. Weights count by their digest, wherever they
    came from."""
    c = found.config
    sections = {kind: c[kind].to_dict() | {"pretrained": ""} for kind in ("image", "text")}
    return {
        "image": sections["image"] if found.image else None,
        "text": sections["text"] if found.text else None,
        "dtype": c.train.dtype,
        "batch_size": c.eval.batch_size,
        "weights": params_digest(found.params),
    }


class Progress:
    """How many items of each array are written: `OUT/features.json`, replaced as a whole."""

    def __init__(self, out: Path, settings: dict):
        """Goes on with what `out` has. Raises ConfigError, naming the settings, if that was made with others."""
        self.path, self.settings, self.done, self.splits = out / "features.json", settings, {}, {}
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out={out} is a file; give a directory")
        out.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            try:
                old = json.loads(self.path.read_text(encoding="utf-8"))
                self.done, self.splits = old["done"], old["splits"]
            except (ValueError, KeyError) as e:
                raise ConfigError(f"{self.path}: cannot be read ({e!r}); remove {out} and start again") from None
            wanted = json.loads(json.dumps(settings))
            changed = [k for k in wanted if old["settings"].get(k) != wanted[k]]
            if changed:
                raise ConfigError(
                    f"--out={out} holds features with other settings ({', '.join(changed)}); choose another"
                )
        elif any(out.iterdir()):
            raise ConfigError(f"--out={out} is not empty and holds no features.json; choose another")

    def begin(self, name: str, texts: list[tuple[str, list[str]]]) -> None:
        """Notes what the split `name` holds, each image's id and captions. Raises ConfigError if its features here were
        made of something else."""
        holds = [len(texts), hashlib.sha256(json.dumps(texts).encode()).hexdigest()]
        if self.splits.setdefault(name, holds) != holds:
            raise ConfigError(
                f"--out={self.path.parent} holds features of other data for {name}; choose another, or remove it"
            )
        self._write()

    def save(self, name: str, number: int) -> None:
        """Notes that the first `number` items of the array `name` are on disk."""
        self.done[name] = number
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        noted = {"settings": self.settings, "splits": self.splits, "done": self.done, "versions": versions()}
        text = json.dumps(noted, indent=1)
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.path)


def write_lines(split: Split, texts: list[tuple[str, list[str]]], prefix: Path) -> None:
    """`_caps.txt` and `_ids.txt`."""
    captions, ids = [], []
    for k, (_, of_image) in enumerate(texts):
        captions += [" ".join(c.split()) for c in of_image]
        ids += [k] * (1 if one_row_per_image(split) else len(of_image))
    for suffix, lines in (("caps", captions), ("ids", ids)):
        Path(f"{prefix}_{suffix}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def one_row_per_image(split: Split) -> bool:
    """SCAN's readers take row k // 5 for caption k, or row k where there are as many rows as captions."""
    return bool(np.all(np.diff(split.caption_offsets) == 5))


def write_regions(found: FrozenTowers, params, mesh, split: Split, prefix: Path, progress: Progress) -> None:
    """`_ims.npy`: the image tower's grids, scale after scale, before any projection."""
    c = found.config
    size = round_up(c.eval.batch_size, mesh.size)

    def regions(params, pixels):
        grids, _ = found.image.apply({"params": params["image"]}, pixels, method="backbone_features")
        return jnp.concatenate([g.reshape(len(g), -1, g.shape[-1]) for g in grids], 1).astype(jnp.float32)

    pixels = jax.ShapeDtypeStruct((size, c.image.size, c.image.size, 3), jnp.uint8)
    try:
        shape = jax.eval_shape(regions, params, pixels).shape
    except TypeError as e:  # widths that differ
        raise ConfigError(
            f"image.region_grids={tuple(c.image.region_grids)}: the scales' widths differ; choose one scale"
        ) from e
    encode = jax.jit(regions, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=batch_sharding(mesh))
    first = np.arange(split.num_images + 1) if one_row_per_image(split) else split.caption_offsets

    def batches(start):
        for batch, number in pipeline.image_batches(split, resize_from_config(c.image), size, c.data.threads, start):
            features = np.asarray(encode(params, from_local_rows(mesh, batch)))[:number]
            yield np.repeat(features, np.diff(first[start : start + number + 1]), 0), number
            start += number

    _write(f"{prefix}_ims.npy", (int(first[-1]), *shape[1:]), np.float32, first, batches, progress, " images")


def write_words(found: FrozenTowers, params, mesh, captions: list[str], prefix: Path, progress: Progress) -> None:
    """`_words.npy` and `_word_offsets.npy`: the text tower's states of each caption's words, one behind the other."""
    c = found.config
    size = round_up(c.eval.batch_size, mesh.size)
    numbers = found.tokenizer(captions)[1].sum(1) - 2
    offsets = np.concatenate([[0], np.cumsum(numbers)])

    def words(params, ids, mask):
        return found.text.apply({"params": params["text"]}, ids, mask, method="backbone_features")[0].astype(
            jnp.float16
        )

    rows = batch_sharding(mesh)
    encode = jax.jit(words, in_shardings=(replicated(mesh), rows, rows), out_shardings=rows)

    def batches(start):
        for ids, mask, number in pipeline.text_batches(captions[start:], found.tokenizer, size):
            states = np.asarray(encode(params, *from_local_rows(mesh, (ids, mask))))[:number][mask[:number, 2:]]
            if not np.all(np.isfinite(states)):
                raise DataError(f"{prefix}_words.npy: the text tower's states do not fit float16, or are not finite")
            yield states, number

    width = jax.eval_shape(words, params, *found.tokenizer([""])).shape[-1]
    np.save(f"{prefix}_word_offsets.npy", offsets)
    _write(f"{prefix}_words.npy", (int(offsets[-1]), width), np.float16, offsets, batches, progress, " captions")


def _write(path: str, shape, dtype, first: np.ndarray, batches, progress: Progress, unit: str) -> None:
    """Fills an array from `batches(start)`, which yields (rows, number of items) from item `start` on; item k has rows
    `first[k] : first[k + 1]`. It is named `path` when it is complete."""
    name, part = Path(path).name, Path(path + ".part")
    done = progress.done.get(name, 0)
    if Path(path).is_file():
        return
    fresh = not (done and part.is_file())
    done = 0 if fresh else done
    array = np.lib.format.open_memmap(part, "w+" if fresh else "r+", dtype, shape if fresh else None)
    if hasattr(os, "posix_fallocate"):  # a disk that is too small says so now, not as a bus error in the middle
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    saved = time.perf_counter()
    with tqdm(total=len(first) - 1, initial=done, desc=name, unit=unit, disable=None) as bar:
        for rows, number in batches(done):
            array[first[done] : first[done + number]] = rows
            done += number
            bar.update(number)
            if time.perf_counter() - saved > SAVE_SECONDS:
                array.flush()  # what is noted as done must be on disk
                progress.save(name, done)
                saved = time.perf_counter()
    array.flush()
    progress.save(name, done)
    os.replace(part, path)


def define_flags() -> None:
    define_config_flag(None)
    flags.DEFINE_string("workdir", "", "Training run whose towers to use, instead of --config.")
    flags.DEFINE_string("data_dir", "", "Prepared data set; by default the configuration's.")
    flags.DEFINE_string("out", None, "Directory to write.", required=True)
    flags.DEFINE_list("splits", ["train", "val", "test"], "Splits to write.")


def main() -> None:
    f = flags.FLAGS
    for name in ("out", "data_dir"):
        require_local(f"--{name}", f[name].value)
    if (f.config is None) == (not f.workdir):
        raise ConfigError("give either --config=FILE.py with pretrained towers, or --workdir=RUN")
    if not any(f.splits):
        raise ConfigError("--splits is empty; name at least one of train, val, test")
    if f.config is not None:
        require_local("data.dir", f.config.data.dir)
    found = from_run(resolve_directory("--workdir", f.workdir)) if f.workdir else from_config(f.config)
    if f.data_dir:
        found.config.data.dir = f.data_dir
    try:
        precompute(found, Path(f.out), [SPLIT_ALIASES.get(s, s) for s in f.splits])
    except OSError as e:
        raise DataError(f"{f.out}: cannot be written ({e}); free some space and run the same command to go on") from e


if __name__ == "__main__":
    run_command(main, define_flags)
