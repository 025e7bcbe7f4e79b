"""Accelerators that are known by name."""

from types import SimpleNamespace

from mefn_jax.runtime.chips import CHIPS, chip_of


def test_chip_of_finds_known_device_kinds():
    assert chip_of(SimpleNamespace(device_kind="TPU v5e")) is CHIPS["TPU v5 lite"]
    assert chip_of(SimpleNamespace(device_kind="cpu")) is None
