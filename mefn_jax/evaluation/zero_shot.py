"""Evaluates the pretrained towers of a configuration as they are, without training.

    python eval.py zero_shot --config=configs/flickr30k.py:model=clip,image=clip_vit_b32,text=clip \\
        --config.image.pretrained=CLIP --config.text.pretrained=CLIP [--split=test] [--folds=1,5] [--out=DIR]

Both towers must be CLIP's, with their projections, or SigLIP's (docs/evaluation.md). SigLIP and SigLIP 2:

    python eval.py zero_shot --config=configs/flickr30k.py:model=siglip,image=siglip2_b16,text=siglip2 \\
        --config.image.pretrained=SIGLIP2 --config.text.pretrained=SIGLIP2 --config.text.max_tokens=63
"""

from absl import flags

from mefn_jax.config import require_local
from mefn_jax.evaluation.evaluate import EvaluationResult, evaluate_split
from mefn_jax.evaluation.evaluator import load_zero_shot
from mefn_jax.evaluation.gallery import open_split
from mefn_jax.evaluation.results import write_results
from mefn_jax.evaluation.run import Gallery, define_gallery_flags, define_scores_flag, gallery_from_flags
from mefn_jax.evaluation.score_file import check_outputs
from mefn_jax.runtime.cli import define_config_flag, define_path_flag, define_process_flags
from mefn_jax.runtime.multihost import check_on_first_process, initialize
from mefn_jax.runtime.storage import resolve_directory


def evaluate_zero_shot(config, gallery: Gallery, out: str = "", save_scores: str = "") -> EvaluationResult:
    """Evaluates the pretrained towers of a configuration (see `evaluator.load_zero_shot`), and prints the table.

    Writes the files of `evaluate.evaluate` into `out` if it is not empty.
    """
    check_on_first_process(lambda: check_outputs(out, save_scores, gallery))
    require_local("data.dir", config.data.dir)
    evaluator, params = load_zero_shot(config)
    name = f"{evaluator.config.model} (zero-shot)"
    result = evaluate_split(evaluator, params, name, gallery, open_split(evaluator, gallery), save_scores)
    result.report["evaluated"] = f"{evaluator.config.model}, zero-shot"
    if out:
        write_results(resolve_directory("--out", out), result.report, result.ranks)
    return result


def define_flags() -> None:
    """Defines the flags of the command."""
    define_config_flag(None)
    flags.mark_flag_as_required("config")
    define_gallery_flags()
    define_scores_flag()
    define_path_flag("out", "", "Directory for metrics.json and ranks.npz; default: they are not written.")
    define_process_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    initialize()
    evaluate_zero_shot(f.config, gallery_from_flags(), f.out, f.save_scores)
