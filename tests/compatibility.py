"""Writes docs/compatibility.md from the marks of the tests: python -m tests.compatibility

A test is marked for the row that it proves:

    @pytest.mark.compat("graphs", "torch.export", "works better", "the number of steps may vary")

Several tests of one row agree in the verdict; the note stands at one of them. The marks are read
without importing a test, so that the page needs no optional package.
"""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/compatibility.md"
VERDICTS = ("works", "works better", "differs")
# In the order of the page.
SECTIONS = {
    "arguments": "Arguments",
    "input": "Input, output and errors",
    "attributes": "Methods and attributes",
    "modules": "What is done to modules",
    "derivatives": "Derivatives",
    "graphs": "Graphs and export",
    "training": "Around training",
    "beyond": "What nn.GRU does not have",
}
HEAD = """\
# nn.GRU, row by row

Made by `python -m tests.compatibility` from the marks of the tests; each row names the tests that
prove it. *works*: as with `torch.nn.GRU`. *works better*: nn.GRU refuses it, or does less.
*differs*: not as with nn.GRU; the note says how, and the test pins the behaviour or the error.

The tests run on a CPU with the backends `auto`, `torch` and `reference`. Most rows on modules,
derivatives, graphs and training run with `triton` too, in an interpreter
(`tests/interpreter/test_torch_features*.py`). Notes on cuDNN state its documented limits: no row
here was run on a GPU.
"""


class CompatibilityError(ValueError):
    """A mark that cannot become a row."""


@dataclasses.dataclass
class Row:
    """A feature, how it compares with nn.GRU, and the tests that show it."""

    section: str
    feature: str
    verdict: str
    note: str
    tests: list[str]


def marks(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The name and the mark's arguments of each marked test of a file."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(
                "mark.compat"
            ):
                try:
                    arguments = [ast.literal_eval(a) for a in decorator.args]
                except ValueError as error:
                    raise CompatibilityError(f"{path}: {node.name}: {error}") from error
                if decorator.keywords or len(arguments) not in (3, 4):
                    raise CompatibilityError(
                        f"{path}: {node.name}: compat takes section, feature, verdict and note"
                    )
                if not node.name.startswith("test_"):
                    raise CompatibilityError(f"{path}: {node.name} is no test")
                yield node.name, arguments


def rows(root: Path = ROOT) -> list[Row]:
    """All rows, in the order of `SECTIONS` and of the files.

    Raises:
        CompatibilityError: A section or verdict is unknown, or marks of one row contradict.
    """
    found: dict[tuple[str, str], Row] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        file = path.relative_to(root).as_posix()
        for test, (section, feature, verdict, *note) in marks(path):
            if section not in SECTIONS or verdict not in VERDICTS:
                raise CompatibilityError(
                    f"{file}: {test}: section should be one of {', '.join(SECTIONS)} and verdict "
                    f"one of {', '.join(VERDICTS)}, got {section!r} and {verdict!r}"
                )
            row = found.setdefault((section, feature), Row(section, feature, verdict, "", []))
            if row.verdict != verdict or (note and row.note not in ("", note[0])):
                raise CompatibilityError(f"{file}: {test} contradicts {row.tests} on {feature!r}")
            row.note = note[0] if note else row.note
            row.tests.append(f"{file}::{test}")
    order = list(SECTIONS)
    return sorted(found.values(), key=lambda row: order.index(row.section))


def page(root: Path = ROOT) -> str:
    """The text of docs/compatibility.md."""
    every = rows(root)
    text = HEAD
    for section, title in SECTIONS.items():
        chosen = [row for row in every if row.section == section]
        if chosen:
            text += f"\n## {title}\n\n| | | note | test |\n|---|---|---|---|\n"
            text += "".join(f"| {' | '.join(_cells(row))} |\n" for row in chosen)
    return text


def _cells(row: Row) -> list[str]:
    names = []
    for test in row.tests:
        file, _, name = test.partition("::")
        names.append(f"[{name.removeprefix('test_')}](../{file})")
    verdict = row.verdict if row.verdict == "works" else f"**{row.verdict}**"
    return [row.feature, verdict, row.note, ", ".join(names)]


if __name__ == "__main__":
    try:
        PAGE.write_text(page(), "utf-8")
    except CompatibilityError as error:
        sys.exit(f"error: {error}")
