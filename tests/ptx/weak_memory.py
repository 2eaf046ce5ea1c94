"""What one program sees of global memory: its own stores late, those of others late or early.

A store goes to the program's buffer and becomes visible element by element (an element is what one
thread stores), in any order, at later hand-overs or after the program's end. A release by a thread
first makes visible what the thread stored and what the program stored before its last barrier, no
more. A thread sees its own buffered stores and those that lie before a barrier; the rest of its
program's it sees or not.

Loads, by kind:

plain, nc           go through an L1 that is never told of other programs' stores, and only an
                    acquire empties; they may be done early too
cg                  go past L1, and may be done early
volatile, relaxed   likewise
acquire             sees memory as it is

A load that is done early finds what lay there at the program's last acquire, or what the program
has seen there since: never anything older. An acquire orders the later loads of its thread at once,
those of the program's other threads after the next barrier.
"""

import numpy as np

from tests.ptx.errors import Race
from tests.ptx.global_memory import SECTOR

EARLY = 0.15  # share of the loads that are done early, where nothing orders them
EVICTED = (0.0, 0.05)  # share of the sectors looked up in L1 that have been replaced, by launch


class _Stores:
    """One store instruction, still buffered in part."""

    __slots__ = ("alive", "data", "epoch", "offsets", "seen", "threads")

    def __init__(self, offsets, data, threads, epoch):
        self.offsets, self.data, self.threads, self.epoch = offsets, data, threads, epoch
        self.alive = np.ones(len(offsets), bool)
        self.seen = np.zeros(len(offsets), bool)


class View:
    """One program's view of a `GlobalMemory`."""

    def __init__(self, memory, weak, evicted, rng, np_rng):
        self.memory, self.weak, self.evicted = memory, weak, evicted
        self.rng, self.np_rng = rng, np_rng
        self.stores, self.epoch = [], 0
        self.acquired = set()  # threads that acquired since the last barrier
        if weak:
            self.l1 = memory.initial.copy()
            self.l1_generation = np.full(len(memory.stored), -1, np.int32)
            self.generation = 0
            self.known = memory.bytes.copy()  # what an early load finds
            self.fresh = self.known  # what one of an acquiring thread finds

    # -- loads --------------------------------------------------------------------------------

    def load(self, how, at, threads, size, count):
        """[n, count] elements of `size` bytes at the offsets `at`."""
        sector, total = at >> SECTOR, size * count
        source, kind = self.memory.bytes, f"u{size}"
        stored = self.memory.stored[sector].any()
        if how == "nc" and stored:
            raise Race("a non-coherent load of what this launch writes")
        if how == "plain" and self.weak:
            if stored:
                source = self._through_l1(sector)
            else:  # L1 holds what lay there before the launch
                self.l1_generation[sector] = self.generation
        data = source.view(kind).reshape(-1, count)[at // total]
        if not stored or not self.weak:
            return data
        if how != "acquire":
            self._early(at, threads, data, size, count)
        if self.stores and self.memory.pending[sector].any():
            data = self._own(at, threads, np.ascontiguousarray(data), total)
        return data

    def _early(self, at, threads, data, size, count):
        """Replaces some elements by what an early load finds; takes note of the others."""
        each = at[:, None] // size + np.arange(count)
        known, fresh = self.known.view(f"u{size}"), self.fresh.view(f"u{size}")
        old = known[each]
        if self.acquired:
            ordered = np.isin(threads, list(self.acquired))
            old[ordered] = fresh[each[ordered]]
        differs = old != data
        if not differs.any():
            return
        grain = self.rng.randrange(4)
        warps = threads // 32  # lanes of a warp that load one element together get one value
        chances = self.np_rng.random((warps.max() + 1, 1021)) < EARLY
        if grain == 0:  # the elements of a vector are loads of their own
            early = chances[warps[:, None], each % 1021]
        elif grain == 1:  # nothing is early
            early = np.zeros(each.shape, bool)
        else:  # what one warp takes from one sector, it takes at one moment
            early = chances[warps, (at >> SECTOR) % 1021][:, None]
        early = differs & early
        data[early] = old[early]
        now = each[differs & ~early]
        known[now] = fresh[now] = self.memory.bytes.view(f"u{size}")[now]

    def _through_l1(self, sector):
        generations = self.l1_generation
        generations[sector[self.np_rng.random(len(sector)) < self.evicted]] = -1
        missing = sector[generations[sector] != self.generation]
        self.l1.reshape(-1, 32)[missing] = self.memory.bytes.reshape(-1, 32)[missing]
        generations[missing] = self.generation
        return self.l1

    def _own(self, at, threads, data, total):
        """The program's buffered stores, as far as each thread sees them, over what it loaded."""
        raw = data.view(np.uint8).reshape(len(at), total)
        for s in self.stores:
            chosen = {}  # for each warp and store whether the warp sees it
            near = (at[:, None] >> SECTOR) == (s.offsets[None, :] >> SECTOR)
            for a, b in np.argwhere(near & s.alive).tolist():
                low = max(at[a], s.offsets[b])
                high = min(at[a] + total, s.offsets[b] + s.data.shape[1])
                if low >= high:
                    continue
                must = s.epoch < self.epoch or s.threads[b] == threads[a] or s.seen[b]
                key = (threads[a] // 32, b)
                if must or chosen.setdefault(key, self.rng.random() < 0.5):
                    s.seen[b] = True
                    first = s.offsets[b]
                    raw[a, low - at[a] : high - at[a]] = s.data[b, low - first : high - first]
        return data

    # -- stores -------------------------------------------------------------------------------

    def store(self, at, raw, threads):
        """Bytes [n, total] at the offsets `at`."""
        memory, sector = self.memory, at >> SECTOR
        memory.stored[sector] = True
        if not self.weak:
            memory.bytes[at[:, None] + np.arange(raw.shape[1])] = raw
            memory.version += 1
            return
        self._settle(sector)
        held = self.l1_generation[sector] == self.generation
        if held.any():
            self.l1[at[held, None] + np.arange(raw.shape[1])] = raw[held]
        self.stores.append(_Stores(at, raw, threads, self.epoch))
        np.add.at(memory.pending, sector, 1)

    def _settle(self, sector):
        """Makes buffered stores to these sectors visible: a location keeps its order."""
        if self.stores and self.memory.pending[sector].any():
            for s in self.stores:
                self._show(s, s.alive & np.isin(s.offsets >> SECTOR, sector))
            self.stores = [s for s in self.stores if s.alive.any()]

    def _show(self, s, now):
        if not now.any():
            return
        at = s.offsets[now]
        where = at[:, None] + np.arange(s.data.shape[1])
        self.memory.bytes[where] = self.known[where] = self.fresh[where] = s.data[now]
        np.subtract.at(self.memory.pending, at >> SECTOR, 1)
        self.memory.version += 1
        s.alive = s.alive & ~now

    def drain(self):
        """Makes some of what is buffered visible."""
        for s in self.stores:
            share = self.rng.choice((0.25, 0.75, 1.0, 1.0))
            self._show(s, s.alive & (self.np_rng.random(len(s.alive)) < share))
        self.stores = [s for s in self.stores if s.alive.any()]

    def flush(self):
        """Makes all of it visible."""
        for s in self.stores:
            self._show(s, s.alive)
        self.stores = []

    # -- order --------------------------------------------------------------------------------

    def release(self, threads):
        """Makes visible what these threads stored, and everybody before the last barrier."""
        for s in self.stores:
            self._show(s, s.alive & (np.isin(s.threads, threads) | (s.epoch < self.epoch)))
        self.stores = [s for s in self.stores if s.alive.any()]

    def acquire(self, threads):
        """Orders the later loads of these threads."""
        if self.weak:
            self.generation += 1
            self.fresh = self.memory.bytes.copy()
            self.acquired.update(threads.tolist())

    def barrier(self):
        self.epoch += 1
        if self.acquired:
            self.known = self.fresh
            self.acquired.clear()

    def update(self, at, size, function):
        """An atomic: applies `function(old) -> new` to one word; returns the old one."""
        sector = np.array([at >> SECTOR])
        self._settle(sector)
        words = self.memory.bytes.view(f"u{size}")
        old = words[at // size]
        new = function(old)
        self.memory.stored[sector] = True
        words[at // size] = new
        if self.weak:
            for image in (self.known, self.fresh):
                image.view(f"u{size}")[at // size] = new
        self.memory.version += new != old
        return old
