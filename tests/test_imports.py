"""What imports what in each package: no circle, and nothing that is further up."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms (packages) and modules at the top, from the bottom up. Each imports those of lines above its
# own, and a room itself.
RANKS = {
    "triton_gru": """
version cache torch_modes equations
kernel_errors validation conversion
plan
verdicts
kernels
engines
dispatch tuning
functional
cell trace
layer
replace class_check preparing check_command
__main__
""",
    "lightning_module": """
errors credentials atomic_files terminal schedules lightning_warnings former_modules
trainer_attributes
settings run_files device
run_config run_lock
distributed
data training_progress
model
checkpoints generation
loggers
callbacks
inspect kernel_check run_directory sweeps
memory serve
train predict evaluate prepare
commands
""",
}


def ranks(package: str) -> dict[str, int]:
    """The number of each room's line."""
    lines = RANKS[package].strip().splitlines()
    return {name: number for number, line in enumerate(lines) for name in line.split()}


def imported(source: str, package: str) -> set[str]:
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


def graph(package: str) -> dict[str, set[str]]:
    """Each module's imports, by their names below the package."""
    root = ROOT / package
    files = [f for f in root.rglob("*.py") if f != root / "__init__.py"]
    names = {".".join(f.relative_to(root).with_suffix("").parts): f for f in files}
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}
    result = {}
    for name, file in modules.items():
        targets = {t.partition(".")[2] for t in imported(file.read_text("utf-8"), package)}
        # `from package.a.b import c`: the module is a.b.c, a.b or a.
        result[name] = {next(p for p in (t, *_parents(t)) if p in modules) for t in targets} - {
            name
        }
    return result


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


@pytest.mark.parametrize("package", RANKS)
def test_no_circle(package):
    try:
        TopologicalSorter(graph(package)).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", RANKS)
def test_nothing_is_imported_from_further_up(package):
    rank = ranks(package)
    upwards = [
        f"{module} imports {target}"
        for module, targets in graph(package).items()
        for target in targets
        if (here := module.partition(".")[0]) != (there := target.partition(".")[0])
        and rank[there] >= rank[here]
    ]
    assert not upwards
    assert {module.partition(".")[0] for module in graph(package)} == rank.keys()


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
    assert imported(source, "lightning_module") == {f"lightning_module.{name}" for name in expected}
