"""Runs of a sweep that are there already: which options they were started with, and whether their data has changed."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from etils import epath

from mefn_jax import config as configuration
from mefn_jax.config import suggest
from mefn_jax.data.digests import digest_gallery
from mefn_jax.data.from_config import open_dataset
from mefn_jax.data.mixture import parse_mixture
from mefn_jax.data.parsing import read_json
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.runtime.checkpoint_format import OPTIONS_OF_6
from mefn_jax.runtime.storage import write_atomic
from mefn_jax.sweeps.plan import PlannedRun

RECORD = "sweep.json"  # file in the directory of a run, with the options that it was started with


def check_earlier_runs(runs: list[PlannedRun], split: str) -> None:
    """Raises ConfigError if a directory of a run has one with other options, or evaluated on other data, or if the data
    set of a run has no such split.

    A run that resumes checks its data itself. A data set that has moved is no other data.
    """
    digests = {}
    for run in (run for run in runs if run.config is not None):
        key = json.dumps([run.config.data.to_dict(), run.config.text.max_tokens], default=str)
        if key not in digests:
            digests[key] = _make_digest(run.config, split)
        report = run.report(split)
        data = read_quietly(report).get("data")
        gallery = data.get("gallery") if isinstance(data, dict) else None
        if gallery and digests[key]() not in (None, gallery):
            raise ConfigError(
                f"--out: {run.workdir} was evaluated on other images or captions than {split} of "
                f"data.dir={run.config.data.dir} has now; choose another --out, or remove it"
            )
        changes = find_changed_options(run, split)
        if (gallery or not report.is_file()) and not _changes_mixture(changes):
            changes.pop("data.dir", None)
        if changes:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in changes.items())
            raise ConfigError(
                f"--out: {run.workdir} has a run with other options ({shown}); choose another --out, or remove it"
            )


def _make_digest(config, split: str) -> Callable[[], str | None]:
    """Returns a function that returns the digest of a split (`digest_gallery`), read when it is first called; None if
    the data cannot be read, which the run will explain. Raises ConfigError if there is no such split."""
    try:
        dataset = open_dataset(config)
    except (DataError, OSError):
        return lambda: None
    if split not in dataset.splits:
        raise ConfigError(
            f"--split={split}: {dataset.directory} has {', '.join(dataset.splits)}{suggest(split, dataset.splits)}"
        )

    @functools.cache
    def digest():
        try:
            return digest_gallery(dataset.split(split))
        except (DataError, OSError):
            return None

    return digest


def _changes_mixture(changes: dict[str, tuple]) -> bool:
    """Returns whether the data sets were, or are now, a mixture: then other paths may be other weights."""
    return any(len(parse_mixture(text)) > 1 for text in changes.get("data.dir", ()) if isinstance(text, str))


def find_changed_options(run: PlannedRun, split: str) -> dict[str, tuple]:
    """Returns the options in which a run differs from the one in its directory, `{key: (old, new)}`; empty without one.

    A run that failed before its first checkpoint is none. Runs of versions that did not record their options are
    compared in those that the command line sets. Options that a version lacked count as it behaved.
    """
    options, record = run.options(), read_quietly(run.workdir / RECORD)
    report = run.report(split)
    if not report.is_file() and not any((run.workdir / "checkpoints").glob("[0-9]*")):
        return {}
    if isinstance(record.get("config"), dict):
        added = {key: value for key, value in OPTIONS_OF_6.items() if key in options}
        return configuration.diff_configs(added | record["config"], options)
    old = read_quietly(report).get("config")
    if not isinstance(old, dict):
        return {}
    old, keys = configuration.flatten(old), [key for key in run.chosen if options.get(key)]
    return {key: (old.get(key), options[key]) for key in keys if old.get(key) != options[key]}


def record_options(run: PlannedRun) -> None:
    """Writes the options of a run into its directory, for `find_changed_options`. Raises ConfigError."""
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        if run.config is not None:
            write_atomic(epath.Path(run.workdir / RECORD), json.dumps({"config": run.options()}, indent=1).encode())
    except OSError as e:
        raise ConfigError(f"--out: {run.workdir} cannot be written ({e.strerror})") from None


def read_quietly(path: Path) -> dict:
    """Returns the JSON object of a file; an empty one if there is none, or the file is damaged."""
    try:
        value = read_json(path)
    except DataError:
        return {}
    return value if isinstance(value, dict) else {}
