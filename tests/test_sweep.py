"""`python -m mefn_jax.sweep` with a run that fails."""

CONFIG = "--config=configs/precomputed.py:smoke"


def test_sweep_names_failed_run_and_continues(tmp_path, command):
    sweep = ("-m mefn_jax.sweep", CONFIG, "--models=mefn,vsep", "--seeds=0", f"--out={tmp_path}")
    result = command(*sweep, f"--config.data.dir={tmp_path / 'nowhere'}", check=False)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"mefn seed 0: failed, error: data.dir: {tmp_path / 'nowhere'}: no such directory")
    assert lines[1].startswith("vsep seed 0: failed, error: model: 'vsep' is not one of")
    for flags, message in (((), "--out=DIR is missing"), (("--out=x", "--seeds=a"), "--seeds=a: give numbers")):
        assert message in command("-m mefn_jax.sweep", CONFIG, *flags, check=False).stderr
