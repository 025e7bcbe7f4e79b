"""The changes that docs/changes.md shows: each applies alone, and all together train."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, environment
from PIL import Image

BLOCKS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "changes.md").read_text(), re.DOTALL)


def copy_sources(root):
    """Copies the files that the changes touch to `root`, and returns it."""
    for name in ("mefn_jax", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / name, root)
    return root


def apply_diff(block, root, *options):
    environ = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}  # so that git does not look for a repository
    done = subprocess.run(
        ["git", "apply", *options], input=block, cwd=root, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    root = copy_sources(tmp_path_factory.mktemp("patched"))
    for block in BLOCKS:
        apply_diff(block, root, "--check")
    for block in BLOCKS:
        apply_diff(block, root)
    return root


def test_changes_cover_every_kind_of_part():
    titles = re.findall(r"^## A new (.*)$", (ROOT / "docs" / "changes.md").read_text(), re.MULTILINE)
    assert titles == ["entropy", "matcher", "loss", "encoder", "system", "data set"]
    assert len(BLOCKS) == len(titles)


@pytest.mark.slow  # that each applies, and equals loops, is tested always
def test_changes_train_and_evaluate(patched, cache, tmp_path):
    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=patched, env=environment(cache), capture_output=True, text=True
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
    order = "--config=configs/shapes.py:smoke,model=order", "--config.matcher.power=1.5"
    run("train.py", *order, *short, f"--workdir={tmp_path / 'order'}")
    assert "order (step 2)" in run("eval.py", f"--workdir={tmp_path / 'order'}")
    config = json.loads((tmp_path / "order" / "eval" / "test" / "metrics.json").read_text())["config"]
    assert (config["loss"]["name"], config["matcher"]["power"]) == ("circle", 1.5)


def test_changes_equal_naive_loops(patched):
    """Compares Renyi's entropy, FILIP, order embeddings, the decoupled and the circle loss with loops."""
    code = """
import jax.numpy as jnp, numpy as np
from mefn_jax.losses import circle, decoupled
from mefn_jax.matching.entropy import renyi
from mefn_jax.features import make_features
from mefn_jax.matching.filip import FILIP
from mefn_jax.matching.order import OrderEmbeddings
rng = np.random.default_rng(0)
S, regions, words = rng.uniform(-1, 1, (4, 5)), np.array([1, 1, 1, 0], bool), np.array([1, 1, 0, 1, 0], bool)
H, region_entropy, word_entropy = renyi(S, regions, words, 9.0)
for i in range(3):
    p = np.exp(9 * S[i, words]) / np.exp(9 * S[i, words]).sum()
    np.testing.assert_allclose(region_entropy[i], -np.log((p**2).sum()) / np.log(3), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(H[i].sum(), -np.log((p**2).sum()), rtol=1e-4, atol=1e-6)
for j in np.flatnonzero(words):
    q = np.exp(9 * S[:3, j]) / np.exp(9 * S[:3, j]).sum()
    np.testing.assert_allclose(word_entropy[j], -np.log((q**2).sum()) / np.log(3), rtol=1e-4, atol=1e-6)
assert not np.any(H[~regions]) and not np.any(H[:, ~words])
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
v = make_features(draw(2, 4, 6), jnp.asarray([regions, ~regions | True]), draw(2, 6))
t = make_features(draw(3, 5, 6), jnp.asarray([words, words, ~words]), draw(3, 6))
scores = FILIP().apply({}, v, t)
for i in range(2):
    for k in range(3):
        s = np.asarray(v.fragments[i] @ t.fragments[k].T)[np.asarray(v.mask[i])][:, np.asarray(t.mask[k])]
        np.testing.assert_allclose(scores[i, k], (s.max(0).mean() + s.max(1).mean()) / 2, rtol=1e-4, atol=1e-6)
for absolute, power in ((True, 2.0), (False, 1.5)):
    scores = OrderEmbeddings(absolute=absolute, power=power).apply({}, v, t)
    for i in range(2):
        for k in range(3):
            a, b = (np.abs(x) if absolute else x for x in (np.asarray(v.pooled[i]), np.asarray(t.pooled[k])))
            excess = sum(max(b[d] - a[d], 0.0) ** power for d in range(6))
            np.testing.assert_allclose(scores[i, k], -excess, rtol=1e-4, atol=1e-6)
x, scale = rng.normal(size=(3, 3)), 1.2
loss = 0
for k in range(3):
    for row in (x[k], x[:, k]):
        e = np.exp(np.exp(scale) * row)
        loss += -np.log(e[k] / (e.sum() - e[k])) / 6
np.testing.assert_allclose(decoupled(jnp.asarray(x), jnp.eye(3, dtype=bool), scale, None), loss, rtol=1e-4, atol=1e-6)
x, positives, loss = rng.uniform(-1, 1, (4, 4)), np.eye(4, dtype=bool), 0
positives[0, 1] = positives[1, 0] = True
for k in range(4):
    for row, true in ((x[k], positives[k]), (x[:, k], positives[:, k])):
        near = np.exp(-32 * max(1.25 - row[k], 0) * (row[k] - 0.75))
        far = sum(np.exp(32 * max(s + 0.25, 0) * (s - 0.25)) for s, same in zip(row, true) if not same)
        loss += np.log(1 + far * near) / 8
np.testing.assert_allclose(circle(jnp.asarray(x), jnp.asarray(positives), None, None), loss, rtol=1e-4, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=patched, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
