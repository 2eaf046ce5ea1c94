"""The GPUs that a plan is made for: what it needs to know of each.

Pure Python: a real device is described from its own limits in `selection.py`.
"""

import dataclasses
import math

KIB = 1024
# Programs of a launch must all be resident; this share of the device is left to others.
HEADROOM = 1 / 64
# How many pieces of the weights may be in registers, and with which Triton: in 3.7 the compiler
# keeps them there as tile.py loads them, in 3.6 and 3.9 it moves them to shared memory.
MOST_IN_REGISTERS = 2
TRITON_OF_REGISTERS = "3.7."


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU.

    Attributes:
        name: for people.
        capability: compute capability, 10 * major + minor.
        multiprocessors: streaming multiprocessors.
        shared_bytes: shared memory one program may have.
        clock_mhz: sustained clock assumed in the arithmetic.
        l2_bytes_per_clock: what all multiprocessors together read from L2 a clock.
        most_in_registers: pieces of the weights that the compiler at hand can keep in registers.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    clock_mhz: int
    l2_bytes_per_clock: int
    most_in_registers: int = MOST_IN_REGISTERS

    @property
    def resident_programs(self) -> int:
        """Programs one launch may hold, one to a multiprocessor, with headroom."""
        return self.multiprocessors - math.ceil(self.multiprocessors * HEADROOM)


# Multiprocessors and shared memory are the vendor's tables; clocks are the middle of base and boost
# that a busy card holds; L2 rates are what public microbenchmarks report, rounded down.
DEVICES = {
    80: Device("A100 SXM", 80, 108, 163 * KIB, 1410, 3072),
    86: Device("RTX 3090", 86, 82, 99 * KIB, 1695, 1536),
    89: Device("L40S", 89, 142, 99 * KIB, 2250, 2048),
    90: Device("H200 SXM", 90, 132, 227 * KIB, 1755, 3072),
    100: Device("B200", 100, 148, 227 * KIB, 1850, 4096),
}


def describe(*, name: str, capability: int, multiprocessors: int, shared_bytes: int) -> Device:
    """A device that reported its own limits; clock and L2 rate of the nearest one in the table."""
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
    """The device as a version of Triton can use it."""
    if version.startswith(TRITON_OF_REGISTERS):
        return device
    return dataclasses.replace(device, most_in_registers=0)
