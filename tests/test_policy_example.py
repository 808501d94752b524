"""The policy of examples/policy draws the plans of its recorded episode both ways."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

POLICY = Path(__file__).parent.parent / "examples" / "policy"


@pytest.mark.parametrize("name", ["drawer-open-v3", "button-press-topdown-v3-flow"])
def test_plans_both_ways_agree(name):
    command = [sys.executable, str(POLICY / "run.py"), name, "--plans", "2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rounds, deviation = re.search(r"(\d+) rounds", printed), re.search(r"deviation of an action ([\d.e+-]+)", printed)
    assert int(rounds[1]) < 40
    assert float(deviation[1]) < 0.05
