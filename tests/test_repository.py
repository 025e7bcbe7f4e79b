"""The repository itself: lint, README's commands, and the modules that commands import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from configs import default
from mefn_jax import config as configuration
from mefn_jax.commands.eval import VERBS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]])
def test_ruff_is_clean(words):
    result = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_ci_runs_test_command_of_readme():
    readme = (ROOT / "README.md").read_text()
    command = "pip install -r requirements-test.txt && python -m pytest"
    assert f"&& {command}\n" in readme
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith(command)
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def read_requirements(name):
    """The requirements of a file, as (name, specifier); files that it includes are left out."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_constraints_have_a_version_within_every_requirements_bounds(python):
    pinned = {canonicalize_name(r.name): r.specifier for r in read_requirements(f"constraints-{python}.txt")}
    assert all(str(specifier).startswith("==") for specifier in pinned.values())
    for requirement in read_requirements("requirements.txt") + read_requirements("requirements-test.txt"):
        assert {">=", "<"} <= {part.operator for part in requirement.specifier}, requirement
        version = str(pinned[canonicalize_name(requirement.name)]).removeprefix("==")
        assert requirement.specifier.contains(version), requirement
    assert f'"{python}"' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_readme_names_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:mefn_jax|configs)/[\w/]+\.py|\w+\.py)`", readme):
        assert (ROOT / path).is_file(), path


def test_readme_names_keys_and_flags_that_exist(command):
    readme = (ROOT / "README.md").read_text()
    known = set(configuration.flatten(default.base().to_dict()))
    keys = set(re.findall(r"--config\.([\w.]+\w)[=`]", readme)) - {"key"}
    assert len(keys) > 15
    assert keys <= known, keys - known
    # This checks README's spelling; other tests run the commands that need no cloud.
    commands = [["train.py"], ["eval.py"], *(["eval.py", verb] for verb in VERBS)]
    commands += [[f"-m {module}"] for module in sorted(set(re.findall(r"python -m (mefn_jax\.[\w.]+)", readme)))]
    flags = set()
    for words in commands:
        flags |= set(re.findall(r"--(?:\[no\])?(\w+)", command(*words, "--help").stdout))
    for line in re.findall(r"(?:train\.py|eval\.py|-m mefn_jax\.[\w.]+)([^`|\n]*)", readme):
        named = set(re.findall(r" --(\w+)\b(?!\.)", line)) - {"config", "name"}
        assert named <= flags, (line, named - flags)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_package_imports_no_tensorflow_torch_pickle_or_tests():
    for path in [*ROOT.glob("mefn_jax/**/*.py"), *ROOT.glob("configs/*.py"), ROOT / "train.py", ROOT / "eval.py"]:
        for name in imports(path):
            assert name.split(".")[0] not in ("tensorflow", "torch", "tests", "pickle"), (path, name)


def test_commands_load_no_unneeded_modules():
    """Training and evaluation load neither TensorFlow nor torch, nor modules that only pictures and pages need."""
    unneeded = {"tensorflow", "torch", "matplotlib", "jinja2", "mefn_jax.reports.figures", "mefn_jax.retrieval.api"}
    modules = "mefn_jax.training.loop, mefn_jax.evaluation.evaluate"
    code = f"import sys, {modules}; print(*{unneeded} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stdout + result.stderr
