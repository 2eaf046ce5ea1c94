"""What imports what in lightning_module: no circle, and nothing that is further up."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_module"
# Rooms (packages) and modules at the top, from the bottom up. Each imports those of lines above its
# own, and a room itself.
RANKS = """
errors atomic_files terminal schedules lightning_warnings
settings run_files device
run_config run_lock
distributed
data training_progress
model
checkpoints generation predictor
loggers
callbacks
inspect run_directory sweeps
memory serve
train predict evaluate
commands
""".strip().splitlines()
RANK = {name: number for number, line in enumerate(RANKS) for name in line.split()}


def imported(source: str, package: str = "lightning_module") -> set[str]:
    """The modules of the package that a source names in imports, wherever they stand.

    Not counted: what `python -m` of a module imports first, to begin where its console script does,
    and what type checkers alone read.
    """
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
        ):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.startswith(f"{package}."))
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            if node.module.partition(".")[0] == package:
                found.update(f"{node.module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def graph() -> dict[str, set[str]]:
    """Each module's imports, by their names below lightning_module."""
    files = [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py"]
    names = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}
    result = {}
    for name, file in modules.items():
        targets = {t.partition(".")[2] for t in imported(file.read_text(encoding="utf-8"))}
        # `from lightning_module.a.b import c`: the module is a.b.c, a.b or a.
        result[name] = {next(p for p in (t, *_parents(t)) if p in modules) for t in targets} - {
            name
        }
    return result


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def test_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_nothing_is_imported_from_further_up():
    upwards = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if (here := module.partition(".")[0]) != (there := target.partition(".")[0])
        and RANK[there] >= RANK[here]
    ]
    assert not upwards
    assert {module.partition(".")[0] for module in graph()} == RANK.keys()


def test_imports_are_found_wherever_they_stand():
    source = """
import lightning_module.a
from lightning_module import b
from other import c
if TYPE_CHECKING:
    from lightning_module.d import D
def f():
    from lightning_module.e.f import g, h
"""
    expected = ["a", "b", "e.f.g", "e.f.h"]
    assert imported(source) == {f"lightning_module.{name}" for name in expected}
