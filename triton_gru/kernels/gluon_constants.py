"""What the Gluon kernels are compiled for: sizes, layouts and inline assembly, as one argument."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.runtime import driver

from triton_gru.kernel_errors import error_words
from triton_gru.kernels import gluon_assembly, launch
from triton_gru.plan.plan import Plan, gluon_depth

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@dataclasses.dataclass(frozen=True, repr=False)
class Constants:
    """What both kernels are compiled for.

    Attributes:
        ARCH: compute capability.
        DTYPE: of everything that is exchanged.
        ROWS: batch rows per program, 8 or 16.
        COLUMNS: columns of the state per program, 16 or 32.
        WARPS: warps per program, each with its own part of K.
        CHUNKS: chunks of K.
        IN_REGISTERS: how many of them, the last ones, have their weights in registers.
        GROUP: programs per group.
        TAIL: whether the last chunk goes beyond the columns of the state.
        EDGE: whether the last program does.
        DIRECTIONS, RESET_AFTER, HAS_LENGTHS, HAS_RESETS: as in `forward.py`.
    """

    ARCH: int
    DTYPE: Any
    ROWS: int
    COLUMNS: int
    WARPS: int
    CHUNKS: int
    IN_REGISTERS: int
    GROUP: int
    TAIL: bool
    EDGE: bool
    DIRECTIONS: int
    RESET_AFTER: bool
    HAS_LENGTHS: bool
    HAS_RESETS: bool

    def __post_init__(self):
        W, N, M = self.WARPS, self.COLUMNS, self.ROWS
        sums = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
        across = min(N // 16, W)
        parts = gl.BlockedLayout([W, 1, 1], [1, 16, 2], [1, across, W // across], [2, 1, 0])
        element = self.DTYPE.primitive_bitwidth // 8
        depth, vector = gluon_depth(element), gluon_assembly.VECTOR_BYTES // element
        chunk = depth * W
        # 32-bit elements leave the assembly as integers.
        loaded = self.DTYPE if element == 2 else gl.int32
        follows = {
            "DEPTH": depth,
            "CHUNK": chunk,
            "TILE": [W, N, depth],
            "PACK": vector * M // 8,
            "FRAGMENT": 2 * vector,
            "LATER_K": 25 if element == 2 else 12,  # bits of k, see gluon_tile.lane_of
            "LOADED": loaded,
            "BITS": gl.int16 if element == 2 else gl.int32,
            "SUM": [W, N, M],
            "UNROLLED": 2 if self.RESET_AFTER else 1,
            "SUMS": sums,
            "LEFT": gl.DotOperandLayout(0, sums, 4 // element),
            "RIGHT": gl.DotOperandLayout(1, sums, 4 // element),
            "PARTS": parts,
            "OWN": gl.SliceLayout(0, parts),
            "SHARED_SUMS": gl.SharedLinearLayout(shared_sums(W, N, M)),
            "SHARED_WEIGHTS": gl.SwizzledSharedLayout(vector, 2, 4, [2, 1, 0]),
            "POLL_TYPES": (loaded,) * self.CHUNKS + (gl.int32,),
        }
        self._set(**follows)
        poll = gluon_assembly.poll(
            self.CHUNKS, element * chunk, M // 8, self.TAIL, element, pairs=self.ARCH >= 90
        )
        self._set_assembly(
            POLL=poll,
            WEIGHTS=gluon_assembly.read_weights(element),
            PUBLISH=gluon_assembly.publish(min(32 * W, M * N), element),
        )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _set_assembly(self, **texts: gluon_assembly.Assembly) -> None:
        for name, (text, constraints) in texts.items():
            self._set(**{name: text, f"{name}_CONSTRAINTS": constraints})

    def __repr__(self) -> str:
        """With the assembly: Triton finds kernels that it compiled before by this text."""
        return f"Constants({sorted(vars(self).items())})"


@dataclasses.dataclass(frozen=True, repr=False)
class ForwardConstants(Constants):
    """Of `gluon_forward.py`; HAS_BIAS and SAVE_GATES as in `forward.py`."""

    HAS_BIAS: bool
    SAVE_GATES: bool


@dataclasses.dataclass(frozen=True, repr=False)
class BackwardConstants(Constants):
    """Of `gluon_backward.py`.

    Attributes:
        PADDED: elements of a row of what is exchanged, and of a plane of the factors.
    """

    PADDED: int

    def __post_init__(self):
        super().__post_init__()
        tiles, bf16 = self.ROWS // 8, self.DTYPE is DTYPES[torch.bfloat16]
        element = self.DTYPE.primitive_bitwidth // 8
        factors = gluon_assembly.read_factors(
            self.CHUNKS, element * self.CHUNK, element * self.PADDED, tiles, self.TAIL, element
        )
        self._set(FACTOR_TYPES=(self.LOADED,) * 3 * self.CHUNKS)
        self._set_assembly(FACTORS=factors, TIMES=gluon_assembly.times(tiles, bf16))


def shared_sums(warps: int, columns: int, rows: int) -> list[list[int]]:
    """Where [warps, columns, rows] float32 sums lie, as bases of the address bits.

    Half a warp stores 4 columns x 8 rows, a warp loads 16 columns x 2 rows. With the bank's bits
    (row 1, column 1, column 2, row 2 ^ column 4, row 4 ^ column 8) neither has a bank conflict.
    """
    banks = [[0, 0, 1], [0, 1, 0], [0, 2, 0], [0, 0, 2], [0, 0, 4]]
    swizzled = [[0, 4, 2], [0, 8, 4]]
    beyond = [[0, 0, 8 << i] for i in range((rows // 8).bit_length() - 1)]
    beyond += [[0, 16 << i, 0] for i in range((columns // 16).bit_length() - 1)]
    return banks + swizzled + beyond + [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]


@functools.lru_cache(maxsize=1024)  # called at every launch
def constants(plan: Plan, dtype: torch.dtype, arch: int, **options: Any) -> Constants:
    """Of a plan and a compute capability, with the options DIRECTIONS to the last by name."""
    kind: Any = ForwardConstants
    if plan.direction == "backward":
        kind = BackwardConstants
        options["PADDED"] = plan.span
    return kind(
        ARCH=arch,
        DTYPE=DTYPES[dtype],
        ROWS=plan.block_m,
        COLUMNS=plan.block_n,
        WARPS=plan.warps,
        CHUNKS=plan.k_blocks,
        IN_REGISTERS=plan.in_registers,
        GROUP=plan.group,
        TAIL=plan.tail < plan.block_k,
        EDGE=plan.group * plan.block_n > plan.span,
        **options,
    )


def launches(
    plan: Plan, like: torch.Tensor, polls: int, options: dict[str, Any]
) -> Iterator[tuple[tuple[int], dict[str, object]]]:
    """As `launch.launches`, for the Gluon kernels; `like` has the dtype and the current device."""
    arch = driver.active.get_current_target().arch
    arguments = {
        "zeros": like.new_zeros(3 * plan.block_k * plan.k_blocks),
        "error": error_words(like.device),
        "polls": polls,
        "C": constants(plan, like.dtype, arch, **options),
    }
    for grid, settings in launch.grids(plan):
        yield grid, {**arguments, **settings}
