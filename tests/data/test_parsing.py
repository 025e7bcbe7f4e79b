"""Sources of JSON on arbitrary input: they return splits or raise DataError, and nothing else."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_data import save_images

from mefn_jax.data import parsing
from mefn_jax.data.sources import coco, flickr8k, karpathy, table
from mefn_jax.errors import DataError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(exclude_categories=()), max_size=4)  # also halves of characters, which JSON can write
    | st.sampled_from(["a.jpg", "./a.jpg", "train", "b.jpg"]),
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
RELAXED = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


def error_message(read, path, images) -> str:
    """Returns the message of a DataError, or the path if there is none. Any other exception fails the test, and so does
    a message that cannot be printed."""
    try:
        splits, _ = read(path, images)
        json.dumps([e["captions"] for entries in splits.values() for e in entries], ensure_ascii=False).encode()
    except DataError as e:
        return str(e).encode().decode()
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


ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "filename": st.sampled_from(["a.jpg", "./a.jpg", "b.jpg", "c", ""]) | VALUES,
            "filepath": st.sampled_from([".", "", ".."]) | VALUES,
            "split": st.sampled_from(["train", "restval", "test"]) | VALUES,
            "sentences": st.lists(st.fixed_dictionaries({"raw": st.text(max_size=5) | VALUES}), max_size=2) | VALUES,
        },
    ),
    max_size=3,
)


@RELAXED
@given(ENTRIES)
def test_karpathy_reads_any_entries_or_raises_data_error(tmp_path, entries):
    path = tmp_path / "data.json"
    if not path.is_file():
        save_images(tmp_path, ["a.jpg", "b.jpg"])
    path.write_text(json.dumps({"images": entries}))
    assert str(tmp_path) in error_message(karpathy.read, path, tmp_path)


@RELAXED
@given(st.binary(max_size=100) | st.text(st.sampled_from('{}[]":,truefalsn0123456789.eE+-\\u ')).map(str.encode))
def test_read_json_reads_any_bytes_or_raises_data_error(tmp_path, data):
    path = tmp_path / "any.json"
    path.write_bytes(data)

    def read(*_):
        parsing.read_json(path)
        return {}, []

    assert error_message(read, path, None).startswith(str(path))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "c": 2, "a": 1}}]'])
def test_read_json_refuses_key_that_occurs_twice(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"x.json: not JSON \(the key 'a' occurs twice in one object"):
        parsing.read_json(path)


def test_clean_caption_refuses_half_of_a_character():
    with pytest.raises(DataError, match=r"place: caption .* holds half of a character"):
        parsing.clean_caption(json.loads('"a \\ud83d dog"'), "place")


def write_source(kind, root, first, second):
    """Writes a source of two images, one in train and one in test, and returns its reader with its arguments."""
    if kind == "karpathy":
        entries = [
            {"filename": name, "split": split, "sentences": [{"raw": "a thing"}]}
            for name, split in ((first, "train"), (second, "test"))
        ]
        (root / "dataset.json").write_text(json.dumps({"images": entries}))
        return karpathy.read, root / "dataset.json", root / "Images"
    if kind == "coco":
        for name, split in ((first, "train"), (second, "test")):
            notes = [{"image_id": 1, "id": 1, "caption": "a thing"}]
            document = {"images": [{"id": 1, "file_name": name}], "annotations": notes}
            (root / f"captions_{split}2017.json").write_text(json.dumps(document))
        return coco.read, root, root / "Images"
    if kind == "flickr8k":
        for name, split in ((first, "train"), (second, "test")):
            (root / f"Flickr_8k.{split}Images.txt").write_text(name + "\n")
        lines = [f"{name}#{k}\ta thing\n" for k, name in enumerate((first, second))]
        (root / "Flickr8k.token.txt").write_text("".join(lines))
        return flickr8k.read, root
    rows = [{"image": first, "caption": "a", "split": "train"}, {"image": second, "caption": "a", "split": "test"}]
    if kind == "jsonl":
        (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["image,caption,split", *(",".join(row.values()) for row in rows)]
        (root / "data.csv").write_text("\n".join(lines))
    return table.read, root / f"data.{kind}", root / "Images"


@pytest.mark.parametrize("kind", ["karpathy", "coco", "flickr8k", "jsonl", "csv"])
@pytest.mark.parametrize("second", ["a.jpg", "./a.jpg", "folder/../a.jpg", "link.jpg"])
def test_sources_refuse_one_image_in_two_splits(kind, second, tmp_path):
    images = tmp_path / "Images"
    save_images(images, ["a.jpg", "b.jpg", "folder/c.jpg"])
    (images / "link.jpg").symlink_to("a.jpg")
    read, *arguments = write_source(kind, tmp_path, "b.jpg", "a.jpg")
    assert {split: len(entries) for split, entries in read(*arguments)[0].items()} == {"train": 1, "test": 1}
    read, *arguments = write_source(kind, tmp_path, "a.jpg", second)
    with pytest.raises(DataError, match=r"image '.*' is (in the data|in train|already)|'.*' is not a plain file"):
        read(*arguments)


def test_karpathy_refuses_image_twice_in_one_split(tmp_path):
    save_images(tmp_path, ["a.jpg"])
    entry = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a"}]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"images": [entry, entry | {"filepath": "."}]}))
    with pytest.raises(DataError) as error:
        karpathy.read(path, tmp_path)
    places = f"{path}: images[1]", f"{path}: images[0]"
    assert str(error.value).startswith(f"{places[0]}: image './a.jpg' is in the data already as 'a.jpg' ({places[1]})")
