"""``parataxis plan`` and ``parataxis bench``."""

from __future__ import annotations

import json

import pytest

from parataxis.cli import main


def test_plan_is_printed(capsys):
    """A plan is printed."""
    arguments = ["plan", "--steps", "20", "--count", "2", "--sampler", "ddpm", "--clip", "1", "--devices", "4"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for line in ("digits: ddpm, N = 20, 2 samples", "4 x cpu", "1 row", "b* =", "plain loop", "> "):
        assert line in printed
    assert main([*arguments, "--model", "digits-unconditional", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"solver", "reason", "seconds", "speedup", "speedup_range", "rows", "candidates"} <= set(figures)
    assert figures["loop_seconds"] / figures["seconds"] == pytest.approx(figures["speedup"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "dim"], "there is no sampler 'dim'. Did you mean 'ddim'?"),
        (["--model", "digitz"], "there is no model 'digitz'. Did you mean 'digits'?"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--devices", "0"], "devices must be an integer of at least 1, got 0"),
        (["--tolerance", "-1"], "tolerance must be a relative error of at least 0, got -1.0"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_in_one_line(arguments, message, capsys):
    assert main(["plan", "--steps", "10", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_bench_times_solvers_against_the_loop(capsys, tmp_path):
    arguments = ["bench", "--steps", "6", "--repeat", "1", "--solvers", "secant,parareal", "--windows", "4,all"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for line in ("N = 6", "Sequential", "Secant, window 4", "Secant, window all", "Parareal", "speed-up"):
        assert line in printed
    assert main([*arguments, "--json", "--plot", str(tmp_path / "bench.png")]) == 0
    assert (tmp_path / "bench.png").stat().st_size > 0
    first, *others = json.loads(capsys.readouterr().out)["solvers"]
    assert first["solver"] == "Sequential()"
    assert first["speedup"] == 1
    assert all(row["speedup"] == first["seconds"] / row["seconds"] for row in others)
    assert all(row["relative_error_worst"] <= 1e-2 for row in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solvers", "secnat"], "there is no solver 'secnat'. Did you mean 'secant'?"),
        (["--windows", "x"], "--window must be int|none, got 'x'"),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_with_a_bench_is_said_in_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
