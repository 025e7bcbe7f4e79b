"""Systems of the field's papers through the commands: any devices and processes, resume, index and search, compilation
for a TPU slice."""

import json
import shutil

import numpy as np
import pytest
from commands import SMOKE, assert_equal_states, finish, logged, read_state

from mefn_jax.data.images import decode, resize_from_config
from mefn_jax.evaluation import evaluator
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.retrieval import index, search

pytestmark = pytest.mark.slow
SYSTEMS = ("visita", "sfe", "esa", "vse_infinity", "mate")
STEPS = ("--config.train.steps=6", "--config.train.save_every=2", "--config.train.eval_every=6")
EVERY_STEP = ("--config.train.log_every=1",)
CAPTION = "a red circle is left of a blue square"


@pytest.fixture(scope="module", params=SYSTEMS)
def whole(request, command, tmp_path_factory):
    """The name of a system and the workdir of a finished run on one device."""
    workdir = tmp_path_factory.mktemp(request.param)
    command("train.py", f"{SMOKE},model={request.param}", f"--workdir={workdir}", *STEPS, *EVERY_STEP)
    return request.param, workdir


def test_losses_are_equal_on_eight_devices_and_two_processes(whole, command, start_training, tmp_path):
    name, workdir = whole
    command("train.py", f"{SMOKE},model={name}", f"--workdir={tmp_path / '8'}", *STEPS, *EVERY_STEP, devices=8)
    finish(start_training(tmp_path / "2", 2, *STEPS, model=name))
    expected = logged(workdir, "loss")
    assert len(expected) == 6
    for run in ("8", "2"):
        found = logged(tmp_path / run, "loss")
        np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-4, err_msg=run)


def test_run_resumes_bit_identically(whole, command, tmp_path):
    name, workdir = whole
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    options = (f"{SMOKE},model={name}", f"--workdir={tmp_path / 'run'}", *STEPS, *EVERY_STEP)
    assert "resuming after 4" in command("train.py", *options).stdout
    assert_equal_states(read_state(workdir), read_state(tmp_path / "run"))


def test_index_and_search_score_as_evaluation(whole, folder, tmp_path):
    _, workdir = whole
    run = TrainedRun(workdir, "latest")
    index.index_images(run, folder, tmp_path / "index")
    best = search.search_images(run, tmp_path / "index", CAPTION, 5)
    model, params, _ = evaluator.load_checkpoint(workdir, "latest")
    names = [n for n in index.find_images(folder).names if n != "broken.jpg"]
    pixels = np.stack([decode((folder / n).read_bytes(), resize_from_config(model.config.image), n) for n in names])
    images = model.model.encode_images(params, pixels)
    texts = model.model.encode_texts(params, *model.tokenizer([CAPTION]))
    scores = np.asarray(model.model.score(params, images, texts))[:, 0]
    np.testing.assert_allclose([score for score, _ in best], np.sort(scores)[::-1][:5], atol=1e-5)
    np.testing.assert_allclose([scores[names.index(name)] for _, name in best], [s for s, _ in best], atol=1e-5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_train_step_compiles_for_tpu_slice(name, command, tmp_path):
    pytest.importorskip("libtpu")
    path = tmp_path / "report.json"
    options = ("--compile_for=v5e:2x4", f"--compile_report={path}", "--config.train.batch_size=512")
    command("train.py", f"--config=configs/shapes.py:model={name}", *options)
    report = json.loads(path.read_text())
    assert report["fits"] is True
    assert report["chips"] == 8
