"""What is read from files and sent to other processes: refused with its path, or whole."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file

import parataxis as px
from parataxis import samplers

SAMPLER = samplers.ddim(steps=5)


@pytest.mark.parametrize(
    ("tensors", "times", "message"),
    [
        ({"trajectory": torch.zeros(2, 6)}, None, r"holds float32 \(2, 6\), expected trajectories \(B, 6, \*shape\)"),
        ({"trajectory": torch.zeros(2, 5, 3)}, None, r"holds float32 \(2, 5, 3\)"),
        ({"trajectory": torch.zeros(2, 6, 3, dtype=torch.int64)}, None, "holds int64"),
        ({"other": torch.zeros(2, 6, 3)}, None, "cannot be read as a trajectory"),
        ({"trajectory": torch.zeros(2, 6, 3)}, "[" * 100_000, "has times that cannot be read"),
        ({"trajectory": torch.zeros(2, 6, 3)}, "{nothing", "has times that cannot be read"),
        ({"trajectory": torch.zeros(2, 6, 3)}, "null", "with other times"),
        ({"trajectory": torch.zeros(2, 6, 3)}, "[1, 2]", "with other times"),
    ],
)
def test_malformed_trajectory_is_refused_with_its_path(tensors, times, message, tmp_path):
    """A wrong shape or dtype, no trajectory, times that are no times: each error names the file."""
    times = json.dumps(SAMPLER.times.tolist()) if times is None else times
    save_file(tensors, tmp_path / "a.safetensors", metadata={"times": times})
    with pytest.raises(ValueError, match=message) as error:
        px.load_trajectory(tmp_path / "a.safetensors", SAMPLER)
    assert "a.safetensors" in str(error.value)


def calibration(**options):
    """Write a calibration's file: what is changed of it."""
    from dataclasses import replace

    trial = px.calibration.Trial(px.calibration.Setting(px.Secant(window=4), 2.0), 0, True, 5.0, 1.5, 1e-3, 2e-3)
    known = px.calibration.fingerprint(lambda x, t: x, torch.zeros(1, 2), SAMPLER, None)
    whole = px.Calibration(trial.setting, 1e-2, 0.95, 0.95, 59, (trial,), 0.95, 2.0, known, 99, 1.0)
    return replace(whole, **options)


CHANGES = {
    "deep": lambda values: "[" * 100_000,
    "list": lambda values: [values],
    "no setting": lambda values: {**values, "setting": None},
    "setting of text": lambda values: {**values, "setting": {"solver": "Secant", "options": "window", "scale": 1}},
    "solver": lambda values: {**values, "setting": {"solver": "os.system", "options": {}, "scale": 1}},
    "tolerance": lambda values: {**values, "tolerance": "0.01"},
    "no tolerance": lambda values: {**values, "tolerance": math.nan},
    "quantile": lambda values: {**values, "quantile": -2.0},
    "promised": lambda values: {**values, "promised": 1.5},
    "runs": lambda values: {**values, "runs": 0},
    "trials": lambda values: {**values, "trials": [{**values["trials"][0], "error": None}]},
    "failures": lambda values: {**values, "trials": [{**values["trials"][0], "failures": -1}]},
    "moments": lambda values: {**values, "moments": {"means": [[2], "O", "AAAA"]}},
    "field": lambda values: {**values, "other": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_malformed_calibration_is_refused_with_its_path(change, tmp_path):
    """Numbers that promise what cannot be, texts for numbers, nesting without end."""
    path = tmp_path / "a.json"
    calibration().save(path)
    assert str(px.Calibration.load(path)) == str(calibration())
    values = CHANGES[change](json.loads(path.read_text()))
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(ValueError, match=r"a\.json cannot be read as a calibration"):
        px.Calibration.load(path)


@pytest.mark.parametrize("floor", [math.nan, math.inf, -1.0, "a", True])
def test_numerical_floor_is_a_number(floor):
    """A floor that is not a number would let every tolerance pass."""
    with pytest.raises(ValueError, match="numerical_floor must be a relative error"):
        px.sample(lambda x, t: x, torch.zeros(1, 2), SAMPLER, px.Picard(), numerical_floor=floor)


@pytest.mark.parametrize(
    "value",
    [
        *(kind() for kind in (px.SOLVERS | px.EXACT_IN_DISTRIBUTION).values()),
        px.stopping.rounds(3),
        px.stopping.error_below(0.1),
        px.stopping.preview_settled(psnr=30.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_solvers_and_stopping_rules_pickle(value):
    """They go to other processes, also once they have seen a run."""
    if not hasattr(value, "solve"):
        noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
        px.sample(lambda x, t: 0.1 * x, noise, SAMPLER, px.Picard(window=2), stop=value)
    again = pickle.loads(pickle.dumps(value))
    assert again == value
    assert repr(again) == repr(value)


def test_stream_made_under_inference_mode_works_outside_of_it():
    """Tensors of inference mode are given, and the rounds run without it."""
    with torch.inference_mode():
        jobs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).unbind()
        stream = px.stream(
            lambda x, t: 0.3 * torch.tanh(x), jobs, samplers.ddpm(steps=9), px.Secant(), rows_per_round=5
        )
        first = next(stream)
    assert sorted([first[0], *(number for number, _ in stream)]) == [0, 1, 2, 3]
