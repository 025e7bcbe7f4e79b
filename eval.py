"""Evaluates a trained model, or pretrained towers as they are.

    python eval.py --workdir=runs/shapes [--split=test] [--step=best|latest|N] [--folds=5] [--data_dir=DIR]
    python eval.py --config=configs/flickr30k.py:model=clip,image=clip_vit_b32,text=clip \\
        --config.image.pretrained=DIR --config.text.pretrained=DIR [--out=DIR]
    python eval.py --config=FILE.py --compile_for=v5e:2x4                 # the scoring step, for a TPU slice
    python eval.py --compare=DIR,DIR,... --out=DIR [--split=test]         # evaluated runs in one table; globs too
    python eval.py --ensemble=DIR,DIR,... --out=DIR [--split=test]        # several runs' scores, averaged
"""

import sys

from absl import flags

from mefn_jax.config import compile_flags, config_flag, process_flags, run
from mefn_jax.errors import ConfigError


def define_flags() -> None:
    config_flag(None)
    flags.DEFINE_string("workdir", "", "Directory of the training run, may be gs://BUCKET/PATH; default: runs/shapes.")
    flags.DEFINE_string("data_dir", "", "Prepared data set; by default the one trained on.")
    flags.DEFINE_string("split", "test", "train, val (or dev) or test.")
    flags.DEFINE_string("step", "best", "Checkpoint: best (by val rSum), latest, or a step.")
    flags.DEFINE_integer("folds", 1, "Consecutive folds of the images to average over (COCO 1K: 5).", lower_bound=1)
    flags.DEFINE_bool("ema", False, "Evaluate the average of the parameters (train.ema), into eval/<split>_ema.")
    flags.DEFINE_list("compare", [], "Directories of evaluated runs; the first is what the others are compared with.")
    flags.DEFINE_list("ensemble", [], "Directories of runs whose score matrices are averaged.")
    process_flags()
    compile_flags()
    flags.DEFINE_string("out", "", "Where metrics.json and ranks.npz go; default: WORKDIR/eval/<split>.")


def main() -> None:
    f = flags.FLAGS
    if f.compile_for:
        from mefn_jax.aot import compile_scoring

        if f.config is None:
            raise ConfigError("--compile_for needs --config=FILE.py: which model is compiled")
        sys.exit(0 if compile_scoring(f.config, f.compile_for, f.compile_report) else 1)
    from mefn_jax import compare, evaluate  # JAX is not needed for --help
    from mefn_jax.distributed import join

    if not f.compare:  # which needs no device
        join()
    if sum(map(bool, (f.config is not None, f.workdir, f.compare, f.ensemble))) > 1:
        raise ConfigError("give one of --workdir, --config, --compare and --ensemble")
    if (f.compare or f.ensemble) and not f.out:
        raise ConfigError("--out=DIR is missing: where the tables, or the ensemble's metrics.json, go")
    if f.compare:
        compare.compare(f.compare, f.split, f.out)
    elif f.ensemble:
        evaluate.ensemble(f.ensemble, f.data_dir, f.split, f.step, f.folds, f.out)
    elif f.config is not None:
        if f["step"].present:
            raise ConfigError("--config evaluates pretrained towers without a run: leave --step out")
        evaluate.zero_shot(f.config, f.data_dir, f.split, f.folds, f.out)
    else:
        evaluate.evaluate(f.workdir or "runs/shapes", f.data_dir, f.split, f.step, f.folds, f.out, f.ema)


if __name__ == "__main__":
    run(main, define_flags)
