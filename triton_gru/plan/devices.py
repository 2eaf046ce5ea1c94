"""The GPUs that plans are made for: their properties.

Pure Python: a real device is described from its own limits in `selection.py`.
"""

import dataclasses
import math

KIB = 1024
# Programs of a launch must all be resident; this share of the device stays free for others.
HEADROOM = 1 / 64
# How many pieces of the weights may be in registers, and with which Triton: 3.7 keeps them there as
# tile.py loads them, 3.6 and 3.9 move them to shared memory.
MOST_IN_REGISTERS = 2
TRITON_OF_REGISTERS = "3.7."
# The versions of Triton that are known to compile the Gluon kernels: tests/ptx/test_gluon.py and
# test_gluon_backward.py pass, and no plan spills, with 3.6.0 (on sm_90) and 3.7.1 (on all). Gluon
# is experimental: others may have another one. No GPU has run the kernels yet.
TRITON_OF_GLUON = ("3.6.", "3.7.")


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of a GPU that a plan depends on.

    Attributes:
        name: shown to users.
        capability: compute capability, 10 * major + minor.
        multiprocessors: streaming multiprocessors.
        shared_bytes: shared memory that one program may have.
        clock_mhz: sustained clock assumed in the arithmetic.
        l2_bytes_per_clock: bytes per clock that all multiprocessors together read from L2.
        most_in_registers: pieces of the weights that the installed Triton can keep in registers.
        gluon: whether the installed Triton compiles the Gluon kernels.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    clock_mhz: int
    l2_bytes_per_clock: int
    most_in_registers: int = MOST_IN_REGISTERS
    gluon: bool = False

    @property
    def resident_programs(self) -> int:
        """Programs that one launch may hold, one per multiprocessor, with headroom."""
        return self.multiprocessors - math.ceil(self.multiprocessors * HEADROOM)


# Multiprocessors and shared memory are from the vendor's tables; clocks are the middle of base and
# boost; L2 rates are those of public microbenchmarks, rounded down.
DEVICES = {
    80: Device("A100 SXM", 80, 108, 163 * KIB, 1410, 3072),
    86: Device("RTX 3090", 86, 82, 99 * KIB, 1695, 1536),
    89: Device("L40S", 89, 142, 99 * KIB, 2250, 2048),
    90: Device("H200 SXM", 90, 132, 227 * KIB, 1755, 3072),
    100: Device("B200", 100, 148, 227 * KIB, 1850, 4096),
}


def describe(*, name: str, capability: int, multiprocessors: int, shared_bytes: int) -> Device:
    """A device from the limits that it reports; clock and L2 rate of the nearest in the table."""
    known = [c for c in DEVICES if c <= capability]
    nearest = DEVICES[max(known)] if known else DEVICES[min(DEVICES)]
    return dataclasses.replace(
        nearest,
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        shared_bytes=shared_bytes,
    )


def for_triton(device: Device, version: str) -> Device:
    """The device with the limits of a version of Triton."""
    return dataclasses.replace(
        device,
        most_in_registers=MOST_IN_REGISTERS if version.startswith(TRITON_OF_REGISTERS) else 0,
        gluon=version.startswith(TRITON_OF_GLUON),
    )
