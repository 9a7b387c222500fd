"""The rooms of the package stand one on the other: a room imports only from rooms above it in the list, and no two modules from each other."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kvlocal

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvlocal"
ROOMS = (
    "errors", "interrupts", "files", "gguf", "policies", "llama", "hub", "template", "cache", "nexus", "chat", "conversations", "batch",
    "serving", "openai_forms", "server", "compat", "training", "evaluation", "benchmark", "doctor",
)  # fmt: skip
MODULES = {
    ".".join(("kvlocal", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere in it, also for its annotations alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name.split(".")[0] in ("kvlocal", "kvlocal_cli")}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_is_in_the_list():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(name):
    above = ROOMS[: ROOMS.index(name) + 1]
    upwards = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if module != "kvlocal" and room(module) == name
        for imported in imports(path)
        if imported != "kvlocal" and (imported.startswith("kvlocal_cli") or room(imported) not in above)
    ]
    assert not upwards


def test_no_two_modules_import_each_other():
    # code that travels to another machine names its own module
    graph = {module: {name for name in imports(path) if name not in ("kvlocal", module)} for module, path in MODULES.items() if module != "kvlocal"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_the_package_loads_no_room_by_itself():
    """Every room may ask it for the version, and `kvlocal --help` is not to wait for numpy."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, kvlocal; print(*sorted(name for name in sys.modules if name.startswith('kvlocal.')))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.split() == []


def test_the_public_names_are_there():
    for name in kvlocal.__all__:
        assert getattr(kvlocal, name) is not None
    assert set(kvlocal.__all__) <= set(dir(kvlocal))
    with pytest.raises(AttributeError, match="has no attribute 'Modell'"):
        kvlocal.Modell  # noqa: B018


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_each_room_says_in_a_sentence_what_it_is(name):
    documentation = importlib.import_module(name).__doc__
    assert documentation and documentation.split("\n\n")[0].rstrip().endswith(".")


def test_no_module_is_long():
    assert [module for module, path in MODULES.items() if len(path.read_text().splitlines()) > 450] == []


def test_no_two_classes_have_one_name():
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
