"""Keeps compiled programs on disk, so that a command does not compile them again when it is repeated."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from mefn_jax.runtime.storage import cache_directory

MAX_BYTES = 2 * 2**30  # of all kept programs; the least recently used are removed
# Faster compilations are not kept: reading the program would take as long.
MIN_COMPILE_SECONDS = 0.05


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in `$MEFN_CACHE`, or in `~/.cache/mefn_jax`. Does nothing if
    JAX_COMPILATION_CACHE_DIR is set (empty: no programs are kept), or if that place cannot be written."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        # Machines may share a home directory, and a program for a CPU may use instructions that another CPU lacks.
        directory = cache_directory() / f"compiled-{digest_processor()}"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if not os.access(directory, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def digest_processor() -> str:
    """Returns a digest, 12 hexadecimal digits, of the processor's model and its instruction sets."""
    description = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    description += sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return hashlib.sha256("\n".join(description).encode()).hexdigest()[:12]
