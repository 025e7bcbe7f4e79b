"""What a result was made with: packages, commit, code and parameters."""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy"),
    *("pillow", "simplejpeg", "opencv-python-headless"),  # these decode images
)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    return {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in PACKAGES}


def git_commit() -> str:
    """Returns the commit of the checkout, with "+changes" if files differ from it. Outside a checkout: what the package
    was installed from, its commit in Git or "release X.Y.Z"; "unknown" for a mere copy of the files."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # git would name a repository around it, such as that of the user's own project
        return _describe_installation(root)

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _describe_installation(folder: Path) -> str:
    """Returns what the package in a folder of installed packages was installed from; "unknown" in another folder."""
    for distribution in importlib.metadata.distributions(name="mefn-jax", path=[str(folder)]):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")  # which pip writes
        commit = origin.get("vcs_info", {}).get("commit_id", "")
        return commit[:12] or f"release {distribution.version}"
    return "unknown"


def params_digest(params) -> str:
    """Returns the SHA-256 of the names and values of parameters (a tree of arrays), which identifies them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def code_digest() -> str:
    """Returns a digest of the package's code. The commit does not suffice: checkouts of one commit may have different
    changes."""
    package = Path(__file__).resolve().parents[1]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()[:12]
