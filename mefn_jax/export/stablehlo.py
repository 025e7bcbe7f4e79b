"""Programs of a model for a process that has JAX alone: its encoders, and the scores of a tile, as StableHLO.

`jax.export` lowers them for CPUs, GPUs and TPUs at once, for any number of images and texts. The parameters are inputs,
by their names in `model.safetensors`, so that they are stored once (docs/export.md). B images or texts of an encoder,
I images and T texts of a tile.
"""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mefn_jax.encoders.inputs import dummy_images, dummy_texts
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.exported import name_variables, nest_variables
from mefn_jax.features import Features
from mefn_jax.model import Model

PLATFORMS = ("cpu", "cuda", "tpu")
# Programs, and the parts of the variables that each needs.
PROGRAM_PARTS = {
    "encode_images": ("image", "matcher"),
    "encode_texts": ("text", "matcher"),
    "score": ("matcher", "hubness"),
}
PROGRAMS_FILE = "stablehlo.json"  # describes the programs
STABLEHLO_FILES = (PROGRAMS_FILE, *(f"{name}.stablehlo" for name in PROGRAM_PARTS))


def export_programs(evaluator: Evaluator, variables: dict, regions: int) -> dict[str, bytes]:
    """Returns the programs of a model, and their description, as `{file name: content}`.

    `regions` is the number of precomputed regions of an image, for a model that takes them. Raises ConfigError if
    flatbuffers is missing, which JAX needs to write programs.
    """
    check_flatbuffers()
    named, files, description = name_variables(variables), {}, {}
    inputs, functions = encoder_inputs(evaluator.config, regions), list_functions(evaluator.model)
    outputs = {}
    for name, function in functions.items():
        parts = PROGRAM_PARTS[name]
        used = {key: x for key, x in named.items() if key.removeprefix("constants/").split("/")[0] in parts}
        parameters = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in used.items()}
        arguments = inputs[name] if name in inputs else tile_inputs(*outputs.values())
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(parameters, arguments)
        outputs[name] = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        files[f"{name}.stablehlo"] = bytes(exported.serialize())
        description[name] = {
            "file": f"{name}.stablehlo",
            "parameters": sorted(parameters),
            "inputs": describe_arrays(arguments),
            "outputs": describe_arrays(outputs[name]),
        }
    text = {"jax": jax.__version__, "platforms": list(PLATFORMS), "programs": description}
    return files | {PROGRAMS_FILE: json.dumps(text, indent=1).encode()}


def check_flatbuffers() -> None:
    """Raises ConfigError if flatbuffers is missing, which JAX needs to write programs."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ConfigError('--stablehlo needs flatbuffers: pip install flatbuffers, or -e ".[stablehlo]"') from None


def list_functions(model: Model) -> dict[str, Callable]:
    """Returns the functions `(parameters by path, inputs by name)` of the programs by name. Features pass as a dict of
    their fields, a container that any process with JAX knows.

    Each is the model's function of a single item or pair, so that encoders and matchers see shapes that are numbers,
    and JAX adds the axes of any length.
    """

    def encode_images(parameters, inputs):
        variables = restore_parts(parameters)
        return jax.vmap(lambda image: first(to_fields(model.encode_images(variables, image[None]))))(inputs["images"])

    def encode_texts(parameters, inputs):
        variables = restore_parts(parameters)

        def encode_text(ids, mask):
            return first(to_fields(model.encode_texts(variables, ids[None], mask[None])))

        return jax.vmap(encode_text)(inputs["ids"], inputs["mask"])

    def score(parameters, inputs):
        variables = restore_parts(parameters)

        def score_pair(image, text):
            pair = [Features(**jax.tree.map(lambda x: x[None], fields)) for fields in (image, text)]
            image_offset, text_offset = model.hub_offsets(variables, *pair)
            return model.score(variables, *pair)[0, 0] - image_offset[0] - text_offset[0]

        return jax.vmap(jax.vmap(score_pair, (None, 0)), (0, None))(inputs["images"], inputs["texts"])

    return {"encode_images": encode_images, "encode_texts": encode_texts, "score": score}


def restore_parts(parameters: dict) -> dict:
    """Returns a model's variables from its parameters by path; a part without any is empty."""
    return {part: {} for parts in PROGRAM_PARTS.values() for part in parts} | nest_variables(parameters)


def first(fields: dict) -> dict:
    """Returns the arrays of the first item."""
    return jax.tree.map(lambda x: x[0], fields)


def to_fields(features: Features) -> dict:
    """Returns the fields of Features by name."""
    fields = {"fragments": features.fragments, "mask": features.mask, "pooled": features.pooled}
    return fields | {"extra": features.extra}


def encoder_inputs(config, regions: int) -> dict[str, dict]:
    """Returns the inputs of both encoders, with their shapes for B images or texts."""
    images, ids, mask = jax.eval_shape(lambda: (dummy_images(config), *dummy_texts(config)))
    if config.image.arch == "regions":
        images = jax.ShapeDtypeStruct((1, regions, images.shape[2]), jnp.float32)
    (size,) = jax.export.symbolic_shape("B")
    inputs = {"encode_images": {"images": images}, "encode_texts": {"ids": ids, "mask": mask}}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), inputs)


def tile_inputs(images: dict, texts: dict) -> dict[str, dict]:
    """Returns the inputs of `score`, with their shapes for I images and T texts: what the encoders return."""
    sizes = dict(zip(("images", "texts"), jax.export.symbolic_shape("I, T"), strict=True))
    fields = {"images": images, "texts": texts}
    return {
        side: jax.tree.map(lambda x, n=sizes[side]: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), fields[side])
        for side in sizes
    }


def describe_arrays(tree) -> dict[str, dict]:
    """Returns shape and type of each array of a tree by its path; an axis of any length is a letter. The path of a
    single array is empty."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {
            "shape": [x if isinstance(x, int) else str(x) for x in leaf.shape],
            "dtype": str(leaf.dtype),
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
