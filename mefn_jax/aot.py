"""Compiles the real train step, or the scoring step, for a TPU slice on a machine without one (`--compile_for`).

libtpu compiles for a topology that it is told of; nothing runs, and no data is read. The report says whether the
program fits, what it sends, and what it cannot be faster than.
"""

import functools
import json
import math
import os
import re
import time

import jax
from etils import epath
from jax.experimental import topologies

from mefn_jax import config as configuration
from mefn_jax import optim
from mefn_jax.encoders.pretrained import towers
from mefn_jax.errors import ConfigError, reason
from mefn_jax.evaluation.evaluator import compile_scorer, score_tile_mib
from mefn_jax.model import batch_shapes, build_model, dummy_inputs
from mefn_jax.resolve import check_options
from mefn_jax.runtime import flops
from mefn_jax.runtime.chips import GIB, chip_of
from mefn_jax.runtime.collectives import list_collectives
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.sharding import (
    abstract_params,
    batch_sharding,
    check_divides,
    describe_mesh,
    make_mesh,
    param_shardings,
    replicated,
)
from mefn_jax.scoring.layouts import region_block, to_packed
from mefn_jax.scoring.packing import GROUP_TEXTS, GROUP_WORDS
from mefn_jax.scoring.tiles import TILE_IMAGES, plan_tiles
from mefn_jax.training import state, step

TEXT_GROUPS = 128  # of texts, about a thousand captions
DEFAULT_VOCABULARY = 30522  # of BERT, where no tokenizer says it
# XLA's level O1 (EFFORT_O1 of xla.proto) compiles several times as fast as what a TPU is given by default. Two programs
# for 256 chips needed 2 and 5 % less memory so (docs/pods.md): this margin is kept. JAX_OPTIMIZATION_LEVEL chooses
# another level.
XLA_OPT_LEVEL, EFFORT_O1 = os.environ.get("JAX_OPTIMIZATION_LEVEL", "O1"), 19
MEMORY_HEADROOM = 0.05
TARGET_HELP = "v4, v5e, v5p or v6e, then the chips, as in v5e:16x16, v6e:4x4, v5p:2x2x2, or 2 slices as in v5e:16x16:2"


def use_cpu() -> None:
    """Keeps JAX on the CPU of this machine while libtpu compiles. Call it before JAX is first used."""
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed it would look for a TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ... and for Google's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may compile at once: none has a TPU to lock


def topology_devices(target: str) -> list:
    """The devices of a topology such as "v5e:16x16", or of several slices of it, "v5e:16x16:2". Raises ConfigError."""
    use_cpu()
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)+)(?::(\d+))?", target)
    if not match:
        raise ConfigError(f"--compile_for={target}: give {TARGET_HELP}")
    name, slices = f"{match[1]}:{match[2]}", {"num_slices": int(match[3])} if match[3] else {}
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)
    except Exception as e:  # JAX raises whatever libtpu says
        if "libtpu" in str(e) and "not" in str(e):
            raise ConfigError(f"--compile_for needs libtpu: pip install 'jax[tpu]' ({e})") from None
        raise ConfigError(
            f"--compile_for={target}: libtpu knows no such slice ({reason(e)}); give {TARGET_HELP}"
        ) from None
    if chip_of(devices[0]) is None:
        raise ConfigError(
            f"--compile_for={target}: mefn_jax/chips.py has no {devices[0].device_kind}; give {TARGET_HELP}"
        )
    return devices


def resolve_config(config, report: str):
    """The configuration with its towers' sizes. Raises ConfigError for what cannot be compiled or written."""
    use_cpu()
    check_options(config)
    widths = {"image.regions.width": config.image.arch == "regions", "text.cached.width": config.text.arch == "cached"}
    for key, needed in widths.items():
        if needed and not configuration.get_dotted(config, key):
            raise ConfigError(f"{key} is 0, and --compile_for reads no data that would say it: give --config.{key}=N")
    if report and not epath.Path(report).parent.is_dir():
        raise ConfigError(f"--compile_report={report}: there is no such directory")
    return towers.load_pretrained(config)[0]


def compile_train(config, target: str, report: str = "") -> bool:
    """Compiles the train step of `config` for `target`, prints the report and writes it as JSON into `report`. Returns
    whether it fits. Raises ConfigError."""
    config = resolve_config(config, report)
    mesh = make_mesh(config.mesh, topology_devices(target))
    check_divides(config.train.batch_size, config.train.grad_cache_chunks, mesh)
    model = build_model(config, config.text.vocab_size or DEFAULT_VOCABULARY)
    init = functools.partial(model.init, jax.random.key(0), *dummy_inputs(config))
    factors = optim.lr_multipliers(jax.eval_shape(init), config.train.lr_multipliers, config.train.layer_decay)
    schedule = optim.lr_schedule(config.train.learning_rate, 1000, config.train.warmup_fraction)
    optimizer = optim.adamw(schedule, config.train.weight_decay, config.train.clip_norm, factors)
    new = functools.partial(state.create_state, init, optimizer, factors, mesh, averaged=config.train.ema_decay > 0)
    current = abstract_params(mesh, jax.eval_shape(new))
    batch = with_batch_sharding(batch_shapes(config), batch_sharding(mesh))
    recipe = step.make_step_config(config, model, optimizer, factors)
    lowered = step.compile_step(mesh, current, recipe).lower(current, batch)
    facts = compile_and_analyze(lowered, mesh, flops.step_flops(recipe, mesh, current.params, batch))
    facts |= summarize_params(mesh, current.params)
    what = f"{config.model}, batch {config.train.batch_size:,} ({config.train.batch_size // mesh.size} a chip)"
    return print_and_write_report(facts, target, mesh, what, report, TRAIN_ADVICE)


def compile_scoring(config, target: str, report: str = "") -> bool:
    """Likewise the step of evaluation that scores IMAGES images a device against GROUPS groups of texts."""
    lowered, mesh, tile, params, work = lower_scoring(resolve_config(config, report), target)
    facts = (
        compile_and_analyze(lowered, mesh, work)
        | summarize_params(mesh, {"matcher": params["matcher"]})
        | {"tile": tile}
    )
    what = f"{config.model}, tiles of {tile['images']} images by {tile['words']} words, {tile['tiles']} a chip"
    return print_and_write_report(facts, target, mesh, what, report, SCORE_ADVICE)


def lower_scoring(config, target: str):
    """The traced step for `target`, its mesh, the size and number of a chip's tiles, parameters as shapes, and FLOPs.
    Raises ConfigError."""
    mesh = make_mesh(None, topology_devices(target))
    model = build_model(config, config.text.vocab_size or DEFAULT_VOCABULARY)
    if not model.has_tile:
        raise ConfigError(f"--compile_for: the matcher of model={config.model} has no tile to compile")
    shapes = jax.eval_shape(model.init, jax.random.key(0), *dummy_inputs(config))
    params, batch, everywhere = abstract_params(mesh, shapes), batch_shapes(config), replicated(mesh)
    images = with_batch_sharding(
        jax.eval_shape(model.encode_images, params, batch["images"]), batch_sharding(mesh), TILE_IMAGES * mesh.size
    )
    sizes = (
        (GROUP_WORDS, config.embed_dim),
        (GROUP_WORDS, GROUP_TEXTS),
        (GROUP_TEXTS, images.pooled.shape[-1]),
    )  # as of `pack`
    groups = tuple(jax.ShapeDtypeStruct((TEXT_GROUPS, *size), jax.numpy.float32, sharding=everywhere) for size in sizes)
    mib = score_tile_mib(config, mesh)
    number = jax.ShapeDtypeStruct((), jax.numpy.int32, sharding=everywhere)
    tiles, size = plan_tiles(TILE_IMAGES, images.mask.shape[1], GROUP_WORDS, mib)
    regions = jax.eval_shape(region_block, with_batch_sharding(images, everywhere, size))
    words = jax.eval_shape(lambda groups: jax.tree.map(lambda x: x[0], to_packed(*groups)), groups)
    # Loops are counted once, by XLA and by us.
    work = {"scores": mesh.size * tiles * TEXT_GROUPS * flops.count_flops(model.score_tile, params, regions, words)}
    lowered = compile_scorer(model, mesh, mib).lower(params, images, groups, number)
    tile = {"images": size, "regions": images.mask.shape[1], "words": GROUP_WORDS, "tiles": tiles * TEXT_GROUPS}
    return lowered, mesh, tile, params, work


def with_batch_sharding(shapes, sharding, number: int | None = None):
    """Shapes with a sharding, and with another number of rows."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((number or x.shape[0], *x.shape[1:]), x.dtype, sharding=sharding), shapes
    )


def compile_and_analyze(lowered, mesh, work: dict[str, float]) -> dict:
    """Compiles, and says what there is to know of the program; figures are of a chip unless named otherwise."""
    chip, start = chip_of(mesh.devices.flat[0]), time.perf_counter()
    facts = {"chips": mesh.size, "hbm_bytes": int(chip.memory), "flops_per_step": sum(work.values()), "flops": work}
    try:
        program = compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as e:
        used = parse_oom_bytes(str(e))
        if used is None:
            raise
        sizes, moved = {"arguments": None, "outputs": None, "temporaries": None, "total": used}, None
    else:
        m = program.memory_analysis()
        total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
        sizes = {
            "arguments": m.argument_size_in_bytes,
            "outputs": m.output_size_in_bytes,
            "temporaries": m.temp_size_in_bytes,
            "total": total + m.generated_code_size_in_bytes,
        }
        moved = list_collectives(program.as_text())
    touched = (sizes["arguments"] or 0) + (sizes["outputs"] or 0)
    bounds = {
        "arithmetic": sum(work.values()) / mesh.size / chip.flops,
        "bandwidth": None if moved is None else touched / chip.bandwidth,
    }
    fits = moved is not None and sizes["total"] <= (1 if XLA_OPT_LEVEL != "O1" else 1 - MEMORY_HEADROOM) * chip.memory
    seconds = time.perf_counter() - start
    return facts | {
        "bytes_per_chip": sizes,
        "fits": fits,
        "collectives": moved,
        "lower_bound_s": bounds,
        "compile_s": round(seconds, 1),
        "compile_level": XLA_OPT_LEVEL,
    }


def compile_lowered(lowered):
    """Compiles at LEVEL."""
    return lowered.compile({"optimization_level": EFFORT_O1} if XLA_OPT_LEVEL == "O1" else None)


def parse_oom_bytes(message: str) -> int | None:
    """The bytes that the compiler says it needed; None for another error."""
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds)", message)
    if not found or "memory" not in message:
        return None
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def summarize_params(mesh, params) -> dict:
    """How many parameters there are, and the largest with their places."""
    where = jax.tree.leaves(param_shardings(mesh, params))
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), where, strict=True)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, s.spec) for (path, x), s in leaves]
    named.sort(key=lambda row: -math.prod(row[1]))
    return {
        "parameters": state.num_params(params),
        "largest": [{"name": n, "shape": list(s), "sharding": str(p)} for n, s, p in named[:5]],
    }


TRAIN_ADVICE = (
    "train.remat=dots or blocks, train.grad_cache_chunks=2 or more, a smaller train.score_tile_mib, mesh.fsdp=2 or more "
    "(parameters and optimiser), train.dtype=bfloat16, or a smaller train.batch_size"
)
SCORE_ADVICE = "a smaller eval.score_tile_mib"


def print_and_write_report(facts: dict, target: str, mesh, what: str, report: str, advice: str) -> bool:
    """Prints the report on one screen and writes it; returns whether the program fits."""
    facts = {"topology": target} | facts
    for line in format_report(facts, mesh, what, advice):
        print0(line)
    if report:
        epath.Path(report).write_text(json.dumps(facts, indent=1) + "\n")
        print0(f"wrote {report}")
    return facts["fits"]


def format_report(facts: dict, mesh, what: str, advice: str) -> list[str]:
    """The report as text."""
    sizes, bounds = facts["bytes_per_chip"], facts["lower_bound_s"]

    def gib(number):
        return "      ?" if number is None else f"{number / GIB:7.3f}"

    verdict = "fits" if facts["fits"] else f"does not fit; try {advice}"
    text = [
        f"{what}, for {facts['topology']}: {mesh.size} x {mesh.devices.flat[0].device_kind} ({describe_mesh(mesh)})",
        f"compiled     in {facts['compile_s']:.0f} s at level {XLA_OPT_LEVEL}; {facts['parameters']:,} parameters",
        "GiB a chip   "
        + "  ".join(f"{name} {gib(size)}" for name, size in sizes.items())
        + f" of {gib(facts['hbm_bytes'])}: {verdict}",
    ]
    moved = [f"{c['kind']} {c['count']} x, {flops.si_format(c['bytes'])}B" for c in facts["collectives"] or []]
    if facts["collectives"] is not None:
        text.append(f"collectives  {'; '.join(moved) or 'none'} (of results, a chip)")
    parts = ", ".join(f"{name} {flops.si_format(n)}" for name, n in facts["flops"].items())
    text.append(f"FLOPs        {flops.si_format(facts['flops_per_step'])} a step ({parts})")
    least = f"at least     {1e3 * bounds['arithmetic']:.2f} ms of arithmetic at the chip's peak"
    if bounds["bandwidth"] is not None:
        least += f", {1e3 * bounds['bandwidth']:.2f} ms to read and write arguments and outputs"
    text.append(least)
    for k, row in enumerate(facts["largest"]):
        text.append(f"{'largest' if k == 0 else '':12} {row['name']} {tuple(row['shape'])} {row['sharding']}")
    return text
