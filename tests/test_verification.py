"""px.verify finds what is wrong with a network or a loop, and says what to do."""

import pytest
import torch

import parataxis as px
from parataxis import samplers
from parataxis.cli import main

SAMPLER = samplers.ddim(steps=12)
NOISE = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def good(x, t):
    return 0.4 * torch.tanh(x) + 0.01 * torch.sin(t[:, None] / 100)


class Remembers:
    calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return good(x, t) * (1 + 0.01 * self.calls)


def failed(checks):
    return {check.name: check for check in checks.checks if not check.passed}


def test_good_network_passes_every_law():
    """Every law holds, and the verdict says so."""
    for sampler in (SAMPLER, samplers.ddpm(steps=12)):
        result = px.verify(good, NOISE, sampler)
        assert result.passed, str(result)
        assert len(result.checks) == 4 + len(NOISE)
        assert str(result).endswith("fit for parallel sampling.")


@pytest.mark.parametrize(
    ("denoise", "law", "advice"),
    [
        (lambda x, t: good(x, t) + 0.1 * torch.randn(x.shape), "same rows, same outputs", "random numbers"),
        (Remembers(), "same rows, same outputs", "remembers earlier calls"),
        (lambda x, t: good(x, t) + 0.1 * x.mean(0), "each row alone", "depends on other rows"),
        (lambda x, t: good(x, t[:1].expand(len(x))), "each row alone", "reads the first timestep only"),
        (lambda x, t: good(x / x.abs().max(), t), "each row alone", "dynamic quantization"),
    ],
    ids=["random", "remembers", "mixes", "first time", "scales"],
)
def test_broken_law_is_named_with_what_to_do(denoise, law, advice):
    """The law that does not hold is named; what needs it is not measured any more."""
    result = px.verify(denoise, NOISE, SAMPLER)
    broken = failed(result)
    assert list(broken) == [law]
    assert advice in broken[law].advice
    assert result.verdict == f"not fit for parallel sampling: {law}."


def test_dynamic_int8_is_measured():
    """Weights in eight bits whose scale follows the batch: an output depends on the other rows, by some percent."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).eval()
    torch.manual_seed(0)
    quantized = lambda x: torch.fake_quantize_per_tensor_affine(x, float(x.abs().max()) / 127, 0, -128, 127)  # noqa: E731
    result = px.verify(lambda x, t: net(quantized(x * (1 + t[:, None] / 100))), NOISE, SAMPLER)
    assert list(failed(result)) == ["each row alone"]


def test_loops_are_compared_seed_by_seed():
    """A loop that runs in parallel passes; one that cannot says why; one that ignores its generator is found out."""

    class Net(torch.nn.Module):
        def forward(self, x, t):
            return good(x, t)

    net = Net().eval()

    def loop(generator, own=False):
        x = torch.randn(1, 5, generator=None if own else generator)
        for i in range(10):
            x = 0.95 * x - 0.1 * net(x, torch.full((1,), 100.0 * (10 - i)))
        return x

    assert px.verify_loop(loop, seeds=2, denoisers=[net]).passed
    sequential = failed(
        px.verify_loop(lambda generator: loop(generator)[:, :5], px.Sequential(), seeds=1, denoisers=[net])
    )
    assert list(sequential) == ["seed 0 runs in parallel"]
    assert "same loop twice" in failed(px.verify_loop(lambda g: loop(g, own=True), seeds=1, denoisers=[net]))
    with pytest.raises(TypeError, match="the loop must return a tensor"):
        px.verify_loop(lambda generator: (loop(generator),), seeds=1, denoisers=[net])


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
