"""Opcodes of the tensor cores: mma.sync, and ldmatrix and stmatrix that feed it."""

import numpy as np

from tests.ptx import values
from tests.ptx.emitter import statement
from tests.ptx.errors import Unsupported


def _accumulate(A, B, c):
    """A @ B^T + c of every warp; A [W, 16, k], B [W, 8, k], c four registers."""
    D = np.matmul(A, B.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)
    out = []
    for n, old in enumerate(c):
        new = D[:, n >> 1, :, :, n & 1].reshape(-1) + old.view(np.float32)
        out.append(values.canonical(new))
    return out


def mma_16(a, b, c, kind):
    """m16n8k16 of 16-bit floats, sums in float32."""

    def quarter(word):  # [W, 8, 8]: a row for each group of four lanes
        return values.halves(word, kind).reshape(-1, 8, 8)

    A = np.empty((a[0].size // 32, 16, 16), np.float32)
    A[:, :8, :8], A[:, 8:, :8], A[:, :8, 8:], A[:, 8:, 8:] = map(quarter, a)
    return _accumulate(A, np.concatenate([quarter(b[0]), quarter(b[1])], 2), c)


def mma_8(a, b, c):
    """m16n8k8 of tf32: the 13 low bits of an operand are not looked at."""

    def quarter(word):
        return (word & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4)

    A = np.empty((a[0].size // 32, 16, 8), np.float32)
    A[:, :8, :4], A[:, 8:, :4], A[:, :8, 4:], A[:, 8:, 4:] = map(quarter, a)
    return _accumulate(A, np.concatenate([quarter(b[0]), quarter(b[1])], 2), c)


@statement("mma")
def multiply(e, i):
    forms = {
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (mma_16, ", 'bf16'"),
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (mma_16, ", 'f16'"),
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": (mma_8, ""),
    }
    if i.op not in forms or i.guard:
        raise Unsupported(repr(i))
    function, extra = forms[i.op]
    e.namespace[function.__name__] = function
    d, *sources = (e.many(x) for x in i.operands)
    texts = ", ".join(f"[{', '.join(e.value(x) for x in xs)}]" for xs in sources)
    lines = [f"t = {function.__name__}({texts}{extra})"]
    for n, x in enumerate(d):
        lines += e.assign(i, x, f"t[{n}]")
    return lines


def _transposes(i):
    shapes = ("x1", "x2", "x4")
    form = [p for p in i.parts[1:] if p not in shapes]
    plain = ["sync", "aligned", "m8n8", "shared", "b16"]
    if i.guard or form not in (plain, [*plain[:3], "trans", *plain[3:]]):
        raise Unsupported(repr(i))
    return "trans" in form


@statement("ldmatrix")
def load_matrix(e, i):
    transposes = _transposes(i)
    address, offset = e.address(i, i.operands[1])
    registers = [e.register(d) for d in e.many(i.operands[0])]
    return [f"W.load_matrix({i.at}, {address}, {offset}, {registers}, {transposes})"]


@statement("stmatrix")
def store_matrix(e, i):
    transposes = _transposes(i)
    address, offset = e.address(i, i.operands[0])
    sources = ", ".join(e.value(v) for v in e.many(i.operands[1]))
    return [f"W.store_matrix({i.at}, {address}, {offset}, [{sources}], {transposes})"]
