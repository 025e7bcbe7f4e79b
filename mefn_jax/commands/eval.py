"""Evaluates a trained model on a split: recall in both directions. A verb as the first word does something else.

    python eval.py [--workdir=runs/shapes] [--split=test] [--step=best|latest|N] [--folds=1,5] [--rerank=0.1]

    python eval.py report    --workdir=DIR                          evaluates, and writes one page about the run
    python eval.py explain   --workdir=DIR --number=8               draws entropy maps of captions of a split
    python eval.py explain   --workdir=DIR --image=FILE --caption=TEXT            ... of any pair
    python eval.py index     --workdir=DIR --images=FOLDER --out=INDEX            encodes a folder of images
    python eval.py index     --index=INDEX --export=faiss --out=DIR               exports it (or parquet)
    python eval.py search    --workdir=DIR --index=INDEX --caption=TEXT           finds its images for a caption
    python eval.py search    --workdir=DIR --index=INDEX --queries=FILE           ... for many captions
    python eval.py search    --workdir=DIR --image=FILE --captions=FILE.txt       finds captions for an image
    python eval.py serve     --workdir=DIR [--index=INDEX]          serves a page to try out a model in a browser
    python eval.py compare   DIR DIR 'runs/*/0' --out=DIR           puts evaluated runs into one table
    python eval.py ensemble  DIR DIR --out=DIR                      evaluates the mean of several runs' scores
    python eval.py zero_shot --config=FILE.py:model=clip,...        evaluates a pretrained CLIP or SigLIP
    python eval.py benchmark NAME --workdir=DIR --data_dir=DIR      scores a published benchmark, such as eccv
    python eval.py mine      --workdir=DIR --out=FILE               mines hard negatives of the training captions
    python eval.py compile   --config=FILE.py --target=v5e:2x4      compiles the scoring step for a TPU slice

`python eval.py VERB --help` lists the flags of a verb, `python eval.py --help` those without a verb.
"""

import importlib
import sys

from mefn_jax.config import suggest
from mefn_jax.runtime.cli import fail, run_command

VERBS = {
    "report": "mefn_jax.reports.report",
    "explain": "mefn_jax.reports.explain",
    "index": "mefn_jax.retrieval.index_command",
    "search": "mefn_jax.retrieval.search",
    "mine": "mefn_jax.retrieval.mine",
    "serve": "mefn_jax.serving.serve",
    "compare": "mefn_jax.reports.compare",
    "ensemble": "mefn_jax.evaluation.ensemble",
    "zero_shot": "mefn_jax.evaluation.zero_shot",
    "benchmark": "mefn_jax.benchmarks.command",
    "compile": "mefn_jax.aot",
}


def main() -> None:
    """Runs the module of the verb, and imports no other; without a verb, the evaluation of a run."""
    has_verb = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    verb = sys.argv.pop(1) if has_verb else ""
    if has_verb and verb not in VERBS:
        fail(f"{verb!r} is not one of the verbs {', '.join(VERBS)}{suggest(verb, VERBS)}", 2)
    if misplaced := [word for word in sys.argv[1:] if not has_verb and word in VERBS]:
        fail(f"a verb is the first word: python eval.py {misplaced[0]} ...", 2)
    module = importlib.import_module(VERBS.get(verb, "mefn_jax.evaluation.evaluate"))
    run_command(module.main, module.define_flags, module.__doc__ if has_verb else __doc__)


if __name__ == "__main__":
    main()
