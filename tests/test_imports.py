"""Who imports whom: no circle, and nothing imports what stands above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top; a module imports only what stands in a line before its own, or beside
# it in the same package.
LAYERS = {
    "triton_gru": (
        ("version", "cache", "torch_modes", "equations"),
        ("validation", "conversion"),
        ("plan",),
        ("kernels",),
        ("engines",),
        ("dispatch", "tuning"),
        ("functional",),
        ("trace", "cell"),
        ("layer",),
        ("replace",),
    ),
}


def imports(package: str) -> dict[str, set[str]]:
    """For each module of a package those of the package that it imports, in functions too."""
    root = ROOT / package
    names = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found[name] |= {module for module in wanted if module in names} - {name, package}
    return found


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """One circle of a graph, or None."""
    done, path = set(), []

    def visit(node: str) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for following in sorted(graph[node]):
            if found := visit(following):
                return found
        done.add(path.pop())
        return None

    return next((found for node in sorted(graph) if (found := visit(node))), None)


def upwards(package: str, graph: dict[str, set[str]]) -> list[str]:
    """The imports that run upwards, and the modules that no layer names."""
    rank = {f"{package}.{name}": i for i, layer in enumerate(LAYERS[package]) for name in layer}
    wrong = []
    for name, imported in graph.items():
        if name == package:  # its __init__ stands above all
            continue
        room = ".".join(name.split(".")[:2])
        if room not in rank:
            wrong.append(f"{name} stands in no layer")
            continue
        for other in imported:
            other_room = ".".join(other.split(".")[:2])
            if other_room != room and rank.get(other_room, len(rank)) >= rank[room]:
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


@pytest.mark.parametrize("package", LAYERS)
def test_no_circle_and_none_upwards(package):
    graph = imports(package)
    assert circle(graph) is None
    assert upwards(package, graph) == []


def test_a_circle_and_an_import_upwards_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    graph = {"triton_gru.plan.plan": {"triton_gru.layer"}, "triton_gru.drawer": set()}
    assert upwards("triton_gru", graph) == [
        "triton_gru.drawer stands in no layer",
        "triton_gru.plan.plan imports triton_gru.layer",
    ]
