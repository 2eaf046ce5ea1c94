"""A scan to be planned, and the plan of its launch.

`planner.py` finds the plans of a problem, `costs.py` computes the time of their steps. Like
`devices.py` they are pure Python: no torch, no triton, no device.
"""

import dataclasses

# Rows of `states` and of the weights are padded to this many elements, so that rows stay aligned.
ALIGNMENT = 16
# Registers a thread may have. Passed to the compiler, which otherwise rounds down to 128 or 168, so
# that programs could share a multiprocessor, and spills a little: these never share one.
MAX_REGISTERS = 255
# Polls before a wait times out: with L2 answering in half a microsecond or more, about a second,
# far longer than any step.
POLLS = 1 << 20
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SENTINEL, COUNTER = "sentinel", "counter"
# The kernels of a plan.
SINGLE, GROUP, GLUON = "single", "group", "gluon"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One scan to be planned.

    Attributes:
        batch: rows.
        hidden: hidden_size.
        dtype: "float32", "bfloat16" or "float16".
        reset_after: the variant.
        direction: "forward" or "backward".
        directions: 1, or 2 for a bidirectional layer.
        tensor_cores: whether float32 products may use tf32.
    """

    batch: int
    hidden: int
    dtype: str
    reset_after: bool
    direction: str = "forward"
    directions: int = 1
    tensor_cores: bool = True


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one scan is launched.

    Attributes:
        kernel: "single", "group", or "gluon", which is a group's too.
        direction: "forward" or "backward".
        block_m: batch rows per program.
        block_n: columns of the state per program.
        block_k: columns of the vector that one piece of the resident weights spans.
        k_blocks: how many such pieces.
        tail: columns of the last piece; as many as `block_k` or fewer.
        in_registers: how many of the last pieces stay in registers, not in shared memory.
        split_k: parts into which warps split such a piece; 1 where they split the columns instead.
        warps: warps per program.
        group: programs that share the columns of one batch tile.
        groups: batch tiles x directions.
        launches: number of launches, if not all groups are resident together.
        groups_a_launch: groups of each launch but the last.
        stage_all: whether the whole vector is staged in shared memory at once, not chunk by chunk.
        by_block: whether the backward receives one gate's gradients after the other, not at once.
        protocol: "sentinel" or "counter".
        weight_bytes: of one program's slice.
        shared_bytes: estimate of what the compiler allocates.
        exchanged_bytes: read from L2 per step by all programs of a launch.
        lower_bound_us: lower bound of the time of a step, see costs.py.
        estimate_us: estimate of the time of a step, by which plans are compared.
    """

    kernel: str
    direction: str
    block_m: int
    block_n: int
    block_k: int
    k_blocks: int
    tail: int
    in_registers: int
    split_k: int
    warps: int
    group: int
    groups: int
    launches: int
    groups_a_launch: int
    stage_all: bool
    by_block: bool
    protocol: str
    weight_bytes: int
    shared_bytes: int
    exchanged_bytes: int
    lower_bound_us: float
    estimate_us: float

    @property
    def span(self) -> int:
        """Columns of the vector that the pieces cover together: hidden_size and padding."""
        return self.block_k * (self.k_blocks - 1) + self.tail

    @property
    def shared_weight_bytes(self) -> int:
        """Bytes of one program's slice in shared memory, which every step reads."""
        if not self.in_registers:
            return self.weight_bytes
        held = self.block_k * (self.in_registers - 1) + self.tail
        return self.weight_bytes * (self.span - held) // self.span

    def describe(self) -> str:
        """The plan in words, as the end of a sentence."""
        if self.kernel == "single":
            shape = (
                f"{self.groups} independent programs, each with all of W_hh for {self.block_m} rows"
            )
        else:
            launches = f" in {self.launches} launches" if self.launches > 1 else ""
            shape = (
                f"{self.groups} groups{launches} of {self.group} programs, each with "
                f"{self.block_n} columns of W_hh for {self.block_m} rows, exchanging the state by "
                f"{self.protocol}" + (", in Gluon" if self.kernel == GLUON else "")
            )
        return f"{shape}; at least {self.lower_bound_us:.2f} us per step by arithmetic"


def gluon_depth(element: int) -> int:
    """Columns of K that a warp of the Gluon kernels takes of each chunk: two matrix instructions.

    64 bytes, 16 for each of the 4 lanes that have a row.
    """
    return 64 // element


def padded_size(hidden: int) -> int:
    """hidden_size padded for the kernels."""
    return -(-hidden // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(frozen=True)
class StepTiles:
    """The tiles of `kernels/step.py`, the same for every shape."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def step_tiles(dtype: str) -> StepTiles:
    """Narrow columns: at hidden_size 512 already 32 programs share the reading of W_hh."""
    if dtype == "float32":
        return StepTiles(block_m=16, block_n=16, block_k=64, warps=4, stages=3)
    return StepTiles(block_m=16, block_n=16, block_k=128, warps=4, stages=3)
