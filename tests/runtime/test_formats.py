"""Format numbers: upgrades in order, refusals that name the version, and that no upgrade is missing."""

import re

import pytest

from mefn_jax.errors import CheckpointError, DataError
from mefn_jax.evaluation import results
from mefn_jax.retrieval import index_files
from mefn_jax.runtime import checkpoint
from mefn_jax.runtime.formats import Format

UPGRADES = {k: lambda metadata, k=k: metadata | {"applied": [*metadata.get("applied", []), k]} for k in (3, 1, 2)}
FORMAT = Format(4, CheckpointError, "train again", UPGRADES)


def test_upgrade_applies_upgrades_in_order():
    for number in (1, 2, 3):
        upgraded = FORMAT.upgrade({"format": number, "step": 8}, "run")
        assert upgraded == {"format": 4, "step": 8, "applied": list(range(number, 4))}
    assert FORMAT.upgrade({"format": 4, "step": 8}, "run") == {"format": 4, "step": 8}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"format": 5, "commit": "abc"},
            "has format 5, written by a newer version (commit abc); this version reads up to format 4: update it",
        ),
        ({"format": 5}, "has format 5, written by a newer version; this"),
        (
            {"commit": "abc"},
            "was written by an earlier version (commit abc) (format 0), which this one cannot read; train again",
        ),
        ({}, "was written by an earlier version (format 0), which"),
        ({"format": "2"}, "expected an object whose 'format' is a number"),
        ({"format": True}, "expected an object whose 'format' is a number"),
        ([1], "expected an object whose 'format' is a number, found '[1]'"),
    ],
)
def test_upgrade_refuses_other_formats_by_name(metadata, message):
    with pytest.raises(CheckpointError, match=re.escape(f"run/checkpoints/8: {message}")):
        FORMAT.upgrade(metadata, "run/checkpoints/8")


@pytest.mark.parametrize("kind", [checkpoint.CHECKPOINT_FORMAT, index_files.INDEX_FORMAT, results.RESULTS_FORMAT])
def test_every_numbered_format_has_an_upgrade(kind):
    assert set(range(1, kind.number)) <= set(kind.upgrades)
    assert issubclass(kind.error, CheckpointError | DataError)
