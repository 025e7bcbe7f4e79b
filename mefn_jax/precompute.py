"""Writes the features of frozen towers to disk once: regions in SCAN's format, and words next to them.

    python -m mefn_jax.precompute --config=FILE.py --config.data.dir=DIR --config.image.pretrained=DIR \\
        --config.text.pretrained=DIR --out=DIR [--splits=train,val,test]
    python -m mefn_jax.precompute --workdir=RUN --out=DIR        # the towers of a training run

Files of each split (val is named dev, as in SCAN): `_ims.npy` float32 (rows, N, C); `_caps.txt`, one caption on a line;
`_ids.txt`, the image of each row; `_words.npy` float16 (all words, C) with `_word_offsets.npy` int64 (captions + 1,).
If every image has five captions, a row is an image, otherwise a caption. A command that was stopped resumes when it is
run again.
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
from mefn_jax.data.digests import digest_text
from mefn_jax.data.formats.precomputed import SPLIT_FILES
from mefn_jax.data.from_config import make_tokenizer, open_dataset
from mefn_jax.data.images import resize_from_config
from mefn_jax.data.mixed_dataset import MixedDataset
from mefn_jax.data.split import SPLIT_ALIASES, Split
from mefn_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from mefn_jax.encoders.from_config import build_image_encoder, build_text_encoder
from mefn_jax.encoders.pretrained import towers
from mefn_jax.errors import ConfigError, DataError, reason
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.model import select_part
from mefn_jax.resolve import resolve
from mefn_jax.runtime.cli import define_config_flag, define_path_flag, run_command
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.lock import LOCK_FILE, hold_lock
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.provenance import params_digest, versions
from mefn_jax.runtime.sharding import batch_sharding, from_local_rows, make_mesh, replicated, round_up
from mefn_jax.runtime.storage import SAVE_SECONDS


@dataclasses.dataclass(frozen=True)
class FrozenTowers:
    """Frozen towers whose features are written.

    Attributes:
        config: the configuration.
        image, text: Linen encoders with a method `backbone_features`; None for a tower whose features are not written.
        params: the parameters of both.
        tokenizer: the tokenizer; None without a text tower.
    """

    config: ConfigDict
    image: nn.Module | None
    text: nn.Module | None
    params: dict
    tokenizer: Tokenizer | None


def from_config(config: ConfigDict) -> FrozenTowers:
    """Loads the pretrained towers that a configuration names. Raises ConfigError if it names none."""
    resolved = resolve(config)
    config, pretrained, tokenizer_json = resolved.config, resolved.towers, resolved.tokenizer_json
    if not pretrained:
        raise ConfigError("give image.pretrained, text.pretrained or both: only trained towers are worth keeping")
    tokenizer = make_tokenizer(config, tokenizer_json) if tokenizer_json else None
    if tokenizer:
        towers.check_vocabulary(config, tokenizer.vocab_size)
    image = build_image_encoder(config) if "image" in pretrained else None
    text = build_text_encoder(config, tokenizer.vocab_size) if tokenizer else None
    variables = {kind: {"backbone": tower.params} for kind, tower in pretrained.items()}
    variables["constants"] = {kind: {"backbone": tower.constants} for kind, tower in pretrained.items()}
    return FrozenTowers(config, image, text, variables, tokenizer)


def from_run(workdir) -> FrozenTowers:
    """Loads both towers of the best checkpoint of a training run, or of an exported model. Raises ConfigError if it
    lacks one of them."""
    run_evaluator, params, _ = TrainedRun(workdir).load()
    if run_evaluator.config.image.arch == "regions":
        raise ConfigError(f"--workdir={workdir}: was trained on precomputed regions; it has no image tower")
    if run_evaluator.config.text.arch == "cached":
        raise ConfigError(f"--workdir={workdir}: was trained on cached text; it has no text tower")
    return FrozenTowers(
        run_evaluator.config, run_evaluator.model.image, run_evaluator.model.text, params, run_evaluator.tokenizer
    )


def precompute(frozen_towers: FrozenTowers, out: Path, splits: list[str]) -> None:
    """Writes what the frozen towers compute for the given splits to the directory `out`. Raises ConfigError if `out`
    holds features of other data or settings, and in a run of several processes."""
    if jax.process_count() > 1:
        raise ConfigError("features are written by one process; run the command on one machine")
    with hold_lock("--out", out):
        _precompute(frozen_towers, out, splits)


def _precompute(frozen_towers: FrozenTowers, out: Path, splits: list[str]) -> None:
    mesh = make_mesh()
    params = jax.device_put(frozen_towers.params, replicated(mesh))
    progress = Progress(out, feature_settings(frozen_towers))
    dataset = open_dataset(frozen_towers.config)
    if isinstance(dataset, MixedDataset):
        raise ConfigError(
            "data.dir is a mixture: write the features of each data set into a folder, and mix the folders"
        )
    opened_splits = [dataset.split(name) for name in splits]
    if frozen_towers.image and any(split.region_width for split in opened_splits):
        raise ConfigError(
            f"data.dir={frozen_towers.config.data.dir} holds precomputed regions; an image tower needs images"
        )
    for split in opened_splits:
        captions_by_image = [
            (record["image_id"], record["captions"]) for record in map(split.record, range(split.num_images))
        ]
        progress.begin(split.name, captions_by_image)
        prefix = out / SPLIT_FILES.get(split.name, split.name)
        write_lines(split, captions_by_image, prefix)
        if frozen_towers.image:
            write_regions(frozen_towers, params, mesh, split, prefix, progress)
        if frozen_towers.text:
            all_captions = [caption for _, captions in captions_by_image for caption in captions]
            write_words(frozen_towers, params, mesh, all_captions, prefix, progress)
    if frozen_towers.tokenizer:
        (out / TOKENIZER_FILE).write_text(frozen_towers.tokenizer.json, encoding="utf-8")
    print0(f"wrote {', '.join(splits)} into {out}")


def feature_settings(frozen_towers: FrozenTowers) -> dict:
    """Returns the settings that determine the features: a command resumes only with the same ones. Weights are
    identified by their digest, so a checkpoint may move to another directory."""
    config = frozen_towers.config
    sections = {kind: config[kind].to_dict() | {"pretrained": ""} for kind in ("image", "text")}
    return {
        "image": sections["image"] if frozen_towers.image else None,
        "text": sections["text"] if frozen_towers.text else None,
        "dtype": config.train.dtype,
        "batch_size": config.eval.batch_size,
        "weights": params_digest(frozen_towers.params),
        "tokenizer": frozen_towers.tokenizer and digest_text(frozen_towers.tokenizer.json),
    }


class Progress:
    """Record of the number of items of each array that are on disk: `OUT/features.json`, replaced atomically."""

    def __init__(self, out: Path, settings: dict):
        """Reads the progress in `out`, if any. Raises ConfigError, naming the settings, if it was made with others."""
        self.path, self.settings, self.done, self.splits = out / "features.json", settings, {}, {}
        if self.path.is_file():
            try:
                saved = json.loads(self.path.read_text(encoding="utf-8"))
                self.done, self.splits, saved_settings = (dict(saved[key]) for key in ("done", "splits", "settings"))
            except (ValueError, KeyError, TypeError, OSError, RecursionError) as e:
                raise ConfigError(f"{self.path}: cannot be read ({reason(e)}); remove {out} and start again") from None
            # A setting that an earlier version did not record is not known to differ.
            json_settings = json.loads(json.dumps(settings))
            changed = [k for k, value in json_settings.items() if saved_settings.get(k, value) != value]
            if changed:
                raise ConfigError(
                    f"--out={out} holds features with other settings ({', '.join(changed)}); choose another"
                )
        elif any(path.name != LOCK_FILE for path in out.iterdir()):
            raise ConfigError(f"--out={out} is not empty and holds no features.json; choose another")

    def begin(self, name: str, captions_by_image: list[tuple[str, list[str]]]) -> None:
        """Records what the split `name` holds: each image's id and captions. Raises ConfigError if `out` has features
        of other data under this name."""
        fingerprint = [len(captions_by_image), hashlib.sha256(json.dumps(captions_by_image).encode()).hexdigest()]
        if self.splits.setdefault(name, fingerprint) != fingerprint:
            raise ConfigError(
                f"--out={self.path.parent} holds features of other data for {name}; choose another, or remove it"
            )
        self._write()

    def save(self, name: str, number: int) -> None:
        """Records that the first `number` items of the array `name` are on disk."""
        self.done[name] = number
        self._write()

    def _write(self) -> None:
        """Writes `features.json`."""
        temporary = self.path.with_suffix(".new")
        record = {"settings": self.settings, "splits": self.splits, "done": self.done, "versions": versions()}
        text = json.dumps(record, indent=1)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)


def write_lines(split: Split, captions_by_image: list[tuple[str, list[str]]], prefix: Path) -> None:
    """Writes `_caps.txt` and `_ids.txt`."""
    captions, ids = [], []
    for image_index, (_, captions_of_image) in enumerate(captions_by_image):
        captions += [" ".join(caption.split()) for caption in captions_of_image]
        ids += [image_index] * (1 if one_row_per_image(split) else len(captions_of_image))
    for suffix, lines in (("caps", captions), ("ids", ids)):
        Path(f"{prefix}_{suffix}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def one_row_per_image(split: Split) -> bool:
    """Returns whether a row of features is an image. SCAN's readers take row k // 5 for caption k, or row k if the
    numbers of rows and captions are equal."""
    return bool(np.all(np.diff(split.caption_offsets) == 5))


def write_regions(frozen_towers: FrozenTowers, params, mesh, split: Split, prefix: Path, progress: Progress) -> None:
    """Writes `_ims.npy`: the grids of the image tower, one scale after another, before any projection."""
    config = frozen_towers.config
    size = round_up(config.eval.batch_size, mesh.size)

    def encode_regions(params, pixels):
        grids, _ = frozen_towers.image.apply(select_part(params, "image"), pixels, method="backbone_features")
        return jnp.concatenate([grid.reshape(len(grid), -1, grid.shape[-1]) for grid in grids], 1).astype(jnp.float32)

    pixels = jax.ShapeDtypeStruct((size, config.image.size, config.image.size, 3), jnp.uint8)
    try:
        shape = jax.eval_shape(encode_regions, params, pixels).shape
    except TypeError as e:  # widths of the scales that differ
        raise ConfigError(
            f"image.region_grids={tuple(config.image.region_grids)}: the scales have different widths; choose one scale"
        ) from e
    encode = jax.jit(
        encode_regions, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=batch_sharding(mesh)
    )
    row_offsets = np.arange(split.num_images + 1) if one_row_per_image(split) else split.caption_offsets

    def batches(start):
        for batch, number in pipeline.image_batches(
            split, resize_from_config(config.image), size, config.data.threads, start
        ):
            features = np.asarray(encode(params, from_local_rows(mesh, batch)))[:number]
            yield np.repeat(features, np.diff(row_offsets[start : start + number + 1]), 0), number
            start += number

    _write_array(
        f"{prefix}_ims.npy", (int(row_offsets[-1]), *shape[1:]), np.float32, row_offsets, batches, progress, " images"
    )


def write_words(
    frozen_towers: FrozenTowers, params, mesh, captions: list[str], prefix: Path, progress: Progress
) -> None:
    """Writes `_words.npy` and `_word_offsets.npy`: the states of the text tower for the words of every caption, one
    caption after another."""
    config = frozen_towers.config
    size = round_up(config.eval.batch_size, mesh.size)
    around = frozen_towers.tokenizer.first_word + 1
    lengths = frozen_towers.tokenizer(captions)[1].sum(1) - around
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    def encode_words(params, ids, mask):
        variables = select_part(params, "text")
        words, exist, _ = frozen_towers.text.apply(variables, ids, mask, method="backbone_features")
        return words.astype(jnp.float16), exist

    rows = batch_sharding(mesh)
    encode = jax.jit(encode_words, in_shardings=(replicated(mesh), rows, rows), out_shardings=rows)

    def batches(start):
        for ids, mask, number in pipeline.text_batches(captions[start:], frozen_towers.tokenizer, size):
            words, exist = map(np.asarray, encode(params, *from_local_rows(mesh, (ids, mask))))
            states = words[:number][exist[:number]]
            if not np.all(np.isfinite(states)):
                raise DataError(f"{prefix}_words.npy: the text tower's states do not fit float16, or are not finite")
            yield states, number

    width = jax.eval_shape(encode_words, params, *frozen_towers.tokenizer([""]))[0].shape[-1]
    np.save(f"{prefix}_word_offsets.npy", offsets)
    _write_array(f"{prefix}_words.npy", (int(offsets[-1]), width), np.float16, offsets, batches, progress, " captions")


def _write_array(path: str, shape, dtype, offsets: np.ndarray, batches, progress: Progress, unit: str) -> None:
    """Fills an array from `batches(start)`, which yields (rows, number of items) from item `start` on. Item k has the
    rows `offsets[k] : offsets[k + 1]`. The file gets its name `path` when it is complete."""
    name, part = Path(path).name, Path(path + ".part")
    done = progress.done.get(name, 0)
    if Path(path).is_file():
        return
    is_new = not (done and part.is_file())
    done = 0 if is_new else done
    array = np.lib.format.open_memmap(part, "w+" if is_new else "r+", dtype, shape if is_new else None)
    if hasattr(os, "posix_fallocate"):  # a disk that is too small fails here, not later with a bus error
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    last_save = time.perf_counter()
    with tqdm(total=len(offsets) - 1, initial=done, desc=name, unit=unit, disable=None) as bar:
        for rows, number in batches(done):
            array[offsets[done] : offsets[done + number]] = rows
            done += number
            bar.update(number)
            if time.perf_counter() - last_save > SAVE_SECONDS:
                array.flush()  # before the progress, which must not exceed what is on disk
                progress.save(name, done)
                last_save = time.perf_counter()
    array.flush()
    progress.save(name, done)
    os.replace(part, path)


def define_flags() -> None:
    """Defines the flags of the command."""
    define_config_flag(None)
    define_path_flag("workdir", "", "Training run or exported model whose towers are used, instead of --config.")
    define_path_flag("data_dir", "", "Prepared data set; default: data.dir of the configuration.")
    define_path_flag("out", None, "Directory for the features.", required=True)
    flags.DEFINE_list("splits", ["train", "val", "test"], "Splits to write.")


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    for name in ("out", "data_dir"):
        require_local(f"--{name}", f[name].value)
    if (f.config is None) == (not f.workdir):
        raise ConfigError("give either --config=FILE.py with pretrained towers, or --workdir=RUN")
    if not any(f.splits):
        raise ConfigError("--splits is empty; name at least one of train, val, test")
    check_output_directory("--out", f.out, {})
    if f.config is not None:
        require_local("data.dir", f.config.data.dir)
    frozen_towers = from_run(f.workdir) if f.workdir else from_config(f.config)
    if f.data_dir:
        frozen_towers.config.data.dir = f.data_dir
    try:
        precompute(frozen_towers, Path(f.out), [SPLIT_ALIASES.get(name, name) for name in f.splits])
    except OSError as e:
        raise DataError(f"{f.out}: cannot be written ({e}); free some space and run the same command to go on") from e


if __name__ == "__main__":
    run_command(main, define_flags)
