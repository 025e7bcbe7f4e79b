"""The repository itself: lint, the two commands, and what the command line's modules may import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default
from mefn_jax import config as configuration

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]])
def test_ruff_is_clean(words):
    result = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_ci_runs_the_readme_test_command():
    readme = (ROOT / "README.md").read_text()
    command = "pip install -r requirements-test.txt && python -m pytest"
    assert f"&& {command}\n" in readme
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith(command)
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_readme_names_what_exists():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:mefn_jax|configs)/[\w/]+\.py|\w+\.py)`", readme):
        assert (ROOT / path).is_file(), path


def test_readme_names_keys_and_flags_that_exist():
    readme = (ROOT / "README.md").read_text()
    known = set(configuration.flatten(default.base().to_dict()))
    keys = set(re.findall(r"--config\.([\w.]+\w)[=`]", readme)) - {"key"}
    assert len(keys) > 15
    assert keys <= known, keys - known
    # Here it is that README spells them right; the other tests run what needs no cloud.
    ours = {"train.py", "eval.py", *re.findall(r"python -m (mefn_jax\.[\w.]+)", readme)}
    flags = set()
    for script in ours:
        words = [script] if script.endswith(".py") else ["-m", script]
        done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
        flags |= set(re.findall(r"--(?:\[no\])?(\w+)", done.stdout))
    for line in re.findall(r"(?:train\.py|eval\.py|-m mefn_jax\.[\w.]+)([^`|\n]*)", readme):
        named = set(re.findall(r" --(\w+)\b(?!\.)", line)) - {"config", "name"}
        assert named <= flags, (line, named - flags)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_nothing_imports_tensorflow_torch_or_the_tests():
    for path in [*ROOT.glob("mefn_jax/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]:
        for name in imports(path):
            assert name.split(".")[0] not in ("tensorflow", "torch", "tests", "pickle"), (path, name)


def test_rooms_import_along_the_flow_of_data():
    below = {
        "data": ("encoders", "matching", "model", "training", "evaluate"),
        "encoders": ("model", "training", "evaluate"),
        "matching": ("encoders", "model", "training", "evaluate", "data"),
    }
    for room, later in below.items():
        for path in (ROOT / "mefn_jax" / room).glob("*.py"):
            for name in imports(path):
                parts = name.split(".")
                assert not (parts[0] == "mefn_jax" and len(parts) > 1 and parts[1] in later), (path, name)


def test_running_the_commands_loads_nothing_that_they_do_not_need():
    """Neither TensorFlow nor torch, nor what only pictures and pages need."""
    unneeded = {"tensorflow", "torch", "matplotlib", "jinja2", "mefn_jax.figures", "mefn_jax.library"}
    code = f"import sys, mefn_jax.training, mefn_jax.evaluate; sys.exit(bool({unneeded} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
