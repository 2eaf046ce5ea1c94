"""PTX text -> a list of instructions, and where the labels point."""

import re

from tests.ptx.errors import Unsupported

# How a register of a type is held: a bool, or unsigned bits of so many bytes.
KINDS = {
    "pred": "?",
    **dict.fromkeys(("b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16"), "u2"),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), "u4"),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), "u8"),
}


class Instruction:
    """One instruction.

    Attributes:
        at: its place in the kernel.
        text: as it was written, with the names of inline assembly made unique.
        guard: "%p1", "!%p1" or None.
        op: the mnemonic with its modifiers, and `parts`, the same in pieces.
        operands: texts, a vector `{...}` being one operand.
        line: of the PTX, from 1.
        source: file and line of the kernel's source.
    """

    __slots__ = ("at", "guard", "line", "op", "operands", "parts", "source", "text")

    def __init__(self, at, text, line, source):
        m = re.match(r"(?:@\s*(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not m:
            raise Unsupported(f"PTX line {line}: {text}")
        self.at, self.text, self.line, self.source = at, text, line, source
        self.guard, self.op, rest = m.groups()
        self.parts = self.op.split(".")
        self.operands = split_operands(rest)

    @property
    def base(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]

    def __repr__(self):
        return f"{self.text}   [PTX line {self.line}, {self.source}]"


def split_operands(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    out, depth, current = [], 0, ""
    for c in text:
        depth += c in "{["
        depth -= c in "}]"
        if c == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip():
        out.append(current.strip())
    return out


class _Scope:
    """A block `{ .reg .b32 n; ... }` of inline assembly: its registers and labels are its own."""

    def __init__(self, number):
        self.number, self.names = number, {}

    def declare(self, type_, names, kinds):
        kinds.setdefault(f"asm_{type_}_", KINDS[type_])
        for name in names.split(","):
            number = 1000 * self.number + len(self.names)
            self.names[name.strip()] = f"%asm_{type_}_{number}"

    def renamed(self, text):
        return re.sub(
            r"(?<![%\w.$])[A-Za-z_]\w*(?![\w.])",
            lambda m: self.names.get(m.group(), m.group()),
            text,
        )


class Parser:
    """Reads one kernel.

    Attributes:
        instructions: in order.
        labels: name -> index of the instruction that follows.
        kinds: prefix of a register's name -> how it is held, see `KINDS`.
    """

    def __init__(self, ptx: str):
        self.instructions, self.labels, self.kinds = [], {}, {}
        self._scopes, self._opened, self._source = [], 0, "?"
        self._files = {
            m.group(1): m.group(2).rsplit("/", 1)[-1]
            for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)
        }
        lines = ptx.splitlines()
        # The body lies between a { and a } that stand alone; no entry has a { before.
        start = next(n for n, line in enumerate(lines) if line.split("//")[0].strip() == "{")
        pending = ""
        for number, raw in enumerate(lines[start + 1 :], start + 2):
            pending = self._read(f"{pending} {raw.split('//')[0].strip()}".strip(), number)
            if pending is None:
                return
        raise Unsupported("a kernel without an end")

    def _read(self, text, number):
        """Takes statements off the front; the rest of an unfinished one, or None at the end."""
        while text:
            loc = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
            label = re.match(r"([$\w]+):(?!:)", text)
            if loc:
                self._source = f"{self._files.get(loc.group(1), '?')}:{loc.group(2)}"
                return ""
            if text[0] == "{":
                self._opened += 1
                self._scopes.append(_Scope(self._opened))
                text = text[1:].strip()
            elif text[0] == "}":
                if not self._scopes:
                    return None
                self._scopes.pop()
                text = text[1:].strip()
            elif label:
                self.labels[self._label(label.group(1), True)] = len(self.instructions)
                text = text[label.end() :].strip()
            elif ";" in text:
                statement, text = (part.strip() for part in text.split(";", 1))
                self._statement(statement, number)
            else:
                return text
        return ""

    def _label(self, name, defined=False):
        if not self._scopes:
            return name
        inner = f"{name}@{self._scopes[-1].number}"
        return inner if defined or not name.startswith("$") else name

    def _statement(self, text, number):
        if not text:
            return
        declaration = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
        if declaration:
            type_, names = declaration.groups()
            family = re.match(r"%(\w+?)<\d+>$", names.strip())
            if family:
                self.kinds[family.group(1)] = KINDS[type_]
            else:
                self._scopes[-1].declare(type_, names, self.kinds)
            return
        if text.startswith("."):
            return
        for scope in reversed(self._scopes):
            text = scope.renamed(text)
        i = Instruction(len(self.instructions), text, number, self._source)
        if i.base == "bra":
            i.operands = [self._label(i.operands[0])]
        self.instructions.append(i)

    def kind(self, register: str) -> str:
        """How a register is held: "?", "u2", "u4" or "u8"."""
        return self.kinds[re.match(r"%(\w*?)\d+$", register).group(1)]
