"""`train.py` and `eval.py` on every model, every pair of towers and every kind of data."""

import json
import re
import shutil

import pytest
from commands import logged
from sample_data import write_coco, write_flickr8k, write_karpathy, write_precomputed, write_table

from mefn_jax.data.dataset import Dataset
from mefn_jax.data.images import Resize, decode


def test_train_prints_header_and_logs_each_step(trained):
    workdir, text = trained
    for name in ("model", "data", "devices", "batch", "steps", "seed", "commit", "versions", "workdir"):
        assert re.search(rf"^{name} +\S", text, re.M), name
    assert "1 x cpu" in text
    assert "16 pairs, 16 a device" in text
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/8", "4/8", "6/8", "8/8"]
    for name in ("loss", "ms/step", "pairs/s", "data", "ETA", "grad", "lr"):
        assert all(name in line for line in lines)
    assert len({line.index("ETA") for line in lines}) == 1  # the lines are aligned
    assert [len(logged(workdir, name)) for name in ("loss", "grad_norm", "learning_rate", "val.rsum")] == [4, 4, 4, 2]
    assert list((workdir / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("model", ["mefn_no_entropy", "mefn_no_local", "mefn_no_global", "vsepp", "clip"])
def test_every_model_trains_and_evaluates(model, tmp_path, command):
    config = f"--config=configs/shapes.py:smoke,model={model}"
    command("train.py", config, f"--workdir={tmp_path}", "--config.train.steps=4")
    assert logged(tmp_path, "val.rsum")[4] > 0
    if model == "clip":  # eval.py treats the other models' checkpoints like MEFN's
        assert f"{model} (step 4)" in command("eval.py", f"--workdir={tmp_path}").stdout


# test_config.py traces the train step of every image with every text.
SLOW_PAIRS = [pytest.param(pair, marks=pytest.mark.slow) for pair in ("resnet101,text=bert", "vit_b16,text=gru")]


@pytest.mark.parametrize("pair", [*SLOW_PAIRS, "clip_vit_b32,text=clip"])
def test_every_pair_of_towers_trains_and_evaluates(pair, tmp_path, command):
    config = f"--config=configs/flickr30k.py:image={pair},smoke"
    command("train.py", config, f"--workdir={tmp_path}", "--config.train.steps=4")
    assert "mefn (step 4)" in command("eval.py", f"--workdir={tmp_path}").stdout


def test_prepared_flickr8k_trains_and_evaluates(prepared, tmp_path, command):
    config = "--config=configs/flickr8k.py:smoke"
    text = command("train.py", config, f"--workdir={tmp_path}", f"--config.data.dir={prepared}").stdout
    assert "train 40 images, 200 captions; val 12, 60" in text
    table = command("eval.py", f"--workdir={tmp_path}", "--split=dev").stdout
    assert "val: 12 images, 60 captions" in table
    assert "twins" not in table
    # The data may have moved, and its tokenizer is not needed.
    moved = tmp_path / "elsewhere"
    shutil.copytree(prepared, moved)
    (moved / "tokenizer.json").unlink()
    assert command("eval.py", f"--workdir={tmp_path}", "--split=val", f"--data_dir={moved}").stdout == table


def test_skip_undecodable_trains_without_truncated_image(tmp_path, command):
    root = write_flickr8k(tmp_path / "source", numbers=(20, 12))
    image = root / "Images" / "train_3.jpg"
    image.write_bytes(image.read_bytes()[:600])
    command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={root}", f"--out={tmp_path / 'out'}")
    options = ("--config=configs/flickr8k.py:smoke", f"--config.data.dir={tmp_path / 'out'}")
    refused = command("train.py", *options, f"--workdir={tmp_path / 'a'}", check=False)
    assert refused.returncode == 1
    assert "image 'train_3.jpg' cannot be decoded" in refused.stderr
    assert "data.skip_undecodable=True" in refused.stderr
    text = command("train.py", *options, f"--workdir={tmp_path / 'a'}", "--config.data.skip_undecodable=True").stdout
    assert "left out 1 images of train that cannot be decoded: train_3.jpg" in text


@pytest.mark.parametrize("source", ["karpathy", "coco", "table"])
def test_each_source_is_prepared(source, tmp_path, command):
    """A prepared data set is of one form whatever its source; `test_prepared_flickr8k_trains_and_evaluates` trains on
    one."""
    root = tmp_path / "source"
    root.mkdir()
    if source == "table":
        path, images = write_table(root, "csv"), root
    else:
        (write_karpathy if source == "karpathy" else write_coco)(root)
        path, images = root / "dataset_coco.json" if source == "karpathy" else root, root / "images"
    out = tmp_path / "out"
    args = (f"--source={source}", f"--path={path}", f"--images={images}", f"--out={out}")
    text = command("-m mefn_jax.data.prepare", *args).stdout
    if source == "karpathy":
        assert "kept the first 5 captions of 27 images that have more" in text
    split = Dataset(out).split("val")
    assert split.num_captions == split.num_images * (2 if source == "table" else 5)
    record = Dataset(out).split("train").record(0)
    assert decode(record["image"], Resize(16), record["image_id"]).shape == (16, 16, 3)


def test_precomputed_regions_train_and_refuse_other_width(tmp_path, command):
    data, run = tmp_path / "f30k_precomp", tmp_path / "run"
    for split, images in (("train", 20), ("dev", 6), ("test", 6)):
        write_precomputed(data, split, images, repeated=split == "train", shape=(5, 8))
    options = (f"--config.data.dir={data}", f"--workdir={run}")
    refused = command("train.py", "--config=configs/flickr8k.py:smoke", *options, check=False)
    assert "image.arch=vit takes images, but the data set has precomputed regions; set" in refused.stderr
    options = ("--config=configs/flickr30k.py:image=regions,smoke", *options)  # as README has it
    text = command("train.py", *options, "--config.train.steps=2").stdout
    assert "training a tokenizer on the 100 training captions" in text
    assert "train 20 images, 100 captions; val 6, 30" in text
    assert "val: 6 images, 30 captions (5 per image)" in command("eval.py", f"--workdir={run}", "--split=dev").stdout
    report = json.loads((run / "eval" / "val" / "metrics.json").read_text())
    assert report["config"]["image"]["regions"]["width"] == 8
    other = tmp_path / "other"
    write_precomputed(other, "test", 6, shape=(5, 9))
    refused = command("eval.py", f"--workdir={run}", f"--data_dir={other}", check=False)
    assert "error: the data set's regions are 9 wide, but image.regions.width=8" in refused.stderr
    options += (f"--config.data.dir={other}",)
    for split in ("train", "dev"):
        write_precomputed(other, split, 6, shape=(5, 9))
    refused = command("train.py", *options, "--config.train.batch_size=8", "--config.train.steps=4", check=False)
    assert "image.regions.width: 8 there, 9 here" in refused.stderr
