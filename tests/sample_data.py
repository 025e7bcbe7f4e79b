"""Small data sets, written in the formats of their sources."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

CAPTIONS = ("a dog runs on grass .", "two children play", "a red car", "someone climbs a rock", "Water, and a boat .")
# Arguments of `prepare.prepare`.
PREPARE_OPTIONS = {"vocab_size": 300, "lower_case": True, "punctuation": "keep", "scenes": None, "seed": 0}


def save_images(folder: Path, names) -> None:
    """Writes a plain JPEG for each name."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (k * 9 % 256, 80, 160)).save(folder / name, "JPEG")


def write_flickr8k(root: Path, numbers=(12, 6), seed=0) -> Path:
    """Writes a folder in Flickr8k's format, with these numbers of noise images in train and dev; returns it."""
    rng = np.random.default_rng(seed)
    (root / "Images").mkdir(parents=True)
    lines = []
    for split, number in zip(("train", "dev"), numbers, strict=True):
        names = [f"{split}_{k}.jpg" for k in range(number)]
        for name in names:
            pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).resize((120, 80)).save(root / "Images" / name)
            lines += [f"{name}#{k}\t{rng.choice(CAPTIONS)}" for k in range(5)]
        (root / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")
    lines.append("2258277193_586949ec62.jpg.1#0\tA stray line of no listed image .")
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    return root


def write_karpathy(root: Path, numbers=(("train", 20), ("restval", 2), ("val", 3), ("test", 2)), captions=6) -> list:
    """Writes and returns entries as `dataset_coco.json` has them: with `filepath`, tokens and the raw text, and by
    default more than five captions."""
    entries = []
    for split, number in numbers:
        for k in range(number):
            sentences = [
                {"tokens": ["a", "dog"], "raw": f"A dog number {n}, {split} {k}.\n", "imgid": k, "sentid": n}
                for n in range(captions)
            ]
            folder = "val2014" if split != "train" else "train2014"
            entries.append(
                {"filepath": folder, "sentids": [0], "filename": f"{split}_{k}.jpg", "imgid": k, "split": split}
                | {"sentences": sentences, "cocoid": k}
            )
    save_images(root / "images", [f"{e['filepath']}/{e['filename']}" for e in entries])
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return entries


def write_coco(root: Path) -> None:
    """Writes COCO's two caption files; the last image of each split has no captions."""
    for split, number in (("train2017", 20), ("val2017", 3)):
        images = [{"id": 100 + k, "file_name": f"{k:012}.jpg", "height": 30} for k in range(number + 1)]
        notes = [
            {"image_id": 100 + k, "id": 1000 - 7 * k - n, "caption": f"caption {n} of {k}"}
            for k in range(number)
            for n in range(5)
        ]
        save_images(root / "images" / split, [i["file_name"] for i in images])
        (root / f"captions_{split}.json").write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))


def write_table(root: Path, kind: str) -> Path:
    """Writes a table of 24 images with two captions each, "csv" or "jsonl", and returns its path."""
    save_images(root, [f"photos/{k}.jpg" for k in range(24)])
    rows = [(f"photos/{k}.jpg", f'say "{n}", {k}', "train" if k < 20 else "dev") for n in range(2) for k in range(24)]
    if kind == "csv":
        lines = ["image,caption,split"] + ['{},"{}",{}'.format(i, c.replace('"', '""'), s) for i, c, s in rows]
    else:
        lines = [json.dumps({"image": i, "caption": c, "split": s}) for i, c, s in rows]
    path = root / f"data.{kind}"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_formats(root: Path, numbers=(("train", 9), ("val", 4), ("test", 3)), captions=2) -> dict[str, Path]:
    """Writes the same images and captions as a table, Parquet shards, tars and an image folder; returns their
    folders by the names of the sources. The images are JPEGs of noise in `table`, called as the tars call them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, folders = np.random.default_rng(5), {n: root / n for n in ("table", "parquet", "webdataset", "imagefolder")}
    for name in folders:
        folders[name].mkdir(parents=True)
    for split, number in numbers:
        entries = []
        for k in range(number):
            name, texts = f"{split}/{k // 5:05}/{k:04}.jpg", [f"{rng.choice(CAPTIONS)} {k}" for _ in range(captions)]
            path = folders["table"] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).save(path)
            entries.append((name, path.read_bytes(), texts))
        with (folders["table"] / f"{split}.csv").open("w", newline="") as stream:
            rows = [(name, text) for name, _, texts in entries for text in texts]
            csv.writer(stream).writerows([("image", "caption"), *rows])
        for start in range(0, number, 5):
            shard = entries[start : start + 5]
            column = [{"bytes": data, "path": name} for name, data, _ in shard]
            columns = {"image": column, "captions": [texts for *_, texts in shard], "other": [0] * len(shard)}
            file = f"{'validation' if split == 'val' else split}-{start // 5:05}-of-{-(-number // 5):05}.parquet"
            pq.write_table(pa.table(columns), folders["parquet"] / file, row_group_size=2)
            members = [
                member
                for name, data, texts in shard
                for member in (
                    (name.rpartition("/")[2], data),
                    (f"{Path(name).stem}.json", json.dumps({"captions": texts, "status": "success"}).encode()),
                )
            ]
            write_tar(folders["webdataset"] / split / f"{start // 5:05}.tar", members)
            (folders["webdataset"] / split / f"{start // 5:05}_stats.json").write_text("{}")
        for name, data, _ in entries:
            path = folders["imagefolder"] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        metadata = [{"file_name": name.partition("/")[2], "text": texts} for name, _, texts in entries]
        text = "".join(json.dumps(row) + "\n" for row in metadata)
        (folders["imagefolder"] / split / "metadata.jsonl").write_text(text)
    return folders


def write_tar(path: Path, members, mode="w") -> Path:
    """Writes a tar of members, pairs of name and content; `mode` is that of `tarfile.open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_precomputed(root: Path, split, images, repeated=False, shape=(3, 4), dtype=np.float32, ids=None):
    """Writes one split of precomputed regions in SCAN's format, with five captions per image; returns the images' rows.

    With `repeated`, the file has a row for each caption. With `ids`, `*_ids.txt` has a line for each of the "rows", or
    of the "captions".
    """
    root.mkdir(exist_ok=True)
    rows = np.random.default_rng(images).normal(size=(images, *shape)).astype(dtype)
    np.save(root / f"{split}_ims.npy", np.repeat(rows, 5, 0) if repeated else rows)
    lines = [f"A dog number {n} of {split} {k}." for k in range(images) for n in range(5)]
    (root / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    number = {None: 0, "rows": images * (5 if repeated else 1), "captions": 5 * images}[ids]
    if number:
        numbers = range(number) if ids == "rows" else np.arange(number) // 5
        (root / f"{split}_ids.txt").write_text("".join(f"{k}\n" for k in numbers))
    return rows


def write_cached_text(root: Path, split, captions, width=6, dtype=np.float16) -> list[np.ndarray]:
    """Writes cached text features, one vector for each word of each caption; returns them by caption."""
    rng = np.random.default_rng(len(captions))
    words = [rng.normal(size=(len(c.split()), width)).astype(dtype) for c in captions]
    root.mkdir(exist_ok=True)
    np.save(root / f"{split}_words.npy", np.concatenate(words))
    np.save(root / f"{split}_word_offsets.npy", np.cumsum([0, *map(len, words)]))
    (root / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    return words


def make_tokenizer(dataset, max_tokens=8):
    """Returns the tokenizer of a prepared data set."""
    from mefn_jax.data.tokenizer import Tokenizer

    return Tokenizer(dataset.tokenizer_json, max_tokens, True, "keep")


def write_tower(root: Path, fixture: str, tokenizer: str = "", rows: int = 0) -> Path:
    """Writes a checkpoint of a fixture's tower with a tokenizer of `fixtures/tokenizers`, for which the word embedding
    gets more rows; returns its folder."""
    folder = root / (fixture + tokenizer)
    fixtures = Path(__file__).parent / "fixtures"
    shutil.copytree(fixtures / fixture, folder)
    if not tokenizer:
        return folder
    for path in (fixtures / "tokenizers" / tokenizer).glob("tokenizer*.json"):
        shutil.copyfile(path, folder / path.name)
    add_rows(folder, rows)
    return folder


def add_rows(folder: Path, rows: int) -> None:
    """Gives the word embedding of a checkpoint's text tower random rows up to a number."""
    (config_file,) = {*folder.glob("*config.json")} - {*folder.glob("[pt]*_config.json")}
    config = json.loads(config_file.read_text())
    section = config.get("model_cfg", config)
    section.get("text_cfg", section.get("text_config", section))["vocab_size"] = rows
    config_file.write_text(json.dumps(config))
    (weights_file,) = folder.glob("*.safetensors")
    tensors = load_file(weights_file)
    for name, value in tensors.items():
        if name.endswith(("word_embeddings.weight", "token_embedding.weight")):
            more = np.random.default_rng(0).normal(size=(rows - len(value), value.shape[1]))
            tensors[name] = np.concatenate([value, more.astype(np.float32)])
    save_file(tensors, weights_file)
