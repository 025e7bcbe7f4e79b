"""The Dockerfile and SkyPilot's files, which no test can run: they parse, and name files, extras and options that
exist. The notebook is stored without what it prints."""

import json
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml
from commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLOUD = sorted((ROOT / "cloud").glob("*.yaml"))
DUMMIES = {"BUCKET": "bucket", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}


def instructions():
    """Returns the instructions of the Dockerfile, as pairs of name and argument."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_dockerfile_copies_what_exists_and_ends_as_a_user_with_a_command_of_the_package():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [word for name, argument in instructions() if name == "COPY" for word in argument.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert set(sources) == kept
    dynamic = {"requirements.txt", "README.md", "LICENSE", "pyproject.toml", "MANIFEST.in", "mefn_jax", "configs"}
    assert set(sources) == dynamic  # what the wheel is built from
    last = dict(instructions())
    assert last["USER"] == "mefn"
    assert json.loads(last["ENTRYPOINT"])[0] in PROJECT["scripts"]


def test_dockerfile_names_extras_that_exist():
    comments = (ROOT / "Dockerfile").read_text() + (ROOT / "docs" / "anywhere.md").read_text()
    extras = [extra for names in re.findall(r"EXTRA=([\w,]+)", comments) for extra in names.split(",")]
    assert {"cuda", "tpu", "gs"} <= set(extras) <= PROJECT["optional-dependencies"].keys()
    (line,) = [argument for _, argument in instructions() if "EXTRA:+" in argument]
    for extra, expected in (("", "."), ("tpu,gs", ".[tpu,gs]")):
        done = subprocess.run(
            ["sh", "-c", line.replace("pip install --no-cache-dir", "echo")],
            env={"EXTRA": extra},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def list_commands(script):
    """Returns the commands `mefn-*` of a script as lists of words, after the shell has put variables in."""
    functions = "".join(f'{name}() {{ printf "%s\\0" {name} "$@"; printf "\\0"; }}\n' for name in PROJECT["scripts"])
    env = DUMMIES | {"SKYPILOT_NODE_RANK": "0", "PATH": "/usr/bin:/bin"}
    words = ["bash", "-euc", functions + script.replace("~/mefn/bin/", "")]
    printed = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    return [command.split("\0") for command in printed.split("\0\0") if command]


@pytest.mark.parametrize("path", CLOUD, ids=lambda path: path.name)
def test_skypilot_task_has_commands_that_this_version_takes(path, command):
    task = yaml.safe_load(path.read_text())
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    assert (ROOT / task["workdir"]).is_dir()
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', task["setup"])
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    train, evaluate = list_commands(task["run"])
    assert [train[0], evaluate[0]] == ["mefn-train", "mefn-eval"]
    printed = command("train.py", *train[1:], "--print_config").stdout
    for word in train[1:]:
        if word.startswith("--config."):
            key, _, value = word.removeprefix("--config.").partition("=")
            assert re.search(rf"^{re.escape(key)} = '?{re.escape(value)}'?  \[command line\]", printed, re.MULTILINE), (
                key
            )
    flags = set(re.findall(r"--(?:\[no\])?(\w+)", command("eval.py", "--help").stdout))
    assert {word[2:].partition("=")[0] for word in evaluate[1:]} <= flags
    workdirs = {word for words in (train, evaluate) for word in words if word.startswith("--workdir=")}
    (workdir,) = workdirs
    assert workdir.startswith("--workdir=gs://bucket/runs/")
    if "num_nodes" in task:
        options = ["--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=0"]
        assert set(options) <= set(train)


def test_documentation_names_the_files_of_the_clouds():
    text = (ROOT / "docs" / "anywhere.md").read_text()
    assert CLOUD
    for path in CLOUD:
        words = [shlex.split(line, comments=True) for line in text.splitlines() if path.name in line]
        assert ["sky", "jobs", "launch", f"cloud/{path.name}", "--env", "BUCKET=NAME"] in words


def test_notebook_is_stored_without_what_it_prints():
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert 5 <= len(code) <= 10
    assert all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in code)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
