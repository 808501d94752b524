"""The loop of a diffusers scheduler, stepped by itself: with random numbers, or with unit vectors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["NoiseInterceptor", "SchedulerLoop", "UnitResponses"]

Array = NDArray[np.float64]


RANDOM = (
    *(torch.rand, torch.rand_like, torch.randn_like, torch.randint, torch.randint_like, torch.normal),
    *(torch.multinomial, torch.bernoulli, torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_),
)


class UnitResponses(NamedTuple):
    """What unit vectors show of a scheduler, in the coordinates of the network's input.

    Attributes:
        states: (N, N) S.
        outputs: (N, N) F.
        noise: (N, K) Z.
        scale: (N + 1,) network input over state; the last is 1.
        memory: (N, 2) p and q of what the scheduler remembers of each step; 0 and 1 where that is the output itself.
        data: (N, 2) p and q of the data prediction that it returns, or None.
        draw_steps: (K,) the step that makes each draw.
    """

    states: Array
    outputs: Array
    noise: Array
    scale: Array
    memory: Array
    data: Array | None
    draw_steps: tuple[int, ...]


class SchedulerLoop:
    """The loop of a scheduler; every run steps a fresh copy, on the CPU."""

    def __init__(self, scheduler: Any, timesteps: Tensor | None, options: dict[str, Any]) -> None:
        self.name = type(scheduler).__name__
        if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "timesteps"):
            raise TypeError(
                f"scheduler must have timesteps and step(output, t, sample), as diffusers' have, got {self.name}."
            )
        timesteps = scheduler.timesteps if timesteps is None else timesteps
        if timesteps is None or not len(timesteps):
            raise ValueError(f"{self.name} has no timesteps: call its set_timesteps first.")
        if getattr(scheduler, "step_index", None):
            raise ValueError(
                f"{self.name} has taken {scheduler.step_index} steps already: call its set_timesteps again first."
            )
        known = inspect.signature(scheduler.step).parameters
        for option in options:
            if option not in known or option in ("generator", "return_dict"):
                raise TypeError(f"step of {self.name} takes no option {option!r}, but {', '.join(known)}.")
        self._scheduler, self.options = scheduler, options
        self._seeded = "generator" in known
        self.times = torch.as_tensor(timesteps).detach().cpu()
        self.steps = len(self.times)

    def config(self, option: str) -> Any:
        """Return an option of the scheduler's configuration, or None."""
        return getattr(self._scheduler, "config", {}).get(option)

    def unsupported(self, reason: str) -> ValueError:
        """Return the error that says why this scheduler is not supported."""
        return UnsupportedScheduler(f"{self.name} is not supported: {reason}.")

    def fresh(self, off: Sequence[str] = ()) -> Any:
        """Return a copy of the scheduler on the CPU, with these options of its configuration off."""
        scheduler = copy.deepcopy(self._scheduler)
        for name, value in list(vars(scheduler).items()):
            if isinstance(value, Tensor):
                setattr(scheduler, name, value.cpu())
        if off:
            scheduler.register_to_config(**dict.fromkeys(off, False))
        return scheduler

    def first(self) -> float:
        """Return the first state over standard normal noise."""
        return float(getattr(self._scheduler, "init_noise_sigma", 1.0))

    def scale_input(self, scheduler: Any, i: int, x: Tensor) -> Tensor:
        """Return the network's input at state i."""
        return scheduler.scale_model_input(x, self.times[i]).to(x) if hasattr(scheduler, "scale_model_input") else x

    def step(self, scheduler: Any, i: int, f: Tensor, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Return state i + 1 and, where the scheduler returns it, the data prediction."""
        options = {**self.options, "generator": generator} if self._seeded else self.options
        try:
            result = scheduler.step(f, self.times[i], x, **options)
        except UnsupportedScheduler:
            raise
        except Exception as error:
            variance = str(self.config("variance_type"))
            if variance.startswith("learned"):
                raise self.unsupported(
                    f"variance_type={variance!r} makes the noise a function of the output"
                ) from error
            said = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no reason"
            raise self.unsupported(
                f"step {i} of a loop of step(output, t, sample) raised {type(error).__name__}, {said}"
            ) from error
        state = result.prev_sample if hasattr(result, "prev_sample") else result[0]
        if not isinstance(state, Tensor) or state.shape != x.shape or not state.is_floating_point():
            raise self.unsupported(f"step {i} does not return a floating-point state of the shape of its input")
        return state.to(x), getattr(result, "pred_original_sample", None)

    def run(self, noise: Tensor, network: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Run the loop, with noise drawn with seed 0.

        Returns:
            The network's inputs and, last, the sample (B, N + 1, ..); the outputs (B, N, ..).
        """
        scheduler, generator = self.fresh(), torch.Generator().manual_seed(0)
        x = noise * self.first()
        states, outputs = [], []
        for i in range(self.steps):
            states.append(self.scale_input(scheduler, i, x))
            outputs.append(network(i, states[-1]))
            x, _ = self.step(scheduler, i, outputs[-1], x, generator)
        return torch.stack([*states, x], 1), torch.stack(outputs, 1)

    def unit_responses(self, draws: int, off: Sequence[str]) -> UnitResponses:
        """Read S, F and Z: one walk in which every state, output and draw is a unit vector of its scheduler."""
        steps, scheduler, generator = self.steps, self.fresh(off), torch.Generator()
        size = 2 * steps + draws

        def unit(index: int) -> Tensor:
            vector = torch.zeros(1, 1, 1, size, dtype=torch.float64)
            vector[..., index] = 1
            return vector

        rows, scale = np.zeros((steps, size)), np.ones(steps + 1)
        memory, data = np.tile([0.0, 1.0], (steps, 1)), np.full((steps, 2), np.nan)
        draw_steps: list[int] = []
        with NoiseInterceptor(self, (1, 1, 1, size), lambda k: unit(2 * steps + k)) as interceptor:
            for i in range(steps):
                x = unit(i)
                u = self.scale_input(scheduler, i, x)
                scale[i] = float(u[..., i])
                if scale[i] == 0 or not torch.equal(u, scale[i] * x):
                    raise self.unsupported(f"scale_model_input of step {i} does not multiply the state by a number")
                x, predicted = self.step(scheduler, i, unit(steps + i), x, generator)
                draw_steps += [i] * (interceptor.count - len(draw_steps))
                rows[i] = x.flatten().numpy()
                for target, tensors in ((memory, _tensors(vars(scheduler))), (data, [predicted])):
                    for tensor in tensors:
                        if isinstance(tensor, Tensor) and tensor.numel() == size and tensor.flatten()[steps + i] != 0:
                            entries = tensor.flatten().double().numpy()
                            if set(np.flatnonzero(entries)) <= {i, steps + i}:
                                target[i] = entries[i] / scale[i], entries[steps + i]
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            raise self.unsupported(f"a coefficient of step {int(np.argmin(finite))} is infinite")
        rows *= scale[1:, None]
        has_data = bool(np.isfinite(data).all() and data[:, 1].all())
        states, outputs, noise = np.split(rows, [steps, 2 * steps], axis=1)
        return UnitResponses(
            states / scale[:-1], outputs, noise, scale, memory, data if has_data else None, tuple(draw_steps)
        )

    def alpha_sigma(self) -> tuple[Array, Array] | None:
        """Return (alpha, sigma) of the times, (N,) each, by the scheduler's own way to add noise, or None."""
        scheduler = self.fresh()
        schedule = np.zeros((self.steps, 2))
        try:
            for i, t in enumerate(self.times[:, None]):
                for kind in range(2):
                    for name in ("_step_index", "_begin_index"):  # in the middle of a loop t would not matter
                        if hasattr(scheduler, name):
                            setattr(scheduler, name, None)
                    data, noise = torch.eye(2, dtype=torch.float64)[kind].view(2, 1, 1, 1, 1)
                    mixed = (
                        scheduler.add_noise(data, noise, t)
                        if hasattr(scheduler, "add_noise")
                        else scheduler.scale_noise(data, t, noise)
                    )
                    schedule[i, kind] = float(mixed)
        except Exception:  # it has no such way, or not for these times
            return None
        alpha, sigma = schedule.T
        return (alpha, sigma) if np.isfinite(schedule).all() and (sigma > 0).all() else None


def _tensors(values: Any) -> Iterator[Tensor]:
    """Find the tensors in an object's attributes."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


class UnsupportedScheduler(ValueError):
    """A scheduler is not supported; raised also from inside its step."""


class NoiseInterceptor(TorchFunctionMode):
    """Counts the noise that a scheduler draws; with ``unit``, draw k returns ``unit(k)``.

    Attributes:
        count: Draws so far.
        dtype: Of the noise, where it differs from that of the states; else None.
    """

    def __init__(
        self, loop: SchedulerLoop, shape: tuple[int, ...], unit: Callable[[int], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.loop, self.shape, self.unit = loop, shape, unit
        self.count = 0
        self.dtype: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RANDOM:
            raise self.loop.unsupported(
                f"it draws with {func.__name__}, not with randn from the generator passed to it"
            )
        result = func(*args, **(kwargs or {}))
        if func is not torch.randn:
            return result
        if (kwargs or {}).get("generator") is None:
            raise self.loop.unsupported("it draws noise, but not from the generator passed to it")
        if tuple(result.shape) != self.shape:
            raise self.loop.unsupported(
                f"it draws noise of shape {tuple(result.shape)} for states of shape {self.shape}"
            )
        self.dtype = None if result.dtype == torch.float64 else result.dtype
        self.count += 1
        return result if self.unit is None else self.unit(self.count - 1).to(result.dtype)
