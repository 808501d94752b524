"""``parataxis sample``, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from parataxis.cli import main

KEYS = [
    "rounds",
    "evaluations",
    "steps",
    "peak_width",
    "relative_error",
    "converged",
    "seconds",
    "sequential_seconds",
    "solver",
    "sampler",
    "model",
]


def test_sample_writes_pictures_and_figures(tmp_path, capsys):
    out, trace, plot = tmp_path / "new" / "sample.png", tmp_path / "trace.png", tmp_path / "plot.png"
    arguments = ["sample", "--steps", "10", "--count", "3", "--label", "7,1", "--guidance", "2", "--compare"]
    assert main([*arguments, "--out", str(out), "--trace", str(trace), "--plot", str(plot)]) == 0
    assert out.stat().st_size > 0
    assert trace.stat().st_size > 0
    assert plot.stat().st_size > 0
    figures = json.loads(out.with_suffix(".json").read_text())
    assert set(KEYS) <= set(figures)
    assert figures["relative_error_worst"] <= 1e-2
    assert figures["rounds"] <= 10
    printed = capsys.readouterr().out
    for line in ("rounds", "evaluations / N", "most steps in a round", "median", "worst", "seconds", "speed-up"):
        assert line in printed


def test_json_stands_alone_on_standard_output():
    command = [sys.executable, "-m", "parataxis.cli", "sample", "--steps", "6", "--count", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert set(KEYS) <= set(figures)
    assert figures["relative_error"] is None


def test_options_of_solver_and_sampler_are_flags(capsys):
    arguments = ["sample", "--steps", "8", "--count", "1", "--json"]
    picard = ["--solver", "picard", "--window", "4", "--rule", "paradigms", "--threshold", "0.2", "--entry", "copy"]
    assert main([*arguments, *picard]) == 0
    assert json.loads(capsys.readouterr().out)["solver"].startswith("Picard(window=4, rule='paradigms', threshold=0.2")
    assert main([*arguments, "--sampler", "ddpm", "--variance", "fixed_large", "--clip", "1", "--window", "all"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_width"] == 8
    assert main([*arguments, "--solver", "coarse_to_fine", "--inner", "picard", "--strides", "4,2"]) == 0
    assert "CoarseToFine(inner=Picard(window=None" in json.loads(capsys.readouterr().out)["solver"]


def test_auto_samples_by_a_plan(capsys):
    arguments = ["sample", "--steps", "12", "--count", "1", "--solver", "auto"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for line in ("plain loop", "1 sample of digits", "planned ", "; took "):
        assert line in printed
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["solver"] == figures["plan"]["solver"]
    assert figures["converged"]


def test_solver_exact_in_distribution_is_not_compared_sample_by_sample(capsys):
    """A solver exact in law is not compared sample by sample."""
    arguments = ["sample", "--solver", "speculative", "--sampler", "ddpm", "--steps", "12", "--count", "2", "--compare"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "other samples than the sequential loop's, of exactly the same distribution" in printed
    assert "relative error" not in printed
    assert main([*arguments, "--verification", "block", "--window", "4", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(KEYS) <= set(figures)
    assert figures["exact_in_distribution"] is True
    assert figures["relative_error"] is None
    assert figures["tolerance"] is None
    assert figures["sequential_seconds"] > 0
    assert figures["solver"] == "Speculative(window=4, verification='block', proposal='latest')"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "picrd"], "there is no solver 'picrd'. Did you mean 'picard'? Choose one of sequential"),
        (["--sampler", "dim"], "there is no sampler 'dim'. Did you mean 'ddim'?"),
        (["--model", "digitz"], "there is no model 'digitz'. Did you mean 'digits'?"),
        (["--sampler", "flow_euler"], "which flow_euler is not for: choose one of ddim"),
        (["--steps", "0"], "steps must be an integer of at least 1, got 0"),
        (["--steps", "1001"], "at most the 1000 training steps of this schedule, got 1001"),
        (["--window", "0"], "window must be a whole number of steps, at least 1, or None for all, got 0"),
        (["--tolerance", "-1"], "tolerance must be a relative error of at least 0, got -1.0"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--label", "11"], "--label must lie in 0..9 (or 10 for none), got '11'"),
        (["--label", "x"], "--label must be integers"),
        (["--model", "digits-unconditional", "--label", "1"], "this model is unconditional"),
        (["--solver", "speculative"], "does not support this sampler: no step"),
        (["--out", "/dev/null/x.png"], "/dev/null/x.png cannot be written"),
        (["--trace", "/dev/null/x.png"], "/dev/null/x.png cannot be written"),
        (["--out", "x.txt"], "has no picture's ending"),
        (["--out", "x.json"], "has no picture's ending"),
        (["--out", "x.png", "--trace", "./x.png"], "x.png is named twice: give each file a path of its own"),
        (["--sampler", "ddmi"], "there is no sampler 'ddmi'. Did you mean 'ddim'?"),
        (["--tolerance", "inf"], "--tolerance must be a finite number, got inf"),
        (["--seed", "99999999999999999999"], "--seed must lie in -2^62..2^62, got 99999999999999999999"),
        (["--out", "new/deep/x.png", "--steps", "0"], "steps must be an integer of at least 1"),
        (["--device", "foo"], "--device foo cannot be used (Expected one of cpu, cuda"),
        (["--device", "meta"], "--device meta cannot be used ("),
        (["--guidance", "nan"], "guidance must be a finite number, got nan"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_the_work_starts(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--steps", "10", "--count", "1", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_options_of_another_solver_are_refused(capsys):
    assert main(["sample", "--solver", "auto", "--window", "8"]) == 2
    assert "the solver auto has no --window: it is an option of picard, anderson, secant" in capsys.readouterr().err
    assert main(["sample", "--solver", "secant", "--rule", "error"]) == 2
    assert "the solver secant has no --rule: it is an option of picard" in capsys.readouterr().err
    assert main(["sample", "--variance", "fixed_large"]) == 2
    assert "the sampler ddim has no --variance: it is an option of ddpm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "true"], "--window must be int|none, got 'true'"),
        (["--window", "1.5"], "--window must be int|none, got '1.5'"),
        (["--solver", "picard", "--rule", "other"], "--rule must be error|paradigms, got 'other'"),
        (["--solver", "coarse_to_fine", "--strides", "a"], "--strides must be int,.., got 'a'"),
        (["--solver", "coarse_to_fine", "--inner", "foo"], "there is no solver 'foo'. Choose one of"),
        (["--eta", "a"], "--eta must be float, got 'a'"),
        (["--steps", "a"], "invalid value for '--steps': must be a valid integer"),
        (["--count=--"], "invalid value for '--count': must be a valid integer"),
        (["--stpes", "3"], "there is no option --stpes. Did you mean --steps? (see parataxis sample --help)"),
        (["--count=1000000000"], "1000000000 samples of 50 steps need at least"),
        (["--sampler", "flow_euler", "--steps=1000000000"], "samples of 1000000000 steps need at least"),
    ],
)
def test_flag_that_cannot_be_read_is_said_in_one_line(arguments, message, capsys):
    """A flag that cannot be read is said in one line."""
    assert main(["sample", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_device_that_is_not_there_is_said_in_one_line(capsys):
    """A device that is not there is said in one line."""
    for command in ("sample", "plan"):
        assert main([command, "--steps", "10", "--device", "cuda"]) == 2
        errors = capsys.readouterr().err
        assert "--device cuda cannot be used (" in errors
        assert errors.count("\n") == 1
