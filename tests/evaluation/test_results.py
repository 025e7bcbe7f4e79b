"""Readers of metrics.json and ranks.npz: damaged, foreign and mismatched files are refused in one line."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mefn_jax.errors import DataError
from mefn_jax.evaluation.results import METRIC_NAMES, read_report, read_results, write_results

SIDE = dict.fromkeys(METRIC_NAMES, 50.0)
PROTOCOL = {"split": "val", "images": 2, "captions": 4, "folds": 1, "captions_per_image": "2", "ties": "against"}
REPORT = {"evaluated": "mefn", "config": {"train": {"seed": 0}}, "protocol": PROTOCOL, "i2t": SIDE, "t2i": SIDE}
REPORT |= {"rsum": 300.0, "data": {"gallery": "digest"}}
RANKS = {"i2t": np.array([1, 2]), "t2i": np.array([1, 1, 2, 2]), "caption_image": np.array([0, 0, 1, 1], np.int32)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path, REPORT, RANKS)
    return tmp_path


def archive(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def test_results_are_read_as_written(folder):
    report, ranks = read_results(folder)
    assert report == REPORT | {"format": 2}
    assert ranks.keys() == RANKS.keys()
    (folder / "ranks.npz").unlink()
    with pytest.raises(FileNotFoundError):
        read_results(folder)
    report["format"] = 1
    del report["data"]
    (folder / "metrics.json").write_text(json.dumps(report))
    assert read_report(folder / "metrics.json")["data"] is None


CHANGES = [
    *({key: None} for key in ("evaluated", "config", "protocol", "i2t", "t2i", "rsum", "format")),
    *({"protocol": PROTOCOL | {key: value}} for key, value in (("images", "2"), ("folds", 1.5), ("split", 3))),
    {"i2t": SIDE | {"r1": "50"}},
    {"t2i": {}},
    {"rsum": float("nan")},
    {"rsum": 10**400},
    {"rsum": True},
    {"data": "x"},
    {"config": json.loads("[" * 30 + "]" * 30)},
    {"format": 3},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: json.dumps(change)[:40])
def test_report_with_a_wrong_value_is_refused_by_name(folder, change):
    (folder / "metrics.json").write_text(json.dumps(REPORT | {"format": 2} | change))
    with pytest.raises(DataError, match=r"metrics\.json") as refused:
        read_report(folder / "metrics.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"NaN", b"null", b"\xff\xfe", b'"x"', b"[" * 100_000, b"1" * 9999]
)
def test_report_that_is_no_json_object_is_refused(folder, content):
    (folder / "metrics.json").write_bytes(content)
    with pytest.raises(DataError, match=r"metrics\.json"):
        read_report(folder / "metrics.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as ranks"),
        (b"PK\x03\x04nothing", "cannot be read as ranks"),
        (archive(**RANKS)[:-30], "cannot be read as ranks"),
        (archive(**RANKS | {"i2t": np.array([None, 1])}), "cannot be read as ranks"),
        (archive(i2t=RANKS["i2t"]), "t2i should be 4 whole numbers"),
        (archive(**RANKS | {"t2i": np.ones(5, int)}), "t2i should be 4 whole numbers"),
        (archive(**RANKS | {"i2t": np.ones(2)}), r"i2t should be 2 whole numbers.*, found float64 \(2,\)"),
        (archive(**RANKS | {"i2t": np.zeros(2, int)}), "has ranks below 1"),
        (archive(**RANKS | {"caption_image": np.array([0, 0, 1, 2])}), "images that do not exist"),
        (archive(**RANKS | {"caption_image": np.array([0, 0, 1, -1])}), "images that do not exist"),
    ],
)
def test_damaged_ranks_are_refused(folder, content, message):
    (folder / "ranks.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"ranks\.npz: .*{message}"):
        read_results(folder)


def test_ranks_that_are_one_array_are_refused(folder):
    with (folder / "ranks.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match="cannot be read as ranks"):
        read_results(folder)


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.sampled_from([*REPORT, "format", "new"]), JSON)
def test_report_with_any_value_raises_no_error_but_ours(folder, key, value):
    (folder / "metrics.json").write_text(json.dumps(REPORT | {"format": 2} | {key: value}))
    with contextlib.suppress(DataError):
        read_results(folder)


@quick
@given(st.integers(0, 800), st.binary(max_size=30))
def test_damaged_ranks_raise_no_error_but_ours(folder, start, data):
    content = archive(**RANKS)
    (folder / "ranks.npz").write_bytes(content[:start] + data + content[start + len(data) :])
    with contextlib.suppress(DataError):
        read_results(folder)
