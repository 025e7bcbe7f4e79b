"""Evaluates a trained model, or pretrained towers without training.

    python eval.py --workdir=runs/shapes [--split=test] [--step=best|latest|N] [--folds=5] [--data_dir=DIR]
    python eval.py --config=configs/flickr30k.py:model=clip,image=clip_vit_b32,text=clip \\
        --config.image.pretrained=DIR --config.text.pretrained=DIR [--out=DIR]
    python eval.py --config=FILE.py --compile_for=v5e:2x4                 # the scoring step, for a TPU slice
    python eval.py --compare=DIR,DIR,... --out=DIR [--split=test]         # evaluated runs in one table; globs too
    python eval.py --workdir=DIR --index_images=FOLDER --index=INDEX      # encodes a folder of images
    python eval.py --workdir=DIR --index=INDEX --query=TEXT [--topk=10] [--rerank=1000] [--out=FILE.png]
    python eval.py --workdir=DIR --query_image=FILE --captions=FILE.txt [--topk=10]
    python eval.py --workdir=DIR --explain=N [--split=test]               # entropy maps of N pairs of a split
    python eval.py --workdir=DIR --explain_image=FILE --explain_caption=TEXT [--out=FILE.png]    # of any pair
    python eval.py --workdir=DIR --report [--split=test]                  # evaluates, and writes report.html
    python eval.py --ensemble=DIR,DIR,... --out=DIR [--split=test]        # mean of several runs' scores
"""

import sys

from absl import flags

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.cli import define_compile_flags, define_config_flag, define_process_flags, run_command


def define_flags() -> None:
    """Defines the flags of the command."""
    define_config_flag(None)
    flags.DEFINE_string("workdir", "", "Directory of the training run, may be gs://BUCKET/PATH; default: runs/shapes.")
    flags.DEFINE_string("data_dir", "", "Prepared data set; default: the one of the run.")
    flags.DEFINE_string("split", "test", "train, val (or dev), test, or held_out (of data.held_out_images).")
    flags.DEFINE_string("step", "best", "Checkpoint: best (by val rSum), latest, or a step.")
    flags.DEFINE_list(
        "folds", ["1"], "Numbers of consecutive folds of the images to average over; 1,5: COCO's 5K and 1K at once."
    )
    flags.DEFINE_string("save_scores", "", "A .npy file for the scores of all pairs, float32 (images, captions).")
    flags.DEFINE_bool("ema", False, "Evaluate the averaged parameters (train.ema_decay), into eval/<split>_ema.")
    flags.DEFINE_list("compare", [], "Directories of evaluated runs; the others are compared with the first.")
    flags.DEFINE_list("ensemble", [], "Directories of runs whose score matrices are averaged.")
    flags.DEFINE_string(
        "rerank", "", "Candidates to rerank, as a share or a number: compared with scoring all pairs, or for --query."
    )
    flags.DEFINE_string("index_images", "", "Folder of images to encode into --index.")
    flags.DEFINE_string("index", "", "Directory of an index, to create or to search.")
    flags.DEFINE_string("query", None, "A caption; finds its images in --index.")
    flags.DEFINE_string("query_image", "", "An image file; finds its captions in --captions.")
    flags.DEFINE_string("captions", "", "A text file with one caption on each line.")
    flags.DEFINE_integer("explain", 0, "Number of captions to draw with their explanations.", lower_bound=0)
    flags.DEFINE_string("explain_image", "", "An image file to explain with --explain_caption.")
    flags.DEFINE_string("explain_caption", "", "A caption to explain with --explain_image.")
    flags.DEFINE_bool("report", False, "Evaluate, and write report.html about the run.")
    flags.DEFINE_string("boxes", "", "For --explain of precomputed regions: their boxes, .npy (images, regions, 4).")
    flags.DEFINE_string("photos", "", "For --explain of precomputed regions: a folder of photographs by image id.")
    flags.DEFINE_integer("topk", 10, "Number of results.", lower_bound=1)
    define_process_flags()
    define_compile_flags()
    flags.DEFINE_string(
        "out", "", "Directory for metrics.json and ranks.npz (default: WORKDIR/eval/<split>); for a query, a picture."
    )


def main() -> None:
    """Runs the command that the flags ask for."""
    f = flags.FLAGS
    if f.compile_for:
        from mefn_jax.aot import compile_scoring

        if f.config is None:
            raise ConfigError("--compile_for needs --config=FILE.py, the model to compile")
        sys.exit(0 if compile_scoring(f.config, f.compile_for, f.compile_report) else 1)
    from mefn_jax.evaluation import ensemble, evaluate  # imported late: --help does not need JAX
    from mefn_jax.reports import compare
    from mefn_jax.runtime.multihost import initialize

    if not f.compare:  # --compare needs no device
        initialize()
    if sum(map(bool, (f.config is not None, f.workdir, f.compare, f.ensemble))) > 1:
        raise ConfigError("give one of --workdir, --config, --compare and --ensemble")
    pairs = f.explain or f.explain_image or f.explain_caption
    if (pairs or f.report) and (f.config is not None or f.compare or f.ensemble):
        raise ConfigError("--explain and --report need one run: give --workdir=DIR")
    if (f.boxes or f.photos) and not f.explain:
        raise ConfigError("--boxes and --photos need --explain=N, whose regions they locate")
    if (f.compare or f.ensemble) and not f.out:
        raise ConfigError("--out=DIR is missing: the directory for the tables, or for the ensemble's metrics.json")
    if not all(number.isdigit() and int(number) for number in f.folds) or not f.folds:
        raise ConfigError(f"--folds={','.join(f.folds)}: give numbers of at least 1")
    folds = tuple(map(int, f.folds))
    if f.rerank and (f.config is not None or f.compare or f.ensemble or pairs or f.index_images or f.query_image):
        raise ConfigError("--rerank needs the evaluation of one run, or --query: leave it out")
    if f.index_images or f.index or f.query is not None or f.query_image:
        run_retrieval(f)
    elif pairs:
        run_explanations(f)
    elif f.compare:
        compare.compare(f.compare, f.split, f.out)
    elif f.ensemble:
        ensemble.evaluate_ensemble(f.ensemble, f.data_dir, f.split, f.step, folds, f.out, save_scores=f.save_scores)
    elif f.config is not None:
        if f["step"].present:
            raise ConfigError("--config evaluates pretrained towers without a run: leave --step out")
        evaluate.zero_shot(f.config, f.data_dir, f.split, folds, f.out, save_scores=f.save_scores)
    elif f.report:
        from mefn_jax.reports import report  # imported late: only --report needs matplotlib and jinja2

        report.write_report(
            f.workdir or "runs/shapes", f.data_dir, f.split, f.step, folds, f.out, f.ema, f.save_scores, f.rerank
        )
    else:
        evaluate.evaluate(
            f.workdir or "runs/shapes", f.data_dir, f.split, f.step, folds, f.out, f.ema, f.save_scores, f.rerank
        )


def run_retrieval(f) -> None:
    """Runs the command that builds or searches an index, or ranks captions."""
    from mefn_jax.retrieval import search

    run = (f.workdir or "runs/shapes", f.step)
    tasks = [name for name in ("index_images", "query", "query_image") if f[name].value not in (None, "")]
    if f.query == "":
        raise ConfigError("--query is empty: give a caption")
    if len(tasks) != 1:
        raise ConfigError("give one of --index_images, --query and --query_image")
    if (f.index_images or f.query) and not f.index:
        raise ConfigError("--index=INDEX is missing: the directory of the index")
    if f.query_image and not f.captions:
        raise ConfigError("--captions=FILE.txt is missing: the lines to rank")
    if f.index_images:
        search.index_images(*run, f.index_images, f.index, f.ema)
    elif f.query_image:
        search.rank_captions(*run, f.query_image, f.captions, f.topk, f.ema)
    else:
        search.search_images(*run, f.index, f.query, f.topk, f.rerank, f.out, f.ema)


def run_explanations(f) -> None:
    """Runs the command that draws explanations."""
    from mefn_jax.reports import explain

    if f.explain and (f.explain_image or f.explain_caption):
        raise ConfigError("give --explain=N, or --explain_image and --explain_caption")
    workdir = f.workdir or "runs/shapes"
    if f.explain:
        explain.draw_captions(workdir, f.data_dir, f.split, f.step, f.explain, f.out, f.ema, f.boxes, f.photos)
    elif f.explain_image and f.explain_caption:
        explain.draw_image_file(workdir, f.step, f.explain_image, f.explain_caption, f.out, f.ema)
    else:
        raise ConfigError("--explain_image=FILE and --explain_caption=TEXT need each other")


if __name__ == "__main__":
    run_command(main, define_flags)
