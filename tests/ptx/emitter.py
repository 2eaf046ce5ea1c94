"""One instruction -> lines of Python over numpy arrays: operands, results, table of opcodes.

In the generated code `R` is the list of registers of the warps that execute, `W` those warps
(`execution.Warps`). An opcode is known by its base mnemonic; its function raises Unsupported for
every form that it does not compute.
"""

import re

import numpy as np

from tests.ptx import values
from tests.ptx.errors import Unsupported

SHARED_BASE = 0x400  # where global_smem lies in the shared window; sm_90 keeps the first KiB
NUMPY = {
    "u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64,
    "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64,
    "f4": np.float32, "f8": np.float64, "f2": np.float16,
}  # fmt: skip
BYTES = {f"{letter}{bits}": bits // 8 for letter in "busf" for bits in (8, 16, 32, 64)}

_expressions, _statements = {}, {}


def expression(*names):
    """Registers `function(emitter, instruction) -> text of the result` for base mnemonics."""

    def register(function):
        _expressions.update(dict.fromkeys(names, function))
        return function

    return register


def statement(*names):
    """Registers `function(emitter, instruction) -> lines` for base mnemonics."""

    def register(function):
        _statements.update(dict.fromkeys(names, function))
        return function

    return register


class Emitter:
    """Names registers and constants for one kernel.

    Attributes:
        index: register -> its place in `R`.
        written: registers that some instruction writes.
        namespace: what the generated code sees.
    """

    def __init__(self, kind_of):
        self.kind_of = kind_of
        self.index, self.written = {}, set()
        self.namespace = {"np": np, **NUMPY}
        public = (n for n in vars(values) if not n.startswith("_") and n != "np")
        self.namespace |= {n: getattr(values, n) for n in public}

    def emit(self, i) -> list[str]:
        if i.base in _statements:
            return _statements[i.base](self, i)
        if i.base not in _expressions:
            raise Unsupported(repr(i))
        return self.assign(i, i.operands[0], _expressions[i.base](self, i))

    # -- operands -----------------------------------------------------------------------------

    def register(self, name):
        """The index of a register that is written."""
        self.written.add(name)
        return self._place(name)

    def _place(self, name):
        if name not in self.index:
            self.kind_of(name)  # raises for what is no register
            self.index[name] = len(self.index)
        return self.index[name]

    def value(self, text, kind="u4"):
        """Python expression of an operand; `kind` is for constants and views, see NUMPY."""
        text = text.strip()
        held = {"i": "u", "f": "u"}.get(kind[0], kind[0]) + kind[1:]
        if re.fullmatch(r"%\w*?\d+", text):
            out = f"R[{self._place(text)}]"
            return out if kind == held else f"{out}.view({kind})"
        special = re.fullmatch(r"%((?:tid|ctaid|ntid|nctaid)\.[xyz]|laneid)", text)
        if special:
            return f"W.special['{special.group(1)}']"
        number = re.fullmatch(r"0[fd]([0-9A-Fa-f]+)|(-?(?:0x[0-9A-Fa-f]+|\d+))U?", text)
        if text == "global_smem":
            return self.constant(SHARED_BASE, held)
        if not number:
            raise Unsupported(f"operand {text!r}")
        bits = int(number.group(1), 16) if number.group(1) else int(number.group(2), 0)
        out = self.constant(bits, held)
        return out if kind == held else f"{out}.view({kind})"

    def constant(self, number, kind):
        if kind == "?":
            value = np.bool_(number != 0)
        else:
            value = NUMPY[kind](number & ((1 << 8 * int(kind[1])) - 1))
        name = f"K_{kind.replace('?', 'p')}_{number & (2**64 - 1):x}"
        self.namespace[name] = value
        return name

    @staticmethod
    def is_number(text):
        return re.fullmatch(r"-?(?:0x[0-9A-Fa-f]+|\d+)U?", text) is not None

    def number(self, i, text):
        """The value of an operand that must be a constant."""
        if not self.is_number(text):
            raise Unsupported(repr(i))
        return int(text.rstrip("U"), 0)

    def predicate(self, text):
        """`%p1` or `!%p1`."""
        p = self.value(text.lstrip("!"), "?")
        return f"~{p}" if text.startswith("!") else p

    def guard(self, i):
        return self.predicate(i.guard) if i.guard else "None"

    @staticmethod
    def many(text):
        """The registers of an operand `{a, b}` or `a`."""
        if text.startswith("{"):
            return [t.strip() for t in text[1:-1].split(",")]
        return [text]

    def address(self, i, text):
        """(expression, constant offset) of `[ %rd1 + 0 ]`."""
        m = re.fullmatch(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not m:
            raise Unsupported(repr(i))
        base, offset = m.group(1), int(m.group(2) or "0", 0)
        if base == "global_smem":
            return f"W.full({SHARED_BASE}, u4)", offset
        return self.value(base), offset

    # -- results ------------------------------------------------------------------------------

    def assign(self, i, register, text) -> list[str]:
        """Lines that assign a register under the instruction's guard."""
        if register == "_":
            return []
        place = self.register(register)
        if i.guard:
            kind = self.kind_of(register)
            return [f"R[{place}] = W.select({self.guard(i)}, {text}, R[{place}], '{kind}')"]
        return [f"R[{place}] = {text}"]
