"""`with emulated(arch):` every `kernel[grid](...)` on CPU tensors runs as compiled PTX.

The launchers of triton_gru, and any other code that launches Triton or Gluon kernels, need no
change: results land in the tensors.
"""

import contextlib
import tempfile

import torch

from tests.ptx import compiling
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.machine import Launch
from tests.ptx.program import Program

_programs = {}
_cache = tempfile.TemporaryDirectory(prefix="ptx-")


def program_of(ptx: str) -> Program:
    """Built once for each text."""
    if ptx not in _programs:
        _programs[ptx] = Program(ptx)
    return _programs[ptx]


@contextlib.contextmanager
def emulated(arch: int = 90, *, instead: dict | None = None, **options):
    """Launches run in the machine; yields the list of `Launch` that grows with them.

    Args:
        arch: compute capability to compile for, as 80 or 90.
        instead: by the name of a kernel a Program to run in the place of its own.
        options: of `machine.Launch`: seed, weak, apart, counting, limit.
    """
    launches = []

    def launch(metadata, ptx, grid, arguments):
        name = compiling.kernel_name(ptx)
        program = (instead or {}).get(name) or program_of(ptx)
        launches.append(_run(program, name, metadata, grid, arguments, options))
        launches[-1].ptx = ptx

    deterministic = torch.are_deterministic_algorithms_enabled()
    # What torch.empty returns holds NaN: a result that nobody wrote shows.
    torch.use_deterministic_algorithms(True)
    try:
        with compiling.compiling_for(arch, launch, _cache.name):
            yield launches
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _run(program, name, metadata, grid, arguments, options):
    memory, storages, values = GlobalMemory(), {}, []
    for label, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            values.append(int(value))
            continue
        storage = value.untyped_storage()
        start = storage.data_ptr()
        if start not in storages:
            # The address keeps what the specialisation knew of its alignment, and no more of it.
            storages[start] = storage, memory.allocate(storage.nbytes(), label, start % 16)
        values.append(storages[start][1] + value.data_ptr() - start)
    raw = [
        torch.empty(0, dtype=torch.uint8).set_(s, 0, (s.nbytes(),)).numpy()
        for s, _ in storages.values()
    ]
    memory.fill(raw)
    values += [0, 0]  # Triton's own scratch memory, which no kernel here uses
    launch = Launch(
        program, name, grid, metadata.num_warps, metadata.shared, values, memory,
        cooperative=metadata.launch_cooperative_grid, **options,
    ).run()  # fmt: skip
    for view, (at, nbytes) in zip(raw, memory.spans, strict=True):
        view[:] = memory.bytes[at : at + nbytes]
    return launch
