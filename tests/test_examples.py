"""Examples and the README's code run as they stand."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import problems

ROOT = Path(__file__).parent.parent


SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "first_minute"]  # see below


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(path, capsys, monkeypatch, tmp_path):
    """An example runs."""
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    if "error" in names:  # an example that compares with the sequential loop keeps its tolerance
        assert float(names["error"].max()) <= 1e-2


def test_first_minute_draws_both_ways_and_says_what_it_took(tmp_path, monkeypatch, capsys):
    options = ["--plans", "1", "--steps", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["first_minute.py", *options])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with torch.no_grad():  # what the script sets for itself ends here
        runpy.run_path(str(ROOT / "examples" / "first_minute.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads((tmp_path / "sample.json").read_text())
    assert list(figures) == ["policy", "digits"]
    for line, (name, found) in zip(printed, figures.items(), strict=False):
        assert line.startswith(name)
        assert f"{1e3 * found['sequential_seconds']:.0f} ms" in line
        assert found["converged"]
        assert found["relative_error_worst"] <= found["tolerance"]
        assert found["speedup"] == found["sequential_seconds"] / found["seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"sample.json", "policy.png", "rounds.png"}


def test_readme_names_targets_and_pictures_that_exist():
    """The readme names targets and pictures that exist."""
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)
    assert {"sample", "test"} <= set(targets)
    listed = subprocess.run(["make", "-qp"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for target in targets:
        assert f"\n{target}:" in listed
    for picture in re.findall(r"\((docs/[^)]+)\)", text):
        assert (ROOT / picture).is_file(), picture


def test_nothing_is_left_out_of_the_version():
    import parataxis

    assert parataxis.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "flow_euler"])
def test_own_solver_keeps_the_laws(name):
    """The solver of the example is exact at tolerance 0, takes at most N rounds, and keeps its tolerance."""
    solver = runpy.run_path(str(ROOT / "examples" / "own_solver.py"))["HalfSecant"]()
    expected = problems.reference("power law", name, 25)
    exact = problems.solve("power law", name, 25, solver, tolerance=0)
    assert problems.relative(exact.x, expected) <= 1e-10
    assert exact.rounds <= 25
    loose = problems.solve("power law", name, 25, solver, tolerance=1e-2)
    assert problems.relative(loose.x, expected) <= 1e-2
