"""Compiles the scoring step, or the train step, for a TPU slice on a machine without one.

    python eval.py compile --config=FILE.py --target=v5e:2x4 [--report=FILE]    # the scoring step
    python train.py --config=FILE.py --compile_for=v5e:2x4 [--compile_report=FILE]    # the train step

libtpu compiles for a topology given by name; nothing runs, and no data is read. The report says whether the program
fits into memory, what it sends between chips, and the least time that it takes.
"""

import functools
import json
import math
import os
import re
import sys
import time

import jax
from absl import flags
from etils import epath
from jax.experimental import topologies

from mefn_jax import config as configuration
from mefn_jax import optim
from mefn_jax.data.parsing import read_json
from mefn_jax.encoders.inputs import batch_shapes, dummy_inputs
from mefn_jax.errors import ConfigError, reason
from mefn_jax.evaluation.evaluator import compile_scorer, score_tile_mib
from mefn_jax.model import build_model, split_constants
from mefn_jax.resolve import check_options, resolve
from mefn_jax.runtime import flops
from mefn_jax.runtime.chips import GIB, chip_of
from mefn_jax.runtime.cli import define_config_flag, define_path_flag
from mefn_jax.runtime.collectives import list_collectives
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.outputs import check_output_file
from mefn_jax.runtime.sharding import (
    abstract_params,
    batch_sharding,
    check_divides,
    describe_mesh,
    make_mesh,
    param_shardings,
    replicated,
)
from mefn_jax.scoring.packing import GROUP_TEXTS, GROUP_WORDS
from mefn_jax.scoring.tiles import TILE_CAPTIONS, TILE_IMAGES, count_tile_flops, plan_tiles
from mefn_jax.training import state, step
from mefn_jax.training.hyperparameters import hyperparameters_from_config
from mefn_jax.training.setup import make_init

TEXT_GROUPS = 128  # groups of packed texts, about a thousand captions
DEFAULT_VOCABULARY = 30522  # BERT's, if text.vocab_size is 0: no tokenizer is read
# XLA's optimization level O1 (EFFORT_O1 in xla.proto) compiles several times as fast as the default for TPUs. For two
# programs on 256 chips it reported 2 and 5 % less memory than the default (docs/pods.md), so MEMORY_HEADROOM of the
# memory is kept free. JAX_OPTIMIZATION_LEVEL chooses another level.
XLA_OPT_LEVEL, EFFORT_O1 = os.environ.get("JAX_OPTIMIZATION_LEVEL", "O1"), 19
MEMORY_HEADROOM = 0.05
TARGET_HELP = "v4, v5e, v5p or v6e, then the chips: v5e:16x16, v6e:4x4, v5p:2x2x2, or v5e:16x16:2 for two slices"


def use_cpu() -> None:
    """Keeps JAX on the CPU of this machine while libtpu compiles. Call it before JAX is first used."""
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, JAX would look for a TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu queries Google's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once: none locks a TPU


def topology_devices(target: str, option: str = "--target") -> list:
    """Returns the devices of a topology such as "v5e:16x16", or of several slices of it, "v5e:16x16:2". Raises
    ConfigError, naming the option."""
    use_cpu()
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)+)(?::(\d+))?", target)
    if not match:
        raise ConfigError(f"{option}={target}: give {TARGET_HELP}")
    name, slices = f"{match[1]}:{match[2]}", {"num_slices": int(match[3])} if match[3] else {}
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)
    except Exception as e:  # JAX passes on any error of libtpu
        if "libtpu" in str(e) and "not" in str(e):
            raise ConfigError(f"{option} needs libtpu: pip install 'jax[tpu]' ({e})") from None
        raise ConfigError(f"{option}={target}: libtpu knows no such slice ({reason(e)}); give {TARGET_HELP}") from None
    if chip_of(devices[0]) is None:
        raise ConfigError(
            f"{option}={target}: mefn_jax/runtime/chips.py does not list {devices[0].device_kind}; give {TARGET_HELP}"
        )
    return devices


def resolve_config(config, report: str = "", option: str = "--report"):
    """Returns the configuration with its towers' sizes filled in. Raises ConfigError for one that cannot be compiled,
    or, naming the option, if the report cannot be written."""
    use_cpu()
    check_options(config)
    widths = {"image.regions.width": config.image.arch == "regions", "text.cached.width": config.text.arch == "cached"}
    for key, needed in widths.items():
        if needed and not configuration.get_dotted(config, key):
            raise ConfigError(f"{key} is 0, and compiling reads no data to take it from: give --config.{key}=N")
    if report and not epath.Path(report).parent.is_dir():
        raise ConfigError(f"{option}={report}: no such directory")
    if report:
        check_output_file(option, report, (), is_compile_report)
    return resolve(config).config


def is_compile_report(path) -> bool:
    """Returns whether a file is a report of this module."""
    return {"topology", "fits"} <= read_json(path).keys()


def compile_train(config, target: str, report: str = "") -> bool:
    """Compiles the train step of `config` for `target`, prints the report and writes it as JSON to `report`. Returns
    whether the program fits. Raises ConfigError."""
    config = resolve_config(config, report, "--compile_report")
    mesh = make_mesh(config.mesh, topology_devices(target, "--compile_for"))
    step_config, *arguments = abstract_train_step(config, mesh)
    state_shapes, batch, _ = arguments
    lowered = step.compile_step(mesh, state_shapes, step_config).lower(*arguments)
    report_values = compile_and_analyze(
        lowered, mesh, flops.step_flops(step_config, mesh, state_shapes.variables, batch)
    )
    report_values |= summarize_params(mesh, state_shapes.params)
    title = f"{config.model}, batch {config.train.batch_size:,} ({config.train.batch_size // mesh.size} a chip)"
    return print_and_write_report(report_values, target, mesh, title, report, TRAIN_ADVICE)


def abstract_train_step(config, mesh):
    """Returns what the train step of a complete configuration is compiled from: its StepConfig, and the arguments as
    shapes with shardings: state, batch and (as numbers) hyperparameters. Raises ConfigError if the configuration does
    not fit the mesh or itself."""
    check_divides(config.train.batch_size, config.train.grad_cache_chunks, mesh)
    model = build_model(config, config.text.vocab_size or DEFAULT_VOCABULARY)
    init, hyper = make_init(model, config, mesh), hyperparameters_from_config(config, steps=1000)
    shapes, _ = split_constants(jax.eval_shape(init, hyper.seed))
    lr_multipliers = optim.lr_multipliers(shapes, config.train.lr_multipliers, config.train.layer_decay)
    step_config = step.make_step_config(config, model, lr_multipliers)
    optimizer, with_ema = step_config.make_optimizer(hyper), config.train.ema_decay > 0
    make_state = functools.partial(
        state.create_state, init, hyper.seed, optimizer, lr_multipliers, mesh, with_ema=with_ema
    )
    state_shapes = abstract_params(mesh, jax.eval_shape(make_state))
    return step_config, state_shapes, with_batch_sharding(batch_shapes(config), batch_sharding(mesh)), hyper


def compile_scoring(config, target: str, report: str = "") -> bool:
    """Compiles the scoring step of evaluation, which scores TILE_IMAGES images a device against TEXT_GROUPS groups of
    texts, and reports as `compile_train` does."""
    lowered, mesh, tile, params, flops_by_part = lower_scoring(resolve_config(config, report), target)
    report_values = (
        compile_and_analyze(lowered, mesh, flops_by_part)
        | summarize_params(mesh, {"matcher": params["matcher"]})
        | {"tile": tile}
    )
    title = f"{config.model}, tiles of {tile['images']} images by {tile['words']} words, {tile['tiles']} a chip"
    return print_and_write_report(report_values, target, mesh, title, report, SCORE_ADVICE)


def lower_scoring(config, target: str):
    """Returns the traced scoring step for `target`, its mesh, the size and number of a chip's tiles, parameters as
    shapes, and FLOPs by part. Raises ConfigError."""
    mesh = make_mesh(None, topology_devices(target))
    model = build_model(config, config.text.vocab_size or DEFAULT_VOCABULARY)
    if not model.has_tile:
        raise ConfigError(f"model={config.model}: cannot compile its scoring: no score_products or score_tile")
    param_shapes = jax.eval_shape(model.init, jax.random.key(0), *dummy_inputs(config))
    params, batch, replicated_sharding = abstract_params(mesh, param_shapes), batch_shapes(config), replicated(mesh)
    images = with_batch_sharding(
        jax.eval_shape(model.encode_images, params, batch["images"]), batch_sharding(mesh), TILE_IMAGES * mesh.size
    )
    # The arrays that `pack` returns.
    group_shapes = (
        ((TEXT_GROUPS, GROUP_WORDS, config.embed_dim), jax.numpy.float32),
        ((TEXT_GROUPS, GROUP_WORDS, GROUP_TEXTS), jax.numpy.float32),
        ((TEXT_GROUPS, GROUP_TEXTS), jax.numpy.int32),
        ((TILE_CAPTIONS, images.pooled.shape[-1]), jax.numpy.float32),
    )
    groups = tuple(jax.ShapeDtypeStruct(*shape, sharding=replicated_sharding) for shape in group_shapes)
    tile_mib = score_tile_mib(config, mesh)
    num_groups = jax.ShapeDtypeStruct((), jax.numpy.int32, sharding=replicated_sharding)
    num_tiles, tile_images = plan_tiles(TILE_IMAGES, images.mask.shape[1], GROUP_WORDS, tile_mib)
    images_of_tile = with_batch_sharding(images, replicated_sharding, tile_images)
    scoring = model.score_tile, model.matcher.uses_pooled_products
    tile_flops = count_tile_flops(*scoring, params, images_of_tile, groups, model.projections)
    # Of a loop whose length the program does not know, one iteration is counted: hence the factors.
    flops_by_part = {"scores": mesh.size * num_tiles * tile_flops}
    lowered = compile_scorer(model, mesh, tile_mib).lower(params, images, groups, num_groups)
    tile = {
        "images": tile_images,
        "regions": images.mask.shape[1],
        "words": GROUP_WORDS,
        "tiles": num_tiles * TEXT_GROUPS,
    }
    return lowered, mesh, tile, params, flops_by_part


def with_batch_sharding(shapes, sharding, number: int | None = None):
    """Returns shapes with the given sharding, and with `number` rows if given."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((number or x.shape[0], *x.shape[1:]), x.dtype, sharding=sharding), shapes
    )


def compile_and_analyze(lowered, mesh, flops_by_part: dict[str, float]) -> dict:
    """Compiles a traced program and returns the values of the report. Figures are for one chip unless their name says
    otherwise. `flops_by_part` holds FLOPs of all chips."""
    chip, start = chip_of(mesh.devices.flat[0]), time.perf_counter()
    report_values = {
        "chips": mesh.size,
        "hbm_bytes": int(chip.memory),
        "flops_per_step": sum(flops_by_part.values()),
        "flops": flops_by_part,
    }
    try:
        program = compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as e:
        needed_bytes = parse_oom_bytes(str(e))
        if needed_bytes is None:
            raise
        memory_bytes = {"arguments": None, "outputs": None, "temporaries": None, "total": needed_bytes}
        collectives = None
    else:
        memory = program.memory_analysis()
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        memory_bytes = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "total": total + memory.generated_code_size_in_bytes,
        }
        collectives = list_collectives(program.as_text())
    io_bytes = (memory_bytes["arguments"] or 0) + (memory_bytes["outputs"] or 0)
    lower_bounds = {
        "arithmetic": sum(flops_by_part.values()) / mesh.size / chip.flops,
        "bandwidth": None if collectives is None else io_bytes / chip.bandwidth,
    }
    fits = (
        collectives is not None
        and memory_bytes["total"] <= (1 if XLA_OPT_LEVEL != "O1" else 1 - MEMORY_HEADROOM) * chip.memory
    )
    seconds = time.perf_counter() - start
    return report_values | {
        "bytes_per_chip": memory_bytes,
        "fits": fits,
        "collectives": collectives,
        "lower_bound_s": lower_bounds,
        "compile_s": round(seconds, 1),
        "compile_level": XLA_OPT_LEVEL,
    }


def compile_lowered(lowered):
    """Compiles a traced program at the optimization level XLA_OPT_LEVEL."""
    return lowered.compile({"optimization_level": EFFORT_O1} if XLA_OPT_LEVEL == "O1" else None)


def parse_oom_bytes(message: str) -> int | None:
    """Returns the bytes that the compiler needed according to its out-of-memory error; None for another error."""
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds)", message)
    if not match or "memory" not in message:
        return None
    return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2])))


def summarize_params(mesh, params) -> dict:
    """Returns the number of parameters, and the largest ones with their shardings."""
    shardings = jax.tree.leaves(param_shardings(mesh, params))
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), shardings, strict=True)
    rows = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, sharding.spec)
        for (path, leaf), sharding in leaves
    ]
    rows.sort(key=lambda row: -math.prod(row[1]))
    return {
        "parameters": state.num_params(params),
        "largest": [{"name": name, "shape": list(shape), "sharding": str(spec)} for name, shape, spec in rows[:5]],
    }


TRAIN_ADVICE = (
    "train.remat=dots or blocks, train.grad_cache_chunks=2 or more, a smaller train.score_tile_mib, mesh.fsdp=2 or "
    "more (parameters and optimizer), train.dtype=bfloat16, or a smaller train.batch_size"
)
SCORE_ADVICE = "a smaller eval.score_tile_mib"


def print_and_write_report(report_values: dict, target: str, mesh, title: str, report: str, advice: str) -> bool:
    """Prints the report on one screen and writes it as JSON to `report`. Returns whether the program fits."""
    report_values = {"topology": target} | report_values
    for line in format_report(report_values, mesh, title, advice):
        print0(line)
    if report:
        epath.Path(report).write_text(json.dumps(report_values, indent=1) + "\n")
        print0(f"wrote {report}")
    return report_values["fits"]


def format_report(report_values: dict, mesh, title: str, advice: str) -> list[str]:
    """Returns the lines of the report."""
    memory_bytes, lower_bounds = report_values["bytes_per_chip"], report_values["lower_bound_s"]

    def format_gib(number):
        return "      ?" if number is None else f"{number / GIB:7.3f}"

    verdict = "fits" if report_values["fits"] else f"does not fit; try {advice}"
    lines = [
        (
            f"{title}, for {report_values['topology']}: {mesh.size} x {mesh.devices.flat[0].device_kind} "
            f"({describe_mesh(mesh)})"
        ),
        (
            f"compiled     in {report_values['compile_s']:.0f} s at level {XLA_OPT_LEVEL}; "
            f"{report_values['parameters']:,} parameters"
        ),
        "GiB a chip   "
        + "  ".join(f"{name} {format_gib(size)}" for name, size in memory_bytes.items())
        + f" of {format_gib(report_values['hbm_bytes'])}: {verdict}",
    ]
    collectives = [
        f"{collective['kind']} {collective['count']} x, {flops.si_format(collective['bytes'])}B"
        for collective in report_values["collectives"] or []
    ]
    if report_values["collectives"] is not None:
        lines.append(f"collectives  {'; '.join(collectives) or 'none'} (of results, a chip)")
    flops_parts = ", ".join(f"{name} {flops.si_format(count)}" for name, count in report_values["flops"].items())
    lines.append(f"FLOPs        {flops.si_format(report_values['flops_per_step'])} a step ({flops_parts})")
    lower_bound_line = f"at least     {1e3 * lower_bounds['arithmetic']:.2f} ms of arithmetic at the chip's peak"
    if lower_bounds["bandwidth"] is not None:
        lower_bound_line += f", {1e3 * lower_bounds['bandwidth']:.2f} ms to read and write arguments and outputs"
    lines.append(lower_bound_line)
    for k, row in enumerate(report_values["largest"]):
        lines.append(f"{'largest' if k == 0 else '':12} {row['name']} {tuple(row['shape'])} {row['sharding']}")
    return lines


def define_flags() -> None:
    """Defines the flags of `eval.py compile`."""
    define_config_flag(None)
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("target", None, f"Slice to compile for: {TARGET_HELP}.", required=True)
    define_path_flag("report", "", "File for the report, as JSON.")


def main() -> None:
    """Compiles the scoring step. The exit status is 1 if it does not fit."""
    f = flags.FLAGS
    sys.exit(0 if compile_scoring(f.config, f.target, f.report) else 1)
