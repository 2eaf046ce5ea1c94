"""Warps of one program that execute together: registers, and what generated code calls."""

import numpy as np

from tests.ptx.emitter import SHARED_BASE
from tests.ptx.errors import Misaligned, OutOfBounds, Uninitialised, Unsupported
from tests.ptx.global_memory import GLOBAL_BASE, SECTOR
from tests.ptx.shared_memory import wavefronts


class _Nothing:
    """A register before its first write; whoever computes with it has forgotten something."""

    def _used(self, *args, **kwargs):
        raise Uninitialised("a register is used that nobody wrote")

    __array__ = __array_ufunc__ = __invert__ = __getitem__ = __getattr__ = _used


NOTHING = _Nothing()


def _transposed(words):
    """[..., 8, 4] words that hold 8 x 8 16-bit matrices, transposed."""
    halves = np.ascontiguousarray(words).view(np.uint16)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).view(np.uint32)


class Warps:
    """Warps at one place of a program.

    Attributes:
        instance: the program, `machine.Instance`.
        members: numbers of the warps.
        registers: one array of all their threads for each, or NOTHING.
        segment: number of the segment they execute next.
        waiting: whether they stand at a barrier.
    """

    def __init__(self, instance, members, segment, registers=None):
        self.instance, self.members = instance, members
        self.segment, self.waiting = segment, False
        self.shared, self.view, self.memory = instance.shared, instance.view, instance.view.memory
        self.count = instance.launch.counting
        self.threads = (members[:, None] * 32 + np.arange(32)).ravel()
        self.warp_of = self.threads // 32
        self.N = len(self.threads)
        places = np.arange(self.N)
        self.first_lane = (places // 32 * 32).astype(np.uint32)
        self._xor = {}
        size, grid = 32 * instance.warps, instance.launch.grid
        self.special = {"laneid": (places % 32).astype(np.uint32)}
        for n, axis in enumerate("xyz"):
            thread = self.threads.astype(np.uint32) if n == 0 else self.full(0, np.uint32)
            self.special[f"tid.{axis}"] = thread
            self.special[f"ctaid.{axis}"] = self.full(instance.index[n], np.uint32)
            self.special[f"ntid.{axis}"] = self.full(size if n == 0 else 1, np.uint32)
            self.special[f"nctaid.{axis}"] = self.full(grid[n], np.uint32)
        if registers is None:
            registers = [NOTHING] * len(instance.program.index)
            for place, kind in instance.program.undefined.items():
                registers[place] = self.garbage(kind)
        self.registers = registers

    # -- registers ----------------------------------------------------------------------------

    def full(self, value, dtype):
        return np.full(self.N, value, dtype)

    def lane_xor(self, k):
        if k not in self._xor:
            self._xor[k] = np.arange(self.N) ^ k
        return self._xor[k]

    def parameter(self, number, size, sign, wide):
        """Of so many bytes, extended to a register of `wide` by its sign ("i") or zeros."""
        value = self.instance.launch.arguments[number] & ((1 << 8 * size) - 1)
        if sign == "i" and value >> (8 * size - 1):
            value |= (1 << 8 * wide) - (1 << 8 * size)
        return self.full(value, f"u{wide}")

    def garbage(self, kind):
        """What lies in a register that nobody wrote."""
        random = self.instance.launch.np_rng
        if kind == "?":
            return random.random(self.N) < 0.5
        return random.integers(0, 1 << 8 * int(kind[1]), self.N, f"u{kind[1]}")

    def select(self, guard, value, old, kind):
        """`value` where the guard holds, the old value elsewhere."""
        if old is NOTHING:
            old = self.garbage(kind)
        if value is NOTHING:
            value._used()
        return np.where(guard, value, old)

    @staticmethod
    def active(guard):
        """Places of the threads that take part, or None for all."""
        return None if guard is None or guard.all() else np.flatnonzero(guard)

    def _set(self, register, kind, who, new):
        new = new.astype(f"u{kind}", copy=False)
        if who is not None:
            old = self.registers[register]
            old = self.garbage(f"u{kind}") if old is NOTHING else old.copy()
            old[who] = new
            new = old
        self.registers[register] = new

    def _bytes(self, sources, size, who):
        """[n, total] bytes of what the threads store."""
        n = self.N if who is None else len(who)
        data = np.empty((n, len(sources)), f"u{size}")
        for k, v in enumerate(sources):
            data[:, k] = v if who is None or not v.ndim else v[who]
        return data.view(np.uint8).reshape(n, size * len(sources))

    # -- global memory ------------------------------------------------------------------------

    def _global(self, i, address, offset, who, total):
        """Flat offsets of an access by the threads at the places `who`."""
        self.instance.at = i
        at = address.view(np.int64) + (offset - GLOBAL_BASE)
        if who is not None:
            at = at[who]
        bad = self.memory.outside(at, total)
        if bad.any():
            n = np.flatnonzero(bad)[0]
            thread = self.threads[n if who is None else who[n]]
            raise OutOfBounds(f"{bad.sum()} of {len(at)} threads outside every argument; thread "
                              f"{thread} at {self.memory.name(int(at[n]))}")  # fmt: skip
        if total > 1 and (at & (total - 1)).any():
            raise Misaligned(f"an access of {total} bytes")
        if self.count:
            warp = self.warp_of if who is None else self.warp_of[who]
            sectors = len(np.unique(warp * (1 << 40) + (at >> SECTOR)))
            self.instance.launch.add_sectors(i, sectors)
        return at

    def load_global(self, i, how, address, offset, guard, size, count, registers, kinds):
        who = self.active(guard)
        at = self._global(i, address, offset, who, size * count)
        threads = self.threads if who is None else self.threads[who]
        launch = self.instance.launch
        if launch.weak and how in ("volatile", "relaxed") and launch.rng.random() < 0.2:
            # The warps do not load at one moment.
            first = np.isin(
                threads // 32,
                launch.rng.sample(range(self.instance.warps), self.instance.warps // 2),
            )
            data = np.empty((len(at), count), f"u{size}")
            data[first] = self.view.load(how, at[first], threads[first], size, count)
            launch.drain()
            data[~first] = self.view.load(how, at[~first], threads[~first], size, count)
        else:
            data = self.view.load(how, at, threads, size, count)
        if how == "acquire":
            self.view.acquire(threads)
        for n, (r, k) in enumerate(zip(registers, kinds, strict=True)):
            self._set(r, k, who, data[:, n])

    def store_global(self, i, how, address, offset, guard, size, sources):
        who = self.active(guard)
        at = self._global(i, address, offset, who, size * len(sources))
        threads = self.threads if who is None else self.threads[who]
        if len(at):
            if how == "release":
                self.view.release(threads)
            self.view.store(at, self._bytes(sources, size, who), threads)

    def atomic(self, i, order, update, dtype, address, offset, guard, sources, register):
        size = np.dtype(dtype).itemsize
        who = self.active(guard)
        at = self._global(i, address, offset, who, size)
        places = np.arange(self.N) if who is None else who
        raw = [np.broadcast_to(s, self.N).view(dtype) for s in sources]
        functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                     "or": np.bitwise_or, "exch": lambda old, x: x,
                     "cas": lambda old, x, y: y if old == x else old}  # fmt: skip
        out = np.empty(len(at), f"u{size}")
        for n, (place, offset_) in enumerate(zip(places.tolist(), at.tolist(), strict=True)):
            thread = self.threads[place : place + 1]
            if order in ("release", "acq_rel"):
                self.view.release(thread)

            def new(old, place=place):
                old = old.view(dtype)
                return dtype(functions[update](old, *(s[place] for s in raw))).view(f"u{size}")

            out[n] = self.view.update(offset_, size, new)
            if order in ("acquire", "acq_rel"):
                self.view.acquire(thread)
        if register is not None:
            self._set(register, str(size), who, out)

    def fence(self):
        self.view.release(self.threads)
        self.view.acquire(self.threads)

    # -- shared memory ------------------------------------------------------------------------

    def _shared(self, i, address, offset, who, total):
        self.instance.at = i
        at = address.astype(np.int64) + (offset - SHARED_BASE)
        if who is not None:
            at = at[who]
        bad = (at < 0) | (at + total > self.shared.nbytes)
        if bad.any():
            raise OutOfBounds(f"byte {at[bad][0]} of {self.shared.nbytes} bytes of shared memory")
        if total > 1 and (at & (total - 1)).any():
            raise Misaligned(f"an access of {total} bytes of shared memory")
        return at

    def _count_banks(self, i, at, warps, total):
        if self.count and self.instance.launch.wants_banks(i, self.instance):
            self.instance.launch.add_banks(i, len(np.unique(warps)), *wavefronts(at, warps, total))

    def load_shared(self, i, address, offset, guard, size, count, registers, kinds):
        who = self.active(guard)
        at = self._shared(i, address, offset, who, size * count)
        warps = self.warp_of if who is None else self.warp_of[who]
        self._count_banks(i, at, warps, size * count)
        data = (
            self.shared.load(at, warps, size, count)
            if len(at)
            else np.empty((0, count), f"u{size}")
        )
        for n, (r, k) in enumerate(zip(registers, kinds, strict=True)):
            self._set(r, k, who, data[:, n])

    def store_shared(self, i, address, offset, guard, size, sources):
        who = self.active(guard)
        at = self._shared(i, address, offset, who, size * len(sources))
        if len(at):
            warps = self.warp_of if who is None else self.warp_of[who]
            self._count_banks(i, at, warps, size * len(sources))
            self.shared.store(at, warps, self._bytes(sources, size, who))

    def _rows(self, i, address, offset, matrices):
        """Where the rows of 8 x 8 matrices lie: lanes 0 to 7 give the first one's, and so on."""
        rows = address.reshape(-1, 32)[:, : 8 * matrices]
        at = self._shared(i, rows.ravel(), offset, None, 16)
        warps = np.repeat(self.members, 8 * matrices)
        self._count_banks(i, at, warps, 16)
        return at, warps

    def load_matrix(self, i, address, offset, registers, transposes):
        at, warps = self._rows(i, address, offset, len(registers))
        data = self.shared.load(at, warps, 4, 4).reshape(-1, len(registers), 8, 4)
        if transposes:
            data = _transposed(data)
        for k, r in enumerate(registers):
            self._set(r, "4", None, data[:, k].reshape(-1))

    def store_matrix(self, i, address, offset, sources, transposes):
        at, warps = self._rows(i, address, offset, len(sources))
        data = np.stack([v.reshape(-1, 8, 4) for v in sources], 1)
        data = _transposed(data) if transposes else np.ascontiguousarray(data)
        self.shared.store(at, warps, data.view(np.uint8).reshape(-1, 16))

    def copy_async(self, i, to, to_offset, source, offset, guard, size, taken):
        who = np.arange(self.N) if self.active(guard) is None else self.active(guard)
        if not len(who):
            return
        at = self._shared(i, to, to_offset, who, size)
        length = np.full(len(who), size)
        if taken is not None:
            length = np.broadcast_to(taken, self.N)[who].astype(np.int64)
        if not ((length == 0) | (length == size)).all():
            raise Unsupported("a partial cp.async")
        raw = np.zeros((len(who), size), np.uint8)
        wanted = length > 0
        if wanted.any():
            places = who[wanted]
            origin = self._global(i, source, offset, places, size)
            loaded = self.view.load("plain", origin, self.threads[places], 4, size // 4)
            raw[wanted] = np.ascontiguousarray(loaded).view(np.uint8)
        self.shared.copy(at, self.threads[who], raw)

    def commit(self):
        self.shared.commit(self.threads)

    def wait(self, i, allowed):
        self.instance.at = i
        self.shared.wait(self.threads, allowed)

    # -- coming apart and together ------------------------------------------------------------

    def part(self, chosen, segment):
        """Of these warps the ones chosen, a bool each, with a copy of their registers."""
        where = np.repeat(chosen, 32)
        registers = [r if r is NOTHING else r[where] for r in self.registers]
        return Warps(self.instance, self.members[chosen], segment, registers)


def together(parts):
    """Warps at one place as one."""
    members = np.concatenate([p.members for p in parts])
    order = np.argsort(members)
    threads = (order[:, None] * 32 + np.arange(32)).ravel()
    first = parts[0]
    kinds = first.instance.program.kinds
    registers = []
    for place, held in enumerate(zip(*(p.registers for p in parts), strict=True)):
        if all(r is NOTHING for r in held):
            registers.append(NOTHING)
            continue
        held = [
            p.garbage(kinds[place]) if r is NOTHING else r for r, p in zip(held, parts, strict=True)
        ]
        registers.append(np.concatenate(held)[threads])
    return Warps(first.instance, members[order], first.segment, registers)
