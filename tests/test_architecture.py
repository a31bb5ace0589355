"""DESIGN.md as a test: which module may import which, and how long things may get.

Read from the source alone, so imports inside functions and by `import_module("...")` count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# Lowest first; a module imports its own level and those below.
LEVELS = (
    "types protocols bounds alarm_config data_config config foreign compose metrics log device "
    "parallel environment stop checkpoints claim intact orphan untrusted records "
    "unpickle redact",
    "algo data models",
    "weights cluster",
    "trainer rollout run console summary alarms dashboard",
    "planner report",
    "build serve",
    "resume drift",
    "train evaluate samples replay doctor launch supervise chaos",
    "cli",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}

# Who may import what is heavy or has a seam of its own: module prefixes under miles_lite.
HEAVY = {
    "megatron": ("trainer.megatron", "planner"),
    "ray": ("cluster", "trainer.group", "rollout.manager", "build"),
    "sglang": ("rollout.sglang",),
    "wandb": ("metrics", "dashboard"),
    "fastapi": ("serve",),
    "uvicorn": ("serve",),
    "openai": (),
    "rich": (
        "console",
        "cli",
        "weights.convert_command",
        "planner.show",
        "samples",
        "planner.command",
    ),
}
LANDFILLS = {"util", "utils", "helper", "helpers", "misc", "common"}
FILE_LINES, FUNCTION_LINES = 420, 80

Modules = Mapping[
    str, ast.Module
]  # by name below miles_lite: "weights.plan"; a package is "weights"


def load_package() -> dict[str, ast.Module]:
    root = PROJECT / "miles_lite"
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    modules.pop("", None)  # miles_lite/__init__.py
    return modules


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Everything imported anywhere in a module, as dotted names with lines. `from a import b` gives
    a.b, which may be a module or a name in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value), node.lineno


def edges(modules: Modules) -> Iterator[tuple[str, str, int]]:
    """(importer, imported, line) within the package."""
    for name, tree in modules.items():
        for target, line in imported(tree):
            parts = target.split(".")
            if parts[0] == "miles_lite" and len(parts) > 1:
                inner = ".".join(parts[1:])
                while inner not in modules and "." in inner:
                    inner = inner.rpartition(".")[0]
                yield name, inner, line


def top(module: str) -> str:
    return module.partition(".")[0]


def wrong_directions(modules: Modules) -> list[str]:
    found = []
    for importer, target, line in edges(modules):
        here, there = top(importer), top(target)
        if not {here, there} <= set(LEVEL):
            found.append(f"{importer}:{line} imports {target}: one has no level")
        elif LEVEL[there] > LEVEL[here] or {here, there} == {"trainer", "rollout"}:
            found.append(f"{importer}:{line} imports {target}")
    return found


def heavy_imports(modules: Modules) -> list[str]:
    found = []
    for name, tree in modules.items():
        for target, line in imported(tree):
            allowed = HEAVY.get(top(target))
            if allowed and not any(name == a or name.startswith(a + ".") for a in allowed):
                found.append(f"{name}:{line} imports {target}")
    return found


def cycles(modules: Modules) -> list[str]:
    """One import path for every module that reaches itself."""
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for importer, target, _ in edges(modules):
        if importer != target:
            graph[importer].add(target)
    found = []
    for start in graph:
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop()
            for target in graph.get(path[-1], ()):
                if target == start:
                    found.append(" -> ".join([*path, start]))
                    paths = []
                    break
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return found


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def args_parameters(modules: Modules) -> list[str]:
    """An `args` object that wanders through functions hides what they need; `*args` is fine."""
    return [
        f"{name}:{function.lineno} {function.name}({parameter.arg})"
        for name, tree in modules.items()
        for function in functions(tree)
        for parameter in (
            *function.args.posonlyargs,
            *function.args.args,
            *function.args.kwonlyargs,
        )
        if parameter.arg == "args"
    ]


# ------------------------------------------------------------------ the package


@pytest.fixture(scope="module")
def package() -> dict[str, ast.Module]:
    return load_package()


def test_every_module_has_a_level(package: Modules) -> None:
    assert sorted({top(name) for name in package} - set(LEVEL)) == []


def test_imports_point_down(package: Modules) -> None:
    assert wrong_directions(package) == []


def test_no_import_cycles(package: Modules) -> None:
    assert cycles(package) == []


def test_heavy_packages_stay_behind_their_seam(package: Modules) -> None:
    assert heavy_imports(package) == []


def test_no_args_object(package: Modules) -> None:
    assert args_parameters(package) == []


def test_no_landfill_modules(package: Modules) -> None:
    assert [name for name in package if LANDFILLS & set(name.split("."))] == []


def test_files_and_functions_fit_a_reader(package: Modules) -> None:
    paths = [*(PROJECT / "miles_lite").rglob("*.py"), *(PROJECT / "rewards").glob("*.py")]
    lengths = {path.relative_to(PROJECT): len(path.read_text().splitlines()) for path in paths}
    assert {str(path): n for path, n in lengths.items() if n > FILE_LINES} == {}
    long = {
        f"{name}.{function.name}": length
        for name, tree in package.items()
        for function in functions(tree)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES
    }
    assert long == {}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "types protocols config parallel metrics log environment",
            "torch ray megatron numpy rich",
        ),
        ("run console", "torch ray megatron transformers wandb"),
        ("cli", "torch ray megatron transformers numpy rich"),
    ],
)
def test_light_modules_stay_light(modules: str, absent: str) -> None:
    imports = "; ".join(f"import miles_lite.{name}" for name in modules.split())
    code = f"import sys; {imports}; print(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# ------------------------------------------------------------------ the checks themselves


def fake(**sources: str) -> dict[str, ast.Module]:
    """Modules by name, "__" for a dot."""
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


def test_a_deferred_import_upwards_is_seen() -> None:
    modules = fake(
        weights__plan="def f():\n    from miles_lite.trainer.megatron import step",
        trainer__megatron__step="",
    )
    assert wrong_directions(modules) == ["weights.plan:2 imports trainer.megatron.step"]


def test_trainer_and_rollout_are_kept_apart() -> None:
    modules = fake(trainer__group="from miles_lite.rollout import manager", rollout__manager="")
    assert wrong_directions(modules) == ["trainer.group:1 imports rollout.manager"]


def test_import_by_name_is_seen() -> None:
    modules = fake(algo__losses="import importlib\nimportlib.import_module('ray.util')")
    assert heavy_imports(modules) == ["algo.losses:2 imports ray.util"]


def test_a_cycle_is_seen() -> None:
    modules = fake(
        algo__a="from miles_lite.algo.b import x", algo__b="import miles_lite.algo.a", algo__c=""
    )
    assert cycles(modules) == ["algo.a -> algo.b -> algo.a", "algo.b -> algo.a -> algo.b"]


def test_args_parameter_is_seen() -> None:
    modules = fake(data__x="def good(*args): ...\nclass A:\n    def bad(self, args): ...")
    assert args_parameters(modules) == ["data.x:3 bad(args)"]
