"""Configuration files by name, in a checkout and in an installed package."""

import pytest
from commands import ROOT

from mefn_jax.errors import ConfigError
from mefn_jax.runtime import config_files
from mefn_jax.runtime.config_files import find_config, list_configs


def test_find_config_replaces_a_name_by_the_path_of_its_file(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert find_config("shapes:smoke,model=vsepp") == "configs/shapes.py:smoke,model=vsepp"
    assert find_config("configs/shapes.py:smoke") == "configs/shapes.py:smoke"
    monkeypatch.chdir(tmp_path)
    assert find_config("shapes") == str(ROOT / "configs" / "shapes.py")
    (tmp_path / "shapes").mkdir()  # no file of the same name stands in the way
    (tmp_path / "mine.py").touch()
    assert find_config("shapes") == str(ROOT / "configs" / "shapes.py")
    assert find_config("./mine.py:a=b") == "./mine.py:a=b"


@pytest.mark.parametrize("name", ["shape", "towers", "__init__", "", "shapes.py", "configs/shape.py", "/", ".:x"])
def test_find_config_lists_the_names_that_exist(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no such .*; give the path of a file, or one of default, flickr30k, flickr8"
    ):
        find_config(name)


def test_installed_package_finds_its_own_copies(monkeypatch, tmp_path):
    """As a wheel has it: the files lie in the package. A folder `configs` beside the package is another's."""
    for name in ("mefn_jax/configs/default.py", "mefn_jax/configs/mine.py", "configs/default.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(config_files, "_PACKAGE", tmp_path / "mefn_jax")
    assert config_files.is_installed()
    assert list_configs() == ["default", "mine"]
    monkeypatch.chdir(ROOT)
    assert find_config("mine:smoke") == f"{tmp_path}/mefn_jax/configs/mine.py:smoke"
