"""The measured cells: shape, dtype, variant, direction and mode, most important first.

A suite is a list in order of importance, so that a time budget cuts off the least important cells.
The input has as many features as the state.
"""

import dataclasses

OURS, CUDNN, LSTM, LOOP = "triton_gru", "nn.GRU", "nn.LSTM", "compiled loop"
PEERS = ("gru-qat", "torchrl", "flashrnn")
BASE = (OURS, CUDNN)
COMPARED = (OURS, CUDNN, LSTM)
# "tf32" is float32 with both of torch's tf32 switches on, "float32" with both off.
DTYPES = ("bfloat16", "float16", "tf32", "float32")
MODES = ("forward", "train")
LENGTHS = ("full", "packed", "lengths")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the measurements.

    Attributes:
        T: steps.
        B: rows.
        H: hidden_size, and the input's features.
        dtype: one of DTYPES.
        mode: "forward" under no_grad, or "train": forward and all gradients.
        reset_after: the variant.
        directions: 1 or 2.
        lengths: "full", or rows of 0.3 T to T, uniform: as a PackedSequence ("packed") or as padded
            rows with the layer's `lengths` argument.
        implementations: names of the timed implementations.
    """

    T: int
    B: int
    H: int
    dtype: str = "bfloat16"
    mode: str = "train"
    reset_after: bool = True
    directions: int = 1
    lengths: str = "full"
    implementations: tuple[str, ...] = BASE

    @property
    def id(self) -> str:
        """The name of the cell in a record."""
        variant = "after" if self.reset_after else "before"
        shape = f"T{self.T}-B{self.B}-H{self.H}-D{self.directions}"
        return f"{self.mode}-{self.dtype}-{variant}-{shape}-{self.lengths}"


def _both(T: int, B: int, H: int, **more) -> list[Cell]:
    return [Cell(T, B, H, mode=mode, **more) for mode in MODES]


def _smoke() -> list[Cell]:
    """Every kind of cell once, small enough for the interpreter on a CPU."""
    shape = {"T": 2, "B": 3}
    return [
        Cell(**shape, H=20, dtype="float32", mode="forward", implementations=(*COMPARED, *PEERS)),
        Cell(**shape, H=20, dtype="float32", implementations=(*COMPARED, LOOP)),
        Cell(**shape, H=140, dtype="bfloat16"),
        Cell(**shape, H=20, dtype="tf32", directions=2),
        Cell(**shape, H=20, dtype="float16", reset_after=False, implementations=(OURS,)),
        Cell(**shape, H=20, dtype="float32", lengths="packed"),
        Cell(**shape, H=20, dtype="float32", lengths="lengths", implementations=(OURS,)),
    ]


def _core() -> list[Cell]:
    """The first call on a GPU: the grid of the goals, the largest shapes' training first."""
    return [
        Cell(256, B, H, mode=mode, implementations=COMPARED)
        for mode in reversed(MODES)
        for H in (768, 1024, 512, 256)
        for B in (16, 64, 128)
    ]


def _quick() -> list[Cell]:
    # The shapes of the goals.
    cells = _both(1024, 16, 768, implementations=COMPARED)
    cells += _both(1024, 16, 768, dtype="float16", implementations=COMPARED)
    cells += _both(512, 64, 1024, implementations=COMPARED)
    # Over H and B.
    for mode in reversed(MODES):
        for H in (256, 512, 768, 1024, 64, 128, 1536, 2048):
            for B in (16, 64, 1, 128, 8):
                names = COMPARED if B in (16, 64) else BASE
                cells.append(Cell(512, B, H, mode=mode, implementations=names))
    for H in (256, 768):
        for dtype in ("tf32", "float32"):
            cells += _both(512, 16, H, dtype=dtype)
    for H, B in ((128, 16), (768, 16), (1024, 64)):
        cells += _both(512, B, H, reset_after=False, implementations=(OURS,))
    for H, B in ((256, 16), (768, 16), (768, 64)):
        cells += _both(512, B, H, lengths="packed")
        cells.append(Cell(512, B, H, lengths="lengths", implementations=(OURS,)))
    cells += _both(512, 16, 512, directions=2)
    cells += _both(128, 16, 768, implementations=COMPARED)
    cells += [Cell(512, B, H, dtype="float16") for H in (256, 512, 1024) for B in (16, 64)]
    cells += [Cell(128, 16, 256, "tf32", implementations=(OURS, CUDNN, LOOP, "gru-qat", "torchrl"))]
    cells += [Cell(128, 16, 256, implementations=(OURS, CUDNN, LOOP, "gru-qat", "torchrl"))]
    return _once(cells)


def _full() -> list[Cell]:
    everyone = ("triton_gru auto", *COMPARED)
    cells = _quick()
    for H in (64, 128, 256, 512, 650, 768, 1024, 1536, 2048):
        for B in (1, 4, 8, 16, 32, 64, 128, 256):
            cells += _both(256, B, H, implementations=everyone)
    for T in (32, 128, 1024, 2048):
        for H in (128, 256, 768, 1024):
            for B in (16, 64):
                cells += _both(T, B, H, implementations=COMPARED)
    for dtype in ("float16", "tf32", "float32"):
        for H in (64, 128, 256, 512, 768, 1024):
            for B in (1, 16, 64, 128):
                cells += _both(512, B, H, dtype=dtype)
    for H in (64, 128, 256, 512, 768, 1024, 2048):
        for B in (1, 16, 128):
            cells += _both(512, B, H, reset_after=False, implementations=(OURS,))
    for H in (64, 256, 512, 1024):
        for B in (16, 64):
            cells += _both(512, B, H, directions=2)
    for H in (128, 512, 1024):
        for B in (16, 64, 128):
            for T in (128, 512):
                cells += _both(T, B, H, lengths="packed")
                cells += _both(T, B, H, lengths="lengths", implementations=(OURS,))
    for dtype in ("tf32", "bfloat16"):
        for H in (256, 512, 768):
            cells += _both(512, 16, H, dtype=dtype, implementations=(OURS, CUDNN, LOOP, *PEERS))
    return _once(cells)


def _once(cells: list[Cell]) -> list[Cell]:
    """Each cell once, at its first position, with the implementations of all its occurrences."""
    merged: dict[str, Cell] = {}
    for cell in cells:
        known = merged.get(cell.id, cell)
        names = dict.fromkeys((*known.implementations, *cell.implementations))
        merged[cell.id] = dataclasses.replace(known, implementations=tuple(names))
    return list(merged.values())


SUITES = {"smoke": _smoke, "core": _core, "quick": _quick, "full": _full}
