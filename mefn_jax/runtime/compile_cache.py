"""Keeps compiled programs on disk, so that a command which ran before need not compile them again."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from mefn_jax.runtime.storage import cache_directory

MAX_BYTES = 2 * 2**30  # of all kept programs; the least recently used are removed
# Programs whose compilation takes less time than reading them are not kept.
MIN_COMPILE_SECONDS = 0.05


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in `$MEFN_CACHE`, or in `~/.cache/mefn_jax`. Does nothing if
    JAX_COMPILATION_CACHE_DIR is set (empty: no programs are kept), or if that place cannot be written."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        # JAX's keys for programs of a CPU leave out its features; a home directory may be shared by several machines.
        directory = cache_directory() / f"compiled-{_digest_processor()}"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if not os.access(directory, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def _digest_processor() -> str:
    """Returns a short digest of the kind of the machine's processor and of its features."""
    description = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    description += sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return hashlib.sha256("\n".join(description).encode()).hexdigest()[:12]
