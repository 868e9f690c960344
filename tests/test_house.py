"""The house rules that a machine can check: who may import whom, how long a thing may be, what must be documented."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyro_vfe"

ROOMS = ("errors", "engine", "program", "energy", "guides", "learning", "reporting")
"""Each room may import from itself and from those before it."""

BORDERS = {
    "pyro": ("program", "energy", "guides", "learning", "reporting"),
    "matplotlib": ("reporting",),
    "arviz": ("reporting",),
}
"""Which rooms may import a foreign library; who is not named may not."""

ENGINE_NEEDS_ONLY = {"torch", "numpy", "opt_einsum", "cotengra", "pyro_vfe", *sys.stdlib_module_names}
PLANS = (
    "chain_groups",
    "chain_plan",
    "contraction_trees",
    "cuts",
    "elimination_orders",
    "ordering",
    "outline",
    "paths",
    "repeats",
    "schedule",
    "search",
    "structure",
)
"""Modules that see names and sizes only."""

MODULE_LINES = 600
FUNCTION_LINES = 50

Function = ast.FunctionDef | ast.AsyncFunctionDef

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))
INSIDE_A_ROOM = [module for module in MODULES if module != "pyro_vfe/__init__.py"]


def room_of(module: str) -> str:
    """Returns the room that a module is in: `engine` for `pyro_vfe/engine/factors.py`."""
    return module.split("/")[1].removesuffix(".py")


def parsed(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), filename=module)


def imported_names(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of everything that the tree imports; `from a import b` yields `a.b`."""
    package = list(Path(module).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])


def functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def body_lines(function: Function) -> int:
    """Returns a function's length from its `def` to its end, docstring not counted."""
    length = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return length


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Yields the module's public functions, its public classes and their public methods."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (f for f in node.body if isinstance(f, Function) and not f.name.startswith("_"))


@pytest.mark.parametrize("module", INSIDE_A_ROOM)
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    assert room in ROOMS, f"{module}: no room '{room}' in the house; move it, or give the room its place in ROOMS."
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for line, name in imported_names(module, parsed(module)):
        if name.split(".")[0] == "pyro_vfe":
            target = [*name.split("."), "the package itself"][1]
            assert target in allowed, f"{module}:{line} imports {name}; {room} may import from {', '.join(allowed)}."


@pytest.mark.parametrize("module", INSIDE_A_ROOM)
def test_foreign_libraries_stay_in_their_rooms(module: str) -> None:
    room = room_of(module)
    for line, name in imported_names(module, parsed(module)):
        library = name.split(".")[0]
        assert room in BORDERS.get(library, ROOMS), f"{module}:{line} imports {name}; only {BORDERS[library]} may."
        if room == "engine":
            assert library in ENGINE_NEEDS_ONLY, f"{module}:{line} imports {name}; the engine is torch alone."


@pytest.mark.parametrize("module", INSIDE_A_ROOM)
def test_imports_of_the_package_stand_at_the_top(module: str) -> None:
    for function in functions(parsed(module)):
        for line, name in imported_names(module, function):
            assert name.split(".")[0] != "pyro_vfe", f"{module}:{line} imports {name} inside {function.name}."


@pytest.mark.parametrize("module", [m for m in MODULES if Path(m).stem in PLANS])
def test_planning_an_elimination_needs_no_tensor(module: str) -> None:
    assert all(name.split(".")[0] != "torch" for _, name in imported_names(module, parsed(module)))


def test_the_package_only_re_exports() -> None:
    tree = parsed("pyro_vfe/__init__.py")
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_constant = isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) and target.id in ("__all__", "__version__") for target in node.targets
        )
        is_import = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro_vfe"
        assert is_docstring or is_constant or is_import, f"pyro_vfe/__init__.py:{node.lineno} does more than re-export."


def test_what_is_exported_is_what_is_imported() -> None:
    tree = parsed("pyro_vfe/__init__.py")
    imported = [alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names]
    exported = [
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        for name in ast.literal_eval(node.value)
    ]
    assert sorted(set(exported) - {"__version__"}) == sorted(imported)


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_stay_short(module: str) -> None:
    length = len((ROOT / module).read_text(encoding="utf-8").splitlines())
    assert length <= MODULE_LINES, f"{module} has {length} lines; it wants another room."
    for function in functions(parsed(module)):
        lines = body_lines(function)
        assert lines <= FUNCTION_LINES, f"{module}:{function.lineno} {function.name} has {lines} lines."


@pytest.mark.parametrize("module", MODULES)
def test_public_things_say_what_they_are(module: str) -> None:
    tree = parsed(module)
    empty_marker = not tree.body
    assert empty_marker or ast.get_docstring(tree), f"{module} has no docstring."
    for definition in public_definitions(tree):
        assert ast.get_docstring(definition), f"{module}:{definition.lineno} {definition.name} has no docstring."


FIRST_CALLS = """
import subprocess
import sys
import pyro, pyro.distributions as dist, torch
import pyro_vfe as vfe

def model(u):
    with pyro.plate("time", len(u)):
        z = pyro.sample("z", vfe.MarkovChain(torch.ones(2) / 2, torch.ones(2, 2) / 2))
        pyro.sample("u", dist.Poisson(torch.tensor([1.0, 5.0])[z]), obs=u)

vfe.FreeEnergy().decompose(model, None, torch.ones(3))
vfe.posterior(model, torch.ones(3)).sample(2)
print(*sorted({"arviz", "matplotlib", "pandas", "sympy", "xarray"} & sys.modules.keys()))
"""


def test_import_and_first_calls_load_no_large_library() -> None:
    found = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == []
