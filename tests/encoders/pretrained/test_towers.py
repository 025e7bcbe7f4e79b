"""Pretrained towers in the real commands: training, freezing, resuming, and messages."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from commands import ROOT, SMOKE, assert_same_results, read_state, refusal
from sample_data import add_rows

from configs import default, flickr30k
from mefn_jax.data.from_config import make_tokenizer
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.encoders.pretrained import weights
from mefn_jax.encoders.pretrained.preprocessor import read_preprocessing
from mefn_jax.encoders.pretrained.towers import insert_pretrained, load_pretrained
from mefn_jax.errors import WeightsError
from mefn_jax.model import build_model
from mefn_jax.runtime.checkpoint import Checkpoints


@pytest.mark.slow  # each part has tests of its own
def test_pretrained_towers_train_with_frozen_text_and_resume(towers, command):
    workdir = towers / "run"
    options = (
        f"--config.text.pretrained={towers / 'bert'}",
        f"--config.image.pretrained={towers / 'vit'}",
        "--config.text.max_tokens=10",
        '--config.train.lr_multipliers=("text/backbone:0", "image/backbone:0.1")',
    )
    text = command("train.py", SMOKE, f"--workdir={workdir}", *options).stdout
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.load_tower(towers / "bert", "text").params))
    assert f"parameters, {size:,} of them frozen" in text
    _, state = read_state(workdir)
    largest_change = {}
    for kind, name in (("text", "bert"), ("image", "vit")):
        before = jax.tree_util.tree_leaves_with_path(weights.load_tower(towers / name, kind).params)
        trained = [state[f"/params/{kind}/backbone/" + "/".join(part.key for part in path)] for path, _ in before]
        largest_change[kind] = max(float(np.abs(a - b).max()) for a, (_, b) in zip(trained, before, strict=True))
    assert largest_change["text"] == 0
    assert 0 < largest_change["image"] < 0.01
    with Checkpoints(workdir) as checkpoints:
        config = checkpoints.meta(checkpoints.latest)["config"]
    assert (config["text"]["bert"]["width"], config["image"]["vit"]["pool"]) == (16, "pooler")
    assert tuple(config["image"]["mean"]) == (0.4, 0.5, 0.6)
    assert (config["image"]["resize"], config["image"]["resample"]) == ("squash", "bicubic")
    # A run that has started no longer needs the towers' checkpoints.
    shutil.rmtree(towers / "bert")
    shutil.rmtree(towers / "vit")
    assert "mefn (step" in command("eval.py", f"--workdir={workdir}").stdout
    check_export(workdir, towers / "model", command)
    args = ("train.py", SMOKE, f"--workdir={workdir}")
    assert "train.lr_multipliers freezes other parameters" in refusal(command, *args, *options[:-1])
    assert "image.pretrained: " in refusal(command, *args, *options, f"--config.image.pretrained={towers}")
    resumed = command(*args, *options[2:], "--config.train.steps=10").stdout
    assert "resuming after 8" in resumed
    assert "note: train.steps was 8" in resumed
    later_state = read_state(workdir)[1]
    np.testing.assert_array_equal(
        later_state["/params/text/backbone/words/embedding"], state["/params/text/backbone/words/embedding"]
    )


def check_export(workdir, out, command):
    """An export of the run evaluates as the run, and tells how pixels are prepared as the tower's checkpoint does."""
    command("-m mefn_jax.export", f"--workdir={workdir}", f"--out={out}")
    command("eval.py", f"--workdir={out}")
    assert_same_results(workdir / "eval" / "test", out / "eval" / "test")
    options = read_preprocessing(out)
    assert (options["size"], options["resize"], options["crop"], options["resample"]) == (64, "squash", 1.0, "bicubic")
    np.testing.assert_allclose((options["mean"], options["std"]), ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)), rtol=1e-12)


def test_train_notes_unused_parts_of_pretrained_checkpoint(clip, prepared, tmp_path, command):
    options = (
        "--config=configs/flickr8k.py:smoke",
        f"--config.image.pretrained={clip}",
        f"--config.data.dir={prepared}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=2",
    )
    text = command("train.py", *options).stdout
    assert "note: the projection to 10 dimensions is not used, because embed_dim is 32" in text
    assert f"note: image.size=64, but {clip} was trained at 16" in text


def test_train_explains_hub_name_without_network(tmp_path, command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = (f"--workdir={tmp_path}", "--config.text.pretrained=nobody/nothing-here")
    message = refusal(command, "train.py", SMOKE, *options)
    assert "nobody/nothing-here: no such directory, and not available from the Hugging Face hub" in message
    assert "hf download nobody/nothing-here --local-dir DIR" in message
    message = refusal(command, "train.py", SMOKE, f"--workdir={tmp_path}", "--config.image.pretrained=/no/where/at all")
    assert "/no/where/at all: no such directory" in message


def test_train_refuses_text_tower_without_its_tokenizer(towers, command):
    options = (
        f"--workdir={towers / 'run'}",
        f"--config.text.pretrained={towers / 'bert'}",
        "--config.text.max_tokens=10",
    )
    path = towers / "bert" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    path.unlink()
    assert "tokenizer.json: no such file, nor vocab.txt" in refusal(command, "train.py", SMOKE, *options)
    tokenizer.add_tokens([f"new{k}" for k in range(40)])
    tokenizer.save(str(path))
    assert "the tokenizer has 51 tokens, the embedding 40 rows" in refusal(command, "train.py", SMOKE, *options)


def test_load_pretrained_refuses_other_end_of_text(clip):
    """transformers would pool at the token that config.json names, which must be that of the tokenizer."""
    config = default.get_config().unlock()
    config.text.update(pretrained=str(clip), max_tokens=10)
    assert load_pretrained(config)[0].text.arch == "clip"
    path = clip / "config.json"
    content = json.loads(path.read_text())
    for number, refused in ((2, False), (38, True), ([39], True)):  # 2: the largest id is meant, in the first CLIPs
        content["text_config"]["eos_token_id"] = number
        path.write_text(json.dumps(content))
        if refused:
            with pytest.raises(WeightsError, match="of the text tower is not 39"):
                load_pretrained(config)
        else:
            load_pretrained(config)


def test_load_pretrained_notes_pooling_of_sentence_transformers(towers, capsys):
    (towers / "bert" / "1_Pooling").mkdir()
    (towers / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    config = default.get_config().unlock()
    config.text.update(pretrained=str(towers / "bert"), max_tokens=10)
    load_pretrained(config)
    assert "pools by mean_tokens, which is not read: text.pooling=tower is used" in capsys.readouterr().out


def test_open_clip_embeds_texts_with_its_own_files(clip, tmp_path):
    """From its layout: the sizes, the joint space, the preprocessing, and CLIP's tokenizer beside it."""
    directory = tmp_path / "open_clip"
    shutil.copytree(ROOT / "tests" / "fixtures" / "open_clip_quick", directory)
    for path in clip.glob("tokenizer*.json"):
        shutil.copyfile(path, directory / path.name)
    add_rows(directory, 40)
    config = flickr30k.get_config("model=clip,image=clip_vit_b32,text=clip,smoke").unlock()
    config.text.update(pretrained=str(directory), max_tokens=10)
    config.image.update(pretrained=str(directory), size=0)
    config, loaded, tokenizer_json = load_pretrained(config)
    image = config.image
    assert (config.embed_dim, image.size, image.resize, image.vit.antialias) == (6, 8, "crop", True)
    assert make_tokenizer(config, tokenizer_json).sep == 39
    model = build_model(config, 40)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *dummy_inputs(config))
    params = insert_pretrained(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), loaded)
    expected = np.load(directory / "expected.npz")
    inputs = expected["input_ids"].astype(np.int32), expected["attention_mask"] > 0
    pooled = jax.jit(model.encode_texts)(params, *inputs).pooled
    np.testing.assert_allclose(pooled, expected["pooled_text"], atol=1e-4)
