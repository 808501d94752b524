"""Importing the package is light, and its parts import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import parataxis

PACKAGE = Path(parataxis.__file__).parent
ORDER = [
    "checks",
    "schedules",
    "table",
    "samplers",
    "solve",
    "solvers",
    "distributed",
    "execution",
    "refill",
    "planning",
    "driver",
]


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


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ORDER:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                inside = len(parts) - node.level
                target = (*parts[:inside], *node.module.split("."))[0]
                assert target in ORDER, f"{path} imports {target}"
                assert ORDER.index(target) <= ORDER.index(parts[0]), f"{path} imports {target}"


def test_public_names_are_there():
    for name in parataxis.__all__:
        assert getattr(parataxis, name) is not None
