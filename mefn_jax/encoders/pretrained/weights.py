"""Loading of pretrained towers from a directory in Hugging Face layout: `config.json` and safetensors, without torch.

`load_tower(directory, kind)` returns the Linen module that `config.json` describes, with its parameters. Every tensor
of the file is accounted for. `huggingface.py` lists the architectures, and `text_towers.py` and `image_towers.py` map
their tensors to parameters.
"""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path

import flax
import flax.linen as nn
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mefn_jax.config import MAX_IMAGE_SIZE
from mefn_jax.encoders.pretrained.files import (
    CHECKPOINT_FILES,
    check_links,
    import_transformers,
    locate_file,
    read_object,
    read_section,
    to_one_line,
)
from mefn_jax.encoders.pretrained.huggingface import ARCHITECTURES, BUILT
from mefn_jax.encoders.pretrained.mapping import Mapping
from mefn_jax.encoders.pretrained.open_clip import CONFIG, WEIGHTS, is_open_clip, read_model_config
from mefn_jax.encoders.transformer import ACTIVATIONS
from mefn_jax.errors import WeightsError

# Ends of the names of buffers, and starts of the names of heads for other tasks. A retrieval model needs neither.
IGNORED = ("position_ids", "num_batches_tracked", "mask_token")
HEADS = ("cls.", "classifier.", "qa_outputs.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
# Names of what a tower was wrapped in when it was saved: DataParallel, Lightning, torch.compile, sentence-transformers.
WRAPPERS = ("module.", "model.", "_orig_mod.", "0.auto_model.")
# Options of a module that a checkpoint does not determine.
TRAINING_OPTIONS = ("dropout", "stochastic_depth", "dtype", "remat")
MAX_LISTED = 60  # largest number of problems that one error names
FLOATS = ("F64", "F32", "F16", "BF16")  # types of tensors, in the words of a file's header
# Keys of config.json that are a side of some tensor, a number of tensors, and a side of an image.
WIDTH_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "embedding_size",
    "hidden_sizes",
    "num_channels",
    "projection_size",
)
# Names that DistilBERT has for keys of the others.
USUAL_KEYS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "activation": "hidden_act",
}
COMMON_WIDTH = 2**16  # sizes up to this one are compared tensor by tensor
DEPTH_KEYS = ("num_hidden_layers", "depths")
PIXEL_KEYS = ("image_size", "patch_size")
PAIRED = ("clip", "siglip", "open_clip")  # architectures whose config.json describes each tower in a section
SECTIONS = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")
CONFIG_KEYS = (
    "model_type",
    *WIDTH_KEYS,
    *DEPTH_KEYS,
    *PIXEL_KEYS,
    *SECTIONS,
    *BUILT,
    *USUAL_KEYS,
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    "layer_type",
    "downsample_in_first_stage",
    "downsample_in_bottleneck",
    "projection_dim",
    "eos_token_id",
    "pad_token_id",
    "mlp_ratio",
    "use_swiglu_ffn",
    "use_gated_mlp",
    "num_register_tokens",
    "key_bias",
    "rope_theta",
    "relative_attention_num_buckets",
    "vision_use_head",
)


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """Place of a tensor: its file, its name and type there (`F32`), and its shape."""

    path: Path
    name: str
    dtype: str
    shape: tuple


@dataclasses.dataclass(frozen=True)
class Tower:
    """Pretrained tower.

    Attributes:
        module: a Linen module `(inputs, ..., deterministic) -> (states of the fragments, pooled)`.
        params, constants: its parameters, and its stored statistics, nested dicts of float32 arrays.
        projection: projection of `pooled` into the joint space with the other tower, float32 `(C, D)`: CLIP's, or one
            that changes nothing, as SigLIP's `pooled` is in the joint space already; None for other towers.
        logit_scale: the logit scale of CLIP or SigLIP, as a logarithm; None for other towers.
        logit_bias: SigLIP's logit bias; None for other towers.
    """

    module: nn.Module
    params: dict
    constants: dict
    projection: np.ndarray | None
    logit_scale: float | None
    logit_bias: float | None


def load_tower(directory, kind: str) -> Tower:
    """Loads the tower of `kind` "image" or "text" from a directory.

    Sizes are compared with the headers of the files before anything is allocated. Raises WeightsError if the tower is
    missing or not supported. The error names the architecture, the option, or each tensor that is missing, surplus or
    of the wrong shape.
    """
    directory = Path(directory)
    check_links(directory)
    config = read_config(directory)
    builders = {(k, name): build for k, name, build in ARCHITECTURES}
    name = config.get("model_type")
    if not isinstance(name, str) or (kind, name) not in builders:
        supported = ", ".join(n for k, n in builders if k == kind)
        raise WeightsError(
            f"{directory}: model_type {str(name)[:60]!r} is no {kind} tower that can be loaded; supported are "
            f"{supported}"
        )
    values, path = select_tower(config, kind), directory / (CONFIG if is_open_clip(directory) else "config.json")
    _check_options(path, name, values)
    # The oldest checkpoints of BERT use these names of a LayerNorm's parameters.
    new_names = {"gamma": "weight", "beta": "bias"}
    headers = {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: new_names[m[0]], n): h
        for n, h in unwrap(read_headers(directory)).items()
    }
    _check_sizes(path, values, headers)
    try:
        mapping = builders[kind, name](values | {"projection_dim": config.get("projection_dim")}, headers)
        shapes = jax.eval_shape(mapping.module.init, jax.random.key(0), *mapping.inputs)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as e:
        raise WeightsError(f"{path}: {to_one_line(e)}") from None
    return _match_tensors(directory, headers, mapping, shapes)


def unwrap(headers: dict) -> dict:
    """Returns the headers of tensors by their names without those of `WRAPPERS` that all of them begin with."""
    while wrapper := next((w for w in WRAPPERS if headers and all(name.startswith(w) for name in headers)), ""):
        headers = {name.removeprefix(wrapper): header for name, header in headers.items()}
    return headers


def select_tower(config: dict, kind: str) -> dict:
    """Returns the part of config.json that describes the tower of `kind` "image" or "text", with unusual names of keys
    replaced (USUAL_KEYS)."""
    section = {"image": "vision_config", "text": "text_config"}[kind]
    values = config[section] if config.get("model_type") in PAIRED else config
    return {USUAL_KEYS.get(key, key): value for key, value in values.items()}


def _check_options(path: Path, name: str, values: dict) -> None:
    """Raises WeightsError if config.json asks for an activation or another option that is not supported."""
    # In a ResNet, Hugging Face applies the option in some blocks and ReLU in others, so that only ReLU can be matched.
    activations = ("relu",) if name == "resnet" else tuple(ACTIVATIONS)
    if values["hidden_act"] not in activations:
        raise WeightsError(
            f"{path}: hidden_act {str(values['hidden_act'])[:60]!r} is not one of {', '.join(activations)}"
        )
    for option, value in BUILT.items():
        if values.get(option, value) != value:
            raise WeightsError(f"{path}: {option} {str(values[option])[:60]!r} is not supported, only {value!r}")
    eps = values.get("layer_norm_eps", 0.0)
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise WeightsError(f"{path}: layer_norm_eps {str(eps)[:60]} must be in [0, 1)")


def _check_sizes(path: Path, values: dict, headers: dict) -> None:
    """Raises WeightsError, naming the key, if a size in config.json is no positive whole number, or far larger than the
    tensors of the files: to compare all shapes would then take without end."""
    longest = max((side for h in headers.values() for side in h.shape), default=0)
    limits = dict.fromkeys(WIDTH_KEYS, max(longest, COMMON_WIDTH)) | dict.fromkeys(DEPTH_KEYS, len(headers))
    for key, limit in (limits | dict.fromkeys(PIXEL_KEYS, MAX_IMAGE_SIZE)).items():
        value = values.get(key, 1)
        for number in value if isinstance(value, list | tuple) else [value]:
            if type(number) is not int or number < 1:
                raise WeightsError(f"{path}: {key} {str(value)[:60]} must be a whole number above 0")
            if number > limit:
                raise WeightsError(f"{path}: {key} {str(value)[:60]} is more than the {limit} that the files allow")


def module_options(module: nn.Module) -> dict:
    """Returns the fields of a tower's module by name, without those of `TRAINING_OPTIONS`."""
    left_out = ("parent", "name", *TRAINING_OPTIONS)
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in left_out}


def locate_checkpoint(name: str) -> Path:
    """Returns the directory of a checkpoint: `name` itself if it is a directory, else the local copy of the Hugging
    Face hub's checkpoint of this name, which is downloaded if necessary. Raises WeightsError if neither is
    available."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise WeightsError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES)))
    except (OSError, ValueError) as e:
        raise WeightsError(
            f"{name}: no such directory, and not available from the Hugging Face hub ({type(e).__name__}). Where there "
            f"is a network, run: hf download {name} --local-dir DIR; copy DIR to this machine and give its path"
        ) from None


def read_config(directory: Path) -> dict:
    """Returns the object of the checkpoint's `config.json`, completed by the defaults of `transformers`, or what
    open_clip's says in the same words. Raises WeightsError if the file is missing or cannot be interpreted."""
    if is_open_clip(directory):
        return read_model_config(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; give the directory of a Hugging Face checkpoint (config.json, model.safetensors), "
            "or of open_clip's (open_clip_config.json, open_clip_model.safetensors)"
        )
    config = read_object(path)
    if config.get("model_type") not in [name for _, name, _ in ARCHITECTURES]:
        return config  # `load_tower` rejects it
    # The library allocates by other keys (a name for each of `num_labels`), which no tower needs.
    config = {k: v for k, v in config.items() if k in CONFIG_KEYS}
    for key in SECTIONS:
        section = read_section(path, config, key)
        if section is not None:
            config[key] = {k: v for k, v in section.items() if k in CONFIG_KEYS and k not in SECTIONS}
    try:
        return import_transformers().AutoConfig.for_model(**config).to_dict()
    except Exception as e:  # the library raises errors of many classes
        raise WeightsError(f"{path}: {to_one_line(e)}") from None


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Returns the headers of all tensors of `model.safetensors`, or of the files that `model.safetensors.index.json`
    lists, by name. Raises WeightsError for a file that is missing, damaged or a pickle."""
    headers = {}
    for path in _list_files(directory):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                headers[name] = TensorHeader(path, name, str(part.get_dtype()), tuple(part.get_shape()))
    return headers


@contextlib.contextmanager
def _open(path: Path):
    """Opens a file of tensors. Raises WeightsError if it cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as e:
        raise WeightsError(f"{path}: cannot be read ({to_one_line(e)}); it may be incomplete, copy it again") from None


def _read_tensors(directory: Path, headers: list[TensorHeader]) -> dict[tuple[Path, str], np.ndarray]:
    """Returns tensors as float32, by file and name. Raises WeightsError if they exceed the machine's memory, or hold
    numbers that are not finite."""
    needed = sum(4 * math.prod(h.shape) for h in headers)
    if needed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise WeightsError(f"{directory}: the tensors need {needed:,} bytes, and this machine has {memory:,}")
    tensors, problems = {}, []
    for path in sorted({h.path for h in headers}):
        with _open(path) as file:
            for name in sorted({h.name for h in headers if h.path == path}):
                value = tensors[path, name] = file.get_tensor(name).astype(np.float32)
                if not np.isfinite(value).all():
                    problems.append(f"{name} has values that are NaN or infinite")
                elif name.endswith("running_var") and value.min(initial=0) < 0:
                    problems.append(f"{name} has a variance below 0")
    if problems:
        raise WeightsError(f"{directory}: {_list_problems(problems)}; copy the files again")
    return tensors


def _list_problems(problems) -> str:
    """Returns problems in one line, at most MAX_LISTED of them."""
    more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return "; ".join(map(to_one_line, sorted(problems)[:MAX_LISTED])) + more


def _list_files(directory: Path) -> list[Path]:
    """Returns the files that hold the tensors. Raises WeightsError if some are missing, or there are only pickles."""
    if is_open_clip(directory) and (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(n, str) for n in listed.values()):
            raise WeightsError(f"{index}: has no weight_map from names of tensors to names of files; copy it again")
        names = sorted(set(listed.values()))
        paths = [locate_file(directory, n, f"{index}: weight_map") for n in names]
        missing = [n for n, path in zip(names, paths, strict=True) if not path.is_file()]
        if missing:
            raise WeightsError(
                f"{directory}: {index.name} lists {to_one_line(', '.join(missing))}, which are missing; copy them too"
            )
        return paths
    if single.is_file():
        return [single]
    pickles = sorted(directory.glob("pytorch_model*.bin")) or sorted(directory.glob("*.bin"))
    if not pickles:
        raise WeightsError(
            f"{single}: no such file; copy it from the checkpoint's source. If the source has only pytorch_model.bin, "
            "copy that and run the command again to see how to convert it"
        )
    raise WeightsError(
        f"{pickles[0]}: a pickle may run code when it is read and is refused; convert it where torch is installed: "
        "python -c "
        '"import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() for f in '
        f"{[str(p) for p in pickles]} for k, v in torch.load(f, weights_only=True).items()}}, '{single}')\""
    )


def _match_tensors(directory, headers: dict, mapping: Mapping, shapes: dict) -> Tower:
    """Reads tensors and converts them to the tower that `mapping` describes.

    `headers` are those of all tensors by name, `shapes` those of the module's variables. Raises WeightsError that names
    all tensors that are missing, surplus or of the wrong shape or type.
    """
    flat_shapes = {kind: flax.traverse_util.flatten_dict(tree) for kind, tree in shapes.items()}
    leaves = {path: leaf for flat in flat_shapes.values() for path, leaf in flat.items()}
    problems, rest, needed = set(), dict(headers), []

    def require(name: str, shape: tuple | None) -> None:
        header = headers.get(name)
        rest.pop(name, None)
        if header is None:
            problems.add(f"missing {name}{f' {shape}' if shape else ''}")
        elif header.dtype not in FLOATS:
            problems.add(f"{name} has dtype {header.dtype}; only float32, float16 and bfloat16 are read")
        elif shape is not None and header.shape != shape:
            problems.add(f"{name} has shape {header.shape}, expected {shape}")
        else:
            needed.append(header)

    for name, path, conversion in mapping.rows:
        require(name, conversion.source_shape(leaves[path].shape))
    projection, conversion, shape = mapping.projection or ("", None, None)
    for name in [*rest]:
        if name in ("logit_scale", "logit_bias"):
            require(name, () if headers[name].shape == () else (1,))
        elif name == projection:
            require(name, conversion.source_shape(shape))
        elif 0 not in headers[name].shape and not (  # an empty tensor: registers of a DINOv3 without any
            name.endswith(IGNORED) or name.startswith((*HEADS, *mapping.other_tower))
        ):
            problems.add(f"surplus {name} {headers[name].shape}")
    if problems:
        raise WeightsError(f"{directory}: weights do not fit config.json: {_list_problems(problems)}")
    tensors = _read_tensors(directory, needed)

    def read(name: str) -> np.ndarray:
        return tensors[headers[name].path, headers[name].name]

    arrays = {
        path: np.ascontiguousarray(conversion.convert(read(name), leaves[path].shape))
        for name, path, conversion in mapping.rows
    }
    params, constants = (
        flax.traverse_util.unflatten_dict({path: arrays[path] for path in flat_shapes.get(kind, {})})
        for kind in ("params", "constants")
    )
    matrix = np.eye(mapping.joint_width, dtype=np.float32) if mapping.joint_width else None
    if projection in headers:
        matrix = conversion.convert(read(projection), shape)
    scale, bias = (read(name).item() if name in headers else None for name in ("logit_scale", "logit_bias"))
    return Tower(mapping.module, params, constants, matrix, scale, bias)
