"""Loops that step a scheduler run once, and leave the world as they do by themselves."""

from __future__ import annotations

import inspect
import random
import threading
import warnings

import diffusers as df
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import parataxis as px
from loop_problems import Net, relative
from parataxis.parallel import parallel

from .zoo import DIM, ZOO, Scaled, append, case, same, scheduler

L = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "ddim": lambda: df.DDIMScheduler(clip_sample=False),
    "ddim clipped": df.DDIMScheduler,
    "ddpm": lambda: df.DDPMScheduler(clip_sample=False),
    "ddpm clipped": df.DDPMScheduler,
    "ddpm thresholded": lambda: df.DDPMScheduler(thresholding=True),
    "euler": lambda: df.EulerDiscreteScheduler(**L),
    "euler ancestral": lambda: df.EulerAncestralDiscreteScheduler(**L),
    "flow": df.FlowMatchEulerDiscreteScheduler,
    "flow heun": df.FlowMatchHeunDiscreteScheduler,
    "heun": lambda: df.HeunDiscreteScheduler(**L),
    "kdpm2": lambda: df.KDPM2DiscreteScheduler(**L),
    "kdpm2 ancestral": lambda: df.KDPM2AncestralDiscreteScheduler(**L),
    "lms": lambda: df.LMSDiscreteScheduler(**L),
    "pndm": lambda: df.PNDMScheduler(skip_prk_steps=True, **L),
    "2M": lambda: df.DPMSolverMultistepScheduler(**L),
    "3M": lambda: df.DPMSolverMultistepScheduler(solver_order=3, **L),
    "2M SDE": lambda: df.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **L),
    "singlestep": lambda: df.DPMSolverSinglestepScheduler(**L),
    "deis": lambda: df.DEISMultistepScheduler(**L),
    "unipc": lambda: df.UniPCMultistepScheduler(**L),
    "sa": lambda: df.SASolverScheduler(**L),
    "edm": df.EDMEulerScheduler,
    "edm 2M": df.EDMDPMSolverMultistepScheduler,
    "lcm": lambda: df.LCMScheduler(**L),
    "ddpm parallel": lambda: df.DDPMParallelScheduler(clip_sample=False),
}


def plain_loop(net, steps, count=16, start=0):
    def run(generator):
        steps.set_timesteps(count)
        x = torch.randn(2, DIM, 1, 1, generator=generator) * float(
            steps.init_noise_sigma if hasattr(steps, "init_noise_sigma") else 1
        )
        more = {"generator": generator} if "generator" in inspect.signature(steps.step).parameters else {}
        for t in steps.timesteps[start:]:
            u = steps.scale_model_input(x, t) if hasattr(steps, "scale_model_input") else x
            x = steps.step(net(u.flatten(1), t).view(x.shape), t, x, **more).prev_sample
        return x

    return run


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_plain_loop_with_any_scheduler_runs_once(name):
    net = Net(DIM)
    expected = plain_loop(net, SCHEDULERS[name]())(seeded())
    run = parallel(plain_loop(net, SCHEDULERS[name]()), px.Secant(window=8), denoisers=[net])
    generator = seeded()
    error, report = relative(run(generator), expected), run.report
    assert report.mode == "one pass"
    assert report.passes == report.real_calls == 1
    assert not report.misses
    assert error <= max(report.error_estimate, 1e-5) <= 1e-2
    assert report.rounds < report.steps
    plain = seeded()
    plain_loop(net, SCHEDULERS[name]())(plain)
    assert torch.equal(generator.get_state(), plain.get_state())


@pytest.mark.parametrize(
    "solver",
    [
        px.Secant(window=16),
        px.Secant(window=None),
        px.Picard(window=8),
        px.Picard(window=None),
        px.Anderson(window=8),
        px.CoarseToFine(),
    ],
)
@pytest.mark.parametrize("name", ["ddim", "ddpm clipped", "2M"])
def test_solvers_and_windows(name, solver):
    net = Net(DIM)
    expected = plain_loop(net, SCHEDULERS[name]())(seeded())
    for tolerance, bound in ((1e-2, 1e-2), (0, 1e-5)):
        run = parallel(plain_loop(net, SCHEDULERS[name]()), solver, tolerance=tolerance, denoisers=[net])
        assert relative(run(seeded()), expected) <= bound
        assert run.report.mode == "one pass"
        assert run.report.rounds <= run.report.steps


@pytest.mark.parametrize("name", ZOO)
def test_world_is_left_as_the_loop_leaves_it(name):
    """Three calls in a row: results, arguments, everything that the loop changes, random numbers."""
    ours, theirs = ZOO[name](), ZOO[name]()
    run = parallel(ours.run, px.Secant(window=8), denoisers=[ours.net])
    for call in range(3):
        arguments, expected_arguments = ours.arguments(call), theirs.arguments(call)
        seed_all(call)
        expected = theirs.run(*expected_arguments)
        states = random_states()
        seed_all(call)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it runs as it is, which is fine here
            result = run(*arguments)
        assert same(result, expected)
        assert same(arguments, expected_arguments)
        assert same(random_states(), states, 0)
        assert same(ours.world, theirs.world)
        if run.report.mode == "sequential" and name != "robot":  # which has a queue of earlier actions
            assert torch.equal(result, expected)


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def random_states():
    return torch.get_rng_state(), np.random.get_state()[1], list(random.getstate()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("attribute of the network", 1),
        ("parameters of the network", 1),
        ("hook of the network", 1),
        ("one shift", 1),
        ("guided in between", 2),
        ("two loops", 1),
    ],
)
def test_loop_that_goes_another_way_is_solved_again(name, most):
    ours = ZOO[name]()
    run = parallel(ours.run, px.Secant(window=8), denoisers=[ours.net])
    run(*ours.arguments(0))
    assert run.report.mode == "one pass"
    assert run.report.misses <= most
    assert run.report.real_calls <= 2 + most


def test_estimate_is_of_what_the_loop_was_given():
    """What is thrown away is no error of the loop; nor is a change of the loop one that its solver must make up for."""
    net, steps = Net(DIM), scheduler()

    def loop(generator):
        steps.set_timesteps(30)
        x = torch.randn(2, DIM, generator=generator)
        for i, t in enumerate(steps.timesteps):
            output = net(x, t)
            x = steps.step(output if i < 9 else 1.01 * output, t, x).prev_sample  # as guidance that ends
        return x

    run, expected = parallel(loop, px.Secant(window=16), tolerance=1e-3, denoisers=[net]), loop(seeded())
    assert relative(run(seeded()), expected) <= run.report.error_estimate
    assert run.report.misses == 1
    assert run.report.error_estimate <= 5e-4
    assert run.report.converged


def test_loop_that_always_goes_another_way_goes_on_by_itself():
    ours, theirs = ZOO["shrunk states"](), ZOO["shrunk states"]()
    run = parallel(ours.run, px.Secant(window=8), denoisers=[ours.net])
    with pytest.warns(RuntimeWarning, match="the rest of the loop runs sequentially: the loop changes the state"):
        result = run(*ours.arguments(0))
    assert same(result, theirs.run(*theirs.arguments(0)))
    assert len(ours.world["trace"]) == 16
    assert (run.report.rounds, run.report.steps) == (16, 16)  # no round for a state that the loop does not have


def test_loop_that_always_goes_another_way_is_recorded_where_that_shows_early():
    net, steps, trace = Net(DIM), scheduler(), []
    steps.set_timesteps(48)

    def loop(generator):
        x = torch.randn(2, DIM, generator=generator)
        for t in steps.timesteps:
            x = steps.step(net(x, t), t, x).prev_sample
            x = torch.where(x > 0, x, 0.99 * x)
            trace.append(x)
        return x

    expected = loop(seeded())
    trace.clear()
    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    assert relative(run(seeded()), expected) <= 1e-2
    assert run.report.mode == "replay"
    assert run.report.rounds < run.report.steps == len(trace) == 48


def test_parts_that_step_the_scheduler_in_turn_are_recorded_at_the_first_call():
    """A scheduler that is stepped twice at every time has made more steps than times: it is early all the same."""
    net, steps = Net(DIM), scheduler()

    def loop(generator):
        steps.set_timesteps(20)
        x = torch.randn(2, DIM + 2, generator=generator)
        for t in steps.timesteps:
            total, count = torch.zeros_like(x), torch.zeros_like(x)
            for part in (slice(0, DIM), slice(2, DIM + 2)):
                total[:, part] += steps.step(net(x[:, part], t), t, x[:, part]).prev_sample
                count[:, part] += 1
            x = total / count
        return x

    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    assert relative(run(seeded()), loop(seeded())) <= 1e-2
    assert run.report.mode == "replay"
    assert run.report.rounds < 30 < run.report.steps == 40


def test_combination_that_is_not_linear_is_recorded_at_the_first_call():
    """The first step shows it; the loop is put back as it was and recorded, and takes no more rounds than steps."""
    ours, theirs = ZOO["not linear"](), ZOO["not linear"]()
    run = parallel(ours.run, px.Secant(window=8), denoisers=[ours.net])
    for call in range(3):
        arguments, expected_arguments = ours.arguments(call), theirs.arguments(call)
        assert relative(run(*arguments), theirs.run(*expected_arguments)) <= 1e-2
        assert run.report.mode == "replay"
        assert run.report.rounds < run.report.steps
        assert same(ours.world, theirs.world)


def test_combination_that_is_not_linear_goes_on_by_itself_where_it_cannot_be_put_back():
    """An iterator of somebody's has gone on by a step: the loop may not begin anew."""
    ours, theirs = ZOO["not linear"](), ZOO["not linear"]()
    numbers, run_loop = iter(range(100)), ours.run

    def counting(*arguments):
        next(numbers)
        return run_loop(*arguments)

    run = parallel(counting, px.Secant(window=8), denoisers=[ours.net])
    with pytest.warns(RuntimeWarning, match="not a combination of the denoiser's outputs"):
        result = run(*ours.arguments(0))
    assert torch.equal(result, theirs.run(*theirs.arguments(0)))
    assert run.report.mode == "sequential"
    assert next(numbers) == 1


def test_gradients_of_a_loop_that_goes_on_by_itself_are_all_there():
    """Nothing warns of gradients that are missing where every output is the network's own."""
    net, steps, numbers = Net(DIM).requires_grad_(), SCHEDULERS["ddim"](), iter(range(100))

    def loop(x):
        steps.set_timesteps(16)
        next(numbers)  # cannot be put back
        for t in steps.timesteps:
            x = steps.step(net(x, t).tanh(), t, x).prev_sample
        return x

    run = parallel(loop, denoisers=[net])
    with pytest.warns(RuntimeWarning) as caught:
        assert run(torch.ones(1, DIM)).requires_grad
    assert ["not a combination of the denoiser's outputs" in str(warning.message) for warning in caught] == [True]


def test_error_of_the_loop_passes_through():
    def fail(i, x, net, world):
        world["trace"].append(i)
        if i == 7:
            raise LookupError("enough")
        return x

    ours = case(fail, world={"trace": []})
    run = parallel(ours.run, px.Secant(window=8), denoisers=[ours.net])
    with pytest.raises(LookupError, match="enough"):
        run(*ours.arguments(0))
    assert ours.world["trace"] == list(range(8))
    assert "_compiled_call_impl" not in ours.net.__dict__
    assert "step" not in vars(ours.world["scheduler"])


def test_loop_that_ends_early_stops_the_work():
    """A loop that ends early has made rounds for its own steps only."""

    def stop(i, x, net, world):
        return None if i == 3 else x

    ours = case(stop)
    run = parallel(ours.run, px.Secant(window=4), denoisers=[ours.net])
    assert run(*ours.arguments(0)) is None
    assert run.report.mode == "one pass"
    assert run.report.peak_width <= 4
    assert run.report.evaluations <= 2 * 4 * (1 + 4)


def test_errors_of_the_network_at_later_steps_are_the_loops_own():
    class Broken(Scaled):
        def forward(self, x, t, condition=None):
            if (torch.as_tensor(t) < 300).any():
                raise LookupError("too late")
            return super().forward(x, t, condition)

    net, steps, trace = Broken(), scheduler(), []

    def run(generator):
        x = torch.randn(2, DIM, generator=generator)
        for t in steps.timesteps:
            x = steps.step(net(x, t), t, x).prev_sample
            trace.append(int(t))
        return x

    solved = parallel(run, px.Secant(window=8), denoisers=[net])
    with pytest.raises(LookupError, match="too late"):
        solved(seeded())
    assert trace == [t for t in steps.timesteps.tolist() if t >= 300]


def test_loop_that_begins_in_the_middle():
    net = Net(DIM)
    expected = plain_loop(net, SCHEDULERS["ddpm"](), 24, 6)(seeded())
    run = parallel(plain_loop(net, SCHEDULERS["ddpm"](), 24, 6), px.Secant(window=8), denoisers=[net])
    assert relative(run(seeded()), expected) <= run.report.error_estimate <= 1e-2
    assert (run.report.mode, run.report.steps, run.report.misses) == ("one pass", 18, 0)


def test_short_loop_runs_sequentially_without_a_warning():
    net = Net(DIM)
    run = parallel(plain_loop(net, SCHEDULERS["ddim"](), 6), px.Secant(window=8), denoisers=[net])
    assert torch.equal(run(seeded()), plain_loop(net, SCHEDULERS["ddim"](), 6)(seeded()))
    assert run.report.reason == "the loop has only 6 steps."


def test_scheduler_that_is_seen_but_not_stepped_is_recorded():
    """At once, where so many calls without a step show it before the loop has ended, else from the second call on."""
    net, steps = Net(DIM), scheduler()

    def run(generator, count):
        x = torch.randn(2, DIM, generator=generator)
        for t in range(0, 1000, 1000 // count):
            x = x - 0.05 * net(x, torch.tensor(t)) * steps.alphas_cumprod[t]
        return x

    solved = parallel(run, px.Secant(window=8), denoisers=[net])
    assert relative(solved(seeded(), 40), run(seeded(), 40)) <= 1e-2
    assert solved.report.mode == "recurrence"
    with pytest.warns(RuntimeWarning, match="does not step its scheduler"):
        solved(seeded(), 10)
    assert relative(solved(seeded(), 10), run(seeded(), 10)) <= 1e-2
    assert solved.report.mode == "recurrence"


def schedule_only(net, generator):
    """A step by hand, with the numbers of a scheduler."""
    alphas, x = DDPMScheduler().alphas_cumprod, torch.randn(2, DIM, generator=generator)
    for t in range(950, 0, -50):
        a, b = alphas[t], alphas[t - 50]
        e = net(x, torch.tensor(t))
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    return x


def test_scheduler_class_whose_step_nothing_names_is_no_reason_for_one_pass():
    net = Net(DIM)
    run = parallel(schedule_only, px.Secant(window=8), denoisers=[net])
    assert relative(run(net, seeded()), schedule_only(net, seeded())) <= 1e-2
    assert (run.report.mode, run.report.real_calls) == ("recurrence", 0)


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    net, steps, trace = Net(DIM), scheduler(), []

    def run(generator):
        x = torch.randn(2, DIM, generator=generator).to(dtype)
        for t in steps.timesteps:
            x = steps.step(net(x, t), t, x).prev_sample
            trace.append(x)
        return x

    expected = run(seeded())
    solved = parallel(run, px.Secant(window=8), denoisers=[net])
    result = solved(seeded())
    assert result.dtype == dtype
    assert len(trace) == 32
    assert relative(result, expected) <= (1e-2 if dtype == torch.float64 else 5e-2)


def test_policy_that_takes_an_action_of_its_queue_keeps_its_road():
    ours = ZOO["robot"]()
    run = parallel(ours.run, px.Secant(window=8), denoisers=[ours.net])
    modes = []
    for call in range(4):
        run(*ours.arguments(call))
        modes.append(run.report.mode)
    assert modes == ["one pass", "sequential"] * 2
    assert run.report.reason == "the loop called none of its denoisers."


@pytest.mark.parametrize("name", ["ddim clipped", "ddpm clipped", "ddpm thresholded"])
def test_clipped_loop_goes_the_way_of_the_solution(name):
    """Where predictions are clipped, outputs move along slopes of single elements: no miss, no further error."""
    net = Net(DIM)
    expected = plain_loop(net, SCHEDULERS[name](), 50)(seeded())
    run = parallel(plain_loop(net, SCHEDULERS[name](), 50), px.Secant(window=16), denoisers=[net])
    assert relative(run(seeded()), expected) <= run.report.error_estimate <= 1e-2
    assert not run.report.misses


def test_list_of_the_loop_has_its_own_entries():
    ours = case(append, world={"trace": []})
    run = parallel(ours.run, px.Secant(window=8), denoisers=[ours.net])
    result = run(*ours.arguments(0))
    assert len(ours.world["trace"]) == 16
    assert torch.equal(ours.world["trace"][-1], result)


def named_class(net, generator):
    steps = DDPMScheduler()
    return loop_with(steps, net, generator)


def named_in_package(net, generator):
    return loop_with(df.DDPMScheduler(), net, generator)


def imported_inside(net, generator):
    from diffusers import DDPMScheduler as Steps

    return loop_with(Steps(), net, generator)


def made_by_another_function(net, generator):
    return loop_with(ddpm_scheduler(), net, generator)


def ddpm_scheduler():
    return df.DDPMScheduler.from_config(df.DDPMScheduler().config)


def loop_with(steps, net, generator):
    steps.set_timesteps(16)
    x = torch.randn(2, DIM, generator=generator)
    more = {"generator": generator} if "generator" in inspect.signature(steps.step).parameters else {}
    for t in steps.timesteps:
        x = steps.step(net(x, t), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("loop", [named_class, named_in_package, imported_inside, made_by_another_function])
def test_scheduler_made_inside_the_function(loop):
    net, step, signature = Net(DIM), DDPMScheduler.step, inspect.signature(DDPMScheduler.step)
    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    for seed in range(3):
        assert relative(run(net, seeded(seed)), loop(net, seeded(seed))) <= 1e-2
        assert (run.report.mode, run.report.misses) == ("one pass", 0)
    assert DDPMScheduler.step is step
    assert inspect.signature(DDPMScheduler.step) == signature


def test_scheduler_class_is_watched_in_one_thread_only():
    """While a loop is solved, schedulers of its class step in other threads as ever; nothing is left behind."""
    net, step, inside, through = Net(DIM), DDPMScheduler.step, threading.Event(), threading.Event()

    def run(generator):
        def callback(i):
            if i == 8:
                inside.set()
                assert through.wait(60)

        steps, x = DDPMScheduler(), torch.randn(2, DIM, generator=generator)
        steps.set_timesteps(16)
        for i, t in enumerate(steps.timesteps):
            x = steps.step(net(x, t), t, x, generator=generator).prev_sample
            callback(i)
        return x

    solved, beside = parallel(run, px.Secant(window=8), denoisers=[net]), []

    def elsewhere():
        assert inside.wait(60)
        beside.append(loop_with(DDPMScheduler(), Net(DIM), seeded(1)))
        other = Net(DIM)
        again = parallel(named_class, px.Secant(window=8), denoisers=[other])
        beside.extend([again(other, seeded(1)), again.report.mode])
        through.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    result = solved(seeded())
    thread.join()
    assert solved.report.mode == beside[2] == "one pass"
    assert not solved.report.misses
    assert relative(result, named_class(net, seeded())) <= 1e-2
    assert torch.equal(beside[0], named_class(Net(DIM), seeded(1)))
    assert relative(beside[1], beside[0]) <= 1e-2
    assert DDPMScheduler.step is step


class Transposed(torch.nn.Module):
    """A network over time, as policies have: its outputs are views that do not lie in memory as their shape says."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return torch.tanh(self.conv(x.mT)).mT


@pytest.mark.parametrize("name", ["ddpm clipped", "ddim", "2M"])
def test_outputs_may_be_transposed_views(name):
    net, steps = Transposed().requires_grad_(False), SCHEDULERS[name]()

    def loop(generator):
        steps.set_timesteps(16)
        x = torch.randn(1, 8, 3, generator=generator)
        for t in steps.timesteps:
            x = steps.step(net(x, t.expand(1)), t, x, generator=generator).prev_sample
        return x

    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    assert relative(run(seeded()), loop(seeded())) <= 1e-2
    assert run.report.mode == "one pass"
    assert run.report.rounds < 16


@pytest.mark.parametrize("solver", [px.Secant(window=8), px.Picard()], ids=repr)
def test_parameters_written_through_data_are_noticed(solver):
    """Such a write leaves no trace in the version of a parameter: the loop is recorded, which watches writes."""

    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)

        def forward(self, x, t):
            return torch.tanh(x) * self.scale

    net, scheduler = Adapted(), df.DDIMScheduler(clip_sample=False)

    def loop(x):
        scheduler.set_timesteps(20)
        for i, t in enumerate(scheduler.timesteps):
            if i == 12:
                net.scale.data.mul_(0.0)
            x = scheduler.step(net(x, t), t, x).prev_sample
        net.scale.data.copy_(torch.tensor(0.5))
        return x

    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="sequentially: the loop changes its denoiser .*scale"):
        result = px.parallel(loop, solver, denoisers=[net])(x)
    assert torch.equal(result, loop(x))


WRITES = {
    "array of its own": lambda scale: scale.numpy(),
    "array around it": np.asarray,
    "tensor of that": lambda scale: torch.from_numpy(scale.numpy()),
    "data": lambda scale: scale.data,
    "dlpack": lambda scale: torch.from_dlpack(scale.detach()),
}


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", WRITES)
def test_memory_of_a_network_that_is_written_to_by_another_name(name, recorded, held):
    """No version shows it, and what the loop names says nothing of it: the values themselves do."""

    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((40,), 0.5, dtype=torch.float32), requires_grad=False)

        def forward(self, x, t):
            return torch.tanh(x) * self.scale[:1]

    net, steps = Adapted(), scheduler()
    alias = WRITES[name](net.scale) if held else None

    def write(value):
        (WRITES[name](net.scale) if alias is None else alias)[...] = value

    def loop(x):
        steps.set_timesteps(20)
        for i, t in enumerate(steps.timesteps):
            if i == 12:
                write(-2.0)
            f = net(x, t)
            x = 0.9 * x + 0.3 * f if recorded else steps.step(f, t, x).prev_sample
        write(0.5)
        return x

    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    run = parallel(loop, px.Secant(window=8), tolerance=1e-3, denoisers=[net])
    expected = loop(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(x)
    assert relative(result, expected) <= 1e-3
    assert run.report.mode == "sequential" or run.report.misses
    assert torch.equal(net.scale, torch.full((40,), 0.5))


class Guide(torch.nn.Module):
    """Its output goes into the network's arguments, as that of a ControlNet."""

    def __init__(self):
        super().__init__()
        self.inner = Net(DIM)

    def forward(self, x, t):
        return (self.inner(x, t),)


class Guided(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Net(DIM)

    def forward(self, x, t, residual):
        return self.inner(x + 0.3 * residual, t)


def handed_on(residual, i):
    return residual


def halved_later(residual, i):
    return residual / 2 if i >= 6 else residual


def halved_later_in_place(residual, i):
    return residual.mul_(0.5) if i >= 6 else residual


def looked_at(residual, i):
    assert torch.isfinite(residual).all()
    return residual


@pytest.mark.parametrize("edit", [1.0, 0.9])
@pytest.mark.parametrize("hand_on", [handed_on, halved_later, halved_later_in_place, looked_at])
def test_output_that_goes_into_another_network_is_there_for_whoever_uses_it(hand_on, edit):
    """Its content is not evaluated until somebody looks: when the loop changes it, or goes another way."""
    guide, net, steps = Guide(), Guided(), SCHEDULERS["ddim"]()

    def loop(generator):
        steps.set_timesteps(16)
        x = torch.randn(2, DIM, generator=generator)
        for i, t in enumerate(steps.timesteps):
            residual = hand_on(guide(x, t)[0], i)
            x = steps.step(net(x, t, residual), t, x).prev_sample * edit
        return x

    expected = loop(seeded())
    run = parallel(loop, px.Secant(window=8), denoisers=[guide, net])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the rest of it runs by itself
        assert relative(run(seeded()), expected) <= max(1e-5, run.report.error_estimate) <= 1e-2
    assert run.report.rounds <= run.report.steps
    if hand_on is handed_on and edit == 1:
        assert (run.report.mode, run.report.real_calls) == ("one pass", 2)


def test_output_as_long_as_its_input_answers_the_state_where_it_stands():
    """Tokens of a condition stand before the state, and the network returns as many: theirs are dropped."""
    net, steps = Transposed().requires_grad_(False), SCHEDULERS["ddim"]()
    tokens = torch.randn(1, 2, 3, generator=seeded(1))

    def loop(generator):
        steps.set_timesteps(16)
        x = torch.randn(1, 8, 3, generator=generator)
        for t in steps.timesteps:
            output = net(torch.cat([tokens, x], 1), t.expand(1))
            x = steps.step(output[:, 2:], t, x).prev_sample
        return x

    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    assert relative(run(seeded()), loop(seeded())) <= 1e-2
    assert (run.report.mode, run.report.misses, run.report.real_calls) == ("one pass", 0, 1)


def test_compiled_network_is_looked_at_once():
    """What stands in the place of a compiled call comes and goes without a change of the network."""
    net = Scaled()
    net.compile(backend="eager")
    run = parallel(plain_loop(net, DDPMScheduler()), denoisers=[net])
    expected = plain_loop(net, DDPMScheduler())(torch.Generator().manual_seed(0))
    watches = []
    for _ in range(3):
        assert relative(run(torch.Generator().manual_seed(0)), expected) <= 1e-2
        watches.append(run.loop.watch)
    assert run.report.mode == "one pass"
    assert watches[1] is watches[2]
