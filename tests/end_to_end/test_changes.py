"""The changes that docs/changes.md shows: each applies alone, and all together train."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

BLOCKS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "changes.md").read_text(), re.DOTALL)


def copied(root):
    """A copy of what the changes are made to."""
    for name in ("mefn_jax", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / name, root)
    return root


def apply(block, root, *options):
    environ = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}  # a folder is enough: no repository around it
    done = subprocess.run(
        ["git", "apply", *options], input=block, cwd=root, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    root = copied(tmp_path_factory.mktemp("changed"))
    for block in BLOCKS:
        apply(block, root, "--check")
    for block in BLOCKS:
        apply(block, root)
    return root


def test_there_is_one_for_each_part():
    titles = re.findall(r"^## A new (.*)$", (ROOT / "docs" / "changes.md").read_text(), re.MULTILINE)
    assert titles == ["entropy", "matcher", "loss", "encoder", "data set"]
    assert len(BLOCKS) == len(titles)


def test_they_are_trained_and_evaluated(changed, cache, tmp_path):
    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=changed, env=environment(cache), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    rng = np.random.default_rng(0)
    for split, number in (("train", 20), ("val", 4), ("test", 4)):
        (tmp_path / "source" / split).mkdir(parents=True)
        for k in range(number):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "source" / split / f"{k}.png")
            (tmp_path / "source" / split / f"{k}.txt").write_text(f"a dog number {k}\ntwo children play\n")
    run(
        "-m", "mefn_jax.data.prepare", "--source=folders", f"--path={tmp_path / 'source'}", f"--out={tmp_path / 'data'}"
    )
    new = "--config.loss.name=decoupled", "--config.text.arch=bag", f"--config.data.dir={tmp_path / 'data'}"
    short = "--config.train.steps=2", "--config.train.batch_size=8"
    run("train.py", "--config=configs/shapes.py:smoke,model=filip", *new, *short, f"--workdir={tmp_path / 'filip'}")
    assert "filip (step 2)" in run("eval.py", f"--workdir={tmp_path / 'filip'}")
    entropy = "--config=configs/shapes.py:smoke", "--config.matcher.entropy=renyi"
    run("train.py", *entropy, *short, f"--workdir={tmp_path / 'renyi'}")


def test_they_compute_what_they_say(changed):
    """Renyi's entropy, FILIP and the decoupled loss against loops."""
    code = """
import jax.numpy as jnp, numpy as np
from mefn_jax.losses import decoupled
from mefn_jax.matching.entropy import renyi
from mefn_jax.matching.features import make_features
from mefn_jax.matching.filip import FILIP
rng = np.random.default_rng(0)
S, regions, words = rng.uniform(-1, 1, (4, 5)), np.array([1, 1, 1, 0], bool), np.array([1, 1, 0, 1, 0], bool)
H, of_regions, of_words = renyi(S, regions, words, 9.0)
for i in range(3):
    p = np.exp(9 * S[i, words]) / np.exp(9 * S[i, words]).sum()
    np.testing.assert_allclose(of_regions[i], -np.log((p**2).sum()) / np.log(3), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(H[i].sum(), -np.log((p**2).sum()), rtol=1e-4, atol=1e-6)
for j in np.flatnonzero(words):
    q = np.exp(9 * S[:3, j]) / np.exp(9 * S[:3, j]).sum()
    np.testing.assert_allclose(of_words[j], -np.log((q**2).sum()) / np.log(3), rtol=1e-4, atol=1e-6)
assert not np.any(H[~regions]) and not np.any(of_words[~words])
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
v = make_features(draw(2, 4, 6), jnp.asarray([regions, ~regions | True]), draw(2, 6))
t = make_features(draw(3, 5, 6), jnp.asarray([words, words, ~words]), draw(3, 6))
found = FILIP().apply({}, v, t)
for i in range(2):
    for k in range(3):
        s = np.asarray(v.fragments[i] @ t.fragments[k].T)[np.asarray(v.mask[i])][:, np.asarray(t.mask[k])]
        np.testing.assert_allclose(found[i, k], (s.max(0).mean() + s.max(1).mean()) / 2, rtol=1e-4, atol=1e-6)
x, scale = rng.normal(size=(3, 3)), 1.2
loss = 0
for k in range(3):
    for row in (x[k], x[:, k]):
        e = np.exp(np.exp(scale) * row)
        loss += -np.log(e[k] / (e.sum() - e[k])) / 6
np.testing.assert_allclose(decoupled(jnp.asarray(x), jnp.eye(3, dtype=bool), scale, None), loss, rtol=1e-4, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=changed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
