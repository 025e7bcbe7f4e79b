"""Readers of compositional suites: the published formats with their quirks, and files that are damaged."""

import json

import benchmark_data as data
import numpy as np
import pytest
from PIL import Image

from mefn_jax.benchmarks.items import Choice, Pairing
from mefn_jax.benchmarks.readers import aro, cases, foil, sugar_crepe, valse, winoground
from mefn_jax.benchmarks.request import Request
from mefn_jax.data.images import Resize, decode
from mefn_jax.errors import DataError

READERS = {
    "sugar_crepe": (sugar_crepe.read, data.write_sugar_crepe),
    "winoground": (winoground.read, data.write_winoground),
    "aro": (aro.read, data.write_aro),
    "valse": (valse.read, data.write_valse),
    "foil": (foil.read, data.write_foil),
    "cases": (cases.read, data.write_cases),
}


def request(root, name, **options):
    return Request(name, "published elsewhere", None, str(root), **options)


def spell(items):
    """Cases with the names of their images and the texts of their captions."""
    names, captions = items.images.records.names, items.captions
    result = []
    for case in items.cases:
        if isinstance(case, Choice):
            texts = [[captions[k] for k in side] for side in (case.true, case.false)]
            result.append((case.subset, names[case.image], *texts))
        else:
            result.append((case.subset, [names[k] for k in case.images], [captions[k] for k in case.captions]))
    return result


def test_sugar_crepe_is_read_with_seven_subsets(tmp_path):
    items = sugar_crepe.read(request(data.write_sugar_crepe(tmp_path), "sugar_crepe"))
    spelled = spell(items)
    assert len(spelled) == 21
    assert spelled[0] == ("add_att", "000000000139.jpg", ["A dog runs on grass 0."], ["A big dog 0 0."])
    assert [subset for subset, *_ in spelled[::3]] == list(sugar_crepe.SUBSETS)
    assert items.images.num_images == 2  # each photograph once
    assert Image.open(items.images.records.paths[0]).size == (40, 30)


def test_sugar_crepe_is_read_from_the_layout_of_its_repository(tmp_path):
    data.write_sugar_crepe(tmp_path)
    (tmp_path / "data").mkdir()
    for path in tmp_path.glob("*.json"):
        path.rename(tmp_path / "data" / path.name)
    (tmp_path / "val2017").rename(tmp_path / "photos")
    assert len(sugar_crepe.read(request(tmp_path, "sugar_crepe", images=str(tmp_path / "photos"))).cases) == 21


def test_winoground_is_read_as_pairings(tmp_path):
    items = winoground.read(request(data.write_winoground(tmp_path), "winoground"))
    assert spell(items)[1] == (
        "Relation",
        ["ex_1_img_0.png", "ex_1_img_1.png"],
        ["dog 1 runs after car", "car runs after dog 1"],
    )
    assert all(isinstance(case, Pairing) for case in items.cases)


def test_aro_cuts_out_the_box_of_a_case(tmp_path):
    data.write_aro(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "2386621.jpg", "PNG")
    items = aro.read(request(tmp_path, "aro"))
    assert spell(items)[0][2:] == (["the dog is on the grass"], ["the grass is on the dog"])
    assert [case.subset for case in items.cases] == ["relation", "attribution"]
    record = items.images.record(0)
    part = decode(record["image"], Resize(15, "squash"), "part")
    expected = decode(png_of(pixels[3:18, 5:25]), Resize(15, "squash"), "expected")
    np.testing.assert_array_equal(part, expected)


def png_of(pixels):
    import io

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_valse_leaves_out_cases_that_annotators_did_not_find_valid(tmp_path):
    items = valse.read(request(data.write_valse(tmp_path), "valse"))
    assert spell(items) == [
        ("existence", "running_1.jpg", ["There is a dog."], ["There is no dog."]),
        ("actant-swap", "exercising_255.jpg", ["A man climbs a rock."], ["A rock climbs a man."]),
    ]


def test_foil_pairs_every_foil_with_its_original(tmp_path):
    spelled = spell(foil.read(request(data.write_foil(tmp_path), "foil")))
    assert [(true, false) for *_, true, false in spelled] == [
        (["A boat on grass."], ["A car on grass."]),
        (["A dog runs."], ["A cat runs."]),
        (["A dog runs."], ["A horse runs."]),
    ]


def test_own_cases_are_of_either_kind(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert spell(cases.read(request(data.write_cases(tmp_path / "one"), "cases")))[1] == (
        "objects",
        "b.jpg",
        ["a dog", "two children"],
        ["a red car"],
    )
    (pairing,) = spell(cases.read(request(data.write_pairs(tmp_path / "two"), "cases")))
    assert pairing == ("cases", ["a.jpg", "b.jpg"], ["a dog bites a man", "a man bites a dog"])


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_is_named_with_where_it_is_published(name, tmp_path):
    read, write = READERS[name]
    with pytest.raises(DataError, match=r"no .*json.* in it; published elsewhere$"):
        read(request(tmp_path, name))
    write(tmp_path)
    with pytest.raises(DataError, match=r"--data_dir=.*/nothing: no such directory; published elsewhere$"):
        read(request(tmp_path / "nothing", name))
    with pytest.raises(DataError, match=r"--images=.*/nothing: no such directory"):
        read(request(tmp_path, name, images=str(tmp_path / "nothing")))


@pytest.mark.parametrize("name", READERS)
def test_a_missing_photograph_is_named(name, tmp_path):
    read, write = READERS[name]
    write(tmp_path)
    photographs = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".png"))
    for path in photographs:
        path.unlink()
    with pytest.raises(DataError, match=r"image '.*' is not in .*; restore it .*; published elsewhere$"):
        read(request(tmp_path, name))


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "sugar_crepe": (
        ("swap_obj.json", lambda c: c["1"].pop("negative_caption"), r"swap_obj.json: '1': the key 'negative_caption'"),
        ("swap_obj.json", lambda c: c["1"].update(caption=" "), r"swap_obj.json: '1': empty caption"),
        ("swap_obj.json", lambda c: c["1"].update(filename="../x.jpg"), r"'1': image '../x.jpg' leaves"),
        ("swap_obj.json", lambda c: c.clear(), r"expected an object of numbered entries"),
    ),
    "aro": (
        ("visual_genome_relation.json", lambda c: c[0].update(bbox_w="20"), r"\[0\]: 'bbox_w' must be of type int"),
        ("visual_genome_relation.json", lambda c: c.clear(), r"expected a list of entries"),
    ),
    "valse": (
        ("existence.json", lambda c: c["e_0"].pop("mturk"), r"'e_0': the key 'mturk' is missing"),
        ("existence.json", lambda c: c["e_0"].update(caption=["a", "b"]), r"'e_0': 'caption' must be of type str"),
    ),
    "foil": (
        ("foilv1.0_test_2017.json", lambda c: c["annotations"].pop(0), r"annotations\[0\]: id 7 has no original"),
        ("foilv1.0_test_2017.json", lambda c: c["annotations"][0].update(image_id=5), r"image_id 5 is not among"),
        ("foilv1.0_test_2017.json", lambda c: c["annotations"][1].update(foil=False), r"id 7 has a second original"),
        ("foilv1.0_test_2017.json", lambda c: c["annotations"][0].update(foil="no"), r"'foil' must be of type bool"),
    ),
}


@pytest.mark.parametrize(("name", "damage"), [(name, d) for name, damages in DAMAGES.items() for d in damages])
def test_damaged_suites_are_named_in_one_line(name, damage, tmp_path):
    read, write = READERS[name]
    file, change, message = damage
    change_json(write(tmp_path) / file, change)
    with pytest.raises(DataError, match=message) as error:
        read(request(tmp_path, name))
    assert "\n" not in str(error.value)


def test_a_box_outside_of_its_photograph_is_named(tmp_path):
    change_json(data.write_aro(tmp_path) / "visual_genome_relation.json", lambda c: c[0].update(bbox_x=400))
    items = aro.read(request(tmp_path, "aro"))
    with pytest.raises(DataError, match=r"2386621.jpg .*: cannot be cropped .*the box .* is empty"):
        items.images.record(0)


LINES = {
    "winoground": (
        ('{"id": 5, "image_0": "ex_0_img_0"}', r"examples.jsonl:3: the key 'image_1' is missing"),
        ('{"id": 0', r"examples.jsonl:3: not JSON"),
        ("REPEAT", r"examples.jsonl:3: id 0 is that of .*:1 already"),
    ),
    "cases": (
        ('{"image": "a.jpg", "true": [], "false": ["a"]}', r"cases.jsonl:3: 'true' must be a list of texts"),
        ('{"image": "a.jpg", "true": ["a"], "false": ["a"]}', r"cases.jsonl:3: a caption is both true and false"),
        ('{"images": ["a.jpg", "b.jpg"], "captions": ["a", "b"]}', r"cases.jsonl:3: has other keys"),
        ('{"images": ["a.jpg", "a.jpg"], "captions": ["a", "b"]}', r"cases.jsonl:3: give two different images"),
        (
            '{"image": "a.jpg", "true": ["a"], "false": ["b"], "subset": "all"}',
            r"cases.jsonl:3: subset 'all' is the name of another row",
        ),
        ("[1]", r"cases.jsonl:3: expected an object"),
    ),
}


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in LINES.items() for line in lines])
def test_damaged_lines_are_named(name, line, tmp_path):
    read, write = READERS[name]
    text, message = line
    path = next(write(tmp_path).glob("*.jsonl"))
    first = path.read_text().splitlines()[0]
    path.write_text(path.read_text().rstrip("\n") + "\n" + (first if text == "REPEAT" else text) + "\n")
    with pytest.raises(DataError, match=message):
        read(request(tmp_path, name))
