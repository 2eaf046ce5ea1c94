"""Shared memory of one program: its bytes, who touched them since the last barrier, cp.async."""

import numpy as np

from tests.ptx.errors import Race, Uninitialised

PENDING = 1 << 30  # epoch of bytes that cp.async has yet to write
PHASES = {1: 32, 2: 32, 4: 32, 8: 16, 16: 8}  # lanes that are served at once, by bytes a lane


class SharedMemory:
    """Bytes with a race detector: epochs count barriers, granules are what accesses never split."""

    def __init__(self, nbytes, warps, granule):
        self.nbytes, self.granule, self.epoch = nbytes, granule, 0
        size = max((nbytes + 15) // 16 * 16, 16)
        self.bytes = np.full(size, 0xCD, np.uint8)
        self._written = np.full(size // granule, -1, np.int32)  # epoch of the last write
        self._read = np.full(size // granule, -1, np.int32)
        self._written_by = np.full((warps, size // granule), -1, np.int32)
        self._read_by = np.full((warps, size // granule), -1, np.int32)
        self._copies, self._commits = [], np.zeros(32 * warps, np.int64)

    def marks(self):
        """The arrays that tell who touched what."""
        return self._written, self._read, self._written_by, self._read_by

    def _granules(self, at, total):
        return at[:, None] // self.granule + np.arange(total // self.granule)

    def load(self, at, warps, size, count):
        """[n, count] elements of `size` bytes at the offsets `at`, read by the warps given."""
        total = size * count
        g, w = self._granules(at, total), warps[:, None]
        written = self._written[g]
        if written.min() < 0:
            n = np.flatnonzero((written < 0).any(1))[0]
            raise Uninitialised(f"reads byte {at[n]} of shared memory, which nobody wrote")
        latest = written.max()
        if latest == PENDING:
            raise Race("reads shared memory that cp.async may not have written yet")
        if latest == self.epoch:
            bad = (written == self.epoch) & (self._written_by[w, g] != self.epoch)
            if bad.any():
                n = np.flatnonzero(bad.any(1))[0]
                others = np.flatnonzero((self._written_by[:, g[n]] == self.epoch).any(1))
                raise Race(f"warp {warps[n]} reads byte {at[n]} of shared memory, which warp "
                           f"{others[0]} wrote after the last barrier")  # fmt: skip
        self._read[g] = self.epoch
        self._read_by[w, g] = self.epoch
        return self.bytes.view(f"u{size}").reshape(-1, count)[at // total]

    def store(self, at, warps, raw):
        """Bytes [n, total] at the offsets `at`, written by the warps given."""
        total = raw.shape[1]
        g = self._granules(at, total)
        self._check_write(at, warps, g, raw)
        rows = self.bytes.reshape(-1, total)
        rows[at // total] = raw
        if (rows[at // total] != raw).any():
            raise Race("two threads write different values to one place at once")

    def _check_write(self, at, warps, g, raw):
        """Writing what lies there already is no race: Triton lets warps repeat each other."""
        w, now = warps[:, None], self.epoch
        latest = self._written[g].max()
        if latest == PENDING:
            raise Race("writes shared memory that cp.async is to write")
        if latest == now or self._read[g].max() == now:
            mine = np.arange(len(self._read_by))[:, None, None] == w[None]
            touched = (self._written_by[:, g] == now) | (self._read_by[:, g] == now)
            others = (touched & ~mine).any(0)
            if raw is not None and others.any():
                there = self.bytes.reshape(-1, raw.shape[1])[at // raw.shape[1]] == raw
                others &= ~there.reshape(len(at), -1, self.granule).all(2)
            if others.any():
                n = np.flatnonzero(others.any(1))[0]
                who = np.flatnonzero((touched & ~mine)[:, n].any(1))[0]
                raise Race(f"warp {warps[n]} writes byte {at[n]} of shared memory, which warp "
                           f"{who} read, or wrote differently, after the last barrier")  # fmt: skip
        self._written[g] = now
        self._written_by[w, g] = now

    # -- cp.async -----------------------------------------------------------------------------

    def copy(self, at, threads, raw):
        """Begins to write bytes [n, total] at the offsets `at`."""
        g = self._granules(at, raw.shape[1])
        self._check_write(at, threads // 32, g, None)
        self._written[g] = PENDING
        self._copies.append((self._commits[threads], at, threads, raw, g))

    def commit(self, threads):
        """Ends a group of each of these threads."""
        self._commits[threads] += 1

    def wait(self, threads, allowed):
        """Completes the groups of these threads but the last `allowed`."""
        left = []
        for groups, at, by, raw, g in self._copies:
            done = np.isin(by, threads) & (groups < self._commits[by] - allowed)
            if done.any():
                self.bytes[at[done, None] + np.arange(raw.shape[1])] = raw[done]
                self._written[g[done]] = self.epoch
                self._written_by[by[done, None] // 32, g[done]] = self.epoch
            if not done.all():
                keep = ~done
                left.append((groups[keep], at[keep], by[keep], raw[keep], g[keep]))
        self._copies = left

    def finish(self):
        if self._copies:
            raise Race("a program ends with cp.async under way")


def wavefronts(at, warps, total):
    """(wavefronts that an access takes with its bank conflicts, the least that could do)."""
    real = least = 0
    for w in np.unique(warps):
        mine = at[warps == w]
        for start in range(0, len(mine), PHASES[total]):
            lanes = mine[start : start + PHASES[total]]
            words = np.unique(lanes[:, None] // 4 + np.arange(max(1, total // 4)))
            real += int(np.bincount(words % 32, minlength=32).max())
            least += -(-len(words) // 32)
    return real, least
