"""Compiled kernels broken one instruction at a time, and whether a run of the machine notices.

    python -m tests.ptx.mutations order 0 999       # mutants of a kind, by number
    python -m tests.ptx.mutations constant 0 999 8  # every eighth of them

A mutant runs on two small problems (`Target`), with several seeds, until it fails: by what the
machine checks, by an error word, or by its values. One that does not is a survivor, which
`survivors.py` explains.
"""

import dataclasses
import functools
import random
import re
import sys

import torch

from tests.ptx import cases, launching, survivors
from tests.ptx.errors import PtxError, Unsupported
from tests.ptx.parsing import Instruction
from tests.ptx.program import Program
from tests.scan_cases import NAMES, error, make_case
from tests.tolerances import PTX_TOLERANCE
from triton_gru.kernel_errors import KernelTimeout, check_errors
from triton_gru.kernels import backward, forward

# Every second one with the warps of a program apart; what orders memory shows in few of them.
SEEDS = {"order": 30, "barrier": 6, "predicate": 2, "constant": 2, "random": 2}
SEEDS_OF_THE_SECOND = 2
# T, B and H. The first has one row and one column less than its tiles hold, the second more rows
# than a tile, so a second group, many columns less, and NaN and infinities among its inputs; both
# run the same compiled kernel.
SHAPES = (4, 15, 47), (3, 20, 35)
RANDOM = 300
POLLS = 300
KINDS = ("barrier", "order", "predicate", "constant", "random")


@dataclasses.dataclass
class Mutant:
    """One change: a line of the PTX of a kernel, from 1, and its new text."""

    target: str
    kind: str
    line: int
    text: str
    instruction: Instruction


class Target:
    """One kernel on two small problems that have lengths, rows of resets and a bias."""

    # No reset_after, which exchanges twice a step; float16, whose tolerance is the tighter one.
    def __init__(self, launch, direction, reset_after=False, shapes=SHAPES):
        self.name, self.direction = f"{launch} {direction}", direction
        plan = cases.plan_of(shapes[0], direction, launch, 90, "fp16", reset_after, {})
        self.problems = [Problem(shape, direction, plan, reset_after) for shape in shapes]
        self.results(None, 0)
        scan = self.scan()
        self.kernel, self.ptx, self.program = scan.name, scan.ptx, scan.program
        self.limit = 10 * max(int(launch.executed.sum()) for launch in self.launches)
        self.results(None, 0, problem=1)
        assert self.scan().ptx == self.ptx  # the sizes are arguments, all else is the same

    def scan(self):
        """The launch of the kernel that is changed; others form factors before and after it."""
        return next(launch for launch in self.launches if launch.name.startswith("scan_"))

    def results(self, program, seed, problem=0, **machine):
        """What the launcher returns, by name, with a Program in the place of the kernel's own."""
        problem = self.problems[problem]
        limit = self.limit if program else None
        machine = {"seed": seed, "apart": seed % 2 == 1, "limit": limit, **machine}
        instead = {self.kernel: program} if program else None
        with launching.emulated(90, instead=instead, **machine) as self.launches:
            results = problem.launch()
            check_errors(problem.y.device)
        return results

    @functools.cache  # noqa: B019  targets live as long as the tests
    def own(self, problem):
        """The kernel's own results, with memory that is one for all programs."""
        return self.results(None, 0, problem, weak=False)

    def text(self, mutant):
        """The kernel with the change."""
        lines = self.ptx.splitlines()
        lines[mutant.line - 1] = mutant.text
        return "\n".join(lines)

    def caught(self, mutant) -> str | None:
        """How a mutant fails, or None."""
        return self.fails(self.text(mutant), SEEDS[mutant.kind])

    def fails(self, text, seeds) -> str | None:
        """How a text in the place of the kernel fails with so many seeds, or None."""
        try:
            program = Program(text)
            for number, count in enumerate((seeds, SEEDS_OF_THE_SECOND)):
                for seed in range(count):
                    results = self.results(program, seed, number)
                    if not self.problems[number].largest(results) <= PTX_TOLERANCE["fp16"]:
                        return "values"
        except (PtxError, KernelTimeout, Unsupported) as error:
            return type(error).__name__
        return None


class Problem:
    """Arguments of a launch, and what it should yield."""

    def __init__(self, shape, direction, plan, reset_after):
        self.direction = direction
        self.case = make_case(*shape, reset_after=reset_after, dtype=torch.float16, lengths=True,
                              resets=True, not_finite=shape != SHAPES[0])  # fmt: skip
        groups = -(-shape[1] // plan.block_m)
        self.plan = dataclasses.replace(plan, groups=groups, groups_a_launch=groups)
        exact_y, self.exact = self.case.exact()
        if direction == "forward":
            self.exact = {"y": exact_y}
        self.y = torch.zeros_like(exact_y, dtype=torch.float16)
        self.y.copy_(exact_y)

    def launch(self):
        options = {**self.case.options, "plan": self.plan, "polls": POLLS}
        if self.direction == "forward":
            return {"y": forward.scan_forward(*self.case.arguments, **options)}
        grads = backward.scan_backward(self.case.dy, self.y, *self.case.arguments, **options)
        return {name: g for name, g in zip(NAMES, grads, strict=True) if g is not None}

    def largest(self, results) -> float:
        return max(error(results[name], exact) for name, exact in self.exact.items())


TARGETS = [
    (launch, d) for launch in ("single", "sentinel", "counter") for d in ("forward", "backward")
]


def mutants(target, kind) -> list[Mutant]:
    """All of a kind; of "random" a share of RANDOM."""
    if kind == "random":
        return at_random(target, RANDOM // len(TARGETS))
    lines, out = target.ptx.splitlines(), []
    for i in target.program.instructions:
        for text in {"barrier": without_barrier, "order": weaker, "predicate": without_guard,
                     "constant": other_constants}[kind](i, lines[i.line - 1]):  # fmt: skip
            out.append(Mutant(target.name, kind, i.line, text, i))
    return out


def every_mutant(target) -> list[Mutant]:
    return [mutant for kind in KINDS for mutant in mutants(target, kind)]


def without_barrier(i, line):
    return [""] if i.op == "bar.sync" else []


def without_guard(i, line):
    return [re.sub(r"@\s*!?%?\w+\s*", "", line, count=1)] if i.guard else []


def weaker(i, line):
    """Each modifier that orders memory, or takes a load past L1, taken away."""
    if "global" not in i.parts:
        return []
    changes = [(r"\.volatile\b", ""), (r"\.cg\b", ""), (r"\.acquire\b", ".relaxed"),
               (r"\.release\b", ".relaxed"),
               (r"\.gpu\.relaxed\b|\.relaxed\.gpu\b", "")]  # fmt: skip
    if i.base in ("atom", "red"):
        changes = changes[2:4]
    return [new for old, by in changes if (new := re.sub(old, by, line)) != line]


def other_constants(i, line):
    """Every number once: an offset moved by 16 bytes, integers by one, floats doubled."""
    if i.base in ("bra", "ret", "bar") or "param" in i.parts:
        return []
    out, start = [], line.index(i.op) + len(i.op) if i.op in line else 0
    for m in re.finditer(r"(?<![\w%.])(0f[0-9A-Fa-f]{8}|-?(?:0x[0-9A-Fa-f]+|\d+))\b", line):
        if m.start() < start:
            continue
        old = m.group()
        if old.startswith("0f"):
            bits = int(old[2:], 16)
            new = f"0f{bits ^ 0x00800000:08X}" if bits else "0f3F800000"
        elif i.type == "b16" and i.base in ("mov", "selp"):  # float16: 0 becomes 1.0
            new = str(int(old, 0) ^ 0x3C00)
        elif "[" in line and line.rindex("[") < m.start() < line.rindex("]"):
            new = str(int(old, 0) + 16)
        elif old == "-1" and i.base in ("shfl", "redux", "vote"):
            continue  # the lanes that take part; nothing else is known to the machine
        else:
            new = str(int(old, 0) + 1)
        out.append(line[: m.start()] + new + line[m.end() :])
    return out


def at_random(target, count):
    """Instructions deleted, zeroed, or with another register among their operands."""
    r = random.Random(target.name)
    lines, out = target.ptx.splitlines(), []
    able = [i for i in target.program.instructions if i.base not in ("bra", "ret", "mov")
            and not i.op.startswith("bar") and "param" not in i.parts]  # fmt: skip
    while len(out) < count:
        i = r.choice(able)
        line = lines[i.line - 1]
        names = re.findall(r"%(?:rd|rs|r|p)\d+", line)
        how = r.choice(("delete", "operand", "operand", "zero"))
        if how == "operand" and len(names) > 1:
            old = r.choice(names[1:])
            family = re.match(r"%[a-z]+", old).group()
            new = f"{family}{r.choice(others(target, family, i))}"
            text = new.join(line.rsplit(old, 1))
        elif how == "zero" and re.fullmatch(r"%(r|rd|rs)\d+", i.operands[0]) and i.base != "st":
            bits = {"%r": "b32", "%rd": "b64", "%rs": "b16"}[
                re.match(r"%[a-z]+", i.operands[0]).group()
            ]
            text = f"mov.{bits} {i.operands[0]}, 0;"
        else:
            text = ""
        if text != line and (line.strip().endswith(";") or text):
            out.append(Mutant(target.name, "random", i.line, text, i))
    return out


def others(target, family, i):
    """Numbers of registers of a family that were written before an instruction."""
    before = (o.operands[0] for o in target.program.instructions[: i.at] if o.operands)
    return sorted({int(n) for d in before for n in re.findall(rf"{family}(\d+)\b", d)}) or [1]


def main(kind, first=0, last=10**9, stride=1):
    for launch, direction in TARGETS:
        target = Target(launch, direction)
        for n, mutant in enumerate(mutants(target, kind)):
            if not int(first) <= n < int(last) or n % int(stride):
                continue
            how = target.caught(mutant)
            why = "" if how else survivors.reason(target, mutant) or "unexplained"
            row = [target.name, kind, str(n), how or "SURVIVED", why, repr(mutant.instruction)]
            print("\t".join([*row, mutant.text.strip()]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
