"""Where compiled programs are kept."""

import jax
import pytest

from mefn_jax.runtime.compile_cache import MAX_BYTES, keep_compiled_programs

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def restored_options(monkeypatch):
    """JAX's options as they were, whatever a test sets."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_cache_of_project(tmp_path, monkeypatch):
    monkeypatch.setenv("MEFN_CACHE", str(tmp_path))
    keep_compiled_programs()
    (directory,) = tmp_path.glob("compiled-*")
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert jax.config.jax_compilation_cache_max_size == MAX_BYTES


@pytest.mark.parametrize("chosen", ["elsewhere", ""])
def test_place_that_user_chooses_is_left_alone(tmp_path, monkeypatch, chosen):
    monkeypatch.setenv("MEFN_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    keep_compiled_programs()
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEFN_CACHE", str(tmp_path / "file"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
