"""Compiles kernels for GPUs that need not be present, and reads the machine code.

Uses the installed Triton and the cuobjdump of its wheel. Instructions are counted in the loop over
time.
"""

import collections
import dataclasses
import os
import re
import subprocess
import tempfile

# Compiling needs triton without its interpreter, which triton decides when it is imported: no user
# of this module imports triton before it.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from triton_gru.kernels import backward, forward, gluon_backward, gluon_constants, gluon_forward
from triton_gru.kernels.launch import PROTOCOLS
from triton_gru.plan.plan import GLUON, MAX_REGISTERS, Plan, Problem, StepTiles

TRITON_VERSION = triton.__version__
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
# Argument types of the kernels; arguments not named here are pointers to the tensors' dtype.
INTEGERS = {"steps", "batch", "hidden", "padded", "y_row", "polls", "first_group"}
INT32_POINTERS = {"lengths", "resets", "counters", "error"}
FLOAT32_POINTERS = {"dh0", "update"}
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# How the Gluon kernel loads its weights, and nothing else.
WEIGHT_LOAD = "LDG.E.128.CONSTANT"
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on one kernel."""

    shared: int
    registers: int
    spill_bytes: int
    loop_spill_bytes: int
    loop_matrix: int
    loop_instructions: int
    loop_barriers: int
    loop_weight_loads: int
    lost_operands: tuple[str, ...]


def scan_kernel(plan: Plan):
    """The kernel that a plan launches."""
    if plan.kernel == GLUON:
        return (
            gluon_forward.scan_forward_gluon_kernel
            if plan.direction == "forward"
            else gluon_backward.scan_backward_gluon_kernel
        )
    return (
        forward.scan_forward_kernel
        if plan.direction == "forward"
        else backward.scan_backward_kernel
    )


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in INTEGERS:
        return "i32"
    if name in INT32_POINTERS:
        return "*i32"
    if name in FLOAT32_POINTERS:
        return "*fp32"
    return "*" + TRITON_TYPES[dtype]


def assemble(
    kernel,
    constants: dict,
    dtype: torch.dtype,
    arch: int,
    warps: int,
    aligned: bool,
    stages: int = 1,
):
    """Triton's result for compute capability `arch`; `aligned`: H is a multiple of 16."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: _type_of(name, dtype) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    # Arguments that the kernels do not specialise: a launch gives the compiler no hints about them.
    unaligned = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    unaligned.add("polls")
    if not aligned:
        unaligned.add("hidden")
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name not in unaligned
    }
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    if stages == 1:
        options["maxnreg"] = MAX_REGISTERS
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


_read: dict[str, Compiled] = {}  # by Triton's hash of what was compiled


def compile_kernel(*arguments, **options) -> Compiled:
    """The report on a kernel; arguments as for `assemble`."""
    compiled = assemble(*arguments, **options)
    if compiled.hash not in _read:  # problems of all batch sizes share a kernel
        _read[compiled.hash] = _read_code(compiled)
    return _read[compiled.hash]


def _read_code(compiled) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    loop, spilled = time_loop(sass)
    return Compiled(
        shared=compiled.metadata.shared,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spill_bytes=spilled,
        loop_spill_bytes=sum(_local_bytes(op) for op in loop),
        loop_matrix=sum(op.startswith(MATRIX) for op in loop),
        loop_instructions=len(loop),
        loop_barriers=sum(op.startswith("BAR") for op in loop),
        loop_weight_loads=weight_loads_in_loop(compiled.asm["ttgir"])
        + sum(op.startswith(WEIGHT_LOAD) for op in loop),
        lost_operands=lost_operands(compiled),
    )


def _cuobjdump(flag: str, path: str) -> str:
    done = subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True)
    return done.stdout


def _local_bytes(op: str) -> int:
    """Bytes per thread that a local load or store moves; 0 for any other instruction."""
    if not op.startswith(("LDL", "STL")):
        return 0
    width = re.search(r"\.(64|128)\b", op)
    return int(width.group(1)) // 8 if width else 4


def time_loop(sass: str) -> tuple[list[str], int]:
    """Instructions of the loop over time, and spill bytes moved anywhere in the kernel.

    The loop over time is the longest stretch that ends in a branch back to its start.
    """
    code = [
        (int(at, 16), op, rest)
        for at, op, rest in re.findall(
            r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*);", sass, re.M
        )
    ]
    longest = (0, -1)
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and target and int(target.group(1), 16) < at:
            start = int(target.group(1), 16)
            if at - start > longest[1] - longest[0]:
                longest = (start, at)
    loop = [op for at, op, _ in code if longest[0] <= at <= longest[1]]
    return loop, sum(_local_bytes(op) for _, op, _ in code)


def weight_loads_in_loop(ttgir: str) -> int:
    """Global loads inside the kernel's loop whose address comes from the argument `weight`."""
    source, weight, depth, count = {}, set(), [], 0
    for line in ttgir.splitlines():
        head = re.search(r"tt\.func public @", line)
        if head:
            weight = set(re.findall(r"(%weight\w*): !tt\.ptr", line))
        made = re.match(r"\s*(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?[^%]*(%[\w#]+)?", line)
        if made:
            name, op, first = made.groups()
            source[name] = first
            if op == "tt.load" and depth:
                at = first
                while at in source and at not in weight:
                    at = source[at]
                count += at in weight
        opened, closed = line.count("{"), line.count("}")
        if "scf.for" in line:
            depth.append(0)
        elif depth:
            depth[-1] += opened - closed
            if depth[-1] < 0:
                depth.pop()
    return count


# For each operand of a matrix product Triton chooses how many consecutive elements of K a thread
# holds (kWidth), four threads of a warp side by side. If a warp has fewer elements of K than that,
# part of the loaded data reaches no matrix instruction, and the result is silently wrong
# (tile.load_flags has a case). There are two traces of it: the layout itself in TTGIR, and in PTX
# shuffles that move such words between threads, whose results no instruction reads.
THREADS_ALONG_K = 4
OPERAND = re.compile(r"tensor<([\dx]+)x(\w+), #ttg\.dot_op<\{opIdx = (\d), [^}]*kWidth = (\d+)\}>")


def wide_operands(ttgir: str) -> tuple[str, ...]:
    """The matrix operands whose layout spreads more of K over threads than a warp holds."""
    found = set()
    for shape, element, index, width in OPERAND.findall(ttgir):
        *_, rows, columns = map(int, shape.split("x"))
        k = columns if index == "0" else rows
        if 1 < k < THREADS_ALONG_K * int(width):  # 1: of addresses, to be broadcast
            found.add(f"{shape}x{element} with kWidth {width}")
    return tuple(sorted(found))


def unread_shuffles(ptx: str) -> int:
    """Shuffles between threads whose result no instruction reads."""
    code = ptx.split(".section")[0]
    uses = collections.Counter(re.findall(r"%\w+", code))
    moved = re.findall(r"\bshfl\.sync\.\w+\.b32\s+(%\w+)", code)
    return sum(uses[register] == 1 for register in moved)


def lost_operands(compiled) -> tuple[str, ...]:
    """The lost parts of matrix operands in a result of `assemble`; empty if there are none."""
    found = [
        f"an operand wider than a warp's K: {one}" for one in wide_operands(compiled.asm["ttgir"])
    ]
    shuffles = unread_shuffles(compiled.asm["ptx"])
    if shuffles:
        found.append(f"{shuffles} words moved between threads and not read")
    return tuple(found)


def scan_constants(plan: Plan, problem: Problem, arch: int, uneven: bool = False) -> dict:
    """The compile-time arguments of a scan without saved gates; `uneven`: lengths and resets."""
    if plan.kernel == GLUON:
        options = {
            "DIRECTIONS": problem.directions,
            "RESET_AFTER": problem.reset_after,
            "HAS_LENGTHS": uneven,
            "HAS_RESETS": uneven,
        }
        if plan.direction == "forward":
            options |= {"HAS_BIAS": True, "SAVE_GATES": False}
        dtype = getattr(torch, problem.dtype)
        return {"C": gluon_constants.constants(plan, dtype, arch, **options)}
    constants = {
        "DIRECTIONS": problem.directions,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "K_BLOCKS": plan.k_blocks,
        "TAIL": plan.tail,
        "REGISTERS": plan.in_registers,
        "SPLIT_K": plan.split_k,
        "GROUP": plan.group,
        "STAGE_ALL": plan.stage_all,
        "RESET_AFTER": problem.reset_after,
        "HAS_LENGTHS": uneven,
        "HAS_RESETS": uneven,
        "PROTOCOL": PROTOCOLS[plan.protocol],
        "PRECISION": "tf32" if problem.tensor_cores else "ieee",
    }
    if plan.direction == "forward":
        constants |= {"HAS_BIAS": True, "SAVE_GATES": False}
    else:
        constants["BY_BLOCK"] = plan.by_block
    return constants


def step_constants(tiles: StepTiles, phase: int) -> dict:
    """The compile-time arguments of one phase of a step."""
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "SPLIT_K": tiles.warps,
        "PHASE": phase,
        "HAS_BIAS": True,
        "PRECISION": "tf32",
    }
