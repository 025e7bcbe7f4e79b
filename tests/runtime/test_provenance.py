"""The commit that a result names."""

import json
import subprocess

from mefn_jax.runtime import provenance


def test_git_commit_outside_a_checkout_names_what_was_installed(tmp_path, monkeypatch):
    """Not the commit of a repository around it, such as that of a project whose environment has the package."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    packages = tmp_path / "packages"
    file = packages / "mefn_jax" / "runtime" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(file))
    file.parent.mkdir(parents=True)
    assert provenance.git_commit() == "unknown"
    metadata = packages / "mefn_jax-1.2.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mefn-jax\nVersion: 1.2.3\n")
    assert provenance.git_commit() == "release 1.2.3"
    (metadata / "direct_url.json").write_text(json.dumps({"url": "file:///mefn_jax-1.2.3.whl", "archive_info": {}}))
    assert provenance.git_commit() == "release 1.2.3"
    vcs = {"vcs": "git", "requested_revision": "main", "commit_id": "0123456789abcdef"}
    (metadata / "direct_url.json").write_text(json.dumps({"url": "https://x/mefn.git", "vcs_info": vcs}))
    assert provenance.git_commit() == "0123456789ab"
