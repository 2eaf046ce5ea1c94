"""Global memory of one launch: the storages of its arguments, with gaps between them."""

import numpy as np

GLOBAL_BASE = 0x7F0000000000
SECTOR = 5  # 32 bytes
GAP = 1024
FILLER = 0xCD


class GlobalMemory:
    """Bytes at flat offsets from GLOBAL_BASE.

    Attributes:
        bytes: what every program sees that looks at L2.
        initial: the same before the launch.
        owner: of each byte the allocation, from 1, or 0.
        stored: sectors that this launch has written to.
        pending: of each sector how many stores wait in the buffers of programs.
        version: grows with every change.
    """

    def __init__(self):
        self.spans, self.names, self._top = [], [], 4096
        self.version = 0

    def allocate(self, nbytes: int, name: str, alignment: int = 0) -> int:
        """The address of a new allocation that lies `alignment` bytes beyond a multiple of 512."""
        at = self._top + alignment
        self.spans.append((at, nbytes))
        self.names.append(name)
        self._top = (at + nbytes + GAP + 511) // 512 * 512
        return GLOBAL_BASE + at

    def fill(self, contents) -> None:
        """Ends the allocations; `contents` has the bytes of each."""
        size = self._top + 4096
        self.bytes = np.full(size, FILLER, np.uint8)
        self.owner = np.zeros(size, np.int16)
        for n, ((at, nbytes), raw) in enumerate(zip(self.spans, contents, strict=True), 1):
            self.owner[at : at + nbytes] = n
            self.bytes[at : at + nbytes] = raw
        self.initial = self.bytes.copy()
        self.stored = np.zeros(size >> SECTOR, bool)
        self.pending = np.zeros(size >> SECTOR, np.int32)

    def outside(self, at, total):
        """Which accesses of `total` bytes leave the allocation in which they begin."""
        bad = (at < 0) | (at + total > len(self.bytes))
        if bad.any():
            return bad
        first = self.owner[at]
        return (first == 0) | (self.owner[at + (total - 1)] != first)

    def name(self, offset: int) -> str:
        """For messages: the argument an address lies in or near."""
        for (at, nbytes), name in zip(self.spans, self.names, strict=True):
            if at <= offset < at + nbytes:
                return f"{name} + {offset - at} of {nbytes} bytes"
        if not self.spans:
            return hex(GLOBAL_BASE + offset)
        far = [min(abs(offset - at), abs(offset - at - size)) for at, size in self.spans]
        n = far.index(min(far))
        return f"{self.names[n]} + {offset - self.spans[n][0]} of {self.spans[n][1]} bytes"
