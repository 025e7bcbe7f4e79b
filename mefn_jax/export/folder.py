"""Writes an exported model: a folder of data that is complete or absent (docs/export.md)."""

import copy
import functools
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save

from mefn_jax.config import list_unknown
from mefn_jax.configs import default
from mefn_jax.data.images import RESAMPLE
from mefn_jax.data.tokenizer_json import TOKENIZER_FILE
from mefn_jax.errors import ConfigError, UserError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.exported import (
    CONFIG_FILE,
    EXPORT_FORMAT,
    LEFT_OUT,
    LIBRARY,
    WEIGHTS_FILE,
    list_replaced,
    name_variables,
    read_metadata,
)
from mefn_jax.export.card import CARD_FILE
from mefn_jax.export.stablehlo import STABLEHLO_FILES
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.provenance import params_digest
from mefn_jax.runtime.storage import is_remote

PREPROCESSOR_FILE = "preprocessor_config.json"
FOLDER_FILES = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, PREPROCESSOR_FILE, CARD_FILE, *STABLEHLO_FILES}


def model_files(evaluator: Evaluator, variables: dict, checkpoint: dict, is_averaged: bool) -> dict[str, bytes]:
    """Returns the files of a model, `{name: content}`: its parameters and constants by their paths, with their types;
    its configuration, with what its `checkpoint` stores besides the state; its tokenizer; and how pixels are
    prepared."""
    arrays = {name: np.asarray(x) for name, x in name_variables(jax.device_get(variables)).items()}
    config = {
        "format": EXPORT_FORMAT.number,
        "library_name": LIBRARY,
        "ema": is_averaged,
        "parameters": params_digest(variables),
        "checkpoint": {key: value for key, value in checkpoint.items() if key not in LEFT_OUT}
        | {"config": leave_unknown_out(checkpoint["config"])},
    }
    files = {
        CONFIG_FILE: json.dumps(config, indent=1, default=lambda x: x.item()).encode(),  # of NumPy's numbers
        WEIGHTS_FILE: save(arrays, {"format": "np"}),
        TOKENIZER_FILE: evaluator.tokenizer.json.encode(),
    }
    if evaluator.config.image.arch != "regions":
        files[PREPROCESSOR_FILE] = json.dumps(describe_preprocessing(evaluator.config.image), indent=1).encode()
    return files


def leave_unknown_out(config: dict) -> dict:
    """Returns the configuration of a run without options that do not exist, and notes them: a configuration file of an
    earlier version could set any, and an exported model with one is refused."""
    known, config = default.base(config["model"]).to_dict(), copy.deepcopy(config)
    for key in list_unknown(config, known):
        *sections, name = key.split(".")
        del functools.reduce(dict.__getitem__, sections, config)[name]
        print0(f"note: {key} is no option, and is left out")
    return config


def describe_preprocessing(image) -> dict:
    """Returns how images are prepared, in the words of a `preprocessor_config.json` in Hugging Face layout. `image` are
    the options of this section."""
    resized = round(image.size / image.crop) if image.resize != "squash" else image.size
    square = {"height": resized, "width": resized}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resized} if image.resize == "crop" else square,
        "resample": int(RESAMPLE[image.resample]),
        "do_center_crop": image.resize != "squash",
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }


def check_out(out) -> Path:
    """Returns the folder of an export, before any work. Raises ConfigError if it is none on a disk, if it cannot be
    written, or if it holds anything but an earlier export, which will be replaced. If an export that was killed had
    moved one away, it is back in its place."""
    if is_remote(out):
        raise ConfigError(f"--out={out}: give a folder on this machine, and copy it")
    path = Path(out)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"--out={out}: is a file or a link; give a folder that does not exist")
    check_output_directory("--out", out, {})
    if not path.exists() and (replaced := list_replaced(path)):
        replaced[-1].rename(path)
        print0(f"note: {path} has its earlier content again, which an export that was killed had moved away")
    if path.is_dir() and any(path.iterdir()):
        try:
            read_metadata(path)
            others = sorted({x.name for x in path.iterdir()} - FOLDER_FILES)
        except (UserError, OSError):
            raise ConfigError(
                f"--out={out}: exists and is no exported model; choose another name, or remove it"
            ) from None
        if others:
            raise ConfigError(f"--out={out}: holds {', '.join(others[:5])} besides an exported model; move it away")
    return path


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    """Writes the files of a folder, which appears, or replaces an earlier export, when all are written. Raises
    ConfigError if that is not possible."""
    out = out.absolute()
    unfinished, earlier = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A process that was killed may have had the same number, as in a container.
        for path in (unfinished, *([earlier] if out.exists() else [])):
            shutil.rmtree(path, ignore_errors=True)
        unfinished.mkdir()
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        if out.exists():
            out.rename(earlier)
        unfinished.rename(out)
        for path in list_replaced(out):  # also those of exports that were killed
            shutil.rmtree(path, ignore_errors=True)
    except OSError as e:
        if earlier.exists() and not out.exists():
            earlier.rename(out)
        raise ConfigError(f"--out={out}: cannot be written ({e})") from None
    finally:
        for path in (unfinished, earlier):
            shutil.rmtree(path, ignore_errors=True)
