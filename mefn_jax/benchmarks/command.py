"""Scores a model on a published benchmark: a table with intervals, and files that `compare` takes.

    python eval.py benchmark NAME --workdir=DIR --data_dir=DIR [--images=FOLDER] [--split=test] [--out=DIR]
    python eval.py benchmark NAME --config=FILE.py:model=clip,... --data_dir=DIR   of pretrained towers, untrained

The benchmarks, with their sizes, licences and what a number above chance means: docs/evaluation.md.
"""

import time

from absl import flags

from mefn_jax.benchmarks.outcome import Outcome
from mefn_jax.benchmarks.registry import BENCHMARKS
from mefn_jax.benchmarks.request import Request
from mefn_jax.benchmarks.results import BENCHMARK_FILES, write_benchmark
from mefn_jax.benchmarks.scorer import Scorer
from mefn_jax.benchmarks.table import make_entries, print_benchmark
from mefn_jax.config import require_local, suggest
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluator import load_zero_shot
from mefn_jax.evaluation.run import define_run_flags, define_split_flag, run_from_flags, split_from_flags
from mefn_jax.evaluation.table import describe_reading
from mefn_jax.runtime.cli import define_config_flag, define_path_flag, define_process_flags
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import check_on_first_process, initialize
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.provenance import versions
from mefn_jax.runtime.storage import resolve_directory


def run_benchmark(name: str, scorer: Scorer, evaluated: str, folder, **options) -> dict:
    """Scores a model on the benchmark `name`, prints its table and returns the report.

    `evaluated` is the system as a comparison names it. The files are written into `folder` unless it is None. `options`
    are the fields of a `Request`. Raises DataError if files are missing or malformed, naming what is wrong.
    """
    benchmark = BENCHMARKS[name]
    require_local("--data_dir", options.get("data_dir", ""))
    require_local("--images", options.get("images", ""))
    start = time.perf_counter()
    items = benchmark.read(Request(name, benchmark.published, scorer.evaluator, **options))
    outcome = benchmark.measure(scorer, items)
    report = make_report(name, scorer, evaluated, outcome) | {"seconds": time.perf_counter() - start}
    print_benchmark(describe_outcome(name, evaluated, report), report["measures"])
    for note in outcome.notes:
        print0(note)
    if folder is not None:
        write_benchmark(folder, report, outcome.measures)
    return report


def make_report(name: str, scorer: Scorer, evaluated: str, outcome: Outcome) -> dict:
    """Returns the content of `metrics.json`. Raises DataError for a measure that is undefined."""
    config = scorer.evaluator.config
    return {
        "benchmark": name,
        "evaluated": evaluated,
        "config": config.to_dict(),
        "protocol": outcome.protocol | describe_reading(config, scorer.tokenizer),
        "measures": make_entries(outcome.measures, outcome.units),
        "units": outcome.units,
        "unit": outcome.unit,
        "data": {"digest": outcome.digest},
        "numbers": outcome.numbers,
        "notes": outcome.notes,
        "versions": versions(),
    }


def describe_outcome(name: str, evaluated: str, report: dict) -> str:
    """Returns the lines above the table: what was scored, and how."""
    p = report["protocol"]
    sizes = ", ".join(f"{value:,} {key}" for key, value in p.items() if isinstance(value, int))
    ties = f"; ties {p['ties']}" if "ties" in p else ""
    return (
        f"{name}, {evaluated}: {sizes}{ties}. In brackets 95 % intervals, by bootstrap of the {report['units']:,} "
        f"{report['unit']}\ntext {p['text']}; images {p['pixels']}"
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    define_config_flag(None)
    define_split_flag()
    define_path_flag("data_dir", "", "Folder of the benchmark's published files.")
    define_path_flag("images", "", "Folder of the images, if it is not where the publishers put them.")
    flags.DEFINE_list("languages", [], "Codes of the languages to score; default: all.")
    define_path_flag("templates", "", "File of prompts with {} in place of a class name, one a line.")
    define_path_flag("out", "", "Directory for metrics.json and measures.npz; default: DIR/benchmarks/NAME.")
    define_process_flags()


def main(names: list[str]) -> None:
    """Runs the command."""
    f = flags.FLAGS
    if len(names) != 1 or names[0] not in BENCHMARKS:
        given = " ".join(names)
        raise ConfigError(
            f"{given + ': not' if given else 'give'} one of the benchmarks {', '.join(BENCHMARKS)}"
            f"{suggest(given, BENCHMARKS)}; python eval.py benchmark NAME --workdir=DIR --data_dir=DIR"
        )
    if f.config is not None and f["workdir"].present:
        raise ConfigError(
            "give either --workdir (a trained run) or --config (pretrained towers, not trained), not both"
        )
    if f.out:
        check_on_first_process(lambda: check_output_directory("--out", f.out, BENCHMARK_FILES))
    initialize()
    options = {key: getattr(f, key) for key in ("data_dir", "images", "templates")}
    options |= {"split": split_from_flags(), "languages": tuple(f.languages)}
    if f.config is not None:
        evaluator, params = load_zero_shot(f.config)
        evaluated = f"{evaluator.config.model}, zero-shot"
        folder = resolve_directory("--out", f.out) if f.out else None
    else:
        run = run_from_flags()
        evaluator, params, _ = run.load()
        evaluated = f"{evaluator.config.model}, averaged parameters" if run.is_averaged else evaluator.config.model
        default = run.results_directory / "benchmarks" / (names[0] + "_ema" * run.is_averaged)
        folder = resolve_directory("--out", f.out) if f.out else default
    run_benchmark(names[0], Scorer(evaluator, params), evaluated, folder, **options)
