"""Importing the package is light, and its parts import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import parataxis

PACKAGE = Path(parataxis.__file__).parent
# A part may import its own files and parts named before it.
ORDER = [
    "checks",
    "html",
    "plots",
    "arrays",
    "samplers",
    "solvers",
    "engine",
    "stopping",
    "trajectories",
    "denoisers",
    "models",
    "guarantees",
    "fingerprint",
    "moments",
    "calibration",
    "planning",
    "streaming",
    "sample",
    "progress",
    "loops",
    "pipelines",
    "kdiffusion",
    "parallel",
    "loop_calibration",
    "verification",
    "_api",
    "demo",
    "cli",
    "__main__",
]
LOOPS = [
    "signals",
    "spool",
    "times",
    "rows",
    "calls",
    "deferred",
    "batch",
    "layout",
    "merger",
    "structure",
    "known_outputs",
    "answers",
    "passes",
    "error_estimate",
    "floor",
    "fit",
    "analysis",
    "stage_plan",
    "loop",
    "content",
    "world",
    "randomness",
    "beginning",
    "module_state",
    "purity",
    "memo",
    "stubs",
    "runner",
    "record",
    "refinement",
    "evaluate",
    "equation",
    "report",
    "schedulers",
    "module_watch",
    "observation",
    "observation",
    "chain",
    "networks",
    "step_arguments",
    "step_batch",
    "evaluated_rounds",
    "output_slopes",
    "ready_steps",
    "general_steps",
    "equal_steps",
    "pins",
    "speculation",
    "foresight",
    "one_pass",
    "stage_solve",
    "solver",
    "roads",
    "auto",
    "function",
]


def imported(path):
    """Yield the modules of the package, as parts of their names, that a file imports."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    for_types = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            inside = parts[: len(parts) - node.level]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((*inside, *module.split(".")) for module in modules)


def test_import_loads_no_heavy_library():
    code = "import sys, parataxis; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for heavy in ("diffusers", "transformers", "matplotlib", "PIL", "torch.distributed.run"):
        assert heavy not in loaded
    # torch itself may load its distributed package; ours adds nothing to it.
    code = "import sys, torch, tqdm.auto; print(*sys.modules)"
    before = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in set(loaded) - set(before) if name.startswith("torch.distributed")}
    assert not ours


def test_parts_import_what_stands_before_them():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if part == "__init__":
            continue
        for target, *_ in imported(path):
            assert ORDER.index(target) <= ORDER.index(part), f"{path} imports {target}"


def test_loops_import_what_stands_before_them():
    for path in (PACKAGE / "loops").glob("*.py"):
        for target in imported(path):
            if target[0] == "loops" and path.stem != "__init__":
                assert LOOPS.index(target[1]) < LOOPS.index(path.stem), f"{path} imports {target}"


def test_public_names_are_there():
    for name in parataxis.__all__:
        assert getattr(parataxis, name) is not None


def test_package_shows_its_public_names_only():
    """The package shows its public names only."""
    assert set(dir(parataxis)) == {*parataxis.__all__, "__version__"}


# Names that say that something was found, given or kept, and not what it is.
SAYS_NOTHING = {"own", "one", "two", "found", "told", "every", "given", "kept", "some", "rest", "most", "least"}


def names(tree):
    """Yield the names that a file gives to values, arguments, attributes, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_names_say_what_they_hold():
    empty = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in names(ast.parse(path.read_text()))
        if name.strip("_") in SAYS_NOTHING
    }
    assert not empty


def test_functions_and_classes_are_short():
    long = {
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in (PACKAGE / "loops").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.end_lineno - node.lineno >= (200 if isinstance(node, ast.ClassDef) else 80)
    }
    assert not long
