"""What is read of an exported folder, which may come from anyone: data of one form, refused in one line otherwise."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from commands import refusal
from safetensors.numpy import load_file, save_file

from mefn_jax.errors import UserError
from mefn_jax.evaluation.exported import load_exported

KERNEL = "text/backbone/layer_0/attention/query/kernel"


def edit(folder, *keys_and_value):
    """Sets a value in config.json at a path of keys."""
    *keys, last, value = keys_and_value
    path = folder / "config.json"
    content = json.loads(path.read_text())
    section = content
    for key in keys:
        section = section[key]
    section[last] = value
    path.write_text(json.dumps(content))


def change_tensors(folder, change):
    """Applies `change` to the dict of tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def remove_key(folder, *keys):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    section = content
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    path.write_text(json.dumps(content))


def flip_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


CONFIG = ("checkpoint", "config")
CHANGES = {
    "future": (lambda f: edit(f, "format", 99), "config.json: has format 99, written by a newer version"),
    "format_text": (lambda f: edit(f, "format", "1"), "expected an object whose 'format' is a number"),
    "other_library": (lambda f: edit(f, "library_name", "transformers"), "config.json: does not belong to an"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "config.json: does not belong to an exported model"),
    "no_json": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json: not JSON that can be read"),
    "not_utf8": (lambda f: (f / "config.json").write_bytes(b"\xff{}"), "config.json: cannot be read"),
    "unknown_key": (lambda f: edit(f, "auto_map", {}), "config.json: auto_map is unknown"),
    "unknown_stored": (lambda f: edit(f, "checkpoint", "hook", 1), "config.json: checkpoint.hook is unknown"),
    "unknown_section": (lambda f: edit(f, *CONFIG, "code", {}), "config.code is unknown"),
    "unknown_option": (lambda f: edit(f, *CONFIG, "matcher", "kapa", 1.0), "config.matcher.kapa is unknown"),
    "unknown_size": (lambda f: edit(f, *CONFIG, "image", "vit", "layer", 1), "config.image.vit.layer is unknown"),
    "unknown_train": (lambda f: edit(f, *CONFIG, "train", "hook", {}), "config.json: config.train.hook is unknown"),
    "unknown_data": (lambda f: edit(f, *CONFIG, "data", "path", "x"), "config.json: config.data.path is unknown"),
    "unknown_eval": (lambda f: edit(f, *CONFIG, "eval", "batch", 4), "config.json: config.eval.batch is unknown"),
    "no_step": (lambda f: remove_key(f, "checkpoint", "step"), "config.json: checkpoint.step is missing"),
    "no_option": (lambda f: remove_key(f, *CONFIG, "image", "size"), "describes no model .*size"),
    "step_text": (lambda f: edit(f, "checkpoint", "step", "8"), "config.json: checkpoint.step is '8'"),
    "step_true": (lambda f: edit(f, "checkpoint", "step", True), "config.json: checkpoint.step is 'True'"),
    "ema_number": (lambda f: edit(f, "ema", 1), "config.json: ema is '1'"),
    "no_model": (lambda f: edit(f, *CONFIG, "model", "os.system"), "'os.system' is not one of mefn, "),
    "no_arch": (lambda f: edit(f, *CONFIG, "image", "arch", "../../x"), "image.arch: '../../x' is not one of"),
    "no_entropy": (lambda f: edit(f, *CONFIG, "matcher", "entropy", "x"), "matcher.entropy: 'x' is not one of"),
    "wrong_type": (lambda f: edit(f, *CONFIG, "text", "bert", "width", "8"), "describes no model"),
    "endless": (
        lambda f: edit(f, *CONFIG, "text", "bert", "layers", 10**7),
        "config.text.bert.layers is 10000000, more",
    ),
    "huge_grid": (lambda f: edit(f, *CONFIG, "image", "region_grids", [10**6]), "config.image.region_grids is .*more"),
    "huge_text": (lambda f: edit(f, *CONFIG, "text", "max_tokens", 10**8), "exceeds text.bert.max_positions"),
    "huge_width": (lambda f: edit(f, *CONFIG, "embed_dim", 10**9), "does not fit config.json: .*float32 .*1000000000"),
    "other_width": (lambda f: edit(f, *CONFIG, "embed_dim", 9), r"words/bias is float32 \(8\), not float32 \(9\)"),
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(KERNEL)), f"missing {KERNEL} float32 "),
    "surplus": (lambda f: change_tensors(f, lambda t: t.update({"a/b": np.zeros(3)})), r"surplus a/b float64 \(3\)"),
    "outside": (lambda f: change_tensors(f, lambda t: t.update({"../b": np.zeros(3)})), r"surplus ../b float64 \(3\)"),
    "shape": (lambda f: change_tensors(f, lambda t: t.update({KERNEL: t[KERNEL][:3]})), rf"{KERNEL} is float32 \(3, "),
    "dtype": (
        lambda f: change_tensors(f, lambda t: t.update({KERNEL: t[KERNEL].astype(np.float16)})),
        rf"{KERNEL} is float16 .*, not float32",
    ),
    "nan": (lambda f: change_tensors(f, lambda t: t[KERNEL].fill(np.nan)), f"NaN or infinity in {KERNEL}"),
    "bit": (flip_bit, "model.safetensors: is damaged, or of another export"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors: cannot be read as tensors"),
    "pickle": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n"), "cannot be read as tensors"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "no_tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"auto_map": "x"}'), "tokenizer.json cannot be read"),
    "pipe": (lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")), "tokenizer.json: no such"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_folder_is_refused_in_one_line(exported, name):
    change, message = CHANGES[name]
    change(exported)
    with pytest.raises(UserError, match=message) as raised:
        load_exported(exported)
    assert "\n" not in str(raised.value)
    assert str(exported) in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_folder_are_refused(exported, tmp_path, name):
    (exported / name).rename(tmp_path / name)
    (exported / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}' leaves the directory"):
        load_exported(exported)


def test_command_prints_refusal_in_one_line(exported, command):
    edit(exported, "auto_map", {"AutoModel": "model.Model"})
    assert "config.json: auto_map is unknown" in refusal(command, "eval.py", f"--workdir={exported}", "--split=val")


def test_nothing_in_folder_is_imported_or_run(exported, tmp_path, monkeypatch):
    """Code that a folder brings stays text, whatever it is called and whatever points to it."""
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("modeling.py", "__init__.py", "tokenizer.py", "conftest.py", "sitecustomize.py", "get_config.py"):
        (exported / name).write_text(trap)
    pointers = {"auto_map": {"AutoTokenizer": ["tokenizer.T", "tokenizer.T"]}, "tokenizer_class": "T"}
    (exported / "tokenizer_config.json").write_text(json.dumps(pointers))
    shutil.copyfile(exported / "tokenizer_config.json", exported / "special_tokens_map.json")
    (exported / "pytorch_model.bin").write_bytes(b"\x80\x04cbuiltins\nexec\n(V" + trap.encode() + b"\ntR.")
    monkeypatch.chdir(exported)
    load_exported(exported)
    assert not (tmp_path / "ran").exists()
    assert not [name for name, module in sys.modules.items() if str(exported) in str(getattr(module, "__file__", ""))]
