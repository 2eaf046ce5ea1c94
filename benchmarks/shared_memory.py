"""A Gluon kernel that reads shared memory again and again (a probe of `probes.py`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def read_shared(sums, rounds, SIZE: gl.constexpr, num_warps: gl.constexpr):
    """Adds up SIZE words of four planes in turn, 16 bytes a thread and load, without conflicts."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [num_warps], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.float32, [4, SIZE], flat)
    for plane in gl.static_range(4):
        memory.index(plane).store(gl.full([SIZE], 1.0, gl.float32, layout))
    total = gl.zeros([SIZE], gl.float32, layout)
    for number in range(rounds):
        total += memory.index(number % 4).load(layout)
    gl.store(sums + gl.program_id(0) * SIZE + gl.arange(0, SIZE, layout), total)
