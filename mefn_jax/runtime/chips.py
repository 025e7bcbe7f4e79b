"""Peak numbers of accelerators, from their makers' data sheets."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        memory: bytes of device memory (HBM).
        bandwidth: bytes per second between the chip and its memory.
    """

    flops: float
    memory: float
    bandwidth: float


# By `jax.Device.device_kind`. TPUs: cloud.google.com/tpu/docs/system-architecture-tpu-vm. One device of v4 and v5p is a
# whole chip.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.228e12),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.819e12),
    "TPU v5": Chip(459e12, 95 * GIB, 2.765e12),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.640e12),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2.039e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 3.35e12),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
    "NVIDIA L4": Chip(121e12, 24 * GIB, 0.3e12),
}
# Other names that releases of libtpu give to the same chips.
NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def chip_of(device) -> Chip | None:
    """Returns the chip of a JAX device; None for one that is not in the table."""
    return CHIPS.get(NAMES.get(device.device_kind, device.device_kind))
