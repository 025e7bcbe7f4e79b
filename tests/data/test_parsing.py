"""Sources of JSON on arbitrary input: they return splits or raise DataError, and nothing else."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mefn_jax.data.sources import coco, karpathy
from mefn_jax.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "images",
                    "annotations",
                    "filename",
                    "filepath",
                    "split",
                    "sentences",
                    "raw",
                    "id",
                    "image_id",
                    "file_name",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=6,
        )
    ),
    max_leaves=30,
)
RELAXED = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def error_message(read, path, images) -> str:
    """Returns the message of a DataError, or the path if there is none. Any other exception fails the test."""
    try:
        read(path, images)
    except DataError as e:
        return str(e)
    return str(path)


@RELAXED
@given(VALUES, st.sampled_from([karpathy, coco]))
def test_json_sources_read_any_json_or_raise_data_error(tmp_path, value, source):
    path = tmp_path / "captions_train.json"
    path.write_text(json.dumps(value))
    assert str(tmp_path) in error_message(source.read, tmp_path if source is coco else path, tmp_path)


def test_read_json_refuses_endless_nesting(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match="not JSON"):
        karpathy.read(path, tmp_path)
