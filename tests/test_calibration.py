"""Calibration: the setting that is chosen, what it guarantees, and where it is not valid."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

import parataxis as px
import problems
from parataxis.calibration import Outcome, choose_setting
from parataxis.denoisers import mixture

STEPS, RUNS = 40, 59
SAMPLER = px.SAMPLERS["ddim"](steps=STEPS)
EXACT = problems.network("power law", "ddim")


def noise(count, seed=0):
    return torch.randn(count, problems.DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def calibration():
    return px.calibrate(EXACT, noise(RUNS), SAMPLER)


def test_calibrated_runs_keep_the_tolerance_in_fewer_rounds(calibration):
    """On fresh noise, nearly all errors are within the tolerance and within the reported bound, in fewer rounds."""
    fresh = noise(120, seed=7)
    expected = px.sample(EXACT, fresh, SAMPLER, px.Sequential()).x
    loose = px.sample(EXACT, fresh, SAMPLER, calibration)
    strict = px.sample(EXACT, fresh, SAMPLER, px.Secant(window=8))
    errors = (loose.x - expected).norm(dim=1) / expected.norm(dim=1)
    assert calibration.setting.scale > 1
    assert calibration.promised >= 0.95
    assert sum(run.rounds for run in loose) < sum(run.rounds for run in strict)
    assert (errors <= 1e-2).float().mean() >= 0.9
    bounds = torch.tensor([run.error_estimate for run in loose])
    assert (errors <= bounds).float().mean() >= 0.9
    assert loose[0].solver == px.Secant(window=8)


def test_table_says_what_was_tried_and_what_is_promised(calibration):
    text = str(calibration)
    assert text.count("Secant(window=8)") == len(calibration.trials)
    assert "<- chosen" in text
    assert "With a confidence of 95%, at least 95." in text
    assert len(repr(calibration)) < 150


def test_saved_calibration_is_the_same(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")
    loaded = px.Calibration.load(tmp_path / "calibration.json")
    assert str(loaded) == str(calibration)
    assert loaded.fingerprint == calibration.fingerprint
    assert px.sample(EXACT, noise(2), SAMPLER, loaded)[1].error_estimate > 0
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a calibration"):
        px.Calibration.load(tmp_path / "calibration.json")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.scale = 1.0

    def forward(self, x, t):
        return self.scale * self.linear(x)


@pytest.fixture
def small():
    torch.manual_seed(0)
    network = Net()
    calls = {"count": 0}
    strength = 0.5

    def denoise(x, t, condition):
        calls["count"] += 1
        return strength * network(x, t) + condition[:, None]

    condition = torch.zeros(3)
    sampler = px.SAMPLERS["ddim"](steps=6)
    return network, denoise, condition, sampler, px.calibrate(denoise, noise(3)[:, :4], sampler, condition=condition)


def change_weights(network, arguments):
    network.linear.weight.data[0, 0] += 1e-3


def change_setting(network, arguments):
    network.scale = 2.0


def change_steps(network, arguments):
    arguments["sampler"] = px.SAMPLERS["ddim"](steps=7)


def change_dtype(network, arguments):
    arguments["noise"] = arguments["noise"].double()


def change_shape(network, arguments):
    arguments["noise"] = noise(2)[:, :5]


def change_condition(network, arguments):
    arguments["condition"] = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_weights, "parameters: 20 in 2 tensors"),
        (change_setting, r"network.network.scale: 1.0 -> 2.0"),
        (change_steps, "sampler: ddim, 6 steps"),
        (change_dtype, "dtype: float32 -> float64"),
        (change_shape, r"shape of a sample: \(4,\) -> \(5,\)"),
        (change_condition, "condition: float32"),
    ],
)
def test_what_has_changed_is_named_and_refused(small, change, name):
    """A calibration holds for another batch size; for anything else it is refused, and a count of calls is not."""
    network, denoise, condition, sampler, calibrated = small
    arguments = {"noise": noise(2)[:, :4], "sampler": sampler, "condition": condition[:2]}
    px.sample(denoise, solver=calibrated, **arguments)
    change(network, arguments)
    with pytest.raises(ValueError, match=f"guarantees nothing here: .*{name}"):
        px.sample(denoise, solver=calibrated, **arguments)


def test_other_guidance_is_refused():
    calibrated = px.calibrate(EXACT, noise(3), SAMPLER)
    other = mixture(problems.DIM, 4, power=1.0, seed=3).network(px.vp())
    with pytest.raises(ValueError, match=r"network\.self\.means: \d+ in 1 tensors"):
        px.sample(other, noise(2), SAMPLER, calibrated)
    with pytest.raises(ValueError, match=r"tolerance 0\.001 was asked for and 0\.01 was calibrated"):
        px.sample(EXACT, noise(2), SAMPLER, calibrated, tolerance=1e-3)


def outcomes(errors_of_scale):
    return lambda setting: [Outcome(error, 1e-3, 20 - setting.scale, 1.0) for error in errors_of_scale[setting.scale]]


def chosen(errors_of_scale, coverage=0.95):
    lists = [[px.Setting(px.Secant(window=8), scale) for scale in errors_of_scale]]
    return choose_setting(lists, outcomes(errors_of_scale), 1e-2, coverage, 0.95, 50)


def test_sampler_that_has_been_used_is_the_same():
    """What a sampler keeps to be quicker the next time is no part of it."""
    scheduler = DDPMScheduler(30, clip_sample=True)
    scheduler.set_timesteps(30)
    calibration = px.calibrate(EXACT, noise(3), px.from_scheduler(scheduler), px.Secant(window=8))
    used = px.from_scheduler(scheduler)
    px.sample(EXACT, noise(1), used, px.Secant(window=8))
    assert px.sample(EXACT, noise(1), used, calibration)[0].rounds > 0


def test_list_ends_at_the_first_rejection():
    """Settings behind one that is rejected are not tried, even if they would do."""
    good, bad = [1e-3] * 59, [1e-3] * 58 + [2e-2]
    setting, quantile, trials = chosen({1.0: good, 2.0: bad, 4.0: good})
    assert setting.scale == 1
    assert [trial.accepted for trial in trials] == [True, False]
    assert quantile == pytest.approx(1.0)
    setting, _, _ = chosen({1.0: good, 2.0: bad * 2, 4.0: good})  # 2 failures in 118 runs
    assert setting.scale == 1
    setting, _, _ = chosen({1.0: good, 2.0: [*bad, *good], 4.0: bad})  # 1 in 118
    assert setting.scale == 2


def test_nan_counts_as_a_failure_and_nothing_accepted_means_the_loop():
    setting, _, trials = chosen({1.0: [math.nan] + [0.0] * 58})
    assert trials[0].failures == 1
    assert setting.solver == px.Sequential()


def test_few_runs_say_what_they_still_promise():
    calibrated = px.calibrate(EXACT, noise(16), SAMPLER, [px.Setting(px.Secant(window=8))])
    assert calibrated.promised == pytest.approx(0.05 ** (1 / 16), abs=1e-6)
    assert calibrated.quantile == math.inf
    assert "For 95% it takes 59 runs" in str(calibrated)
    solution = px.sample(EXACT, noise(1), SAMPLER, calibrated)[0]
    assert math.isfinite(solution.error_estimate)


def test_network_for_which_no_setting_does_is_sampled_sequentially():
    """A tolerance below the network's own rounding in few bits is kept by no setting."""

    def rough(x, t):
        return torch.round(EXACT(x, t) * 8) / 8

    calibrated = px.calibrate(rough, noise(6), SAMPLER, [px.Setting(px.Secant(window=8), 1e6)], tolerance=1e-4)
    assert calibrated.solver == px.Sequential()
    assert "no setting keeps the tolerance" in str(calibrated)
    assert px.sample(rough, noise(1), SAMPLER, calibrated)[0].rounds == STEPS


def test_full_width_begins_from_the_moments():
    """The guess from moments saves rounds, also from a file, and does not change the sample."""
    sampler = px.SAMPLERS["ddpm"](steps=STEPS)
    network = problems.network("power law", "ddpm")
    calibrated = px.calibrate(network, noise(RUNS), sampler, [px.Setting(px.Secant())], generator=torch.Generator())
    assert calibrated.moments is not None
    fresh, generators = noise(8, seed=9), problems.generators(8)
    with_guess = px.sample(network, fresh, sampler, calibrated, generator=problems.generators(8))
    plain = px.sample(network, fresh, sampler, px.Secant(), generator=problems.generators(8))
    by_hand = px.sample(network, fresh, sampler, px.Secant(), generator=generators, guess=calibrated)
    assert sum(run.rounds for run in with_guess) < sum(run.rounds for run in plain)
    assert torch.equal(by_hand.x, with_guess.x)
    assert problems.relative(with_guess.x, plain.x) < 2e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0}, "tolerance must be above 0"),
        ({"coverage": 1.0}, r"coverage must be in \(0, 1\)"),
        ({"confidence": math.nan}, r"confidence must be in \(0, 1\)"),
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": [px.Speculative()]}, "draws another sample than the loop's"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"sampler": SAMPLER, **options}
    with pytest.raises(ValueError, match=message):
        px.calibrate(EXACT, noise(2), **arguments)
    with pytest.raises(ValueError, match="there is no solver 'secnat'"):
        px.calibrate(EXACT, noise(2), SAMPLER, ["secnat"])
    with pytest.raises(TypeError, match="solver must be a name"):
        px.calibrate(EXACT, noise(2), SAMPLER, [3])


def test_one_candidate_needs_no_list():
    for candidate in (px.Secant(window=4), px.Setting(px.Secant(window=4), 2.0), "secant"):
        one, several = (px.calibrate(EXACT, noise(2), SAMPLER, given) for given in (candidate, [candidate]))
        assert (one.setting, one.trials) == (several.setting, several.trials)
    with pytest.raises(ValueError, match="scale must be a positive number"):
        px.Setting(px.Secant(), -1.0)
