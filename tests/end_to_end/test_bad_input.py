"""The commands refuse bad input in one line that names it."""

import re

import pytest
from commands import SMOKE, refusal

from mefn_jax.runtime.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.train.stepz=4"], "option --config.train.stepz, did you mean 'steps'?; config.train has batch_"),
        ([SMOKE, "--config.train.stepz=4"], "option --config.train.stepz, did you mean 'steps'?; config.train has"),
        (["--config.trian.steps=4"], "option --config.trian.steps, did you mean 'train'?; config has augment, data, "),
        (
            [SMOKE, "--config.matcher.lse_factor=6"],  # an option of SCAN's matcher, but not of MEFN's
            "unknown option --config.matcher.lse_factor; config.matcher has branches, entropy, global_input, ",
        ),
        (["--config.train.steps=many"], "--config.train.steps=many"),
        (["--confg.train.steps=4"], "Unknown command line flag 'confg.train.steps'"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config=configs/shapes.py:smok"], "unknown configuration argument 'smok', did you mean 'smoke'?"),
        (["--config=configs/shapes.py:model=mefm"], "did you mean 'mefn'?"),
        ([SMOKE, "--config.data.dir=/nowhere"], "data.dir: /nowhere: no such directory"),
        ([SMOKE, "--config.train.batch_size=100000"], "train.batch_size=100000 exceeds the 320 training captions"),
        ([SMOKE, "--config.text.lower_case=False"], "text.lower_case=False, but the data set was prepared with True"),
        (["spare"], "unexpected argument 'spare'"),
    ],
)
def test_train_refuses_bad_option_in_one_line(args, message, tmp_path, command):
    assert message in refusal(command, "train.py", f"--workdir={tmp_path}", *args)


def test_train_refuses_batch_that_devices_do_not_divide(tmp_path, command):
    result = command("train.py", SMOKE, f"--workdir={tmp_path}", "--config.train.batch_size=12", devices=8, check=False)
    assert "train.batch_size=12 is not a multiple of the 8 devices" in result.stderr


def test_prepare_refuses_malformed_source_in_one_line(flickr8k, tmp_path, command):
    token = flickr8k / "Flickr8k.token.txt"
    token.write_text("broken\n" + token.read_text())
    args = ("--source=flickr8k", f"--path={flickr8k}", f"--out={tmp_path / 'out'}")
    assert "Flickr8k.token.txt:1: not '<image>#<number><tab><caption>'" in refusal(
        command, "-m mefn_jax.data.prepare", *args
    )
    assert "needs --path" in refusal(command, "-m mefn_jax.data.prepare", "--source=flickr8k", "--out=x")
    assert not (tmp_path / "out").exists()


def test_train_names_log_that_cannot_be_written(tmp_path, command):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    message = refusal(command, "train.py", SMOKE, f"--workdir={tmp_path}")
    assert "metrics.jsonl: cannot be written" in message
    assert "No space left on device" in message


def test_commands_refuse_urls_of_data(tmp_path, command):
    run = f"--workdir={tmp_path}"
    prepare = ("--source=coco", "--path=there", "--images=there", "--out=here")
    for script, args, option in (
        ("train.py", [run, SMOKE], "--config.data.dir"),
        ("eval.py", [run], "--data_dir"),
        ("-m mefn_jax.precompute", [run], "--out"),
        ("-m mefn_jax.precompute", [run, "--out=here"], "--data_dir"),
        *(("-m mefn_jax.data.prepare", prepare, option) for option in ("--path", "--images", "--out")),
    ):
        message = refusal(command, script, *args, f"{option}=gs://bucket/data")
        name = option.replace("--config.", "")
        assert f"{name}=gs://bucket/data: data must be in a local or mounted directory; mount the bucket" in message
    for script, option in (("train.py", "--workdir"), ("eval.py", "--workdir"), ("eval.py", "--out")):
        message = refusal(command, script, f"{option}=s3://bucket/run")
        assert f"{option}=s3://bucket/run: only gs:// and local or mounted directories can be used" in message


def test_train_stops_at_loss_that_is_not_finite(tmp_path, command):
    args = (f"--workdir={tmp_path}", "--config.train.learning_rate=1e30", "--config.train.clip_norm=1e30")
    message = refusal(command, "train.py", SMOKE, *args)
    step = int(re.search(r"step (\d+): loss", message)[1])
    assert 1 <= step <= 4
    assert "captions of the batch" in message
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None  # no broken state was saved
