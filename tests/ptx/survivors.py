"""Why a mutant may survive: each reason in one line, and how it is told from the mutant itself."""

import dataclasses
import re

import torch

EFFECT = ("st", "bra", "ret", "bar", "red", "atom", "cp", "stmatrix", "fence", "exit")
REASONS = {
    "barrier": "another barrier stands between the same accesses, or their bytes are not shared",
    "dead": "no instruction with an effect reads what it writes",
    "first look": "a poll looks again, past L1, for what a first look misses",
    "order": "a load that an acquire orders finds L1 empty: .cg spares it the look",
    "idle": "no thread takes part in this problem: without the instruction all is as before",
    "repeated": "threads that hold copies store the same value again, to the same place",
    "guarded": "what is loaded or computed besides is masked, or multiplied by zero, later on",
    "same value": "every value that this problem yields here is the same with the change",
    "poll bound": "the bound or the count of looks: a healthy run never gets there",
    "rounding": "the results move by less than the rounding of 16-bit results allows",
}


def live(program) -> set[int]:
    """Instructions with an effect, and those that feed one, whatever the order they run in."""
    writers, reads = {}, {}
    for i in program.instructions:
        effect = i.base in EFFECT and i.base != "atom"
        out = [] if effect else re.findall(r"%\w*?\d+\b", i.operands[0]) if i.operands else []
        inputs = i.operands if effect else i.operands[1:]
        reads[i.at] = re.findall(r"%\w*?\d+\b", " ".join(inputs))
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


def reason(target, mutant) -> str | None:
    """The key in REASONS that fits a survivor, or None."""
    i = mutant.instruction
    if mutant.kind == "barrier":
        return "barrier"
    if i.at not in live(target.program):
        return "dead"
    program = target.program
    polls = {x.at for n in program.polls for x in program.segments[n].instructions}
    if mutant.kind == "order":
        if "volatile" in i.parts and i.at not in polls:
            return "first look"
        if "cg" in i.parts:
            return "order"
        return "idle" if same_results(target, dataclasses.replace(mutant, text="")) else None
    if not same_results(target, mutant):
        return "rounding"
    if i.at in polls:
        return "poll bound"
    if i.guard or mutant.kind == "predicate":
        return "repeated" if i.base in ("st", "atom") else "guarded"
    return "same value"


def same_results(target, mutant) -> bool:
    """Whether the mutant's results are those of the kernel, to the bit."""
    lines = target.ptx.splitlines()
    lines[mutant.line - 1] = mutant.text
    results = (target.results(text, 0) for text in (None, "\n".join(lines)))
    return all(
        torch.equal(a.nan_to_num(3), b.nan_to_num(3))
        for a, b in zip(*(r.values() for r in results), strict=True)
    )
