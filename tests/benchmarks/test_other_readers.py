"""Readers of judgements, languages and classes: the published formats with their quirks, and damaged files."""

import json

import benchmark_data as data
import numpy as np
import pytest

from mefn_jax.benchmarks.readers import class_folder, flickr8k_judgements, languages
from mefn_jax.benchmarks.request import Request
from mefn_jax.errors import ConfigError, DataError, UserError


def request(root, name="name", **options):
    return Request(name, "published elsewhere", None, str(root), **options)


def test_expert_judgements_leave_out_an_images_own_captions(tmp_path):
    pairs = flickr8k_judgements.read_expert(request(data.write_judgements(tmp_path)))
    assert pairs.skipped == 1
    assert pairs.ratings.shape == (12, 3)
    names = pairs.images.records.names
    assert pairs.captions[pairs.caption[0]] == "A dog 1 runs on grass 0 ."
    assert names[pairs.image[0]] == "100_ab.jpg"
    assert pairs.ratings[0].tolist() == [1, 1, 1]


def test_crowd_judgements_are_shares(tmp_path):
    pairs = flickr8k_judgements.read_crowd(request(data.write_judgements(tmp_path)))
    assert pairs.skipped == 0
    assert pairs.ratings[:4, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-5)


def append(name, line):
    def damage(root):
        path = root / name
        path.write_text(path.read_text() + line + "\n")

    return damage


JUDGEMENT_DAMAGES = [
    (
        append("ExpertAnnotations.txt", "100_ab.jpg\t101_ab.jpg#9\t1\t1\t1"),
        r"Annotations.txt:14: caption '101_ab.jpg#9'",
    ),
    (append("ExpertAnnotations.txt", "100_ab.jpg\t101_ab.jpg#4\t1\t5\t1"), r":14: expected three ratings from 1 to 4"),
    (append("ExpertAnnotations.txt", "100_ab.jpg\t101_ab.jpg#4\t1\t1"), r":14: expected three ratings"),
    (append("ExpertAnnotations.txt", "100_ab.jpg\t101_ab.jpg#0\t1\t1\t1"), r":14: .* was judged in .*:2 already"),
    (append("ExpertAnnotations.txt", "nothing"), r":14: caption '' is not in"),
    (append("ExpertAnnotations.txt", "900_ab.jpg\t101_ab.jpg#0\t1\t1\t1"), r":14: image '900_ab.jpg' is not in"),
    (append("Flickr8k.token.txt", "100_ab.jpg#0\tAgain"), r"token.txt:22: caption 100_ab.jpg#0 occurs a second time"),
    (append("Flickr8k.token.txt", "100_ab.jpg Again"), r"token.txt:22: not '<image>#<number><tab><caption>'"),
    (lambda root: (root / "Flickr8k.token.txt").unlink(), r"no Flickr8k.token.txt .*; published elsewhere"),
    (lambda root: (root / "ExpertAnnotations.txt").write_text("\n"), r"no judgements"),
]


@pytest.mark.parametrize(("damage", "message"), JUDGEMENT_DAMAGES)
def test_damaged_judgements_are_named(damage, message, tmp_path):
    damage(data.write_judgements(tmp_path))
    with pytest.raises(DataError, match=message):
        flickr8k_judgements.read_expert(request(tmp_path))


@pytest.mark.parametrize("fields", ["0.5\t2\t1", "x\t1\t2", "0\t0\t0", "0.5\t1"])
def test_shares_of_the_crowd_that_are_none_are_named(fields, tmp_path):
    append("CrowdFlowerAnnotations.txt", f"100_ab.jpg\t101_ab.jpg#4\t{fields}")(data.write_judgements(tmp_path))
    with pytest.raises(DataError, match=r":17: expected a share and numbers"):
        flickr8k_judgements.read_crowd(request(tmp_path))


LANGUAGES = {
    "xm3600": (languages.read_xm3600, data.write_xm3600, ["en", "zh", "quz"]),
    "multi30k": (languages.read_multi30k, data.write_multi30k, ["de", "en"]),
    "languages": (languages.read_language_table, data.write_languages, ["en", "de"]),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_languages_are_read_with_the_images_of_their_captions(name, tmp_path):
    read, write, codes = LANGUAGES[name]
    table = read(request(write(tmp_path), name))
    assert list(table.languages) == codes
    assert all(len(captions) == len(image) for captions, image in table.languages.values())
    assert all(np.all(np.diff(image) >= 0) for _, image in table.languages.values())
    chosen = read(request(tmp_path, name, languages=("en",)))
    assert chosen.languages["en"][0] == table.languages["en"][0]
    with pytest.raises(ConfigError, match=rf"--languages=eng: not in the data.*'en'.*; present are {', '.join(codes)}"):
        read(request(tmp_path, name, languages=("eng",)))


def test_xm3600_has_languages_without_a_caption_of_some_image(tmp_path):
    table = languages.read_xm3600(request(data.write_xm3600(tmp_path)))
    assert table.languages["quz"][1].tolist() == [1, 2]
    assert table.languages["en"][1].tolist() == [0, 0, 1, 1, 2, 2]
    assert table.languages["zh"][0][1] == "一只狗 1"


def test_multi30k_reads_compressed_files_and_names_with_a_caption_number(tmp_path):
    data.write_multi30k(tmp_path)
    path = tmp_path / "data" / "task1" / "image_splits" / "test_2016_flickr.txt"
    path.write_text("0.jpg#11\n1.jpg#12\n0.jpg#13\n")
    table = languages.read_multi30k(request(tmp_path))
    assert table.languages["en"][0] == ["A dog runs 0.", "A dog runs 2.", "A dog runs 1."]
    assert table.languages["en"][1].tolist() == [0, 0, 1]


def rewrite(name, change):
    def damage(root):
        path = next(root.rglob(name))
        path.write_bytes(change(path.read_bytes()))

    return damage


LANGUAGE_DAMAGES = [
    ("xm3600", rewrite("captions.jsonl", lambda x: x + x.splitlines()[0]), r"captions.jsonl:4: image/key 'fff"),
    (
        "xm3600",
        rewrite("captions.jsonl", lambda x: x.replace(b'"caption"', b'"text"', 1)),
        r":1: en: the key 'caption'",
    ),
    (
        "xm3600",
        rewrite("captions.jsonl", lambda x: x.replace(b'"A dog 0."', b"3", 1)),
        r":1: 'caption' must be of type",
    ),
    ("xm3600", rewrite("captions.jsonl", lambda x: b'{"image/key": "a"}'), r":1: has captions in no language"),
    ("multi30k", rewrite("*.de", lambda x: x + b"Mehr.\n"), r"4 lines, but .*test_2016_flickr.txt names 3 photographs"),
    ("multi30k", rewrite("*.en.gz", lambda x: x[:20]), r"flickr.en.gz: cannot be decompressed"),
    ("multi30k", rewrite("*.de", lambda x: x.replace(b"Hund", b"Hund\n")), r"6 lines, but"),
    ("multi30k", rewrite("test_2016_flickr.txt", lambda x: x.replace(b"2.jpg", b"9.jpg")), r"image '9.jpg' is not in"),
    ("languages", rewrite("captions.csv", lambda x: x.replace(b"language", b"lang")), r"csv:2: the key 'language'"),
    ("languages", rewrite("captions.csv", lambda x: x.replace(b",de\n", b",\n")), r"csv:4: the language is empty"),
    ("languages", rewrite("captions.csv", lambda x: x.splitlines()[0]), r"no captions"),
]


@pytest.mark.parametrize(("name", "damage", "message"), LANGUAGE_DAMAGES)
def test_damaged_languages_are_named(name, damage, message, tmp_path):
    read, write, _ = LANGUAGES[name]
    damage(write(tmp_path))
    with pytest.raises(UserError, match=message):
        read(request(tmp_path, name))


def test_multi30k_of_another_set_says_which_file_is_missing(tmp_path):
    data.write_multi30k(tmp_path)
    with pytest.raises(DataError, match=r"no data/task1/image_splits/test_2017_flickr.txt or .*; published elsewhere"):
        languages.read_multi30k(request(tmp_path, split="test_2017_flickr"))


def test_classes_are_the_folders(tmp_path):
    classes = class_folder.read(request(data.write_classes(tmp_path)))
    assert classes.names == ["boat", "dog", "red car"]
    assert classes.label.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert classes.images.records.names[4] == "dog/0.jpg"
    assert classes.templates == ["a photo of a {}."]


def test_classes_are_named_by_a_file_and_prompts_by_another(tmp_path):
    data.write_classes(tmp_path / "images")
    names = {"dog": "golden retriever", "red_car": "sports car", "boat": "gondola"}
    (tmp_path / "images" / "classes.json").write_text(json.dumps(names))
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\n{} in the wild\n")
    classes = class_folder.read(request(tmp_path / "images", templates=str(tmp_path / "templates.txt")))
    assert classes.names == ["gondola", "golden retriever", "sports car"]
    assert classes.templates == ["a photo of a {}.", "{} in the wild"]


CLASS_DAMAGES = [
    (lambda root: (root / "classes.json").write_text('{"dog": "a"}'), r"classes.json: the key 'boat' is missing"),
    (
        lambda root: (root / "classes.json").write_text('{"dog": "a", "boat": "a", "red_car": "b"}'),
        r"two classes .* 'a'",
    ),
    (lambda root: (root / "empty").mkdir(), r"empty: no images in it"),
    (
        lambda root: (root / "templates.txt").write_text("a photo"),
        r"--templates=.*: 'a photo'; write lines with one {}",
    ),
    (lambda root: (root / "templates.txt").write_text("\n"), r"--templates=.*: no line; write lines"),
]


@pytest.mark.parametrize(("damage", "message"), CLASS_DAMAGES)
def test_damaged_classes_are_named(damage, message, tmp_path):
    damage(data.write_classes(tmp_path))
    templates = str(tmp_path / "templates.txt") if (tmp_path / "templates.txt").exists() else ""
    with pytest.raises(DataError, match=message):
        class_folder.read(request(tmp_path, templates=templates))


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="0 folders in it; give a folder with one for each class"):
        class_folder.read(request(tmp_path))
