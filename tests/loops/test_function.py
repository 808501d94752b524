"""Ways in which people call their networks: parallel, or sequential in plain words."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from loop_problems import relative
from parataxis.parallel import parallel

DIM, STEPS = 16, 12


class Net(nn.Module):
    def __init__(self, extra=0):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shape = (DIM + extra, DIM)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) / DIM**0.5, requires_grad=False)

    def forward(self, x, t, scale=1.0):
        return scale * torch.tanh(x @ self.weight) * (0.5 + torch.as_tensor(t).reshape(-1, 1))

    def forward_with_guidance(self, x, t):
        plain = self.forward(x, t, 0.5)
        return plain + 2 * (self.forward(x, t) - plain)


class Around(nn.Module):
    """A preconditioning around a network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return 0.9 * x - 0.1 * self.net(x, t)


class Posterior:
    def __init__(self, mean):
        self.mean = mean


class Probabilistic(Net):
    def forward(self, x, t):
        return Posterior(super().forward(x, t))


class Conditioned(Net):
    """Takes its own prediction of the step before, which is None at the first."""

    def __init__(self):
        super().__init__(DIM)

    def forward(self, x, t, before=None):
        return super().forward(torch.cat([x, torch.zeros_like(x) if before is None else before], 1), t)


class Joint(nn.Module):
    """Two states, whose outputs come in the other order."""

    def forward(self, x, y, t):
        return torch.tanh(y + t + x.mean(1, keepdim=True)), torch.tanh(x - t + y.mean(1, keepdim=True))


def descend(predict, x=None):
    x = torch.linspace(-2, 2, 2 * DIM).view(2, DIM) if x is None else x
    for i in range(STEPS):
        x = x + 0.2 * (predict(x, torch.tensor(1 - i / STEPS)) - x)
    return x


def guided_by_a_classifier(net, classifier):
    def predict(x, t):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient = torch.autograd.grad(torch.log_softmax(classifier(leaf), 1)[:, 1].sum(), leaf)[0]
        return net(x, t) + 0.3 * gradient

    return descend(predict)


def conditioned_on_itself(net):
    before = None

    def predict(x, t):
        nonlocal before
        before = net(x, t, before)
        return before

    return descend(predict)


def joint(net):
    x, y = torch.linspace(-2, 2, 2 * DIM).view(2, DIM), torch.linspace(-1, 1, 12).view(2, 6)
    for i in range(STEPS):
        for_y, for_x = net(x, y, 1 - i / STEPS)
        x, y = x + 0.2 * (for_x - x), y + 0.2 * (for_y - y)
    return torch.cat([x, y], 1)


classifier, plain = nn.Linear(DIM, 3).requires_grad_(False), Net()
around = Around(plain)
PARALLEL = {
    "forward": (plain, lambda: descend(plain.forward)),
    "a method that calls forward": (plain, lambda: descend(plain.forward_with_guidance)),
    "a module around it": (plain, lambda: descend(around)),
    "an object": (net := Probabilistic(), lambda net=net: descend(lambda x, t: net(x, t).mean)),
    "a classifier between steps": (plain, lambda: guided_by_a_classifier(plain, classifier)),
    "its own prediction": (net := Conditioned(), lambda net=net: conditioned_on_itself(net)),
    "outputs in another order": (net := Joint(), lambda net=net: joint(net)),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_way_of_calling_a_network_is_parallel(name):
    net, loop = PARALLEL[name]
    run = parallel(loop, denoisers=[net], tolerance=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*slower.*")  # than such a tiny network
        for _ in range(2):
            assert relative(run(), loop()) <= 1e-3
            assert run.report.mode != "sequential"
            assert run.report.rounds <= run.report.steps


def derivative(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own first derivative compiles by torch.jit
        return descend(lambda x, t: torch.func.jvp(lambda u: net(u, t), (x,), (torch.ones_like(x),))[1])


def adaptive(net):
    x, t = torch.ones(2, DIM), torch.tensor(1.0)
    while t > 0:
        f = net(x, t)
        step = 0.1 / (1 + f.abs().max())
        x, t = x - step * f, t - step
    return x


REFUSED = {
    "a forward-mode derivative": (derivative, "takes derivatives of the denoiser"),
    "an adaptive solver": (adaptive, "depends? on .* outputs"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own forward mode uses it
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_remembered(name):
    """The second call of a loop that was refused calls its network no more often than the loop does."""
    make, reason = REFUSED[name]
    calls, net = 0, Net()

    def count(module, args, output):
        nonlocal calls
        calls += 1

    net.register_forward_hook(count)
    expected = make(net)
    alone, run = calls, parallel(make, denoisers=[net])
    for most in (2 * alone + 4, alone):
        calls = 0
        with pytest.warns(RuntimeWarning, match=f"runs sequentially: .*{reason}"):
            assert torch.equal(run(net), expected)
        assert calls <= most


class Policy:
    """A loop of somebody's own with settings that are no argument."""

    def __init__(self):
        self.net, self.limit, self.adaptive, self.calls = Net(), None, False, 0

    def act(self, x):
        self.calls += 1
        for i in range(12):
            f = self.net(x, torch.tensor(i / 12))
            x = x - 0.1 * (f / (1 + f.abs().max()) if self.adaptive and float(f.mean()) > 9 else f)
            if self.adaptive and float(f[0, 0]) > 0:
                self.net(x, torch.tensor(0.5))
            x = x if self.limit is None else x.clamp(-self.limit, self.limit)
        return x


@pytest.mark.parametrize(
    ("name", "value", "mode"), [("limit", 0.5, "replay"), ("adaptive", True, "sequential")], ids=["clipped", "refused"]
)
@pytest.mark.filterwarnings("ignore:.*runs sequentially|running in parallel was slower")
def test_other_settings_are_tried_anew(name, value, mode):
    """What a loop was with one setting is not held against it with another."""
    policy, x = Policy(), torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    plain = getattr(policy, name)
    setattr(policy, name, value)
    run = parallel(policy.act, denoisers=[policy.net])
    modes = []
    for setting in (value, value, plain, plain):
        setattr(policy, name, setting)
        result = run(x)
        modes.append(run.report.mode)
        assert relative(result, policy.act(x)) <= 1e-2
    assert modes == [mode, mode, "recurrence", "recurrence"]


def test_adaptive_solver_is_not_recorded_without_end():
    """A loop that takes smaller steps on outputs at random than on its own is found out early."""
    steps = 0

    def loop(net):
        nonlocal steps
        x, t, steps = torch.ones(2, DIM), torch.tensor(1.0), 0
        while t > 0:
            f = net(x, t)
            step = 1e-5 if f.abs().max() > 1.5 else 0.05
            x, t, steps = x - step * f, t - step * (1 + 1e-3 * f[0, 0].tanh()), steps + 1
        return x

    with pytest.warns(RuntimeWarning, match="depends? on .* outputs"):
        parallel(loop, denoisers=[net := Net()])(net)
    assert steps < 100


@pytest.mark.parametrize("road", ["recorded", "one pass"])
def test_output_that_is_not_finite_is_the_loops_own_affair(road):
    """One sample of a batch becomes NaN: the others are returned as the loop returns them, with a warning."""

    class Breaks(nn.Module):
        def forward(self, x, t):
            broken = (t < 400) & (x[:, :1] > 0)
            return torch.where(broken, torch.nan, torch.tanh(x))

    net, scheduler = Breaks(), DDIMScheduler(clip_sample=False)

    def recorded(x):
        for t in torch.arange(20).flip(0) * 50:
            x = x - 0.05 * net(x, t)
        return x

    def stepped(x):
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x).prev_sample
        return x

    loop = recorded if road == "recorded" else stepped
    x = torch.tensor([[1.0, 0.3], [-1.0, 0.2], [-0.5, 1.0]])
    expected = loop(x)
    assert expected.isnan().any(1).tolist() == [True, False, False]
    with pytest.warns(RuntimeWarning, match="sequentially: .*the network returned NaN or Inf at step"):
        result = parallel(loop, denoisers=[net])(x)
    assert torch.allclose(result, expected, rtol=1e-2, equal_nan=True)


def test_torchscript_module_runs_sequentially():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        script = torch.jit.script(nn.Linear(DIM, DIM))
    with pytest.warns(RuntimeWarning, match="runs sequentially: its denoiser is a TorchScript module"):
        result = parallel(lambda: descend(lambda x, t: script(x)), denoisers=[script])()
    assert torch.equal(result, descend(lambda x, t: script(x)))
