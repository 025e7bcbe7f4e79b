"""Runs the project's scripts as forks of a process that has imported their modules, because importing takes longer than
many of them run. A script sees the same as if it was started by itself."""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

IMPORTED = (
    "mefn_jax.training.loop",
    "mefn_jax.evaluation.ensemble",
    "mefn_jax.evaluation.zero_shot",
    "mefn_jax.retrieval.search",
    "mefn_jax.reports.compare",
    "mefn_jax.reports.explain",
    "mefn_jax.reports.report",
    "mefn_jax.precompute",
    "mefn_jax.data.prepare",
    # What these import only where they need it:
    "mefn_jax.data.formats.tfds_writer",
    "mefn_jax.reports.figures",
    "tensorboardX",
    "transformers.models.auto.tokenization_auto",
)


class Forks:
    """A process that forks scripts, one after the other, in `cwd`, with the environment `env`."""

    def __init__(self, cwd, env: dict):
        self.env = env
        words = [sys.executable, __file__]
        env = env | {"PYTHONPATH": os.pathsep.join(filter(None, (str(cwd), env.get("PYTHONPATH"))))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(words, cwd=cwd, env=env, text=True, **pipes)

    def run(self, words: list[str], folder) -> subprocess.CompletedProcess:
        """Runs a script, `["FILE.py", ...]` or `["-m", "MODULE", ...]`, to its end. Its output passes through files in
        `folder`."""
        out, err = str(folder / "stdout"), str(folder / "stderr")
        self._process.stdin.write(json.dumps([words, out, err]) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline()
        assert code, f"the forking process has ended with {self._process.wait()}"
        texts = [Path(path).read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(words, int(code), *texts)

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Forks a script for each line of stdin, and writes its exit code."""
    for name in IMPORTED:
        importlib.import_module(name)
    # Tracing makes many objects that live on, among which a collection finds no garbage.
    gc.set_threshold(50_000, 20, 20)
    gc.freeze()
    for line in sys.stdin:
        words, out, err = json.loads(line)
        child = os.fork()
        if not child:
            become(words, out, err)
            return  # ends as a script does
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(words: list[str], out: str, err: str) -> None:
    """Runs a script in this process; its SystemExit and exceptions pass through."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY), number)
    if words[0] == "-m":
        sys.modules.pop(words[1], None)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve()
