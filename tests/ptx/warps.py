"""Opcodes by which the lanes of a warp meet: shuffles, votes, reductions."""

from tests.ptx.emitter import expression
from tests.ptx.errors import Unsupported


def whole_warp(e, i, member):
    """Only all lanes: branches never split a warp (machine.py)."""
    if not member.startswith("%") and e.number(i, member) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Unsupported(repr(i))
    if i.guard:
        raise Unsupported(repr(i))


@expression("shfl")
def shuffle(e, i):
    _, a, lane, clamp, member = i.operands
    whole_warp(e, i, member)
    x = e.value(a)
    if clamp in ("31", "0x1f") and "|" not in i.operands[0]:
        if i.op == "shfl.sync.bfly.b32" and e.is_number(lane):
            return f"{x}[W.lane_xor({lane})]"
        if i.op == "shfl.sync.idx.b32":
            return f"{x}[W.first_lane + ({e.value(lane)} & u4(31))]"
    raise Unsupported(repr(i))


@expression("vote")
def vote(e, i):
    whole_warp(e, i, i.operands[2])
    source = i.operands[1]
    text = f"W.full({e.value(source, '?')}, bool)" if e.is_number(source) else e.predicate(source)
    lanes = f"({text}).reshape(-1, 32)"
    if i.op in ("vote.sync.any.pred", "vote.sync.all.pred"):
        return f"np.repeat({lanes}.{i.parts[2]}(1), 32)"
    if i.op == "vote.sync.ballot.b32":
        return f"np.repeat(np.packbits({lanes}, axis=1, bitorder='little').view(u4).ravel(), 32)"
    raise Unsupported(repr(i))


@expression("redux")
def reduce(e, i):
    whole_warp(e, i, i.operands[2])
    view = {"s32": "i4", "u32": "u4", "b32": "u4"}.get(i.type)
    functions = {"max": "maximum", "min": "minimum", "add": "add", "or": "bitwise_or",
                 "and": "bitwise_and", "xor": "bitwise_xor"}  # fmt: skip
    if view is None or len(i.parts) != 4 or i.parts[2] not in functions:
        raise Unsupported(repr(i))
    lanes = f"{e.value(i.operands[1], view)}.reshape(-1, 32)"
    reduced = f"np.{functions[i.parts[2]]}.reduce({lanes}, axis=1)"
    return f"np.repeat({reduced}, 32).astype({view}).view(u4)"
