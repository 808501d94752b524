"""The solver's own work is bounded: operations a round and memory, counted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

import parataxis as px
import problems
from meter import measure

SOLVERS = [solver for solver in problems.variants() if getattr(solver, "window", None) == 8]
IN_DISTRIBUTION = [px.Speculative(window=8), px.Speculative(window=8, verification="block")]
PAIRS = [(solver, name) for solver in SOLVERS for name in ("ddim", "ddpm", "dpmpp_2m")]
PAIRS += [(solver, name) for solver in IN_DISTRIBUTION for name in ("ddpm", "euler_ancestral")]
RECENT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)  # older versions take more for the same calls

# Operations of a round, 60; more where blocks of noise are tested and drawn again.
OPERATIONS = {(px.Speculative, "ddpm"): 130, (px.Speculative, "euler_ancestral"): 130}


@pytest.mark.parametrize(("solver", "name"), PAIRS, ids=str)
def test_operations_a_round_depend_neither_on_n_nor_on_the_number_of_samples(solver, name):
    figures = [
        measure(px.SAMPLERS[name](steps=steps), solver, count, shape=(4, 16, 16))["operations_a_round"]
        for steps, count in ((40, 1), (200, 6), (200, 1))
    ]
    if RECENT:
        assert max(figures) <= OPERATIONS.get((type(solver), name), 60)
    # Among more samples fewer rounds pass in which no run moves its window; and once half of them have ended, the
    # window is made anew for the others, which takes some 170 operations: much in 20 rounds, if it comes to that.
    assert max(figures) <= 1.2 * min(figures)


# Windows of memory: states, outputs, those of the round before, what the network is given and returns; more
# where the corrections of the last rounds are kept.
WINDOWS = {px.Picard: 7.25, px.Anderson: 9.25, px.Secant: 7.25}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_memory_is_bounded_in_windows_and_a_trajectory(solver, name, count):
    width = 16
    figures = measure(px.SAMPLERS[name](steps=100), dataclasses.replace(solver, window=width), count, shape=(4, 16, 16))
    # The noise of a stochastic sampler is not in "windows"; everything else is, start and rings of W + 1 included.
    # Where outputs are transformed, they are there twice for a moment.
    assert figures["windows"] <= WINDOWS[type(solver)] + 1.5 * (name == "dpmpp_2m")


@pytest.mark.parametrize("solver", IN_DISTRIBUTION, ids=repr)
def test_memory_of_solvers_exact_in_distribution_is_bounded_in_windows(solver):
    width = 16
    figures = measure(px.SAMPLERS["ddpm"](steps=100), dataclasses.replace(solver, window=width), 2, shape=(4, 16, 16))
    # Drawing new noise for blocks takes a copy of the noise of all steps, so that the caller's table stays as it is.
    assert figures["windows"] <= 12.5 + (100 / width if solver.verification == "block" else 0)


LONG = """
import json, resource, time
import torch
import parataxis as px
from parataxis import samplers

def network(x, t):
    return torch.tanh(x * (0.5 + t.view(-1, 1) / 20000))

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
before, seconds = megabytes(), []
for steps in (2500, 10000):
    sampler = samplers.ddpm(px.vp(10000, 1e-5, 2e-3), steps=steps)
    begun = time.process_time()
    result = px.sample(network, torch.ones(1, 4), sampler, px.Secant(window=16))
    seconds.append((time.process_time() - begun) / result.rounds)
print(json.dumps([megabytes() - before, *seconds]))
"""


def test_ten_thousand_steps_take_little_memory_and_time_in_proportion():
    """Neither what is held nor the work of a round grows with N."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    megabytes, short, long = json.loads(done.stdout)
    assert megabytes < 300
    assert long < 3 * short  # seconds a round, on a machine that does other things as well


class Reads(TorchFunctionMode):
    """Count what makes the host wait for the device, where there is one; index tensors (int64) are on the CPU."""

    NAMES = ("cpu", "item", "tolist", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__contains__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES and args[0].dtype != torch.int64:
            self.count += 1
        return func(*args, **(kwargs or {}))


READING = [dataclasses.replace(solver, window=6) for solver in SOLVERS] + [px.CoarseToFine(px.Secant(window=6), (3, 2))]
READS = [(solver, name, 1) for solver in [*READING, px.Sequential()] for name in ("ddim", "ddpm", "dpmpp_2m")]
READS += [(px.Speculative(window=6, verification=rule), "ddpm", 1) for rule in ("reflection", "residual")]
# New noise has to be measured after it has been drawn.
READS += [
    (px.Speculative(window=6, verification="block"), "ddpm", 2),
    (px.Parareal(blocks=5), "ddim", 1),
    (px.Parareal(blocks=5, rule="srds"), "ddim", 1),
]


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize(("solver", "name", "reads"), READS, ids=str)
def test_host_waits_for_the_device_once_a_round(solver, name, reads, count):
    """The host waits for the device once a round, and once more where samples end, to see that they are finite."""
    sampler, rounds = px.SAMPLERS[name](steps=30), []
    network, times = problems.network("power law", name), sampler.network_times(torch.float64)
    table = sampler.recurrence(problems.noise(count), problems.generators(count))
    runs = px.start(sampler, table, solver, tolerance=1e-3, generator=problems.generators(count))
    with Reads() as meter:

        def evaluate(rows):
            rounds.append(meter.count)
            outputs = network(rows.x, times[rows.step])
            meter.count = rounds[-1]  # its own reads are its own affair
            return outputs

        ended = [sum(run.done for run in runs) for _ in px.drive(runs, evaluate)]
    assert all(run.done for run in runs)
    assert rounds[0] == 0
    looks = [later > earlier for earlier, later in itertools.pairwise([0, *ended])]
    counts = [later - first for first, later in itertools.pairwise([*rounds, meter.count])]
    assert max(count - look for count, look in zip(counts, looks, strict=True)) == reads
