"""A kernel, ready to run: its straight-line code compiled to Python, and the branches between.

A segment ends at a branch, at `bar.sync`, at `ret`, and before every instruction at which other
programs may step in (access.py). An instruction that the machine does not know raises Unsupported
here, not when it is reached.
"""

import functools
import itertools

from tests.ptx import arithmetic, matrix, warps  # noqa: F401  they register their opcodes
from tests.ptx.access import yields
from tests.ptx.emitter import BYTES, Emitter
from tests.ptx.errors import Unsupported
from tests.ptx.parsing import Parser


class Segment:
    """Straight-line code.

    Attributes:
        instructions: in order.
        end: ("next" | "bar" | "bra" | "ret", guard, number of the segment branched to).
        hands_over: whether other programs may step in before it.
        function: executes it, `function(registers, warps)`.
        lines: the instruction of each line of the function.
    """

    __slots__ = ("end", "function", "hands_over", "instructions", "lines")

    def __init__(self, instructions, end):
        self.instructions, self.end = instructions, end
        self.hands_over = yields(instructions[0])


class Program:
    """One kernel.

    Attributes:
        instructions: all of them.
        segments: they follow each other.
        index: register -> its place in the list of registers.
        kinds: place -> how the register is held, see parsing.KINDS.
        undefined: the same of registers that nobody writes: any value will do.
        loop: numbers of the segments of the longest loop, the one over time.
        polls: those of each loop within it.
        granule: bytes of shared memory that accesses never split.
    """

    def __init__(self, ptx: str):
        parser = Parser(ptx)
        self.instructions, labels = parser.instructions, parser.labels
        self.segments = self._cut(labels)
        emitter = Emitter(parser.kind)
        for n, segment in enumerate(self.segments):
            self._compile(n, segment, emitter)
        self.index = emitter.index
        self.kinds = {place: parser.kind(name) for name, place in self.index.items()}
        written = {self.index[name] for name in emitter.written}
        self.undefined = {k: kind for k, kind in self.kinds.items() if k not in written}
        self.granule = self._granule()

    def _cut(self, labels):
        starts = {0, *labels.values()}
        for i in self.instructions:
            if i.base in ("bra", "ret", "exit") or i.op == "bar.sync":
                starts.add(i.at + 1)
            if yields(i):
                starts.add(i.at)
        starts = sorted(s for s in starts if s < len(self.instructions))
        number = {s: n for n, s in enumerate(starts)}
        segments = []
        for n, (start, stop) in enumerate(itertools.pairwise([*starts, len(self.instructions)])):
            code = self.instructions[start:stop]
            last, end = code[-1], ("next", None, n + 1)
            if last.base == "bra":
                end = ("bra", last.guard, number[labels[last.operands[0]]])
            elif last.base in ("ret", "exit"):
                end = ("ret", last.guard, None)
            elif last.op == "bar.sync":
                if last.operands != ["0"] or last.guard:
                    raise Unsupported(repr(last))
                end = ("bar", None, n + 1)
            segments.append(Segment(code, end))
        if segments[-1].end[0] != "ret" or segments[-1].end[1]:
            raise Unsupported("a kernel that does not end with ret")
        return segments

    def lines(self, emitter, i) -> list[str]:
        """What an instruction is in Python."""
        return emitter.emit(i)

    def _compile(self, number, segment, emitter):
        text, segment.lines = ["def segment(R, W):"], []
        for i in segment.instructions:
            try:
                new = self.lines(emitter, i)
            except Unsupported as error:
                raise Unsupported(f"{error} in {i!r}") from error
            except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
                raise Unsupported(f"{i!r}: {error!r}") from error
            text += ["    " + line for line in new]
            segment.lines += [i] * len(new)
        text.append("    return")
        segment.lines.append(segment.instructions[-1])
        scope = {}
        exec(_compiled("\n".join(text), number), emitter.namespace, scope)
        segment.function = scope["segment"]

    def _granule(self):
        sizes = [16]
        for i in self.instructions:
            if "shared" in i.parts and i.base in ("ld", "st"):
                vector = next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
                sizes.append(BYTES[i.type] * vector)
            elif i.op.startswith("cp.async") and len(i.operands) > 2:
                sizes.append(int(i.operands[2], 0))
        return min(sizes)

    # -- loops --------------------------------------------------------------------------------

    def edges(self) -> list[tuple[int, int]]:
        out = []
        for n, segment in enumerate(self.segments):
            kind, guard, target = segment.end
            if kind == "bra":
                out.append((n, target))
            if kind in ("next", "bar") or guard:
                out.append((n, n + 1))
        return out

    @functools.cached_property
    def loop(self) -> set[int]:
        return max(_cycles(range(len(self.segments)), self.edges()), key=len, default=set())

    @functools.cached_property
    def polls(self) -> list[set[int]]:
        edges = self.edges()
        heads = {b for a, b in edges if b in self.loop and a not in self.loop}
        return _cycles(self.loop - heads, edges)


@functools.lru_cache(maxsize=8192)  # mutants of one kernel differ in one segment
def _compiled(text, number):
    return compile(text, f"<segment {number}>", "exec")


def _cycles(nodes, edges):
    """Strongly connected sets of more than one segment, or of one with an edge to itself."""
    after = {n: [] for n in nodes}
    for a, b in edges:
        if a in after and b in after:
            after[a].append(b)
    reach = {}
    for n in after:
        seen, todo = set(), list(after[n])
        while todo:
            x = todo.pop()
            if x not in seen:
                seen.add(x)
                todo += after[x]
        reach[n] = seen
    out = []
    for n in after:
        if n in reach[n] and not any(n in s for s in out):
            out.append({m for m in reach[n] if n in reach[m]})
    return out
