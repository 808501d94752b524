"""Stop a solve between two rounds, and go on with it in another process, to the same bits.

What a run is, between two rounds, is a few tensors: the window of states, its latest outputs, what was measured of its
steps, and the random stream if its solver draws. Their number does not grow with the rounds. Everything else follows
from the arguments of :func:`parataxis.start`, which has to be called again with the same ones; a state that was saved
with others is refused.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import is_int
from .fingerprint import fingerprint
from .solution import Round

if TYPE_CHECKING:
    from .rows import EvalBatch
    from .run import Run

__all__ = ["Interruptions", "load_runs", "run_state", "restore_run", "save_runs"]

FORMAT = 1  # of the file; another one when what solvers keep changes
GROWING = ("memory.rows", "memory.changes")  # Parareal's: as many as there are by now
STEPS = ("lo", "hi", "step", "evaluated_until", "last_step", "last_evaluated")
COUNTS = ("rounds", "evaluations", "peak_width")


def run_state(run: Run) -> dict[str, Tensor]:
    """Return what a run is between two rounds; see :meth:`parataxis.Run.state_dict`."""
    batch, place = run.group.batch, run.place
    _check_can_be_saved(run)
    if not run.done:
        run.group.ask()  # the solver sets up its memory
    about = {**_arguments(run), "reason": run._reason, "accepted": run.accepted, "error": run.error}
    about |= {name: getattr(run, name) for name in COUNTS}
    if place in batch.streams:
        about["stream"] = batch.streams[place].bit_generator.state
    state = {"about": _packed(about), "history": torch.tensor(run.history, dtype=torch.float64).view(-1, 3)}
    state["bounded"] = torch.tensor(bool(batch.bounded[place]))
    state["output_rounding"] = torch.tensor(batch.output_rounding, dtype=torch.float64)
    if run._final is not None:
        state["final"] = run._final.clone()
    trajectory = run._trajectory if run.done else None if batch.trajectory is None else batch.trajectory[place]
    if trajectory is not None:
        state["trajectory"] = trajectory.clone()
    noise = batch.recurrence.noise
    if noise is not None and noise is not batch.noise_owner:  # the solver has drawn some of it anew
        state["noise"] = noise[place].flatten(1).clone()
    if not run.done:
        assert batch.memory is not None
        for name, value in batch.memory.state(place).items():
            state[f"memory.{name}"] = _tensor(value).clone()  # the solver goes on in its own memory
    return state


def _tensor(value: Any) -> Tensor:
    # Through an array: torch 2.4 warns at numpy's scalars.
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def restore_run(run: Run, state: dict[str, Tensor]) -> None:
    """Go on from the state of a run; see :meth:`parataxis.Run.load_state_dict`."""
    batch, place = run.group.batch, run.place
    _check_can_be_saved(run)
    if run.rounds or run.done:
        raise ValueError(f"{run!r} has begun already: load a state into a run that has just been started.")
    about = _unpacked(state)
    differing = {name: (about.get(name), value) for name, value in _arguments(run).items() if about.get(name) != value}
    if differing:
        texts = "; ".join(f"{name}: saved {saved}, now {now}" for name, (saved, now) in differing.items())
        raise ValueError(f"this state is of another solve ({texts}): start the run with the same arguments.")
    run.group.ask()  # the solver sets up its memory
    assert batch.memory is not None
    _check_state(state, about, run)
    for name in COUNTS:
        setattr(run, name, about[name])
    run.history = [Round(int(a), int(w), float(e)) for a, w, e in state["history"].tolist()]
    batch.accepted[place], batch.error[place] = about["accepted"], about["error"]
    batch.bounded[place] = bool(state["bounded"])
    batch.output_rounding = float(state["output_rounding"])
    if "stream" in about:
        stream = np.random.default_rng()
        stream.bit_generator.state = about["stream"]
        batch.streams[place] = stream
    if "noise" in state:
        rows = state["noise"].to(batch.start)
        steps = torch.arange(len(rows)) + place * len(rows)
        batch.replace_noise(steps.to(rows.device), rows)
    trajectory = state.get("trajectory")
    if trajectory is not None and batch.trajectory is not None:
        batch.trajectory[place] = trajectory.to(batch.start)
    if about["reason"]:
        batch.finished[place] = True
        run._trajectory = None if trajectory is None or batch.trajectory is None else batch.trajectory[place]
        run._end(about["reason"], state["final"].to(batch.start))
    else:
        prefix = "memory."
        batch.memory.load(
            place, {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        )
    run.group.changed = True


def save_runs(path: str | Path, runs: Sequence[Run]) -> None:
    """Write the runs of one call of :func:`parataxis.start` as safetensors, between two rounds.

    Args:
        path: Of the file. It is replaced at once when the new one is complete, so that none is ever half written.
        runs: All of them, in their order.

    Raises:
        ValueError: If a run cannot be saved (see :meth:`parataxis.Run.state_dict`), or the file cannot be written.
    """
    tensors = {f"{run.place}.{name}": value for run in runs for name, value in run_state(run).items()}
    path, part = Path(path), Path(f"{path}.{os.getpid()}.part")  # two processes may write at once
    try:
        # Contiguous copies: a safetensors file holds no tensor twice, and some of these may share memory.
        save_file(
            {name: value.cpu().contiguous().clone() for name, value in tensors.items()},
            part,
            metadata={"parataxis": str(FORMAT), "runs": str(len(runs))},
        )
        os.replace(part, path)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({error}): choose another path.") from error


def load_runs(path: str | Path, runs: Sequence[Run]) -> None:
    """Go on with the runs that :func:`save_runs` has written.

    Args:
        path: Of the file.
        runs: Just started, with the same arguments as those that were saved.

    Raises:
        ValueError: If the file cannot be read, is none of these, or is of another solve; it is named, and so is what
            differs.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a saved solve ({error}): write it by save_runs.") from error
    if about.get("parataxis") != str(FORMAT):
        raise ValueError(f"{path} is no saved solve of this version of parataxis: write it by save_runs.")
    if about.get("runs") != str(len(runs)):
        raise ValueError(f"{path} has {about.get('runs')} samples, and {len(runs)} were started: start as many.")
    for run in runs:
        prefix = f"{run.place}."
        state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            restore_run(run, state)
        except (KeyError, RuntimeError, TypeError, IndexError, AttributeError, OverflowError, StopIteration) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): begin anew without it.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class Interruptions:
    """Let Ctrl-C and SIGTERM end a solve only where its state can be saved: while the network works.

    Within ``with Interruptions() as interruptions``, both raise ``KeyboardInterrupt``, at once in what
    :meth:`during` wraps, and elsewhere when that is entered next. Other threads than the main one receive no signals,
    so nothing changes there.
    """

    def __init__(self) -> None:
        self._open, self._pending = False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        """Take over both signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        """Give them back; one that has come since the network was last called counts still."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pending and error[0] is None:
            raise KeyboardInterrupt

    def during(self, evaluate: Callable[[EvalBatch], Tensor]) -> Callable[[EvalBatch], Tensor]:
        """Return the same function, in which a solve may be interrupted."""

        def interruptible(rows: EvalBatch) -> Tensor:
            with self._opened():
                return evaluate(rows)

        return interruptible

    @contextmanager
    def _opened(self) -> Iterator[None]:
        self._open = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._open = False

    def _receive(self, number: int, frame: object) -> None:
        self._pending = True
        if self._open:
            before = self._before.get(number)
            if callable(before):  # whoever listens to this signal is told too
                before(number, frame)
            raise KeyboardInterrupt


def _check_can_be_saved(run: Run) -> None:
    batch = run.group.batch
    if batch.refilled:
        raise ValueError("runs of a stream cannot be saved: draw the samples as a batch, by px.start and px.drive.")
    if batch.recurrence.replays:
        raise ValueError("a run over a recorded loop cannot be saved: the loop itself is part of its state.")


def _arguments(run: Run) -> dict[str, Any]:
    """Return what identifies a solve."""
    batch, problem, place = run.group.batch, run.group.batch.problem, run.place
    noise, guess, redrawn = batch.noise_owner, batch.guess, batch.recurrence.redrawn
    added = None if noise is None else noise[place].cpu()
    if redrawn is not None:
        added = redrawn.identity(place)
    return {
        "solver": repr(run.solver),
        "steps": problem.steps,
        "shape": list(run.group.shape),
        "dtype": str(run.group.dtype),
        "tolerance": problem.tolerance,
        "frozen_steps": problem.frozen_steps,
        "sampler": fingerprint(problem.coefficients),
        "noise": fingerprint(batch.start[place].cpu()),
        "added": None if added is None else fingerprint(added),
        "guess": None if guess is None else fingerprint(guess[place].cpu()),
    }


def _check_state(state: dict[str, Tensor], about: dict[str, Any], run: Run) -> None:
    """Raise unless all parts have the forms that this run's own have: torch would spread a wrong one over a window."""
    batch, steps = run.group.batch, run.problem.steps
    assert batch.memory is not None
    like: dict[str, Any] = {"bounded": torch.tensor(True), "output_rounding": torch.tensor(0.0, dtype=torch.float64)}
    if about["reason"]:
        like["final"] = batch.start[run.place]
    else:
        like |= {f"memory.{name}": _tensor(value) for name, value in batch.memory.state(run.place).items()}
    if batch.trajectory is not None:
        like["trajectory"] = batch.trajectory[run.place]
    if "noise" in state and batch.noise is not None:
        like["noise"] = batch.noise[run.place]
    for name, expected in like.items():
        value, first = state[name], 1 if name in GROWING else 0
        if (value.ndim, value.shape[first:], value.dtype) != (expected.ndim, expected.shape[first:], expected.dtype):
            raise TypeError(
                f"{name} is {value.dtype} {tuple(value.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
            )
    for name in STEPS:
        step = int(state.get(f"memory.{name}", 0))
        if not -1 <= step <= steps:
            raise TypeError(f"{name} is {step}, and the loop has {steps} steps")
    counts = {**{name: about[name] for name in COUNTS}, "accepted": about["accepted"]}
    for name, count in counts.items():
        if not is_int(count, 0) or (name == "accepted" and count > steps):
            raise TypeError(f"{name} is {count!r}, expected a whole number of at least 0")
    if not isinstance(about["error"], (int, float)) or state["history"].shape != (about["rounds"], 3):
        raise TypeError(f"error is {about['error']!r}, and {tuple(state['history'].shape)} rounds are described")


def _packed(value: Any) -> Tensor:
    """Return JSON as bytes: safetensors holds texts for a whole file only."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()


def _unpacked(state: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(state, dict) or "about" not in state:
        raise ValueError("this is no state of a run: pass what Run.state_dict returned.")
    about: dict[str, Any] = json.loads(state["about"].numpy().tobytes())
    return about
