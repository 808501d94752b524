"""The steps of a scheduler that a loop goes through, and what is left of them at any time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..samplers.recurrence import Recurrence
from ..samplers.sampler import Sampler
from .calls import Call
from .observation import ObservedStep, StepForm
from .schedulers import SchedulerStep, read_sampler
from .signals import NotParallelizable

__all__ = ["Chain"]


@dataclass(eq=False)
class Chain:
    """The steps of a scheduler, and which of them is next.

    Attributes:
        scheduler: Whose.
        sampler: Of the steps from ``first`` on.
        times: (N,) all timesteps.
        first: The first one that the loop makes.
        step: The next one.
        options: Of every step.
        generator: Of the noise.
        draw_dtype: What noise is drawn in.
        past: (input, model output) of the latest steps, as many as a step remembers.
    """

    scheduler: Any
    sampler: Sampler
    times: Tensor
    first: int
    step: int
    options: dict[str, Any]
    generator: Any
    draw_dtype: torch.dtype
    past: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._floats: list[float] = self.times.tolist()

    @property
    def count(self) -> int:
        """N."""
        return len(self._floats)

    @property
    def remembers(self) -> bool:
        """Whether later steps take the inputs and outputs of earlier ones."""
        return bool(self.past.maxlen)

    @property
    def left(self) -> int:
        """How many steps are left."""
        return len(self._floats) - self.step

    def expects(self, step: SchedulerStep) -> bool:
        """Return whether this is the next step."""
        return (
            step.scheduler is self.scheduler
            and self.left > 0
            and float(step.t) == self._floats[self.step]
            and step.options.keys() == self.options.keys()
            and all(step.options[name] is value or step.options[name] == value for name, value in self.options.items())
        )

    @classmethod
    def begin(cls, observed: ObservedStep) -> Chain:
        """Return the chain that an observed step begins.

        Raises:
            NotParallelizable: If its scheduler cannot be read.
        """
        step, before = observed.step, observed.before
        assert step is not None
        times = torch.as_tensor(before.timesteps).detach().cpu()
        first = getattr(before, "begin_index", None)
        if first is None:
            at = torch.nonzero(times.double() == float(step.t)).flatten()
            if not len(at):
                raise NotParallelizable("the loop steps its scheduler at a time that is none of its timesteps.")
            first = int(at[0])
        try:
            sampler = read_sampler(before, first, step.options)
        except (TypeError, ValueError) as error:
            raise NotParallelizable(f"its scheduler cannot be read: {error}") from error
        made_by = sampler.draw_steps or ()
        if any(i > made for made, draw in zip(made_by, sampler.draws or (), strict=True) for i, _ in draw):
            # The rest of such a loop would depend on noise that has been drawn and that nobody keeps.
            raise NotParallelizable(f"noise that {sampler.name} draws in one step enters later ones as well.")
        dtype = step.model_output.dtype
        lags = sampler.coefficients.lags
        return cls(
            step.scheduler, sampler, times, first, first, step.options, step.generator, dtype, deque(maxlen=lags)
        )

    def take(self, step: SchedulerStep, form: StepForm, call: Call | None) -> None:
        """Take a step that the loop has made, whose first call was ``call``: None if the chain remembers nothing."""
        self.step += 1
        if call is not None and self.remembers:
            inputs = form.inputs(call)
            self.past.append((inputs, step.model_output.detach().flatten(1).to(inputs.dtype, copy=True)))

    def recurrence(self, state: Tensor) -> tuple[Sampler, Recurrence]:
        """Return the sampler and the recurrence of the steps that are left, from the network's input (B, *shape)."""
        done = self.step - self.first
        sampler = self.sampler.tail(done)
        recurrence = sampler.recurrence(state, _copies(self.generator, state), self.draw_dtype)
        noise, weight = recurrence.noise, self.sampler.coefficients.output_weight
        entered = []  # what the latest steps' outputs are to the recurrence, the latest one last
        for back, (inputs, output) in enumerate(reversed(self.past), 1):
            index = torch.full((len(state),), done - back, device="cpu")
            entered.append(self.sampler.output(index, inputs.view(state.shape), output.reshape(state.shape)))
        if entered:
            noise = state.new_zeros(len(state), sampler.steps, *state.shape[1:]) if noise is None else noise
            lags = self.sampler.coefficients.lags
            for i in range(min(lags, sampler.steps)):
                for lag in range(i + 1, min(lags, i + len(entered)) + 1):
                    noise[:, i] += float(weight[done + i, lag]) * entered[lag - i - 1]
        return sampler, replace(recurrence, noise=noise)


def _copies(generator: Any, state: Tensor) -> Any:
    """Return copies of the loop's generators: of the default one of the device, where it passes none."""
    if isinstance(generator, (list, tuple)):
        return [_copies(part, state) for part in generator] if len(generator) > 1 else _copies(generator[0], state)
    if generator is None:
        generator = _default_generator(state.device)
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator
