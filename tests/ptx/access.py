"""Opcodes that reach memory: parameters, loads, stores, atomics, fences, cp.async."""

import re

from tests.ptx.emitter import BYTES, statement
from tests.ptx.errors import Unsupported

# Modifiers of a load, in any order -> the kind of load, see weak_memory.py.
LOADS = {
    (): "plain", ("nc",): "nc", ("cg",): "cg", ("volatile",): "volatile",
    ("gpu", "relaxed"): "relaxed", ("relaxed", "sys"): "relaxed",
    ("acquire", "gpu"): "acquire", ("acquire", "sys"): "acquire",
}  # fmt: skip
STORES = {
    (): "plain", ("volatile",): "relaxed",
    ("gpu", "relaxed"): "relaxed", ("relaxed", "sys"): "relaxed",
    ("gpu", "release"): "release", ("release", "sys"): "release",
}  # fmt: skip
ORDERS = ("relaxed", "acquire", "release", "acq_rel")
UPDATES = ("add", "exch", "min", "max", "and", "or", "cas")


def yields(i) -> bool:
    """Whether other programs may step in before an instruction."""
    how = {"volatile", "relaxed", "acquire", "release"} & set(i.parts)
    return i.base in ("atom", "red") or (
        i.base in ("ld", "st") and bool(how) and "global" in i.parts
    )


def _form(i, known):
    """(space, kind, bytes an element, elements) of a load or store."""
    vector = [p for p in i.parts if p in ("v2", "v4", "v8")]
    spaces = [p for p in i.parts if p in ("global", "shared")]
    rest = [p for p in i.parts[1:-1] if p not in (*vector, *spaces, "weak")]
    kind = known.get(tuple(sorted(rest)))
    if len(spaces) != 1 or kind is None or i.type not in BYTES:
        raise Unsupported(repr(i))
    if spaces == ["shared"] and kind not in ("plain", "volatile"):
        raise Unsupported(repr(i))
    return spaces[0], kind, BYTES[i.type], int(vector[0][1:]) if vector else 1


@statement("ld")
def load(e, i):
    parameter = re.fullmatch(r"\[\w+_param_(\d+)\]", i.operands[1])
    if parameter:
        if i.parts[1] != "param" or len(i.parts) != 3 or i.guard:
            raise Unsupported(repr(i))
        sign, wide = "i" if i.type[0] == "s" else "u", int(e.kind_of(i.operands[0])[1])
        text = f"W.parameter({parameter.group(1)}, {BYTES[i.type]}, '{sign}', {wide})"
        return e.assign(i, i.operands[0], text)
    space, kind, size, count = _form(i, LOADS)
    address, offset = e.address(i, i.operands[1])
    names = e.many(i.operands[0])
    registers = [e.register(d) for d in names]
    kinds = "".join(e.kind_of(d)[1] for d in names)
    if len(names) != count:
        raise Unsupported(repr(i))
    how = "" if space == "shared" else f"'{kind}', "
    return [f"W.load_{space}({i.at}, {how}{address}, {offset}, {e.guard(i)}, {size}, {count}, "
            f"{registers}, '{kinds}')"]  # fmt: skip


@statement("st")
def store(e, i):
    space, kind, size, count = _form(i, STORES)
    address, offset = e.address(i, i.operands[0])
    names = e.many(i.operands[1])
    if len(names) != count:
        raise Unsupported(repr(i))
    held = f"u{max(size, 2)}"
    sources = ", ".join(e.value(v, held) for v in names)
    how = "" if space == "shared" else f"'{kind}', "
    return [f"W.store_{space}({i.at}, {how}{address}, {offset}, {e.guard(i)}, {size}, [{sources}])"]


@statement("atom", "red")
def atomic(e, i):
    middle = set(i.parts[1:-1]) - {"global", "gpu", "sys"}
    orders, updates = middle & set(ORDERS), middle & set(UPDATES)
    known = {"u32": 4, "s32": 4, "b32": 4, "u64": 8, "b64": 8}
    if "global" not in i.parts or len(updates) != 1 or len(orders) > 1 or i.type not in known:
        raise Unsupported(repr(i))
    if middle - orders - updates or "cta" in i.parts:
        raise Unsupported(repr(i))
    order, update, size = (*orders, "relaxed")[0], *updates, known[i.type]
    d, *rest = i.operands if i.base == "atom" else ("_", *i.operands)
    address, offset = e.address(i, rest[0])
    sources = ", ".join(e.value(v, f"u{size}") for v in rest[1:])
    register = None if d == "_" else e.register(d)
    view = f"{'i' if i.type[0] == 's' else 'u'}{size}"
    return [f"W.atomic({i.at}, '{order}', '{update}', {view}, {address}, {offset}, {e.guard(i)}, "
            f"[{sources}], {register})"]  # fmt: skip


@statement("fence", "membar")
def fence(e, i):
    if i.guard or i.op not in (
        "fence.acq_rel.gpu",
        "fence.sc.gpu",
        "membar.gl",
        "fence.acq_rel.sys",
    ):
        raise Unsupported(repr(i))
    return ["W.fence()"]


@statement("cp")
def copy(e, i):
    if i.op == "cp.async.commit_group":
        return ["W.commit()"]
    if i.op == "cp.async.wait_group":
        return [f"W.wait({i.at}, {e.number(i, i.operands[0])})"]
    if i.op not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
        raise Unsupported(repr(i))
    to, to_offset = e.address(i, i.operands[0])
    source, offset = e.address(i, i.operands[1])
    size = e.number(i, i.operands[2])
    taken = e.value(i.operands[3]) if len(i.operands) > 3 else "None"
    return [f"W.copy_async({i.at}, {to}, {to_offset}, {source}, {offset}, {e.guard(i)}, {size}, "
            f"{taken})"]  # fmt: skip
