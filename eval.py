"""Evaluates a trained model, or pretrained towers as they are.

    python eval.py --workdir=runs/shapes [--split=test] [--step=best|latest|N] [--folds=5] [--data_dir=DIR]
    python eval.py --config=configs/flickr30k.py:model=clip,image=clip_vit_b32,text=clip \\
        --config.image.pretrained=DIR --config.text.pretrained=DIR [--out=DIR]
    python eval.py --config=FILE.py --compile_for=v5e:2x4                 # the scoring step, for a TPU slice
    python eval.py --compare=DIR,DIR,... --out=DIR [--split=test]         # evaluated runs in one table; globs too
    python eval.py --workdir=DIR --index_images=FOLDER --index=INDEX      # encodes a folder of images
    python eval.py --workdir=DIR --index=INDEX --query=TEXT [--topk=10] [--rerank=1000] [--out=FILE.png]
    python eval.py --workdir=DIR --query_image=FILE --captions=FILE.txt [--topk=10]
    python eval.py --workdir=DIR --explain=N [--split=test]               # entropy maps of N pairs; of any pair:
    python eval.py --workdir=DIR --explain_image=FILE --explain_caption=TEXT [--out=FILE.png]
    python eval.py --workdir=DIR --report [--split=test]                  # evaluates, and writes report.html
    python eval.py --ensemble=DIR,DIR,... --out=DIR [--split=test]        # several runs' scores, averaged
"""

import sys

from absl import flags

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.cli import define_compile_flags, define_config_flag, define_process_flags, run_command


def define_flags() -> None:
    define_config_flag(None)
    flags.DEFINE_string("workdir", "", "Directory of the training run, may be gs://BUCKET/PATH; default: runs/shapes.")
    flags.DEFINE_string("data_dir", "", "Prepared data set; by default the one trained on.")
    flags.DEFINE_string("split", "test", "train, val (or dev) or test.")
    flags.DEFINE_string("step", "best", "Checkpoint: best (by val rSum), latest, or a step.")
    flags.DEFINE_list("folds", ["1"], "Consecutive folds of the images to average over; 1,5: COCO's 5K and 1K at once.")
    flags.DEFINE_string("save_scores", "", "A .npy file for the scores of all pairs, float32 (images, captions).")
    flags.DEFINE_bool("ema", False, "Evaluate the average of the parameters (train.ema_decay), into eval/<split>_ema.")
    flags.DEFINE_list("compare", [], "Directories of evaluated runs; the first is what the others are compared with.")
    flags.DEFINE_list("ensemble", [], "Directories of runs whose score matrices are averaged.")
    flags.DEFINE_string("rerank", "", "Two-stage retrieval beside all pairs, or of --query: share or number.")
    flags.DEFINE_string("index_images", "", "A folder of images to encode into --index.")
    flags.DEFINE_string("index", "", "Directory of an index, to be made or searched.")
    flags.DEFINE_string("query", None, "A caption, whose images are looked for in --index.")
    flags.DEFINE_string("query_image", "", "An image file, whose lines are looked for in --captions.")
    flags.DEFINE_string("captions", "", "A text file, a caption a line.")
    flags.DEFINE_integer("explain", 0, "How many captions to draw with what the matcher makes of them.", lower_bound=0)
    flags.DEFINE_string("explain_image", "", "An image file to draw with --explain_caption.")
    flags.DEFINE_string("explain_caption", "", "A caption to draw with --explain_image.")
    flags.DEFINE_bool("report", False, "Evaluate, and write a page about the run, report.html.")
    flags.DEFINE_string("boxes", "", "For --explain of precomputed regions: their boxes, .npy (images, regions, 4).")
    flags.DEFINE_string("photos", "", "For --explain of precomputed regions: a folder of photographs by image id.")
    flags.DEFINE_integer("topk", 10, "How many are found.", lower_bound=1)
    define_process_flags()
    define_compile_flags()
    flags.DEFINE_string("out", "", "Where metrics.json and ranks.npz go (WORKDIR/eval/<split>); of a query, a picture.")


def main() -> None:
    f = flags.FLAGS
    if f.compile_for:
        from mefn_jax.aot import compile_scoring

        if f.config is None:
            raise ConfigError("--compile_for needs --config=FILE.py: which model is compiled")
        sys.exit(0 if compile_scoring(f.config, f.compile_for, f.compile_report) else 1)
    from mefn_jax.evaluation import ensemble, evaluate  # JAX is not needed for --help
    from mefn_jax.reports import compare
    from mefn_jax.runtime.multihost import initialize

    if not f.compare:  # which needs no device
        initialize()
    if sum(map(bool, (f.config is not None, f.workdir, f.compare, f.ensemble))) > 1:
        raise ConfigError("give one of --workdir, --config, --compare and --ensemble")
    pairs = f.explain or f.explain_image or f.explain_caption
    if (pairs or f.report) and (f.config is not None or f.compare or f.ensemble):
        raise ConfigError("--explain and --report are of one run: give --workdir=DIR")
    if (f.boxes or f.photos) and not f.explain:
        raise ConfigError("--boxes and --photos say where the regions of --explain=N lie; give it too")
    if (f.compare or f.ensemble) and not f.out:
        raise ConfigError("--out=DIR is missing: where the tables, or the ensemble's metrics.json, go")
    if not all(number.isdigit() and int(number) for number in f.folds) or not f.folds:
        raise ConfigError(f"--folds={','.join(f.folds)}: give numbers of at least 1")
    folds = tuple(map(int, f.folds))
    if f.rerank and (f.config is not None or f.compare or f.ensemble or pairs or f.index_images or f.query_image):
        raise ConfigError("--rerank is of one run's evaluation, or of --query: leave it out")
    if f.index_images or f.index or f.query is not None or f.query_image:
        retrieval(f)
    elif pairs:
        explanations(f)
    elif f.compare:
        compare.compare(f.compare, f.split, f.out)
    elif f.ensemble:
        ensemble.evaluate_ensemble(f.ensemble, f.data_dir, f.split, f.step, folds, f.out, save_scores=f.save_scores)
    elif f.config is not None:
        if f["step"].present:
            raise ConfigError("--config evaluates pretrained towers without a run: leave --step out")
        evaluate.zero_shot(f.config, f.data_dir, f.split, folds, f.out, save_scores=f.save_scores)
    elif f.report:
        from mefn_jax.reports import report  # matplotlib and jinja2, which only this needs

        report.write_report(
            f.workdir or "runs/shapes", f.data_dir, f.split, f.step, folds, f.out, f.ema, f.save_scores, f.rerank
        )
    else:
        evaluate.evaluate(
            f.workdir or "runs/shapes", f.data_dir, f.split, f.step, folds, f.out, f.ema, f.save_scores, f.rerank
        )


def retrieval(f) -> None:
    """The commands around an index."""
    from mefn_jax.retrieval import search

    run_of = (f.workdir or "runs/shapes", f.step)
    asked = [name for name in ("index_images", "query", "query_image") if f[name].value not in (None, "")]
    if f.query == "":
        raise ConfigError("--query is empty: give a caption")
    if len(asked) != 1:
        raise ConfigError("give one of --index_images, --query and --query_image")
    if (f.index_images or f.query) and not f.index:
        raise ConfigError("--index=INDEX is missing: the directory of the index")
    if f.query_image and not f.captions:
        raise ConfigError("--captions=FILE.txt is missing: the lines to rank")
    if f.index_images:
        search.index_images(*run_of, f.index_images, f.index, f.ema)
    elif f.query_image:
        search.rank_captions(*run_of, f.query_image, f.captions, f.topk, f.ema)
    else:
        search.search_images(*run_of, f.index, f.query, f.topk, f.rerank, f.out, f.ema)


def explanations(f) -> None:
    """The pictures of pairs."""
    from mefn_jax.reports import explain

    if f.explain and (f.explain_image or f.explain_caption):
        raise ConfigError("give --explain=N, or --explain_image and --explain_caption")
    workdir = f.workdir or "runs/shapes"
    if f.explain:
        explain.draw_captions(workdir, f.data_dir, f.split, f.step, f.explain, f.out, f.ema, f.boxes, f.photos)
    elif f.explain_image and f.explain_caption:
        explain.draw_image_file(workdir, f.step, f.explain_image, f.explain_caption, f.out, f.ema)
    else:
        raise ConfigError("--explain_image=FILE and --explain_caption=TEXT need one another")


if __name__ == "__main__":
    run_command(main, define_flags)
