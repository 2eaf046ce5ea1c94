"""Compiled kernels broken one instruction at a time, and whether a run of the machine notices.

    python -m tests.ptx.mutations order 0 999       # mutants of a kind, by number
    python -m tests.ptx.mutations constant 0 999 8  # every eighth of them

A mutant runs on one small problem (`Target`), with several seeds, until it fails: by what the
machine checks, by an error word, or by its values. One that does not is a survivor, which
`survivors.py` explains.
"""

import dataclasses
import random
import re
import sys

import torch

from tests.interpreter.cases import NAMES, error, make_case
from tests.ptx import cases, launching, survivors
from tests.ptx.errors import PtxError, Unsupported
from tests.ptx.parsing import Instruction
from tests.tolerances import PTX_TOLERANCE
from triton_gru.kernels import backward, forward
from triton_gru.kernels.launch import KernelTimeout, check_errors

# Every second one with the warps of a program apart; what orders memory shows in few of them.
SEEDS = {"order": 30, "barrier": 6, "predicate": 6, "constant": 6, "random": 6}
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
    """One kernel on one small problem that has lengths, a row of resets and a bias."""

    def __init__(self, launch, direction):
        self.name, self.direction = f"{launch} {direction}", direction
        # One row and one column less than the tiles hold; no reset_after, which exchanges twice a
        # step; float16, whose tolerance is the tighter one.
        shape = 4, 15, 47
        self.case = make_case(*shape, reset_after=False, dtype=torch.float16, lengths=True,
                              resets=True)  # fmt: skip
        self.plan = cases.plan_of(shape, direction, launch, 90, "fp16", False, {})
        self.exact_y, self.exact = self.case.exact()
        self.y = torch.zeros_like(self.exact_y, dtype=torch.float16)
        self.y.copy_(self.exact_y)
        launches = self.run(None, 0)[1]
        self.ptx = launches[0].ptx
        self.program = launches[0].program
        self.limit = 30 * max(int(launch.executed.sum()) for launch in launches)

    def run(self, ptx, seed):
        """(errors of the results, launches) of a text in the place of the kernel's own."""
        results = self.results(ptx, seed)
        exact = {"y": self.exact_y} if self.direction == "forward" else self.exact
        return {name: error(results[name], exact[name]) for name in exact}, self.launches

    def results(self, ptx, seed):
        """What the launcher returns, by name."""
        options = {**self.case.options, "plan": self.plan, "polls": POLLS}
        mutate = (lambda name, own: ptx) if ptx else None
        limit = self.limit if ptx else None
        machine = {"seed": seed, "apart": seed % 2 == 1, "limit": limit, "mutate": mutate}
        with launching.emulated(90, **machine) as self.launches:
            if self.direction == "forward":
                results = {"y": forward.scan_forward(*self.case.arguments, **options)}
            else:
                grads = backward.scan_backward(
                    self.case.dy, self.y, *self.case.arguments, **options
                )
                named = zip(NAMES, grads, strict=True)
                results = {name: grad for name, grad in named if grad is not None}
            check_errors(self.y.device)
        return results

    def caught(self, mutant) -> str | None:
        """How a mutant fails, or None."""
        lines = self.ptx.splitlines()
        lines[mutant.line - 1] = mutant.text
        text = "\n".join(lines)
        try:
            for seed in range(SEEDS[mutant.kind]):
                errors, _ = self.run(text, seed)
                if not max(errors.values()) <= PTX_TOLERANCE["fp16"]:
                    return "values"
        except (PtxError, KernelTimeout, Unsupported) as error:
            return type(error).__name__
        finally:
            launching._programs.pop(text, None)
        return None


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


def without_barrier(i, line):
    return [""] if i.op == "bar.sync" else []


def without_guard(i, line):
    return [re.sub(r"@\s*!?%\w+\s*", "", line, count=1)] if i.guard else []


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
    """Every number once: an offset moved by one access, others by one, floats doubled."""
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
            why = "" if how else survivors.reason(target, mutant)
            row = [target.name, kind, str(n), how or "SURVIVED", why, repr(mutant.instruction)]
            print("\t".join([*row, mutant.text.strip()]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
