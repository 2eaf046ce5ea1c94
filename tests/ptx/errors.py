"""What the machine raises: an instruction it does not know, and what a GPU would do wrong."""


class Unsupported(NotImplementedError):
    """A form of an instruction that the machine does not know; raised when a program is built."""


class PtxError(AssertionError):
    """An error of the executed code, of the kind that compute-sanitizer reports."""


class OutOfBounds(PtxError):
    """An access outside every argument, or outside the program's shared memory."""


class Misaligned(PtxError):
    """An address that is no multiple of the size of the access."""


class Uninitialised(PtxError):
    """A register or a byte of shared memory is read that nobody wrote."""


class Race(PtxError):
    """Two accesses, one of them a write, with nothing that orders them."""


class BarrierError(PtxError):
    """A barrier that not all warps of the program reach."""


class Divergence(PtxError):
    """A branch that some lanes of a warp take and others do not."""


class Deadlock(PtxError):
    """No program can go on."""
