"""px.verify finds what is wrong with a network or a loop, and says what to do."""

import itertools

import pytest
import torch

import parataxis as px
from parataxis import samplers
from parataxis.cli import main

SAMPLER = samplers.ddim(steps=12)
NOISE = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def good(x, t):
    return 0.4 * torch.tanh(x) + 0.01 * torch.sin(t[:, None] / 100)


class Keeps:
    """Networks that remember something, in a known way."""

    def __init__(self, what):
        self.what, self.calls, self.kept, self.last = what, 0, {}, None

    def __call__(self, x, t):
        self.calls += 1
        if self.what == "count":
            return good(x, t) * (1 + 1e-5 * self.calls)
        if self.what == "own steps":  # a loop that is called step by step needs no t
            return good(x, SAMPLER.network_times()[self.calls % SAMPLER.steps].expand(len(x)))
        if self.what == "times":
            rows = zip(t.tolist(), good(x, t), strict=True)
            return torch.stack([self.kept.setdefault(time, output) for time, output in rows])
        if self.last is None or self.last[0].shape != x.shape or (self.last[0] - x).norm() > 0.1 * x.norm():
            self.last = x.clone(), good(x, t)
        return self.last[1]


def failed(checks):
    return {check.name: check for check in checks.checks if not check.passed}


def test_good_network_passes_every_law():
    """Every law holds, and the verdict says so."""
    for sampler in (SAMPLER, samplers.ddpm(steps=12)):
        result = px.verify(good, NOISE, sampler)
        assert result.passed, str(result)
        assert len(result.checks) == 5 + len(NOISE)
        assert str(result).endswith("fit for parallel sampling.")


STATE, STEADY, ALONE, CALLS = (
    "outputs follow the state",
    "same rows, same outputs",
    "each row alone",
    "calls of the network",
)
FAULTS = {
    "random": (lambda x, t: good(x, t) + 0.1 * torch.randn(x.shape), STEADY, "draws random numbers"),
    "dropout": (lambda x, t: torch.nn.functional.dropout(good(x, t), 0.1), STEADY, "eval()"),
    "counts": (Keeps("count"), STEADY, "remembers earlier calls"),
    "own steps": (Keeps("own steps"), STEADY, "remembers earlier calls"),
    "cache by times": (Keeps("times"), STATE, "cache"),
    "cache by states": (Keeps("states"), STATE, "cache"),
    "mean of rows": (lambda x, t: good(x, t) + 0.1 * x.mean(0), ALONE, "depends on other rows"),
    "scale of rows": (lambda x, t: good(x / x.abs().max(), t), ALONE, "dynamic quantization"),
    "sorted rows": (lambda x, t: good(x.sort(0).values, t), ALONE, "depends on other rows"),
    "place in the batch": (lambda x, t: good(x, t) * (1 + torch.arange(len(x))[:, None]), ALONE, "other rows"),
    "many rows": (lambda x, t: good(x, t) * (1.1 if len(x) > 1 else 1), ALONE, "depends on other rows"),
    "first time": (lambda x, t: good(x, t[:1].expand(len(x))), ALONE, "reads the first timestep only"),
    "last time": (lambda x, t: good(x, t[-1:].expand(len(x))), ALONE, "depends on other rows"),
    "one time": (lambda x, t: good(x, torch.full((len(x),), t.item())), CALLS, "t has one time for each row"),
    "batch norm": (torch.nn.Sequential(torch.nn.BatchNorm1d(5)), CALLS, "eval()"),
    "raises": (lambda x, t: {}["weights"], CALLS, "KeyError: 'weights'"),
    "one row": (lambda x, t: good(x[:1], t[:1]), CALLS, "expected that of its input"),
    "shape": (lambda x, t: good(x, t)[:, :4], CALLS, "expected that of its input"),
    "dtype": (lambda x, t: good(x, t).double(), CALLS, "convert it"),
    "tuple": (lambda x, t: (good(x, t),), CALLS, "return the prediction itself"),
    "nothing": (lambda x, t: None, CALLS, "return the prediction itself"),
    "nan": (lambda x, t: good(x, t) / (t[:, None] > 300) - 0 / (t[:, None] > 300), CALLS, "NaN or Inf at step"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_law_is_named_with_what_to_do(fault):
    """The law that does not hold is named; what needs it is not measured any more."""
    denoise, law, advice = FAULTS[fault]
    if fault == "batch norm":
        layers, denoise = denoise, lambda x, t: layers(x)
    result = px.verify(denoise, NOISE, SAMPLER)
    broken = failed(result)
    assert list(broken) == [law], str(result)
    assert advice in f"{broken[law].measured} {broken[law].advice}"
    assert result.verdict == f"not fit for parallel sampling: {law}."


@pytest.mark.parametrize(
    "take", [lambda c: c[:1].expand(len(c)), lambda c: c.roll(1), lambda c: c.mean().expand(len(c))]
)
def test_condition_of_another_row_is_found(take):
    """Each sample has a condition of its own, and each row that of its sample."""

    def denoise(x, t, c):
        return good(x, t) + 0.1 * take(c)[:, None]

    assert list(failed(px.verify(denoise, NOISE, SAMPLER, condition=torch.tensor([1.0, 2.0])))) == [ALONE]
    assert px.verify(lambda x, t, c: good(x, t) + 0.1 * c[:, None], NOISE, SAMPLER, condition=torch.ones(2)).passed


def test_network_may_use_its_input_and_its_output_again():
    """Neither is anyone else's."""
    memory = torch.empty(64, 5)

    def denoise(x, t):
        memory[: len(x)] = good(x, t)
        x.zero_()
        return memory[: len(x)]

    assert px.verify(denoise, NOISE, SAMPLER).passed


def test_dynamic_int8_is_measured():
    """Weights in eight bits whose scale follows the batch: an output depends on the other rows, by some percent."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).eval()
    torch.manual_seed(0)
    quantized = lambda x: torch.fake_quantize_per_tensor_affine(x, float(x.abs().max()) / 127, 0, -128, 127)  # noqa: E731
    result = px.verify(lambda x, t: net(quantized(x * (1 + t[:, None] / 100))), NOISE, SAMPLER)
    assert list(failed(result)) == ["each row alone"]


class Net(torch.nn.Module):
    """A network for loops, with a fault."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0
        self.weight = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        self.dropout = torch.nn.Dropout(0.1)
        self.train(fault == "dropout")

    def forward(self, x, t):
        self.calls += 1
        if self.fault == "first time":
            t = t[:1].expand(len(x))
        output = self.weight * good(x, t)
        if self.fault == "mean of rows":
            output = output + 0.1 * x.mean(0)
        if self.fault == "counts":
            output = output * (1 + 0.01 * (self.calls % 10))
        if self.fault == "nan":
            output = output * torch.where(t < 300, torch.nan, 1.0)[:, None]
        return self.dropout(output)


def loop_with(fault):
    """Return a loop with a fault of its own or of its network."""
    net, kept = Net(fault), [torch.zeros(2, 5)]

    def loop(generator):
        x = torch.randn(2, 5, generator=None if fault == "no generator" else generator)
        for i in range(10):
            x = 0.95 * x - 0.1 * net(x, torch.full((2,), 1000.0 - 99 * i))
            if fault == "weights change" and i == 5:
                net.weight.mul_(0.99)
            if fault == "noise of its own":
                x = x + 0.1 * torch.randn(2, 5)
            if fault == "ends by its state" and float(x.norm()) < 1.9:
                break
        x = x + 0.1 * kept.pop()
        kept.append(x if fault == "keeps" else torch.zeros(2, 5))
        return x

    return loop, net


TWICE, PARALLEL = "same loop twice", "seed 0 runs in parallel"


@pytest.mark.parametrize("fault", ["mean of rows", "first time"])
def test_network_that_looks_at_the_rows_of_a_call_is_no_fault_of_a_loop(fault):
    """Its calls are mapped over, so each of them sees its own rows and its own time."""
    loop, net = loop_with(fault)
    result = px.verify_loop(loop, seeds=1, denoisers=[net])
    assert not failed(result), str(result)


@pytest.mark.parametrize(
    ("fault", "law", "advice"),
    [
        ("dropout", TWICE, "call eval()"),
        ("no generator", TWICE, "from the generator that is passed"),
        ("noise of its own", TWICE, "from the generator that is passed"),
        ("keeps", TWICE, "keep nothing from call to call"),
        ("nan", "the loop's result is finite", "the loop itself meets them"),
        ("counts", PARALLEL, "it counts its calls"),
        ("weights change", PARALLEL, "changes its denoiser between steps"),
        ("ends by its state", PARALLEL, "number of denoiser calls changes"),
    ],
)
def test_what_is_wrong_with_a_loop_is_named(fault, law, advice):
    """A loop that cannot be compared with itself is not compared with anything; one that cannot run says why."""
    loop, net = loop_with(fault)
    result = px.verify_loop(loop, seeds=1, denoisers=[net])
    broken = failed(result)
    assert list(broken) == [law], str(result)
    assert advice in broken[law].advice


def test_loops_are_compared_seed_by_seed():
    """A loop that runs in parallel passes; the answer must be a tensor, and in parallel."""
    loop, net = loop_with("none")
    result = px.verify_loop(loop, seeds=2, denoisers=[net])
    assert result.passed, str(result)
    assert len(result.checks) == 6
    assert list(failed(px.verify_loop(loop, px.Sequential(), seeds=1, denoisers=[net]))) == [PARALLEL]
    with pytest.raises(TypeError, match="the loop must return a tensor"):
        px.verify_loop(lambda generator: (loop(generator),), seeds=1, denoisers=[net])


def test_loop_that_reads_a_clock_is_not_within_its_estimate():
    """What no check of a single run finds shows in the comparison."""
    net, clock = Net("none"), itertools.count()

    def loop(generator):
        x = torch.randn(2, 5, generator=generator)
        strength = 0.1 + 0.05 * (next(clock) // 2)  # the same in the loop and its repetition
        for i in range(10):
            x = 0.95 * x - strength * net(x, torch.full((2,), 1000.0 - 99 * i))
        return x

    broken = failed(px.verify_loop(loop, seeds=1, denoisers=[net]))
    assert any("is within its" in law or law == PARALLEL for law in broken)


def test_command_verifies_a_function_of_a_module(tmp_path, monkeypatch, capsys):
    """``parataxis verify module:function`` prints the table, and ends with 1 where a law does not hold."""
    (tmp_path / "my_networks.py").write_text(
        "import torch, parataxis as px\n"
        "def good():\n"
        "    return lambda x, t: 0.3 * torch.tanh(x), torch.randn(2, 4), px.samplers.ddim(steps=9)\n"
        "def mixes():\n"
        "    return lambda x, t: x.mean(0) + 0 * x, torch.randn(2, 4), px.samplers.ddim(steps=9)\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "my_networks:good", "--count", "2"]) == 0
    assert "fit for parallel sampling." in capsys.readouterr().out
    assert main(["verify", "my_networks:mixes", "--json"]) == 1
    assert '"passed": false' in capsys.readouterr().out
    assert main(["verify", "my_networks:none"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert main(["verify", "my_networks:wrong"]) == 2
    assert "must return (denoise, noise, sampler) or a loop, got int" in capsys.readouterr().err
