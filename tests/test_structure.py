"""What the tree promises: few rooms, imports that point one way, and a library whose names are all there."""

import ast
import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import pwkd_jax

ROOT = Path(pwkd_jax.__file__).parent
COMMANDS = {"train", "evaluate", "report", "prepare", "convert", "export", "preflight", "benchmark", "sweep", "predict"}
IDEAS = {"slimmable", "stages"}
GROUND = {"errors", "storage"}
PACKAGES = {"config", "cost", "data", "distillers", "examples", "experiment", "models", "reporting", "training", "weights"}


def modules() -> dict[str, ast.Module]:
    """{dotted name below pwkd_jax, '' for the package itself: its syntax tree}."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = ast.parse(path.read_text())
    return found


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of this project that a tree imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pwkd_jax":
            base = node.module.partition(".")[2]
            names = [f"{base}.{a.name}".strip(".") for a in node.names]
            found |= {name if name in known else base for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "pwkd_jax"}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The names along a circle, [] where there is none."""
    done, path = set(), []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        found = next((c for other in sorted(edges.get(name, ())) if (c := visit(other))), [])
        path.pop()
        done.add(name)
        return found

    return next((c for name in sorted(edges) if (c := visit(name))), [])


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_top_floor_holds_commands_two_ideas_and_packages():
    entries = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()}
    assert entries - {"__init__"} == COMMANDS | IDEAS | GROUND | PACKAGES
    for command in COMMANDS:
        assert len((ROOT / f"{command}.py").read_text().splitlines()) <= 125, f"{command}.py parses, calls and prints"
    for package in PACKAGES:
        assert ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())), package


def test_imports_point_one_way_between_rooms():
    trees = modules()
    rooms: dict[str, set[str]] = {}
    for name, tree in trees.items():
        room = name.partition(".")[0]
        room = room or "face"  # of the package, which names what lies in the rooms
        rooms.setdefault(room, set()).update({d.partition(".")[0] or "face" for d in imported(tree, set(trees))} - {room})
    assert circle(rooms) == [] and [r for r, found in rooms.items() if "face" in found] == ["examples"]
    # A command is nobody's room but another command's.
    below = {room: found & COMMANDS for room, found in rooms.items() if room not in COMMANDS}
    assert not any(below.values()), below


def test_imports_make_no_circles_between_modules():
    trees = modules()
    edges = {}
    for name, tree in trees.items():
        # What a function imports when it is called is no part of loading a module.
        top = ast.Module([n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))], [])
        edges[name] = imported(top, set(trees)) - {name, ""} if name else set()
    assert circle(edges) == []


# Files that belong to no workdir: the page's template, the source itself, the user's PyTorch file, chips, the null device.
OWN_FILES = {"reporting.page", "experiment.fingerprint", "weights.convert", "training.cluster", "training.distributed",
             "experiment.exported"}  # fmt: skip
ACCESS = {"read_text", "read_bytes", "write_text", "write_bytes", "exists", "is_file", "is_dir", "iterdir", "glob", "rglob",
          "mkdir", "unlink", "rmtree", "open"}  # fmt: skip


def test_files_of_experiments_are_reached_by_one_door():
    found = []
    for name, tree in modules().items():
        if name.partition(".")[0] not in ("experiment", "training", "weights", "reporting") or name in OWN_FILES:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            word = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            of = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
            if word in ACCESS and of != "storage":
                found.append(f"{name}: {ast.unparse(called)}")
    assert not found, found


def test_every_public_name_is_there_and_stands_in_the_stub():
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.asname: f"{line.module.removeprefix('pwkd_jax.')}:{alias.name}" for line in lines for alias in line.names}
    assert declared == pwkd_jax._HOMES and set(pwkd_jax.__all__) == set(declared)
    for name, (module, _, there) in {name: home.partition(":") for name, home in declared.items()}.items():
        value = getattr(pwkd_jax, name)
        assert value is getattr(importlib.import_module(f"pwkd_jax.{module}"), there)
        assert name in dir(pwkd_jax) and inspect.getdoc(value), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        _ = pwkd_jax.distill


def _hints(name: str, function) -> None:
    known = typing.get_type_hints(function)
    for key, parameter in inspect.signature(function).parameters.items():
        assert key in known or key in ("self", "cls") or parameter.kind is parameter.VAR_KEYWORD, f"{name}: {key} has no type"
    assert "return" in known, f"{name} does not say what it returns"


def test_the_public_names_have_type_hints():
    assert (ROOT / "py.typed").exists()
    for name in pwkd_jax.__all__:
        value = getattr(pwkd_jax, name)
        if inspect.isfunction(value):
            _hints(name, value)
        elif inspect.isclass(value) and not issubclass(value, Exception):
            for key, method in vars(value).items():
                if inspect.isfunction(method) and not key.startswith("_"):
                    _hints(f"{name}.{key}", method)


def test_the_package_is_imported_without_jax():
    code = "import sys, pwkd_jax; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'typing', 'pwkd_jax.errors')))"
    assert subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT.parent).returncode == 0


def test_the_reference_is_made_without_a_warning(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc makes the reference; launch/test.sh installs it")
    command = ["-W", "error", "-m", "pdoc", "pwkd_jax", "!pwkd_jax.examples", "-o", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr[-2000:]
    page = (tmp_path / "pwkd_jax.html").read_text()
    assert all(f'id="{name}"' in page for name in pwkd_jax.__all__)
