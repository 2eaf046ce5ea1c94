"""Runs a Program: a grid of instances, their interleavings by seed, and the checks of barriers.

All that a run may choose comes from its seed: which program goes on, which of its warps (where they
run apart), what stores and loads do (weak_memory.py). A failure repeats with the same seed.
"""

import random

import numpy as np

from tests.ptx.errors import (
    BarrierError,
    Deadlock,
    Divergence,
    PtxError,
    Uninitialised,
    Unsupported,
)
from tests.ptx.execution import NOTHING, Warps, together
from tests.ptx.shared_memory import SharedMemory
from tests.ptx.weak_memory import EVICTED, View

# Hand-overs without any change of memory that are a deadlock: so many, and so many for each program
# or, where they run apart, each warp. A look at a vector takes one for each of its loads.
IDLE, IDLE_EACH = 1000, 300
SAMPLES = 4  # times that bank conflicts of an instruction are counted, but in the first program


class Instance:
    """One program of the grid (a CTA)."""

    def __init__(self, launch, number, index):
        self.launch, self.program, self.warps = launch, launch.program, launch.warps
        self.number, self.index = number, index
        self.shared = SharedMemory(launch.shared, launch.warps, launch.program.granule)
        self.view = View(launch.memory, launch.weak, launch.evicted, launch.rng, launch.np_rng)
        self.executed = np.zeros(len(self.program.segments), np.int64)
        self.at = 0  # the instruction that reached memory last
        everyone = Warps(self, np.arange(self.warps), 0)
        self.strands = [everyone]
        if launch.apart and self.warps > 1:
            self.strands = [everyone.part(np.arange(self.warps) == w, 0) for w in range(self.warps)]
        self._left = 0  # warps that have returned

    def run(self):
        """A generator: yields where other programs may step in."""
        while self.strands:
            ready = [s for s in self.strands if not s.waiting]
            if not ready:
                self._pass_barrier()
                continue
            strand = ready[0] if len(ready) == 1 else self.launch.rng.choice(ready)
            segment = self.program.segments[strand.segment]
            if segment.hands_over:
                yield
            self.launch.spent += len(strand.members)
            if self.launch.limit is not None and self.launch.spent > self.launch.limit:
                self._fail(Deadlock, "runs without end", segment.instructions[-1])
            self._execute(strand, segment)
            self.executed[strand.segment] += len(strand.members)
            self._go_on(strand, segment)
        self._guarded(self.shared.finish, self.program.instructions[-1])

    def _execute(self, strand, segment):
        try:
            segment.function(strand.registers, strand)
        except (
            PtxError,
            Uninitialised,
            Unsupported,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            frames, line = error.__traceback__, None
            while frames is not None:
                if frames.tb_frame.f_code is segment.function.__code__:
                    line = frames.tb_lineno
                frames = frames.tb_next
            raise self._located(error, segment.lines[line - 2]) from error

    def _located(self, error, instruction):
        """The error, with the program and the instruction it happened at."""
        kind = (
            type(error)
            if isinstance(error, (PtxError, Uninitialised, Unsupported))
            else RuntimeError
        )
        return kind(f"{self.launch.name}, program {self.index}, seed {self.launch.seed}: {error}\n"
                    f"    at {instruction!r}")  # fmt: skip

    def _fail(self, kind, text, instruction):
        raise self._located(kind(text), instruction)

    def _guarded(self, function, instruction):
        try:
            function()
        except PtxError as error:
            raise self._located(error, instruction) from error

    def _go_on(self, strand, segment):
        kind, guard, target = segment.end
        strand.segment += 1
        if kind == "next":
            return
        if kind == "bar":
            strand.waiting = True
            return
        taken = np.ones(len(strand.members), bool)
        if guard:
            held = strand.registers[self.program.index[guard.lstrip("!")]]
            if held is NOTHING:
                self._fail(Uninitialised, "a branch by what nobody wrote", segment.instructions[-1])
            lanes = held.reshape(-1, 32)
            lanes = ~lanes if guard.startswith("!") else lanes
            taken = lanes.any(1)
            if (taken != lanes.all(1)).any():
                self._fail(Divergence, "a branch splits a warp", segment.instructions[-1])
        if kind == "ret":
            self._left += int(taken.sum())
        if taken.all():
            strand.segment = target
            if kind == "ret":
                self.strands.remove(strand)
        elif taken.any():
            self.strands.remove(strand)
            self.strands.append(strand.part(~taken, strand.segment))
            if kind != "ret":
                self.strands.append(strand.part(taken, target))

    def _pass_barrier(self):
        places = {s.segment for s in self.strands}
        last = self.program.segments[self.strands[0].segment - 1].instructions[-1]
        if self._left or len(places) > 1:
            self._fail(BarrierError, f"{self._left} warps have returned, the others wait at "
                                     f"{len(places)} different barriers", last)  # fmt: skip
        self.shared.epoch += 1
        self.view.barrier()
        if not self.launch.apart and len(self.strands) > 1:
            self.strands = [together(self.strands)]
        for strand in self.strands:
            strand.waiting = False


class Launch:
    """One launch of a grid.

    Args:
        program: what to run, `program.Program`.
        name: for messages.
        grid: programs along x, y, z.
        warps: warps a program.
        shared: bytes of shared memory a program.
        arguments: numbers, pointers being addresses in `memory`.
        memory: `GlobalMemory`.
        cooperative: whether all programs are resident; otherwise they run one after the other.
        seed: of every choice.
        weak: whether stores are seen late and loads done early; otherwise memory is one for all.
        apart: whether the warps of a program run one by one between barriers.
        counting: whether to count sectors and wavefronts.
        limit: segments that warps may execute in all, or None.

    Attributes:
        executed: of each segment, how often a warp executed it.
        programs: how many ran.
        handovers: how often another program could step in.
        sectors: instruction -> [executions, sectors of L2] (with counting).
        banks: instruction -> [warps counted, wavefronts, least possible] (with counting).
    """

    def __init__(self, program, name, grid, warps, shared, arguments, memory, *, cooperative=True,
                 seed=0, weak=True, apart=False, counting=False,
        limit=None):  # fmt: skip
        self.program, self.name, self.arguments = program, name, arguments
        self.grid = (*grid, 1, 1)[:3]
        self.warps, self.shared, self.memory = warps, shared, memory
        self.cooperative, self.seed = cooperative, seed
        self.weak, self.apart, self.counting = weak, apart, counting
        self.limit, self.spent = limit, 0
        self.rng, self.np_rng = random.Random(seed), np.random.default_rng(seed)
        self.evicted = self.rng.choice(EVICTED)
        self._drain_chance = self.rng.choice((0.05, 0.3, 0.8))
        self.sectors, self.banks = {}, {}
        self.handovers = self.programs = 0
        self.executed = np.zeros(len(program.segments), np.int64)

    def run(self):
        x, y, z = self.grid
        indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        if not self.cooperative:
            self.rng.shuffle(indices)
        batches = [indices] if self.cooperative else [[index] for index in indices]
        with np.errstate(all="ignore"):
            for batch in batches:
                self._instances = []
                for index in batch:
                    self._instances.append(Instance(self, self.programs, index))
                    self.programs += 1
                self._interleave()
                for instance in self._instances:
                    instance.view.flush()
                    self.executed += instance.executed
                self._instances = []  # what they saw of memory is large, and refers back to this
        return self

    def drain(self):
        """Lets some stores become visible."""
        for instance in self._instances:
            if instance.view.stores and self.rng.random() < self._drain_chance:
                instance.view.drain()

    def _interleave(self):
        live = [(instance, instance.run()) for instance in self._instances]
        idle, version = 0, self.memory.version
        while live:
            n = self.rng.randrange(len(live))
            try:
                next(live[n][1])
            except StopIteration:
                live.pop(n)
                idle = 0
                continue
            self.handovers += 1
            self.drain()
            idle = idle + 1 if self.memory.version == version else 0
            version = self.memory.version
            each = sum(len(instance.strands) for instance, _ in live)
            if idle > IDLE + IDLE_EACH * each and not any(i.view.stores for i in self._instances):
                places = [
                    f"program {i.index} at {self.program.instructions[i.at]!r}" for i, _ in live
                ]
                raise Deadlock(f"{self.name}, seed {self.seed}: no program can go on\n  "
                               + "\n  ".join(places[:4]))  # fmt: skip

    # -- counts -------------------------------------------------------------------------------

    def add_sectors(self, at, sectors):
        count = self.sectors.setdefault(at, [0, 0])
        count[0] += 1
        count[1] += sectors

    def wants_banks(self, at, instance):
        return instance.number == 0 or self.banks.get(at, [0])[0] < SAMPLES * self.warps

    def add_banks(self, at, warps, real, least):
        count = self.banks.setdefault(at, [0, 0, 0])
        for n, more in enumerate((warps, real, least)):
            count[n] += more


def instructions(launch) -> int:
    """How many instructions the warps of a launch executed together."""
    return int(
        sum(
            n * len(s.instructions)
            for n, s in zip(launch.executed, launch.program.segments, strict=True)
        )
    )
