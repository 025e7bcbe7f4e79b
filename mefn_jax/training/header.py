"""The header that a run prints: model, data, devices, length and versions."""

import jax

from mefn_jax import optim
from mefn_jax.config import count_pairs
from mefn_jax.data.mixture import MixedSplit
from mefn_jax.data.statistics import summarize_text
from mefn_jax.runtime.console import print0, print_rows
from mefn_jax.runtime.provenance import git_commit, versions
from mefn_jax.runtime.sharding import describe_mesh
from mefn_jax.training import state
from mefn_jax.training.setup import Run


def print_header(run: Run, workdir) -> None:
    """Prints the header of a run: model, data, devices, length, versions."""
    config, mesh, train_split, val_split = run.config, run.evaluator.mesh, run.train, run.val
    frozen = state.num_params(optim.select_frozen(run.state.params, run.step_config.lr_multipliers))
    pairs, rows, views = count_pairs(config), config.train.batch_size, config.data.views
    examples = run.start.after(run.steps, pairs).examples
    parameters = f"{state.num_params(run.state.params):,} parameters" + (
        f", {frozen:,} of them frozen" if frozen else ""
    )
    device = mesh.devices.flat[0]
    package_versions = versions()
    text, warnings = summarize_text(train_split, run.evaluator.tokenizer, config.augment.flip > 0)
    for split in (train_split, val_split):
        if split.skipped:
            print0(
                f"data: left out {len(split.skipped)} images of {split.name} that cannot be decoded: "
                f"{', '.join(split.skipped[:5])}"
            )
    print_rows(
        {
            "model": f"{config.model}, {parameters}",
            "data": f"{config.data.dir or 'drawn scenes'}: train {train_split.num_images:,} images, "
            f"{train_split.num_captions:,} captions; {val_split.name} {val_split.num_images:,}, "
            f"{val_split.num_captions:,}",
            **({"mixture": train_split.describe()} if isinstance(train_split, MixedSplit) else {}),
            "text": text,
            "devices": f"{mesh.size} x {device.device_kind}, {jax.process_count()} process(es), {describe_mesh(mesh)}",
            "batch": (f"{pairs} pairs" if views == 1 else f"{pairs} pairs in {views} views, {rows} rows")
            + f", {rows // mesh.size} a device",
            "steps": f"{run.steps:,} ({examples / train_split.num_captions:.1f} epochs)"
            + (f", resuming after {run.first_step:,}" if run.first_step else ""),
            "seed": str(config.train.seed),
            "commit": git_commit(),
            "versions": ", ".join(
                f"{name} {package_versions[name]}" for name in ("python", "jax", "flax", "orbax-checkpoint")
            ),
            "workdir": str(workdir),
        }
    )
    for warning in warnings:
        print0(warning)
