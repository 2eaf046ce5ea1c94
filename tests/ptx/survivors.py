"""Why a mutant survives, in one line each, by checks that can fail.

A change has no effect where it is in dead code, where every value is the same with it, where
nobody reads the values that differ, or where those are multiplied by zero. The last two are shown
by a `Probe`: the kernel as it is, but with random bits, or random finite numbers, in the place of
what the mutant would have changed, whose results are the kernel's to the bit. Barriers and loads
that need not be as strong have checks of their own. What is left is looked up in LISTED.
"""

import dataclasses
import re

import numpy as np
import torch

from tests.ptx.errors import PtxError, Race
from tests.ptx.execution import NOTHING
from tests.ptx.global_memory import SECTOR
from tests.ptx.parsing import Parser
from tests.ptx.program import Program
from triton_gru.kernel_errors import KernelTimeout

EFFECT = ("st", "bra", "ret", "bar", "red", "atom", "cp", "stmatrix", "fence", "exit")
# Mutants that are none: the kernel does on these problems what it did.
NO_EFFECT = {
    "dead": "no instruction with an effect reads what it writes",
    "same": "every value that it computes, loads or stores is the same with the change",
    "same uses": "every address, every value stored and every branch of the kernel is the same",
    "unread": "random bits in the place of what differs change no bit of the results",
    "times zero": "random finite numbers in the place of what differs change no bit of the results",
}
# Survivors that do something else, and why it does no harm; each has a check of its own.
HARMLESS = {
    "first look": "with what lay there before the launch in its place, a poll looks again",
    "after an acquire": "L1 holds none of what it loads, as an acquire has emptied it",
    "same results": "what differs reaches no result: they are the kernel's to the bit",
    "parted already": "no two warps meet where it parted them, in eight more orders of the warps",
}
# (target, kinds, pattern of the instruction, reason): survivors that no check explains.
LISTED = [
    ("sentinel .*", ("constant", "random"), r"sub\.s32\s+%r\d+, -65538.*exchange\.py",
     "finds a missing low half; here both halves of a word are one store, and come together"),
]  # fmt: skip


def reason(target, mutant) -> str | None:
    """A key of NO_EFFECT or HARMLESS, a reason of LISTED, or None."""
    found = {"barrier": barrier, "order": order}.get(mutant.kind, effect)(target, mutant)
    if found:
        return found
    for name, kinds, pattern, why in LISTED:
        fits = re.fullmatch(name, target.name) and mutant.kind in kinds
        if fits and re.search(pattern, repr(mutant.instruction)):
            return why
    if mutant.kind not in ("barrier", "order") and same_results(target, mutant):
        return "same results"
    return None


def barrier(target, mutant) -> str | None:
    """Whether what it parted is parted by others; the kernel's results are the same to the bit."""
    program = Program(target.text(mutant))
    for problem in range(len(target.problems)):
        for seed in range(1, 16, 2):  # odd ones have the warps apart
            if not unchanged(target, program, problem, seed=seed, weak=True):
                return None
    return "parted already"


def order(target, mutant) -> str | None:
    """Why a load need not be as strong."""
    if effect(target, dataclasses.replace(mutant, text="")) == "same":
        return "same"
    for why in ("first look", "after an acquire"):
        look = Look(target, mutant, why)
        if all(
            unchanged(target, look, problem, seed=seed, weak=True)
            for problem in range(len(target.problems))
            for seed in range(4)
        ):
            return why
    return None


def registers(text) -> list[str]:
    return re.findall(r"%[a-z]\w*?\d+\b", text)


def live(program) -> set[int]:
    """Instructions with an effect, and those that feed one, whatever the order they run in."""
    writers, reads = {}, {}
    for i in program.instructions:
        effect = i.base in EFFECT and i.base != "atom"
        out = [] if effect else registers(i.operands[0]) if i.operands else []
        inputs = i.operands if effect else i.operands[1:]
        reads[i.at] = registers(" ".join(inputs))
        if i.guard:
            reads[i.at] += [i.guard.lstrip("!"), *out]
        for name in out:
            writers.setdefault(name, []).append(i)
    alive, todo = set(), [i for i in program.instructions if i.base in EFFECT]
    while todo:
        i = todo.pop()
        if i.at not in alive:
            alive.add(i.at)
            for name in reads[i.at]:
                todo += writers.get(name, [])
    return alive


def effect(target, mutant) -> str | None:
    """A key of NO_EFFECT, or None where what is random shows or the machine cannot tell."""
    if mutant.instruction.at not in live(target.program):
        return "dead"
    if mutant.instruction.base in ("bra", "ret", "bar", "cp", "fence"):
        return None
    if same_uses(target, mutant):
        return "same uses"
    for finite in (False, True):
        probe = Probe(target, mutant, finite)
        if all(unchanged(target, probe, problem) for problem in range(len(target.problems))):
            return ("times zero" if finite else "unread") if probe.differs else "same"
    return None


def same_results(target, mutant) -> bool:
    program = Program(target.text(mutant))
    return all(
        unchanged(target, program, problem, seed=seed, weak=True)
        for problem in range(len(target.problems))
        for seed in range(4)
    )


def same_uses(target, mutant) -> bool:
    """Whether the two do the same to memory, and branch alike, instruction by instruction."""
    for problem in range(len(target.problems)):
        traces = []
        for text in (target.ptx, target.text(mutant)):
            traced = Traced(text)
            try:
                target.results(traced, 0, problem, weak=False)
            except (PtxError, KernelTimeout):
                return False
            traces.append(traced.trace)
        if traces[0] != traces[1]:
            return False
    return True


def unchanged(target, program, problem, seed=0, weak=False) -> bool:
    """Whether the results are the kernel's own to the bit."""
    try:
        results = target.results(program, seed, problem, weak=weak)
    except (PtxError, KernelTimeout):
        return False
    return equal(target.own(problem), results)


def equal(a, b) -> bool:
    """Whether results are equal to the bit, in the elements that are no NaN."""
    return all(torch.equal(a[name].nan_to_num(3), b[name].nan_to_num(3)) for name in a)


class Traced(Program):
    """A kernel that keeps a hash of what each instruction with an effect was given.

    Attributes:
        trace: line of the PTX and hash, in the order of execution.
    """

    def __init__(self, ptx):
        self.trace = []
        super().__init__(ptx)

    def lines(self, emitter, i):
        own = super().lines(emitter, i)
        if i.base not in (*EFFECT, "ld", "ldmatrix") or "param" in i.parts:
            return own
        emitter.namespace["TRACED"] = self
        given = i.operands[1:] if i.base in ("ld", "ldmatrix", "atom") else i.operands
        places = [emitter.value(name) for name in registers(" ".join(given))]
        if i.base == "st" and i.type == "b8":  # the address, and the low bytes of what is stored
            places = [places[0], *(f"({value} & u2(255))" for value in places[1:])]
        where = emitter.guard(i)
        if i.base == "bra":
            places, where = [where] if i.guard else [], "None"
        return [f"TRACED.note({i.line}, {where}, [{', '.join(places)}])", *own]

    def note(self, line, where, values):
        chosen = [v if where is None else v[where] for v in values]
        self.trace.append((line, hash((where is None or where.tobytes(),
                                       *(v.tobytes() for v in chosen)))))  # fmt: skip


class Probe(Program):
    """A kernel with random values where the results of a mutant's instruction differ from its own.

    Values are any bits, or finite numbers: as float16 from 0.6 to 4, as float32 from 1e-4 to 128.

    Attributes:
        differs: whether any did.
    """

    def __init__(self, target, mutant, finite):
        self._at, self._finite, self.differs = mutant.instruction.at, finite, False
        self._random = np.random.default_rng(mutant.line)
        changed = Parser(target.text(mutant)).instructions
        self._new = [i for i in changed if i.line == mutant.line]
        super().__init__(target.ptx)

    def lines(self, emitter, i):
        if i.at != self._at:
            return super().lines(emitter, i)
        emitter.namespace["PROBE"] = self
        own = emitter.emit(i)
        new = [line for j in self._new for line in emitter.emit(j)]
        written = [] if i.base in ("st", "stmatrix", "red") else registers(i.operands[0])
        places = {emitter.index[name]: emitter.kind_of(name) for name in written}
        return [
            *(f"before = PROBE.state(R, W, {list(places)})", *own),
            *(f"own = PROBE.state(R, W, {list(places)})", "PROBE.restore(R, W, before)", *new),
            f"PROBE.mix(R, W, own, {places})",
        ]

    @staticmethod
    def state(R, W, places):
        """Copies of the registers at these places and of all memory."""
        return {place: R[place] for place in places}, [m.copy() for m in _memories(W)]

    @staticmethod
    def restore(R, W, state):
        for place, held in state[0].items():
            R[place] = held
        for memory, held in zip(_memories(W), state[1], strict=True):
            memory[...] = held

    def mix(self, R, W, own, kinds):
        """The instruction's own results, random where they differ from those in place."""
        mutants = self.state(R, W, kinds)
        self.restore(R, W, own)
        for place, kind in kinds.items():
            a, b = own[0][place], mutants[0][place]
            a = np.broadcast_to(a, W.N)
            differs = np.ones(W.N, bool) if b is NOTHING else a != b
            R[place] = np.where(differs, self._bits(W.N, kind), a)
            self.differs |= bool(differs.any())
        for memory, a, b in zip(_memories(W)[:2], own[1], mutants[1], strict=False):
            differs = np.flatnonzero(a != b)
            memory[differs] = self._bits(len(memory), "u1")[differs]
            self.differs |= bool(len(differs))

    def _bits(self, count, kind):
        if kind == "?":
            return self._random.random(count) < 0.5
        bytes_ = int(kind[1]) * count
        bits = self._random.integers(0, 256, bytes_ + bytes_ % 2, np.uint8)
        if self._finite:  # the high byte of each half: a sign and some of the exponent
            bits[1::2] = bits[1::2] & 0x80 | self._random.integers(0x39, 0x43, len(bits) // 2)
        return bits[:bytes_].view(f"u{kind[1]}")


class Look(Program):
    """A kernel with a mutant's load watched, or replaced by the oldest that it may find.

    Under "first look" it finds what lay there before the launch, in every step; under "after an
    acquire" it is an error if L1 holds a line of what it loads.
    """

    def __init__(self, target, mutant, why):
        self._at, self._why = mutant.instruction.at, why
        super().__init__(target.text(mutant) if why == "after an acquire" else target.ptx)

    def lines(self, emitter, i):
        own = super().lines(emitter, i)
        if i.at != self._at:
            return own
        emitter.namespace["LOOK"] = self
        return ["held = W.view.load", "W.view.load = LOOK.finds(W.view)", *own,
                "W.view.load = held"]  # fmt: skip

    def finds(self, view):
        load = view.load

        def oldest(how, at, threads, size, count):
            return view.memory.initial.view(f"u{size}").reshape(-1, count)[at // (size * count)]

        def watched(how, at, threads, size, count):
            if how != "plain" or (view.l1_generation[at >> SECTOR] == view.generation).any():
                raise Race("L1 holds a line")
            return load(how, at, threads, size, count)

        return oldest if self._why == "first look" else watched


def _memories(W):
    """Bytes of shared and of global memory, and what tells races in the former."""
    shared = W.shared
    return [shared.bytes, W.memory.bytes, *shared.marks()]
