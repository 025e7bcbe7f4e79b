"""Exports a trained model as a folder of data that `mefn_jax.load` and all commands read (docs/export.md).

    python -m mefn_jax.export --workdir=DIR --out=FOLDER [--step=best|latest|N] [--ema] [--license=apache-2.0]
    python -m mefn_jax.export --workdir=DIR --out=FOLDER --push=OWNER/NAME      uploads it to the Hugging Face hub
    python -m mefn_jax.export --workdir=DIR --out=FOLDER --stablehlo            adds programs that need JAX alone

FOLDER gets `config.json`, `model.safetensors`, `tokenizer.json`, `preprocessor_config.json` and a card, `README.md`.
"""

import jax
from absl import flags

from mefn_jax.encoders.inputs import DEFAULT_NUM_REGIONS
from mefn_jax.evaluation.run import TrainedRun, define_run_flags, run_from_flags
from mefn_jax.export.card import UNKNOWN_LICENSE, check_license, find_evaluations, write_card
from mefn_jax.export.folder import CARD_FILE, check_out, model_files, write_folder
from mefn_jax.export.push import check_push, push_folder
from mefn_jax.export.stablehlo import check_flatbuffers, export_programs
from mefn_jax.runtime.cli import define_count_flag, define_path_flag, run_command
from mefn_jax.runtime.console import print0


def export_run(
    run: TrainedRun, out, license_name: str = UNKNOWN_LICENSE, repository: str = "", regions: int = 0
) -> None:
    """Writes the folder `out` of a run's checkpoint, complete or not at all. LoRA's adapters are merged.

    `repository` is the model's name on the hub, for its card, if it has one. `regions`: adds the programs in StableHLO,
    which take this number of precomputed regions of an image, if any; 0: no programs. Raises ConfigError for an `out`
    that holds anything but an earlier export.
    """
    check_license(license_name)
    folder = check_out(out)
    if regions:
        check_flatbuffers()
    evaluator, variables, step = run.load()
    checkpoint, is_averaged = run.read_meta(step), run.is_averaged
    system = evaluator.config.model
    evaluated = f"{system}, averaged parameters" if is_averaged else system
    evaluations = find_evaluations(run.results_directory, evaluated, step)
    size = sum(x.size for x in jax.tree.leaves(variables))
    name = repository or folder.absolute().name  # the card does not say where the folder lay
    card = write_card(name, license_name, checkpoint, is_averaged, evaluations, size)
    files = model_files(evaluator, variables, checkpoint, is_averaged) | {CARD_FILE: card.encode()}
    if regions:
        files |= export_programs(evaluator, variables, regions)
    write_folder(folder, files)
    megabytes = sum(map(len, files.values())) / 1e6
    print0(
        f"wrote {folder}: {evaluated}, step {step}, {len(files)} files, {megabytes:.1f} MB; "
        f"evaluations in its card: {len(evaluations)}"
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    define_path_flag("out", None, "Folder of the exported model; an earlier export there is replaced.", required=True)
    flags.DEFINE_string("license", UNKNOWN_LICENSE, "License of the model, for its card: apache-2.0, cc-by-4.0, ...")
    flags.DEFINE_string("push", "", "Upload the folder to the Hugging Face hub as OWNER/NAME, too.")
    flags.DEFINE_bool("private", False, "With --push: if the repository is new, make it private.")
    flags.DEFINE_bool("stablehlo", False, "Add the encoders and the scores of a tile as programs that need JAX alone.")
    define_count_flag(
        "regions", DEFAULT_NUM_REGIONS, "With --stablehlo: precomputed regions of an image, for a model of these."
    )


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    if f.push:
        check_push(f.push)
    export_run(run_from_flags(), f.out, f.license, f.push, f.regions if f.stablehlo else 0)
    if f.push:
        push_folder(check_out(f.out), f.push, f.private)


if __name__ == "__main__":
    run_command(main, define_flags)
