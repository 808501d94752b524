"""The policy of examples/policy draws the plans of its recorded episode both ways."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

POLICY = Path(__file__).parent.parent / "examples" / "policy"


@pytest.mark.parametrize("name", ["drawer-open-v3", "button-press-topdown-v3-flow"])
def test_plans_both_ways_agree(name):
    command = [sys.executable, str(POLICY / "run.py"), name, "--plans", "2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rounds, deviation = re.search(r"(\d+) rounds", printed), re.search(r"deviation of an action ([\d.e+-]+)", printed)
    assert int(rounds[1]) < 40
    assert float(deviation[1]) < 0.05


def test_packed_network_is_the_same_function(monkeypatch):
    monkeypatch.syspath_prepend(str(POLICY))
    network_module = importlib.import_module("network")
    torch.manual_seed(0)
    for kernel, modulation in ((5, True), (3, False)):
        network = network_module.UNet1d(4, 16, 6, (16, 32), kernel_size=kernel, use_film_scale_modulation=modulation)
        x, t, condition = torch.randn(3, 16, 4), torch.tensor([0.0, 50.0, 99.0]), torch.randn(3, 6)
        with torch.no_grad():
            expected = network.eval()(x, t, condition)
            packed = network_module.packed(network)(x, t, condition)
        assert torch.allclose(packed, expected, atol=1e-5)
    with pytest.raises(ValueError, match="only kernel 4, stride 2, padding 1 can be packed"):
        network_module.PackedConv(torch.nn.ConvTranspose1d(4, 4, 2))
