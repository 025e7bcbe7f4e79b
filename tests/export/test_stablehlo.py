"""Programs of an exported model, run by a process that has JAX and NumPy alone."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, environment

from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.export.__main__ import export_run
from mefn_jax.export.stablehlo import STABLEHLO_FILES, check_flatbuffers

READER = re.search(r"```python\n(import json\n.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)[1]
USE = """
import sys

inputs = np.load("inputs.npz")
images = load_program("encode_images")(images=inputs["images"])
texts = load_program("encode_texts")(ids=inputs["ids"], mask=inputs["mask"])
scores = load_program("score")(images=images, texts=texts)
one = load_program("score")(images=jax.tree.map(lambda x: x[:1], images), texts=texts)
np.savez("outputs.npz", scores=scores, one=one, pooled=texts["pooled"])
print(*(name for name in ("mefn_jax", "flax", "safetensors", "ml_collections") if name in sys.modules))
"""


@pytest.fixture(scope="module")
def programs(once, small_run):
    """The exported folder of `small_run` with its programs."""
    return once("programs", lambda folder: export_run(TrainedRun(small_run), folder / "model", regions=36)) / "model"


def test_programs_give_scores_of_evaluator_in_process_with_jax_alone(programs, cache, tmp_path):
    evaluator, params, _ = TrainedRun(programs).load()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, evaluator.config.image.size, evaluator.config.image.size, 3), np.uint8)
    captions = ["a red circle", "a blue square left of a green triangle", "a square", "a circle", "red"]
    ids, mask = evaluator.tokenizer(captions)
    images = evaluator.encode_pixels(params, pad_rows(pixels, evaluator.mesh.size), 3)
    texts = evaluator.encode_captions(params, captions)
    expected = evaluator.scores(params, images, texts)(slice(0, 3), slice(0, 5))
    np.savez(tmp_path / "inputs.npz", images=pixels, ids=ids, mask=mask)
    code = READER.replace('"FOLDER"', repr(str(programs))) + USE
    env = {key: value for key, value in environment(cache).items() if key != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stdout + result.stderr
    with np.load(tmp_path / "outputs.npz") as outputs:
        np.testing.assert_allclose(outputs["scores"], expected, atol=1e-5)
        np.testing.assert_allclose(outputs["one"], expected[:1], atol=1e-5)
        np.testing.assert_allclose(outputs["pooled"], texts.pooled, atol=1e-5)
    assert expected.std() > 1e-3


def test_description_states_shapes_and_types(programs):
    description = json.loads((programs / "stablehlo.json").read_text())
    config = json.loads((programs / "config.json").read_text())["checkpoint"]["config"]
    size, width = config["image"]["size"], config["embed_dim"]
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    images, score = (description["programs"][name] for name in ("encode_images", "score"))
    assert images["inputs"] == {"images": {"shape": ["B", size, size, 3], "dtype": "uint8"}}
    assert images["outputs"]["pooled"] == {"shape": ["B", width], "dtype": "float32"}
    assert score["inputs"]["texts/pooled"]["shape"] == ["T", width]
    assert score["outputs"] == {"": {"shape": ["I", "T"], "dtype": "float32"}}
    assert not [name for name in images["parameters"] if name.startswith(("text/", "loss/"))]
    assert set(STABLEHLO_FILES) <= {path.name for path in programs.iterdir()}


def test_missing_flatbuffers_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ConfigError, match="--stablehlo needs flatbuffers: pip install flatbuffers"):
        check_flatbuffers()
