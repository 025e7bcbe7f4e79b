"""Small data in the exact formats in which benchmarks are published."""

import gzip
import json
from pathlib import Path

import numpy as np
from sample_data import save_images

SUGAR_CREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def write_sugar_crepe(root: Path) -> Path:
    """Writes SugarCrepe's seven files, numbered entries with a trailing space in a caption, and two photographs."""
    names = ["000000000139.jpg", "000000000285.jpg"]
    save_images(root / "val2017", names)
    for k, subset in enumerate(SUGAR_CREPE):
        entries = {
            str(n): {
                "filename": names[n % 2],
                "caption": f"A dog runs on grass {k}. ",
                "negative_caption": f"A grass runs on dog {k}." if subset.startswith("swap") else f"A big dog {n} {k}.",
            }
            for n in range(3)
        }
        (root / f"{subset}.json").write_text(json.dumps(entries, indent=4))
    return root


def write_winoground(root: Path) -> Path:
    """Writes Winoground's `examples.jsonl` and its PNG images, named without their ending."""
    lines = []
    for k, tag in enumerate(("Object", "Relation")):
        line = {"id": k, "image_0": f"ex_{k}_img_0", "image_1": f"ex_{k}_img_1", "num_main_preds": 1}
        line |= {"caption_0": f"dog {k} runs after car", "caption_1": f"car runs after dog {k}"}
        lines.append(line | {"tag": "Noun", "secondary_tag": "", "collapsed_tag": tag})
    (root / "images").mkdir(parents=True)
    save_images(root / "images", [f"ex_{k}_img_{n}.png" for k in range(2) for n in range(2)])
    (root / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def write_aro(root: Path) -> Path:
    """Writes ARO's two lists, whose cases are about a box of a photograph."""
    save_images(root / "images", ["2386621.jpg", "2405722.jpg"])
    box = {"bbox_x": 5, "bbox_y": 3, "bbox_w": 20, "bbox_h": 15}
    relation = [
        {"image_id": "2386621", "relation_name": "on", "image_path": "2386621.jpg", **box}
        | {"true_caption": "the dog is on the grass", "false_caption": "the grass is on the dog"}
    ]
    attribution = [
        {"image_id": "2405722", "attributes": ["red", "big"], "image_path": "2405722.jpg", **box}
        | {"true_caption": "the red car and the big dog", "false_caption": "the big car and the red dog"}
    ]
    (root / "visual_genome_relation.json").write_text(json.dumps(relation))
    (root / "visual_genome_attribution.json").write_text(json.dumps(attribution))
    return root


def write_valse(root: Path) -> Path:
    """Writes two of VALSE's files: a valid and an invalid case, and one whose caption is a list."""
    save_images(root / "images", ["exercising_255.jpg", "SWiG/running_1.jpg"])
    votes = {"foil": 0, "caption": 3, "other": 0}
    entry = {"dataset": "SWiG", "original_split": "test", "linguistic_phenomena": "actions"}
    actant = {
        "actions_test_0": entry
        | {"image_file": "exercising_255.jpg", "caption": "A man climbs a rock.", "foil": "A rock climbs a man."}
        | {"mturk": votes},
        "actions_test_1": entry
        | {"image_file": "running_1.jpg", "caption": "A dog runs.", "foil": "A car runs."}
        | {"mturk": {"foil": 2, "caption": 1, "other": 0}},
    }
    existence = {
        "e_0": entry
        | {"image_file": "running_1.jpg", "caption": ["There is a dog."], "foil": "There is no dog.", "mturk": votes}
    }
    (root / "actant-swap.json").write_text(json.dumps(actant))
    (root / "existence.json").write_text(json.dumps(existence))
    return root


def write_foil(root: Path) -> Path:
    """Writes FOIL-COCO's test file: a caption with two foils, and one with one."""
    names = [f"COCO_val2014_{k:012}.jpg" for k in (42, 73)]
    save_images(root / "val2014", names)
    notes = [
        {"id": 7, "image_id": 73, "caption": "A dog runs.", "foil": False, "foil_id": 1, "target_word": "ORIG"}
        | {"foil_word": "ORIG"},
        {"id": 7, "image_id": 73, "caption": "A cat runs.", "foil": True, "foil_id": 2, "target_word": "dog"}
        | {"foil_word": "cat"},
        {"id": 7, "image_id": 73, "caption": "A horse runs.", "foil": True, "foil_id": 3, "target_word": "dog"}
        | {"foil_word": "horse"},
        {"id": 9, "image_id": 42, "caption": "A car on grass.", "foil": True, "foil_id": 4, "target_word": "boat"}
        | {"foil_word": "car"},
        {"id": 9, "image_id": 42, "caption": "A boat on grass.", "foil": False, "foil_id": 5, "target_word": "ORIG"}
        | {"foil_word": "ORIG"},
    ]
    images = [{"id": key, "file_name": name, "width": 640} for key, name in zip((42, 73), names, strict=True)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": notes}
    (root / "foilv1.0_test_2017.json").write_text(json.dumps(content))
    return root


def write_cases(root: Path) -> Path:
    """Writes cases of a user's own: an image with several captions."""
    save_images(root, ["a.jpg", "b.jpg"])
    lines = [
        {"image": "a.jpg", "true": ["a red car"], "false": ["a car red"], "subset": "order"},
        {"image": "b.jpg", "true": ["a dog", "two children"], "false": ["a red car"], "subset": "objects"},
    ]
    (root / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def write_pairs(root: Path) -> Path:
    """Writes cases of a user's own: two images and two captions."""
    save_images(root, ["a.jpg", "b.jpg"])
    line = {"images": ["a.jpg", "b.jpg"], "captions": ["a dog bites a man", "a man bites a dog"]}
    (root / "cases.jsonl").write_text(json.dumps(line) + "\n\n")
    return root


def write_coco_test(root: Path, images: int = 10, train: int = 2) -> tuple[list[int], dict[int, list[int]]]:
    """Writes `dataset_coco.json` with `images` of the split test, each with six captions of which five are published,
    and the positives in the layout of `eccv_caption`. Returns the ids of the images and of their captions."""
    ids = [391895 - 7 * k for k in range(images)]
    sentence_ids = {key: [770337 + 100 * k + 3 * n for n in range(5)] for k, key in enumerate(ids)}
    entries = []
    for k, key in enumerate([*ids, *range(1, train + 1)]):
        split = "test" if k < images else "restval"
        sentids = [*sentence_ids.get(key, [5 * key + n for n in range(5)]), 10 * key + 1]
        sentences = [
            {"tokens": ["a"], "raw": f"A dog number {n} of {key}.", "imgid": k, "sentid": sentid}
            for n, sentid in enumerate(sentids)
        ]
        name = f"COCO_val2014_{key:012}.jpg"
        entries.append(
            {"filepath": "val2014", "sentids": sentids, "filename": name, "imgid": k, "split": split, "cocoid": key}
            | {"sentences": sentences}
        )
    save_images(root / "val2014", [entry["filename"] for entry in entries])
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    write_positives(root, ids, sentence_ids)
    return ids, sentence_ids


def write_positives(folder: Path, ids: list[int], sentence_ids: dict[int, list[int]]) -> None:
    """Writes the positives of ECCV Caption (half of the images), of CxC, and COCO's own, and the order of all
    captions."""
    rng = np.random.default_rng(0)
    order = [sentid for key in ids for sentid in sentence_ids[key]]
    own = {key: sentence_ids[key] for key in ids}

    def widen(chosen):
        return {key: list(dict.fromkeys([*own[key], *rng.choice(order, 4).tolist()])) for key in chosen}

    def write(name, i2t):
        t2i = {}
        for key, of_image in i2t.items():
            for sentid in of_image:
                if sentid not in order:
                    continue
                t2i.setdefault(sentid, []).append(key)
        for kind, content in (("image_to_caption", i2t), ("caption_to_image", t2i)):
            (folder / f"{name}_{kind}.json").write_text(json.dumps(content))

    folder.mkdir(parents=True, exist_ok=True)
    write("original", own)
    write("cxc", widen(ids))
    eccv = widen(ids[::2])
    eccv[ids[0]].append(144675)  # a caption that is not of the published gallery, as in the package
    write("eccv", eccv)
    np.save(folder / "coco_test_ids.npy", np.array(order))


def write_judgements(root: Path) -> Path:
    """Writes Flickr8k's captions and judgements: an expert's line of an image with its own caption, which is left out,
    and shares of the crowd that are rounded."""
    names = [f"10{k}_ab.jpg" for k in range(4)]
    save_images(root / "Flicker8k_Dataset", names)
    tokens = [f"{name}#{n}\tA dog {k} runs on grass {n} ." for k, name in enumerate(names) for n in range(5)]
    tokens.append("2258277193_586949ec62.jpg.1#0\tA stray line .")
    (root / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")
    expert = [f"{names[0]}\t{names[0]}#1\t4\t4\t4"]
    expert += [
        f"{names[k]}\t{names[(k + 1 + n) % 4]}#{n}\t{1 + (k + n) % 4}\t1\t{1 + n % 4}"
        for k in range(4)
        for n in range(3)
    ]
    (root / "ExpertAnnotations.txt").write_text("\n".join(expert) + "\n")
    crowd = [f"{names[k]}\t{names[(k + n) % 4]}#{n}\t{n / 3:.6f}\t{n}\t{3 - n}" for k in range(4) for n in range(4)]
    (root / "CrowdFlowerAnnotations.txt").write_text("\n".join(crowd) + "\n")
    return root


def write_xm3600(root: Path) -> Path:
    """Writes XM3600's `captions.jsonl`: some languages have two captions of an image, one image has none in Quechua."""
    keys = ["fff1a2b3c4d5e6f7", "00a1b2c3d4e5f607", "abc0000000000001"]
    save_images(root / "images", [f"{key}.jpg" for key in keys])
    lines = []
    for k, key in enumerate(keys):
        line = {"image/key": key, "image/locale": "en"}
        for code, texts in {
            "en": [f"A dog {k}.", f"Two children {k}."],
            "zh": [f"一只狗 {k}"],
            "quz": [f"Allqu {k}"],
        }.items():
            if code != "quz" or k:
                line[code] = {"caption": texts, "caption/tokenized": texts, "caption/tokenized/lowercase": texts}
        lines.append(json.dumps(line, ensure_ascii=False))
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_multi30k(root: Path) -> Path:
    """Writes a test set of Multi30K's task 1, as in its repository: one language is compressed."""
    names = [f"{k}.jpg" for k in range(3)]
    save_images(root / "flickr30k-images", names)
    task = root / "data" / "task1"
    for folder in ("raw", "image_splits"):
        (task / folder).mkdir(parents=True)
    (task / "image_splits" / "test_2016_flickr.txt").write_text("\n".join(names) + "\n")
    (task / "raw" / "test_2016_flickr.de").write_text("".join(f"Ein Hund läuft {k}.\n" for k in range(3)))
    english = "".join(f"A dog runs {k}.\n" for k in range(3))
    (task / "raw" / "test_2016_flickr.en.gz").write_bytes(gzip.compress(english.encode()))
    return root


def write_languages(root: Path) -> Path:
    """Writes a table of a user's own with a column for the language."""
    save_images(root, ["a.jpg", "b.jpg"])
    lines = ["image,caption,language"]
    lines += [
        f'{name}.jpg,"{text}, {name}",{code}' for code, text in (("en", "a dog"), ("de", "ein Hund")) for name in "ab"
    ]
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    return root


def write_classes(root: Path) -> Path:
    """Writes a folder of images for each of three classes, one of two words."""
    for k, name in enumerate(("dog", "red_car", "boat")):
        save_images(root / name, [f"{n}.jpg" for n in range(2 + k)])
    return root
