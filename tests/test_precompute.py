"""Features written by `precompute` equal the towers' states; an interrupted run resumes without loss."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ROOT, environment
from sample_data import write_flickr8k, write_precomputed

from mefn_jax.data import images
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.grids import pool_grid
from mefn_jax.encoders.pretrained import weights
from mefn_jax.errors import ConfigError
from mefn_jax.precompute import Progress

FILES = ("train_ims.npy", "train_words.npy", "train_word_offsets.npy", "train_caps.txt", "train_ids.txt")


def options(towers, prepared, out):
    return (
        "--config=configs/flickr8k.py:smoke",
        f"--config.image.pretrained={towers / 'vit'}",
        f"--config.text.pretrained={towers / 'bert'}",
        "--config.image.region_grids=(2, 1)",
        "--config.text.max_tokens=10",
        f"--config.data.dir={prepared}",
        f"--out={out}",
    )


def test_precompute_writes_states_of_towers(towers, prepared, tmp_path, command):
    out = tmp_path / "out"
    text = command("-m mefn_jax.precompute", *options(towers, prepared, out), "--splits=train,dev").stdout
    assert f"wrote train, val into {out}" in text
    split = Dataset(prepared).split("val")
    captions = [c for k in range(split.num_images) for c in split.record(k)["captions"]]
    assert (out / "dev_caps.txt").read_text().splitlines() == captions
    assert (out / "dev_ids.txt").read_text().split() == [str(k) for k in range(split.num_images)]

    resize = images.Resize(64, "squash", resample="bicubic")
    pixels = np.stack([images.decode(split.record(k)["image"], resize, "") for k in range(split.num_images)]) / 255
    pixels = ((pixels - np.array([0.4, 0.5, 0.6])) / 0.2).astype(np.float32)
    tower = weights.load_tower(towers / "vit", "image")
    (grid,), _ = tower.module.apply({"params": tower.params}, pixels)
    expected = [np.asarray(pool_grid(grid, n)).reshape(split.num_images, n * n, -1) for n in (2, 1)]
    features = np.load(out / "dev_ims.npy")
    assert (features.dtype, features.shape) == (np.float32, (12, 5, 16))
    np.testing.assert_allclose(features, np.concatenate(expected, 1), atol=2e-4)

    ids, mask = Tokenizer((towers / "bert" / "tokenizer.json").read_text(), 10, False, "keep")(captions)
    tower = weights.load_tower(towers / "bert", "text")
    states, _ = tower.module.apply({"params": tower.params}, ids, mask)
    words, offsets = np.load(out / "dev_words.npy"), np.load(out / "dev_word_offsets.npy")
    assert words.dtype == np.float16
    assert offsets[-1] == len(words) == mask.sum() - 2 * len(captions)
    for k in (0, 17, 59):
        expected = np.asarray(states[k, 1 : mask[k].sum() - 1])
        np.testing.assert_allclose(words[offsets[k] : offsets[k + 1]], expected, atol=5e-3)
    assert Tokenizer((out / "tokenizer.json").read_text(), 10, False, "keep").vocab_size == 12  # with [MASK]
    assert not list(out.glob("*.part"))


SLOW = """
import sys, time
from mefn_jax import precompute
from mefn_jax.runtime.cli import run_command
from mefn_jax.data import pipeline
read_quickly = pipeline.image_batches
def image_batches(*args):
    for batch in read_quickly(*args):
        time.sleep(0.4)
        yield batch
pipeline.image_batches = image_batches
precompute.SAVE_SECONDS = 0.0  # seconds
run_command(precompute.main, precompute.define_flags)
"""


def test_killed_precompute_resumes_to_equal_files(towers, prepared, tmp_path, command, cache):
    args = ("--splits=train", "--config.eval.batch_size=4")
    command("-m mefn_jax.precompute", *options(towers, prepared, tmp_path / "whole"), *args)
    broken = tmp_path / "broken"
    progress = broken / "features.json"

    def kill_when(script, condition):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *options(towers, prepared, broken), *args], cwd=ROOT, env=environment(cache)
        )
        while not condition():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()

    # Kills the command before it has recorded any progress, and then in the middle.
    kill_when(SLOW.replace("0.0  # seconds", "99.0"), (broken / "train_ims.npy.part").exists)
    assert json.loads(progress.read_text())["done"] == {}
    kill_when(SLOW, lambda: json.loads(progress.read_text())["done"].get("train_ims.npy", 0) >= 8)
    done = json.loads(progress.read_text())["done"]["train_ims.npy"]
    assert 8 <= done < 40
    assert not (broken / "train_ims.npy").exists()
    # Rows that were written are not written again, so a mark in them survives.
    part = np.load(broken / "train_ims.npy.part", mmap_mode="r+")
    part[0] += 1
    part.flush()
    command("-m mefn_jax.precompute", *options(towers, prepared, broken), *args)
    whole, resumed = (np.load(tmp_path / run / "train_ims.npy") for run in ("whole", "broken"))
    resumed[0] -= 1
    np.testing.assert_allclose(resumed[0], whole[0], atol=1e-6)
    np.testing.assert_array_equal(resumed[1:], whole[1:])
    for name in FILES[1:]:
        assert (tmp_path / "whole" / name).read_bytes() == (broken / name).read_bytes(), name


def test_precompute_refuses_other_settings_and_missing_towers(towers, prepared, tmp_path, command):
    out = tmp_path / "out"
    command("-m mefn_jax.precompute", *options(towers, prepared, out), "--splits=val")

    def refusal(*args):
        result = command("-m mefn_jax.precompute", *args, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        return result.stderr

    changed = refusal(*options(towers, prepared, out), "--config.image.region_grids=(2,)")
    assert "holds features with other settings (image)" in changed
    # The same weights may lie in another folder.
    (towers / "elsewhere").mkdir()
    shutil.copytree(towers / "vit", towers / "elsewhere" / "vit")
    shutil.copytree(towers / "bert", towers / "elsewhere" / "bert")
    command("-m mefn_jax.precompute", *options(towers / "elsewhere", prepared, out), "--splits=val")
    other = write_flickr8k(tmp_path / "source", numbers=(20, 12), seed=1)
    command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={other}", f"--out={tmp_path / 'data'}")
    changed = refusal(*options(towers, tmp_path / "data", out), "--splits=val")
    assert "holds features of other data for val" in changed
    assert "data.dir is a mixture" in refusal(*options(towers, f"{prepared}:1,{tmp_path / 'data'}:1", out))
    (out / "features.json").write_text("{")
    assert "features.json: cannot be read" in refusal(*options(towers, prepared, out))
    assert "--splits is empty" in refusal(*options(towers, prepared, out), "--splits=")
    (tmp_path / "file").write_text("")
    assert "is a file; give a directory" in refusal(*options(towers, prepared, tmp_path / "file"))
    plain = ("--config=configs/flickr8k.py:smoke", f"--out={tmp_path / 'other'}")
    assert "give image.pretrained, text.pretrained or both" in refusal(*plain)
    assert "give either --config=FILE.py with pretrained towers, or --workdir=RUN" in refusal(plain[1])
    assert "is not empty and holds no features.json" in refusal(*options(towers, prepared, towers))


def test_precompute_explains_full_disk_and_resumes(towers, prepared, tmp_path, command):
    """Limits files to 8 kB, less than the features need, so that writing them fails as on a full disk."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))  # noqa: E731
    args = (*options(towers, prepared, tmp_path / "out"), "--splits=train")
    full = command("-m mefn_jax.precompute", *args, check=False, preexec_fn=limit)
    assert full.returncode == 1
    assert "cannot be written" in full.stderr
    assert "run the same command to go on" in full.stderr
    assert "Traceback" not in full.stderr
    command("-m mefn_jax.precompute", *args)
    assert np.load(tmp_path / "out" / "train_ims.npy").shape == (40, 5, 16)


def test_precompute_uses_towers_of_a_run(prepared, tmp_path, command):
    run = tmp_path / "run"
    command("train.py", "--config=configs/flickr8k.py:smoke", f"--workdir={run}", f"--config.data.dir={prepared}")
    command("-m mefn_jax.precompute", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--splits=dev")
    assert np.load(tmp_path / "out" / "dev_ims.npy").shape == (12, 16, 32)
    assert np.load(tmp_path / "out" / "dev_words.npy").shape[1] == 32


def test_precompute_writes_row_per_caption_without_five_captions(towers, tmp_path, command):
    root = write_flickr8k(tmp_path / "source", numbers=(20, 3))
    token = root / "Flickr8k.token.txt"
    token.write_text("".join(line for line in token.read_text().splitlines(True) if "dev_1.jpg#4" not in line))
    command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={root}", f"--out={tmp_path / 'data'}")
    image_alone = [o for o in options(towers, tmp_path / "data", tmp_path / "out") if "text.pretrained" not in o]
    command("-m mefn_jax.precompute", *image_alone, "--splits=val")
    rows = np.load(tmp_path / "out" / "dev_ims.npy")
    image_index = [0] * 5 + [1] * 4 + [2] * 5
    assert (tmp_path / "out" / "dev_ids.txt").read_text().split() == [str(k) for k in image_index]
    assert len(np.unique(rows, axis=0)) == 3
    np.testing.assert_array_equal(rows, rows[[0, 0, 0, 0, 0, 5, 5, 5, 5, 9, 9, 9, 9, 9]])
    assert not (tmp_path / "out" / "dev_words.npy").exists()


def test_precompute_refuses_image_tower_for_regions(towers, tmp_path, command):
    for split in ("train", "dev"):
        write_precomputed(tmp_path / "x", split, 6, shape=(5, 8))
    options = ("--config=configs/flickr8k.py", f"--config.data.dir={tmp_path / 'x'}", f"--out={tmp_path / 'out'}")
    tower = f"--config.image.pretrained={towers / 'vit'}"
    result = command("-m mefn_jax.precompute", *options, tower, "--splits=train", check=False)
    assert "holds precomputed regions; an image tower needs images" in result.stderr
    assert not (tmp_path / "out").exists()


def test_progress_compares_what_an_earlier_command_recorded(tmp_path):
    settings = {"weights": "a", "tokenizer": "x"}
    Progress(tmp_path, settings).begin("val", [("1.jpg", ["a dog"])])
    Progress(tmp_path, settings).begin("val", [("1.jpg", ["a dog"])])
    with pytest.raises(ConfigError, match=r"other settings \(tokenizer\)"):
        Progress(tmp_path, settings | {"tokenizer": "y"})
    path = tmp_path / "features.json"
    record = json.loads(path.read_text())
    del record["settings"]["tokenizer"]  # earlier versions did not record it
    path.write_text(json.dumps(record))
    Progress(tmp_path, settings)
    for content in ("[]", "null", '{"done": 1}', '{"done": {}, "splits": {}, "settings": 3}', "[" * 100_000, ""):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"features\.json: cannot be read"):
            Progress(tmp_path, settings)
