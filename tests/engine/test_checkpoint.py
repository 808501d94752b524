"""A solve that is stopped after any round goes on in another process, to the same bits."""

import json
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import parataxis as px
from parataxis import samplers
from parataxis.engine.checkpoint import Interruptions

SOLVERS = {
    **{name: kind() for name, kind in {**px.SOLVERS, **px.EXACT_IN_DISTRIBUTION}.items()},
    "anderson 3": px.Anderson(window=5, history=3),
    "coarse": px.CoarseToFine(px.Secant(window=8), strides=(4, 2)),
    "block": px.Speculative(window=6, verification="block"),
    "plain parareal": px.Parareal(blocks=4, pipelined=False),
}


def network(x, step):
    return 0.3 * torch.tanh(x * (1 + step[:, None] / 50)) + 0.1 * torch.sin(2 * x)


def begin(solver, sampler=None, count=2, seed=0, **options):
    sampler = sampler or samplers.ddpm(steps=16)
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    recurrence = sampler.recurrence(noise, [torch.Generator().manual_seed(b) for b in range(count)])
    generators = [torch.Generator().manual_seed(90 + b) for b in range(count)]
    return px.start(sampler, recurrence, solver, generator=generators, **options)


def finish(runs):
    for _ in px.drive(runs, lambda rows: network(rows.x, rows.step)):
        pass
    return [run.solution for run in runs]


def same(first, second):
    trajectories = first.trajectory is second.trajectory is None or torch.equal(first.trajectory, second.trajectory)
    return torch.equal(first.x, second.x) and trajectories and first.history == second.history


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # torch 2.4, of its own pickles
@pytest.mark.parametrize("name", SOLVERS)
def test_run_goes_on_from_its_state_to_the_same_bits(name):
    """The state after any round leads to the same sample, in as many rounds."""
    solver = SOLVERS[name]
    expected, runs = finish(begin(solver, keep_trajectory=True)), begin(solver, keep_trajectory=True)
    rounds = 0
    while True:
        states = [pickle.loads(pickle.dumps(run.state_dict())) for run in runs]
        resumed = begin(solver, keep_trajectory=True)
        for run, state in zip(resumed, states, strict=True):
            run.load_state_dict(state)
        assert all(torch.equal(a.estimate, b.estimate) for a, b in zip(runs, resumed, strict=True))
        assert all(same(a, b) for a, b in zip(finish(resumed), expected, strict=True)), rounds
        rounds = next(px.drive(runs, lambda rows: network(rows.x, rows.step)), None)
        if rounds is None:
            break


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t, parataxis as px
solutions = []
for path in sys.argv[2:]:
    runs = t.begin(px.Secant(window=8), px.samplers.ddpm(steps=100), count=1)
    px.load_runs(path, runs)
    solutions.append(t.finish(runs)[0])
torch.save([(s.x, s.rounds) for s in solutions], sys.argv[2] + ".pt")
"""


def test_solve_of_100_steps_stopped_after_every_round_goes_on_in_another_process(tmp_path):
    """Secant(8) with DDPM, N = 100: the bits are those of the solve that was not stopped, whichever round it was."""
    solver, sampler = px.Secant(window=8), samplers.ddpm(steps=100)
    runs, paths = begin(solver, sampler, count=1), []
    for rounds in px.drive(runs, lambda rows: network(rows.x, rows.step)):
        paths.append(tmp_path / f"{rounds}.safetensors")
        px.save_runs(paths[-1], runs)
    assert len(paths) > 20
    here = str(sys.modules[__name__].__file__).rsplit("/", 1)[0]
    subprocess.run([sys.executable, "-c", RESUME, here, *map(str, paths)], check=True)
    for x, rounds in torch.load(f"{paths[0]}.pt", weights_only=True):
        assert torch.equal(x, runs[0].solution.x)
        assert rounds == runs[0].rounds


def test_size_of_a_state_does_not_grow_with_the_rounds():
    """What is kept is the window, not the rounds that have been."""
    runs, sizes = begin(px.Secant(window=4), samplers.ddim(steps=60), count=1), []
    for _ in px.drive(runs, lambda rows: network(rows.x, rows.step)):
        state = runs[0].state_dict()
        sizes.append(sum(value.numel() for name, value in state.items() if name.startswith("memory")))
    assert len(set(sizes[:-1])) == 1  # of the last round only the sample is left


def test_state_of_another_solve_is_refused(tmp_path):
    """What differs is named: the noise, the solver, the number of samples."""
    path, runs = tmp_path / "a.safetensors", begin(px.Secant(window=4))
    next(px.drive(runs, lambda rows: network(rows.x, rows.step)))
    px.save_runs(path, runs)
    with pytest.raises(ValueError, match=r"a.safetensors: this state is of another solve \(noise: saved float32"):
        px.load_runs(path, begin(px.Secant(window=4), seed=1))
    with pytest.raises(ValueError, match=r"solver: saved Secant\(window=4\), now Secant\(window=8\)"):
        px.load_runs(path, begin(px.Secant(window=8)))
    with pytest.raises(ValueError, match="has 2 samples, and 3 were started"):
        px.load_runs(path, begin(px.Secant(window=4), count=3))
    with pytest.raises(ValueError, match="has begun already"):
        px.load_runs(path, runs)


def test_file_that_is_no_state_is_refused(tmp_path):
    """A damaged file, a trajectory, nothing at all: each is named with its path."""
    path, runs = tmp_path / "a.safetensors", begin(px.Secant(window=4))
    px.save_runs(path, runs)
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.safetensors cannot be read as a saved solve"):
            px.load_runs(path, begin(px.Secant(window=4)))
    px.save_trajectory(path, torch.zeros(1, 17, 6), samplers.ddpm(steps=16))
    with pytest.raises(ValueError, match=r"a.safetensors is no saved solve"):
        px.load_runs(path, begin(px.Secant(window=4)))
    with pytest.raises(ValueError, match="cannot be written"):
        px.save_runs(tmp_path / "none" / "a", runs)
    with pytest.raises(ValueError, match=r"pass what Run\.state_dict returned"):
        runs[0].load_state_dict({})


def about(state, **changes):
    """Return a state whose description is changed."""
    known = json.loads(state["about"].numpy().tobytes())
    return {**state, "about": torch.tensor(list(json.dumps({**known, **changes}).encode()), dtype=torch.uint8)}


DAMAGES = {
    "another shape": lambda state: {**state, "memory.rows.x": state["memory.rows.x"][:, :1]},
    "another dtype": lambda state: {**state, "memory.rows.x": state["memory.rows.x"].double()},
    "a missing part": lambda state: {name: value for name, value in state.items() if name != "memory.lo"},
    "a step behind the end": lambda state: {**state, "memory.lo": torch.tensor(999)},
    "no numbers": lambda state: about(state, rounds="three"),
    "too many steps": lambda state: about(state, accepted=99),
    "no error": lambda state: about(state, error=None),
    "too few rounds": lambda state: {**state, "history": state["history"][1:]},
    "no description": lambda state: {**state, "about": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
    "nesting without end": lambda state: {**state, "about": torch.full((100_000,), ord("["), dtype=torch.uint8)},
    "no text": lambda state: {**state, "about": torch.full((9,), 255, dtype=torch.uint8)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_with_its_path(damage, tmp_path):
    """What would be spread over a window, or is no description of a solve, never becomes a sample."""
    path, runs = tmp_path / "a.safetensors", begin(px.Secant(window=4))
    for rounds in px.drive(runs, lambda rows: network(rows.x, rows.step)):
        if rounds == 3:
            break
    px.save_runs(path, runs)
    tensors = load_file(path)
    state = DAMAGES[damage]({name[2:]: value for name, value in tensors.items() if name.startswith("0.")})
    others = {name: value for name, value in tensors.items() if name.startswith("1.")}
    changed = {f"0.{name}": value.contiguous() for name, value in state.items()}
    save_file(others | changed, path, metadata={"parataxis": "1", "runs": "2"})
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        px.load_runs(path, begin(px.Secant(window=4)))


def draw(denoise, path, **options):
    noise = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    return px.sample(denoise, noise, samplers.ddim(steps=24), px.Secant(window=4), checkpoint=path, **options)


def test_sample_goes_on_where_it_was_interrupted(tmp_path):
    """Ctrl-C writes the file, the same call goes on from it, and the file is gone when the solve has ended."""
    path, calls = tmp_path / "a.safetensors", []

    def denoise(x, t):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return network(x, t / 40)

    assert [s.reason for s in draw(denoise, path)] == ["interrupted"] * 2
    assert path.exists()
    resumed, expected = draw(denoise, path), draw(lambda x, t: network(x, t / 40), None)
    assert torch.equal(resumed.x, expected.x)
    assert len(calls) - 1 == expected.rounds  # but for the call that was interrupted, none twice
    assert not path.exists()
    with pytest.raises(ValueError, match="checkpoint= cannot be combined"):
        draw(denoise, path, rows_per_round=4)
    with pytest.raises(ValueError, match="a checkpoint is of one solver"):
        px.sample(denoise, torch.randn(1, 6), samplers.ddim(steps=24), "auto", checkpoint=path)


def test_signal_between_two_calls_of_the_network_waits_for_the_next():
    """There a solver is in the midst of its round; the call is not made any more, and a last signal is not lost."""
    before, reached = signal.getsignal(signal.SIGINT), []

    def solve(number, calls):
        with Interruptions() as interruptions:
            signal.raise_signal(number)
            reached.append("solver")
            if calls:
                interruptions.during(reached.append)("network")

    for number, calls in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        with pytest.raises(KeyboardInterrupt):
            solve(number, calls)
    assert reached == ["solver"] * 2
    assert signal.getsignal(signal.SIGINT) is before


TERMINATED = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t
def denoise(x, at):
    print("called", flush=True)
    time.sleep(0.05)
    return t.network(x, at / 40)
print([s.reason for s in t.draw(denoise, sys.argv[2])], flush=True)
"""


def test_sigterm_writes_the_file(tmp_path):
    """A process that is told to end writes what it has, and the next one goes on from it."""
    path, here = tmp_path / "a.safetensors", str(sys.modules[__name__].__file__).rsplit("/", 1)[0]
    command = [sys.executable, "-c", TERMINATED, here, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "called\n"
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "['interrupted', 'interrupted']"
    expected = draw(lambda x, t: network(x, t / 40), None)
    assert torch.equal(draw(lambda x, t: network(x, t / 40), path).x, expected.x)


def test_runs_of_a_stream_and_of_loops_cannot_be_saved():
    """Their state is not their own."""
    stream = px.stream(
        lambda x, t: network(x, t / 40),
        torch.randn(3, 6).unbind(),
        samplers.ddim(steps=9),
        px.Picard(),
        rows_per_round=3,
    )
    next(stream)
    with pytest.raises(ValueError, match="runs of a stream cannot be saved"):
        stream.runs[0].state_dict()
