"""Opcodes that compute a register from registers of the same thread."""

from tests.ptx.emitter import BYTES, expression, statement
from tests.ptx.errors import Unsupported

SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
BITWISE = {"and": "&", "or": "|", "xor": "^"}
HALVES = ("bf16", "f16", "bf16x2", "f16x2")
INTEGERS = {f"{s}{bits}" for s in "su" for bits in (16, 32, 64)}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
               "lo": "<", "ls": "<=", "hi": ">", "hs": ">=", "neu": "!="}  # fmt: skip


def integer(type_):
    """s32 -> i4, u32 and b32 -> u4."""
    return f"{'i' if type_[0] == 's' else 'u'}{BYTES[type_]}"


def bits(type_):
    return f"u{BYTES[type_]}"


def back(type_):
    """To the bits that registers hold."""
    return f".view({bits(type_)})" if type_[0] == "s" else ""


def only(i, *modifiers):
    """Refuses modifiers other than these between mnemonic and type."""
    if not set(i.parts[1:-1]) <= set(modifiers):
        raise Unsupported(repr(i))


@statement("bar", "bra", "ret", "exit")
def control(e, i):
    """What the scheduler does itself, see program.py."""
    if i.base == "bar" and i.op not in ("bar.sync", "bar.warp.sync"):
        raise Unsupported(repr(i))
    e.guard(i)  # the scheduler looks it up
    return []


@statement("mov")
def mov(e, i):
    d, s = i.operands
    only(i)
    if d.startswith("{"):
        wide, part, width = {4: ("u4", "u2", 16), 8: ("u8", "u4", 32)}[BYTES[i.type]]
        names, lines = e.many(d), [f"t = {e.value(s, wide)}"]
        if len(names) != 2:
            raise Unsupported(repr(i))
        for n, name in enumerate(names):
            shifted = f"(t >> {wide}({width}))" if n else "t"
            lines += e.assign(i, name, f"{shifted}.astype({part})")
        return lines
    if s.startswith("{"):
        if i.type == "b32":
            low, high = (e.value(x, "u2") for x in e.many(s))
            return e.assign(i, d, f"join({low}, {high})")
        if i.type == "b64":
            low, high = (e.value(x) for x in e.many(s))
            return e.assign(i, d, f"({low}.astype(u8) | ({high}.astype(u8) << u8(32)))")
        raise Unsupported(repr(i))
    kind = e.kind_of(d)
    source = e.value(s, kind)
    if source.startswith("K_"):
        source = f"W.full({source}, {'bool' if kind == '?' else kind})"
    return e.assign(i, d, source)


@expression("add", "sub", "mul", "min", "max", "abs", "neg", "fma", "div", "mad", "rem")
def arithmetic(e, i):
    sources = i.operands[1:]
    if i.type == "f32x2":
        only(i, "rn")
        return float32_pairs(e, i, sources)
    if "f32" in i.parts:
        return float32(e, i, sources)
    if i.type in HALVES:
        only(i, "rn")
        if i.base not in ("add", "sub", "mul", "fma", "max", "min"):
            raise Unsupported(repr(i))
        kind = "u4" if "x2" in i.type else "u2"
        texts = ", ".join(e.value(x, kind) for x in sources)
        return f"narrow('{i.base}', '{i.type}', {texts})"
    if i.op == "max.u16x2":
        return f"maximum_of_pairs({', '.join(e.value(x, 'u4') for x in sources)})"
    if i.type not in INTEGERS:
        raise Unsupported(repr(i))
    return whole(e, i, sources)


def float32_pairs(e, i, sources):
    function = {"add": "np.add", "sub": "np.subtract", "mul": "np.multiply", "fma": "fma"}
    if i.base not in function:
        raise Unsupported(repr(i))
    return f"two({function[i.base]}, {', '.join(e.value(x, 'u8') for x in sources)})"


def float32(e, i, sources):
    if i.type in ("bf16", "f16"):  # mixed: f32 = f32 op bf16, the narrow operand first
        only(i, "rn", "f32")
        if i.base not in ("add", "sub"):
            raise Unsupported(repr(i))
        a = f"{i.type}_to_f32({e.value(sources[0], 'u2')})"
        return f"canonical({a} {SIGNS[i.base]} {e.value(sources[1], 'f4')})"
    only(i, "rn", "full", "approx", "ftz")
    a = [e.value(x, "f4") for x in sources]
    if i.base == "div":
        if "full" in i.parts or "approx" in i.parts:
            return f"approximate({a[0]} / {a[1]}, {a[0]}, {a[1]})"
        return f"canonical({a[0]} / {a[1]})"
    if i.base in SIGNS:
        return f"canonical({a[0]} {SIGNS[i.base]} {a[1]})"
    if i.base == "fma":
        return f"canonical(fma({', '.join(a)}))"
    if i.base in ("min", "max"):
        return f"canonical({i.base}imum({', '.join(a)}))"
    if i.base == "abs":
        return f"({e.value(sources[0])} & u4(0x7FFFFFFF))"
    if i.base == "neg":
        return f"({e.value(sources[0])} ^ u4(0x80000000))"
    raise Unsupported(repr(i))


def whole(e, i, sources):
    t, u = i.type, bits(i.type)
    if i.base in ("add", "sub"):
        only(i)
        a, b = (e.value(x, u) for x in sources)
        return f"({a} {SIGNS[i.base]} {b})"
    if i.base == "neg":
        only(i)
        return f"({u}(0) - {e.value(sources[0], u)})"
    if i.base == "abs" and t[0] == "s":
        only(i)
        return f"np.abs({e.value(sources[0], integer(t))}){back(t)}"
    if i.base in ("min", "max"):
        only(i)
        a, b = (e.value(x, integer(t)) for x in sources)
        return f"np.{i.base}imum({a}, {b}){back(t)}"
    if i.base in ("div", "rem"):
        only(i)
        a, b = (e.value(x, integer(t)) for x in sources)
        q = f"quotient({a}, {b})"
        return f"({q if i.base == 'div' else f'{a} - {q} * {b}'}){back(t)}"
    if i.base in ("mul", "mad") and i.parts[1:-1] == ["lo"]:
        product = " * ".join(e.value(x, u) for x in sources[:2])
        plus = f" + {e.value(sources[2], u)}" if i.base == "mad" else ""
        return f"({product}{plus})"
    if i.base in ("mul", "mad") and i.parts[1:-1] == ["wide"] and t in ("s32", "u32"):
        k, w = integer(t), f"{integer(t)[0]}8"
        a, b = (f"{e.value(x, k)}.astype({w})" for x in sources[:2])
        plus = f" + {e.value(sources[2], 'u8')}" if i.base == "mad" else ""
        return f"(({a} * {b}).view(u8){plus})"
    if i.base == "mul" and i.parts[1:-1] == ["hi"] and t in ("s32", "u32"):
        k, w = integer(t), f"{integer(t)[0]}8"
        a, b = (f"{e.value(x, k)}.astype({w})" for x in sources)
        return f"(({a} * {b}) >> {w}(32)).astype({k}).view(u4)"
    raise Unsupported(repr(i))


@expression("and", "or", "xor", "not")
def bitwise(e, i):
    only(i)
    kind = "?" if i.type == "pred" else bits(i.type)
    a, *b = (e.value(x, kind) for x in i.operands[1:])
    if i.base == "not":
        return f"(~{a})"
    return f"({a} {BITWISE[i.base]} {b[0]})"


@expression("shl", "shr")
def shifts(e, i):
    only(i)
    x, by = e.value(i.operands[1], integer(i.type)), i.operands[2]
    if e.is_number(by) and int(by, 0) < 8 * BYTES[i.type]:
        return f"({x} {'<<' if i.base == 'shl' else '>>'} {integer(i.type)}({by})){back(i.type)}"
    return f"shift({x}, {e.value(by)}, {i.base == 'shl'}){back(i.type)}"


@expression("shf")
def funnel_shift(e, i):
    if i.op not in ("shf.l.wrap.b32", "shf.r.wrap.b32"):
        raise Unsupported(repr(i))
    return f"funnel({', '.join(e.value(x) for x in i.operands[1:])}, {i.parts[1] == 'l'})"


@expression("bfe")
def bit_field(e, i):
    if i.type not in ("u32", "s32"):
        raise Unsupported(repr(i))
    position, length = (e.number(i, x) for x in i.operands[2:])
    return f"extract({e.value(i.operands[1])}, {position}, {length}, {i.type == 's32'})"


@expression("prmt")
def permute(e, i):
    if i.op != "prmt.b32":
        raise Unsupported(repr(i))
    a, b = (e.value(x) for x in i.operands[1:3])
    return f"permute({a}, {b}, {e.number(i, i.operands[3])})"


@expression("lop3")
def truth_table(e, i):
    if i.op != "lop3.b32":
        raise Unsupported(repr(i))
    a, b, c = (e.value(x) for x in i.operands[1:4])
    return f"logic({a}, {b}, {c}, {e.number(i, i.operands[4])})"


@expression("selp")
def choose(e, i):
    only(i)
    a, b = (e.value(x, bits(i.type)) for x in i.operands[1:3])
    return f"np.where({e.value(i.operands[3], '?')}, {a}, {b})"


@statement("setp")
def compare(e, i):
    comparison, modifiers = i.parts[1], i.parts[2:-1]
    d, a, b, *q = i.operands
    if "|" in d:  # two at a time, of 16-bit floats
        if comparison not in ("num", "nan") or i.type not in ("bf16x2", "f16x2") or modifiers:
            raise Unsupported(repr(i))
        kind = i.type.removesuffix("x2")
        lines = [f"t = np.isnan(halves({e.value(a)}, '{kind}')) | "
                 f"np.isnan(halves({e.value(b)}, '{kind}'))"]  # fmt: skip
        for n, name in enumerate(d.split("|")):
            lines += e.assign(i, name.strip(), ("~" if comparison == "num" else "") + f"t[:, {n}]")
        return lines
    if i.type in ("f32", "bf16", "f16"):
        if modifiers:
            raise Unsupported(repr(i))
        return e.assign(i, d, compared_floats(e, i, comparison, a, b))
    if (
        comparison not in COMPARISONS
        or comparison == "neu"
        or i.type not in (*INTEGERS, "b32", "b16", "b64")
    ):
        raise Unsupported(repr(i))
    k = integer(i.type)
    text = f"({e.value(a, k)} {COMPARISONS[comparison]} {e.value(b, k)})"
    if modifiers:  # setp.lt.and.u32 p, a, b, q
        if modifiers not in (["and"], ["or"]) or len(q) != 1:
            raise Unsupported(repr(i))
        text = f"({text} {'&' if modifiers == ['and'] else '|'} {e.predicate(q[0])})"
    return e.assign(i, d, text)


def compared_floats(e, i, comparison, a, b):
    if i.type == "f32":
        a, b = e.value(a, "f4"), e.value(b, "f4")
    else:
        a, b = (f"{i.type}_to_f32({e.value(x, 'u2')})" for x in (a, b))
    unordered = f"(np.isnan({a}) | np.isnan({b}))"
    if comparison in ("num", "nan"):
        return f"(~{unordered})" if comparison == "num" else unordered
    if comparison in ("ltu", "leu", "gtu", "geu", "equ"):
        return f"(({a} {COMPARISONS[comparison[:2]]} {b}) | {unordered})"
    if comparison not in ("lt", "le", "gt", "ge", "eq", "neu"):
        raise Unsupported(repr(i))
    return f"({a} {COMPARISONS[comparison]} {b})"


@expression("ex2")
def exponential(e, i):
    if i.op not in ("ex2.approx.f32", "ex2.approx.ftz.f32"):
        raise Unsupported(repr(i))
    a = e.value(i.operands[1], "f4")
    return f"approximate(np.exp2({a}), {a})"


@expression("rcp")
def reciprocal(e, i):
    if i.op not in ("rcp.approx.f32", "rcp.approx.ftz.f32"):
        raise Unsupported(repr(i))
    a = e.value(i.operands[1], "f4")
    return f"approximate(f4(1) / {a}, {a})"


@expression("cvt")
def convert(e, i):
    o = i.operands
    form = ".".join(p for p in i.parts[1:] if p != "rn")
    if form in ("f32.bf16", "f32.f16"):
        return f"{form[4:]}_to_f32({e.value(o[1], 'u2')}).view(u4)"
    if form in ("bf16.f32", "f16.f32"):
        return f"f32_to_{form[:-4]}({e.value(o[1], 'f4')})"
    if form in ("bf16x2.f32", "f16x2.f32"):
        low, high = (f"f32_to_{form[:-6]}({e.value(x, 'f4')})" for x in (o[2], o[1]))
        return f"join({low}, {high})"
    if form == "rna.tf32.f32":
        return f"f32_to_tf32({e.value(o[1], 'f4')})"
    if form in ("f32.s32", "f32.u32"):
        return f"{e.value(o[1], integer(form[4:]))}.astype(f4).view(u4)"
    to, source = (i.parts[-2], i.parts[-1]) if len(i.parts) == 3 else (None, None)
    if to in INTEGERS | {"s8", "u8"} and source in INTEGERS | {"s8", "u8"}:
        width = BYTES[source]
        x = f"{e.value(o[1], f'u{max(width, 2)}')}.astype(u{width}).view({integer(source)})"
        return f"{x}.astype({integer(to)}).astype({e.kind_of(o[0])})"
    raise Unsupported(repr(i))
