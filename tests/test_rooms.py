"""Imports run down the rooms only, and in no circle. (import-linter walks folders and would not find massl_fast.kernels at the top.)"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the street to the ground. Rooms of one floor do not import each other; what is inside a room is held by the circles' test.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"benchmarks"},
    {"profiling"},
    {"report"},
    {"engine"},
    {"run"},
    {"evaluation"},
    {"data", "objectives"},
    {"distributed"},
    {"models"},
    {"length", "records"},
    {"config"},
    {"extras", "hardware", "plugins", "processes", "recipes", "registry"},
    {"kernels"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, package in ((ROOT / "massl_fast", ("massl_fast",)), (ROOT / "kernels", ("massl_fast", "kernels"))):
        for path in folder.rglob("*.py"):
            parts = (*package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_by(tree: ast.AST) -> set[str]:
    """Names of what a module imports anywhere, in functions and for annotations too."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module from the root"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            names |= imported_by(node)
    return names


def as_module(name: str) -> str:
    """The module that an imported name lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


IMPORTS = {name: {found for found in map(as_module, imported_by(ast.parse(path.read_text()))) if found} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} - {""} <= FLOOR.keys()


def lies_below(imported: str, module: str) -> bool:
    here, there = FLOOR.get(room(module), -1), FLOOR[room(imported)]
    return there > here or room(imported) == room(module)


def test_imports_run_down():
    pairs = [(module, imported) for module, imports in IMPORTS.items() for imported in imports - {"massl_fast"}]
    assert not [f"{module} imports {imported}" for module, imported in pairs if not lies_below(imported, module)]


def test_no_import_runs_in_a_circle():
    graph = {name: {other for other in imports if other != name} for name, imports in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" → ".join(circle.args[1]))


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "massl_fast"} | set(sys.stdlib_module_names)
    for name in MODULES:
        if room(name) == "kernels":
            roots = {imported.split(".")[0] for imported in imported_by(ast.parse(MODULES[name].read_text()))}
            assert roots <= allowed, f"{name} imports {sorted(roots - allowed)}"
