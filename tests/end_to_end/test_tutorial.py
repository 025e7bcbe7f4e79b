"""The notebook, from top to bottom, in a process of its own and without Jupyter."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
from commands import ROOT

# Of processor time: the notebook keeps a core busy nearly all the time, so it takes no longer where nothing else runs.
SECONDS = 180
# Runs the code cells of a notebook in one namespace, and evaluates a last expression as Jupyter does.
RUNNER = """
import ast, json, sys
namespace = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] != "code":
        continue
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell["id"], "exec"), namespace)
    shown = eval(compile(ast.Expression(last.value), cell["id"], "eval"), namespace) if last else None
    print("shown:", type(shown).__name__, *getattr(shown, "size", ()), flush=True)
"""


def processor_seconds():
    """Returns the processor time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow  # what it calls is tested elsewhere; it trains for two minutes
def test_notebook_runs_from_top_to_bottom_in_three_minutes(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "MEFN_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-W", "ignore:.*non-interactive", "-c", RUNNER, str(ROOT / "docs" / "tutorial.ipynb")]
    start = processor_seconds()
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    seconds = processor_seconds() - start
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^shown: PngImageFile \d{3,} \d{3,}$", done.stdout, re.MULTILINE)  # the explained pair
    assert done.stdout.count("done: ") == 2
    for entropy in ("shannon", "renyi"):
        metrics = json.loads((tmp_path / "runs" / "tutorial" / entropy / "eval" / "test" / "metrics.json").read_text())
        assert metrics["config"]["matcher"]["entropy"] == entropy
        assert metrics["rsum"] > 100  # chance is 32
    assert seconds < SECONDS, f"{seconds:.0f} s"
