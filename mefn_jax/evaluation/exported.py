"""Reads a model that `mefn_jax.export` wrote: a folder of data, none of which is ever executed (docs/export.md).

`config.json` has what a checkpoint stores besides its state, `model.safetensors` the parameters and constants by their
paths, `tokenizer.json` the tokenizer. Nothing else in the folder is read. The folder may come from anyone: sizes are
compared with the header of the tensors before anything is allocated.
"""

import re
from pathlib import Path

import flax
import jax
import ml_collections
import numpy as np
from safetensors import SafetensorError, safe_open

from mefn_jax.config import flatten, list_unknown
from mefn_jax.configs import default
from mefn_jax.data.from_config import make_tokenizer
from mefn_jax.data.parsing import parse_json
from mefn_jax.data.tokenizer_json import TOKENIZER_FILE
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.encoders.pretrained.files import locate_file, to_one_line
from mefn_jax.encoders.pretrained.towers import check_vocabulary
from mefn_jax.errors import CheckpointError, UserError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.matching.systems import matcher_options
from mefn_jax.model import Model, build_model
from mefn_jax.resolve import check_options
from mefn_jax.runtime.checkpoint_format import CHECKPOINT_FORMAT
from mefn_jax.runtime.formats import Format
from mefn_jax.runtime.provenance import params_digest
from mefn_jax.runtime.sharding import from_full_copy, make_mesh, replicated
from mefn_jax.runtime.storage import is_remote

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)  # what is read, and downloaded from the hub
LIBRARY = "mefn_jax"  # `library_name` of config.json, by which it differs from other projects' files of this name
EXPORT_FORMAT = Format(1, CheckpointError, "export the run again")
# Keys of config.json, and of its `checkpoint`, what the checkpoint stored besides its state, with their types.
CONFIG_TYPES = {"format": int, "library_name": str, "ema": bool, "parameters": str, "checkpoint": dict}
CHECKPOINT_TYPES = {
    "format": int,
    "config": dict,
    "step": int,
    "examples": int,
    "data": dict | None,
    "preprocessing": dict,
    "commit": str,
    "versions": dict,
}
# Of what a checkpoint stores: what is a file of its own here, and what only a run that goes on needs.
LEFT_OUT = {"tokenizer", "best", "negatives"}
CONFIG_SECTIONS = {"data", "image", "text", "augment", "matcher", "loss", "mesh", "train", "log", "eval"}
COPY_AGAIN = "copy the folder again, or export the run again"
MAX_PROBLEMS = 20  # largest number of tensors that one error names
LARGEST_FILE = 2**26  # bytes of config.json and of tokenizer.json
# Options that a model's arrays grow with before its parameters are compared with the file's.
LARGEST_OPTIONS = {"text.max_tokens": 2**16, "image.region_grids": 2**8, "image.regions.grid": 2**8}
# NumPy's names of the types in a file of tensors.
TENSOR_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BOOL": "bool",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
}


def is_exported(directory) -> bool:
    """Returns whether a directory holds an exported model, or claims to: it has a `config.json` and no checkpoints."""
    return not (directory / "checkpoints").exists() and (directory / CONFIG_FILE).exists()


def list_replaced(directory) -> list[Path]:
    """Returns the exported models that exports to a folder had moved away, to replace them, when they were killed
    (`write_folder` in `export/folder.py`), the newest last."""
    if is_remote(directory):
        return []
    path = Path(directory).absolute()
    name = re.compile(re.escape(f".{path.name}.") + r"[0-9]+\.old")
    try:
        found = [other for other in path.parent.iterdir() if name.fullmatch(other.name) and is_exported(other)]
        return sorted(found, key=lambda other: other.stat().st_mtime)
    except OSError:  # there is no such directory
        return []


def load_exported(directory, step: str = "best", ema: bool = False):
    """Loads an exported model: `(Evaluator, variables, step)`, as `load_checkpoint` does of a run.

    Raises CheckpointError, in one line, for a folder with anything that `mefn_jax.export` does not write: an unknown
    key, a tensor that is missing, surplus or of the wrong shape or type, or that is not finite or not what was
    exported; and if `step` or `ema` name something else than what was exported.
    """
    metadata, directory = read_metadata(directory), Path(directory)
    checkpoint = metadata["checkpoint"]
    if step not in ("best", "latest", str(checkpoint["step"])):
        raise CheckpointError(f"--step={step}: {directory} is the exported model of step {checkpoint['step']} alone")
    if ema and not metadata["ema"]:
        raise CheckpointError(f"{directory}: was exported without averaged parameters; leave --ema out")
    config, tokenizer, model, shapes = build_exported(directory, checkpoint["config"])
    variables = read_variables(directory, shapes)
    if params_digest(variables) != metadata["parameters"]:
        raise CheckpointError(f"{directory / WEIGHTS_FILE}: is damaged, or of another export; {COPY_AGAIN}")
    mesh = make_mesh()
    variables = from_full_copy(replicated(mesh), variables)
    return Evaluator(model, tokenizer, config, mesh, checkpoint["data"]), variables, checkpoint["step"]


def read_metadata(directory) -> dict:
    """Returns the object of a folder's `config.json`, in the current format. Raises CheckpointError if it cannot be
    one that `mefn_jax.export` wrote, or lies in a bucket."""
    if is_remote(directory):
        raise CheckpointError(f"{directory}: an exported model is read from a disk; copy the folder to this machine")
    directory = Path(directory)
    path = directory / CONFIG_FILE
    try:
        metadata = parse_json(_read_text(directory, CONFIG_FILE), str(path))
    except UserError as e:
        raise CheckpointError(f"{e}; {COPY_AGAIN}") from None
    if not isinstance(metadata, dict) or metadata.get("library_name") != LIBRARY:
        raise CheckpointError(
            f"{path}: does not belong to an exported model; give the --workdir of a training run, or a folder that "
            "python -m mefn_jax.export wrote"
        )
    metadata = EXPORT_FORMAT.upgrade(metadata, path)
    _check_keys(path, metadata, CONFIG_TYPES)
    try:
        checkpoint = CHECKPOINT_FORMAT.upgrade(metadata["checkpoint"], path)
    except UserError:
        raise
    except Exception as e:  # an upgrade may miss a key
        raise CheckpointError(f"{path}: checkpoint cannot be read ({to_one_line(repr(e))}); {COPY_AGAIN}") from None
    checkpoint = {key: value for key, value in checkpoint.items() if key not in LEFT_OUT}  # an upgrade may add them
    _check_keys(path, checkpoint, CHECKPOINT_TYPES, "checkpoint.")
    if checkpoint["step"] < 0:
        raise CheckpointError(f"{path}: checkpoint.step is {checkpoint['step']}; {COPY_AGAIN}")
    return metadata | {"checkpoint": checkpoint}


def _read_text(directory: Path, name: str) -> str:
    """Returns the text of a file of the folder. Raises UserError, naming it, if that is not possible."""
    path = locate_file(directory, name, str(directory / name))
    if not path.is_file():  # also of a pipe or a device
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_FILE:
        raise CheckpointError(f"{path}: is larger than {LARGEST_FILE:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read ({to_one_line(e)})") from None


def _check_keys(path: Path, values: dict, types: dict, prefix: str = "") -> None:
    """Raises CheckpointError, naming the key, unless an object has exactly these keys, with values of these types."""
    for key in sorted(values.keys() ^ types.keys()):
        what = "is missing" if key in types else "is unknown"
        raise CheckpointError(f"{path}: {prefix}{str(key)[:60]} {what}; {COPY_AGAIN}")
    for key, kind in types.items():
        is_number = kind is int and type(values[key]) is not int  # True is no number
        if is_number or not isinstance(values[key], kind):
            raise CheckpointError(f"{path}: {prefix}{key} is {str(values[key])[:60]!r}; {COPY_AGAIN}")


def build_exported(directory: Path, options: dict):
    """Builds the model of a folder, whose configuration is `options`: `(config, tokenizer, model, shapes)`, the shapes
    of its variables. Raises CheckpointError for an impossible value, before anything is allocated."""
    path = directory / CONFIG_FILE
    _check_sections(path, options)
    try:
        config = ml_collections.ConfigDict(options)
        check_options(config)
        _check_depths(path, config, len(_read_header(directory)))
        tokenizer = make_tokenizer(config, _read_text(directory, TOKENIZER_FILE))
        check_vocabulary(config, tokenizer.vocab_size)
        model = build_model(config, tokenizer.vocab_size)
        # Adapters were merged into the towers.
        plain = Model(model.image, model.text, model.matcher, model.hubness, model.loss)
        shapes = jax.eval_shape(lambda key: plain.init(key, *dummy_inputs(config)), jax.random.key(0))
    except CheckpointError:
        raise
    except UserError as e:
        raise CheckpointError(f"{directory}: {e}; {COPY_AGAIN}") from None
    except Exception as e:  # values of a wrong type or size raise errors of many classes
        raise CheckpointError(f"{path}: describes no model ({to_one_line(repr(e))}); {COPY_AGAIN}") from None
    return config, tokenizer, model, shapes


def _check_sections(path: Path, options: dict) -> None:
    """Raises CheckpointError, naming it, for a section or an option that does not exist, and for an option of the
    matcher that is missing."""
    _check_keys(path, options, {"model": str, "embed_dim": int} | dict.fromkeys(CONFIG_SECTIONS, dict), "config.")
    try:
        known = matcher_options(options["model"])
    except UserError as e:
        raise CheckpointError(f"{path}: {e}; {COPY_AGAIN}") from None
    _check_keys(path, options["matcher"], dict.fromkeys(known, object), "config.matcher.")
    for key in list_unknown(options, default.base(options["model"]).to_dict()):
        raise CheckpointError(f"{path}: config.{key[:60]} is unknown; {COPY_AGAIN}")


def _check_depths(path: Path, config, tensors: int) -> None:
    """Raises CheckpointError for a number of layers above that of the tensors, and for other sizes that no model has:
    building such a model would not end."""
    towers = (f"image.{config.image.arch}.", f"text.{config.text.arch}.", "matcher.")
    for key, value in flatten(config.to_dict()).items():
        is_depth = key.startswith(towers) and key.endswith((".layers", ".depths", ".steps"))
        limit = tensors if is_depth else LARGEST_OPTIONS.get(key)
        for number in [] if limit is None else value if isinstance(value, list) else [value]:
            if type(number) is not int or number > limit:
                raise CheckpointError(f"{path}: config.{key} is {str(value)[:60]}, more than {limit}; {COPY_AGAIN}")


def _read_header(directory: Path) -> dict[str, tuple[str, tuple]]:
    """Returns type and shape of each tensor by name. Raises CheckpointError if the file cannot be read."""
    with _open_weights(directory) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}


def _open_weights(directory: Path):
    """Returns the opened file of tensors. Raises CheckpointError if it cannot be read."""
    path = locate_file(directory, WEIGHTS_FILE, str(directory / WEIGHTS_FILE))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {COPY_AGAIN}")
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read as tensors ({to_one_line(e)}); {COPY_AGAIN}") from None


def read_variables(directory: Path, shapes: dict) -> dict:
    """Returns the variables of a model, NumPy arrays in the tree of `shapes`. Raises CheckpointError that names all
    tensors that are missing, surplus, of the wrong shape or type, or not finite."""
    expected = {name: (str(x.dtype), x.shape) for name, x in name_variables(shapes).items()}
    found = {name: (TENSOR_TYPES.get(dtype, dtype), shape) for name, (dtype, shape) in _read_header(directory).items()}
    path = directory / WEIGHTS_FILE
    if problems := compare_leaves(expected, found):
        raise CheckpointError(f"{path}: does not fit {CONFIG_FILE}: {list_problems(problems)}; {COPY_AGAIN}")
    try:
        with _open_weights(directory) as file:
            arrays = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read as tensors ({to_one_line(e)}); {COPY_AGAIN}") from None
    problems = [name for name, x in arrays.items() if x.dtype.kind == "f" and not np.isfinite(x).all()]
    if problems:
        raise CheckpointError(f"{path}: NaN or infinity in {list_problems(problems)}; {COPY_AGAIN}")
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], shapes)


def compare_leaves(expected: dict, found: dict) -> list[str]:
    """Returns how the leaves `found` differ from those `expected`, both `{name: (dtype, shape)}`: which are missing,
    surplus, or of another shape or type."""
    missing = [f"missing {name} {describe_leaf(*expected[name])}" for name in sorted(expected.keys() - found.keys())]
    surplus = [f"surplus {name} {describe_leaf(*found[name])}" for name in sorted(found.keys() - expected.keys())]
    both = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    other = [f"{name} is {describe_leaf(*found[name])}, not {describe_leaf(*expected[name])}" for name in both]
    return missing + surplus + other


def describe_leaf(dtype: str, shape: tuple) -> str:
    """Returns a type and a shape as text: `float32 (3, 4)`."""
    return f"{dtype} ({', '.join(map(str, shape))})"


def list_problems(problems: list[str]) -> str:
    """Returns problems in one line, at most MAX_PROBLEMS of them."""
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(to_one_line(text) for text in problems[:MAX_PROBLEMS]) + more


def name_variables(variables: dict) -> dict:
    """Returns the leaves of a tree of variables by their path, `image/backbone/layer_0/attention/query/kernel`."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}


def nest_variables(named: dict) -> dict:
    """Returns a tree of variables from its leaves by path; parts without leaves are left out."""
    return flax.traverse_util.unflatten_dict(named, sep="/")


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
