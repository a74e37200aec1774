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


# What sets an attribute of another object, and why it may.
SETTERS = {
    "massl_fast.cli": {"sys.stdout", "sys.stderr"},  # of a process that is the command's alone: a run goes on where nobody hears it
    "massl_fast.distributed.sharding": {"block.packed_forward"},  # FSDP calls methods of the modules that it wraps, by their names
    "massl_fast.engine.optimizer": {"optimizer.found_inf"},  # by which PyTorch's fused optimizers learn that a step does not count
    "massl_fast.evaluation.features": {"module.training"},  # PyTorch's own flag, put back afterwards
    "massl_fast.models.packed": {"ctx.dtype", "ctx.shapes", "ctx.layout"},
    "massl_fast.models.positions": {"backbone.__class__"},  # other methods for a network of timm's, its weights untouched
    "massl_fast.models.products": {"layer.__class__"},
    "massl_fast.models.published": {"module.eps"},  # a layer's own argument
    "massl_fast.evaluation.tokens": {"patch_colours_of.__name__"},
}
IN_WHICH_ALL_MAY = {"commands", "profiling", "benchmarks", "kernels"}
"""Arguments are argparse's; instruments count; contexts of autograd hold what the backward pass needs."""
GRADIENT = ".grad"
"""Where PyTorch has gradients."""


def attributes_set_from_outside(tree: ast.AST) -> set[str]:
    """Targets such as ``other.name`` and ``self.part.name``, where the function around them has not made ``other`` itself."""
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            assigned = [target for node in ast.walk(function) if isinstance(node, ast.Assign) for target in node.targets]
            made = {node.id for target in assigned for node in ast.walk(target) if isinstance(node, ast.Name) and node is target}
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    owner = ast.unparse(node.value)
                    if owner not in {"self", "cls"} and owner.partition(".")[0] not in made | {"parser"}:
                        found.add(ast.unparse(node))
    return found


def test_nothing_sets_an_attribute_of_another_object():
    for name, path in MODULES.items():
        if room(name) not in IN_WHICH_ALL_MAY:
            found = {target for target in attributes_set_from_outside(ast.parse(path.read_text())) if not target.endswith(GRADIENT)}
            assert found == SETTERS.get(name, set()), f"{name} sets {sorted(found ^ SETTERS.get(name, set()))}"


def test_only_the_command_knows_the_whole_trainer():
    users = {name for name, imports in IMPORTS.items() if "massl_fast.engine.trainer" in imports}
    assert users == {"massl_fast.commands.train"}


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "massl_fast"} | set(sys.stdlib_module_names)
    for name in MODULES:
        if room(name) == "kernels":
            roots = {imported.split(".")[0] for imported in imported_by(ast.parse(MODULES[name].read_text()))}
            assert roots <= allowed, f"{name} imports {sorted(roots - allowed)}"
