"""``parataxis calibrate``, and ``parataxis sample --calibration``."""

from __future__ import annotations

import json

import pytest

from parataxis.cli import main

MODEL = ["--model", "digits-v", "--steps", "10", "--label", "3"]


def test_calibration_is_printed_saved_and_used(capsys, tmp_path):
    """What was calibrated can be sampled with; other steps are refused by name."""
    out = tmp_path / "calibration.json"
    assert main(["calibrate", *MODEL, "--windows", "4", "--runs", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for line in ("digits-v: ddim, N = 10", "Secant(window=4)", "With a confidence of 95%", f"wrote {out}"):
        assert line in printed
    assert main(["sample", *MODEL, "--count", "1", "--calibration", str(out), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["solver"] == "Secant(window=4)"
    assert figures["error_estimate"] is None  # three runs bound no error
    assert 0 < figures["promised"] < 0.95
    assert main(["sample", "--model", "digits-v", "--steps", "11", "--calibration", str(out)]) == 2
    assert "sampler: ddim, 10 steps" in capsys.readouterr().err
    assert main(["sample", *MODEL, "--calibration", str(out), "--window", "2"]) == 2
    assert "--calibration has its own solver" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["calibrate", *MODEL, "--out", str(tmp_path / "other.json")]) == 2
    assert "was not written by parataxis" in capsys.readouterr().err


def test_calibration_as_json(capsys):
    assert main(["calibrate", *MODEL, "--windows", "4,all", "--runs", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"Secant(window=4)", "Secant(window=None)"} == {trial["solver"] for trial in figures["trials"]}
    assert figures["quantile"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs must be at least 1, got 0"),
        (["--windows", "x"], "window"),
        (["--coverage", "2"], "coverage must be in (0, 1)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, capsys):
    assert main(["calibrate", *MODEL, *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
