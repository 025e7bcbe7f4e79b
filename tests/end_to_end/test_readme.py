"""README's example of Python code."""

import re
import textwrap

from commands import ROOT


def test_readme_python_example_runs(mefn_run, loaded, tmp_path, monkeypatch, capsys):
    """Runs README's lines of Python in a folder with the run and the photographs that they name."""
    code = re.search(r"    import mefn_jax\n.*?\n\n(?=## )", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(mefn_run)
    for k, name in enumerate(("one.jpg", "two.jpg")):
        (tmp_path / name).write_bytes(loaded[2].record(k)["image"])
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code), {})
    printed = capsys.readouterr().out
    assert printed.count("[") >= 4
    assert "'circle'" in printed
