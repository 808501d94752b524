"""Schedulers that a loop steps: which it can see, and what it makes of the steps while they are watched."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..samplers.from_scheduler import from_scheduler
from ..samplers.sampler import Sampler

__all__ = ["SchedulerStep", "is_scheduler", "read_sampler", "schedulers_in", "unwatched_copy", "watch"]

MAX_CACHED_SAMPLERS = 32
_SAMPLERS: dict[Any, Sampler] = {}  # by what they were read from; the latest ones


class SchedulerStep(NamedTuple):
    """One call of a scheduler's ``step``.

    Attributes:
        scheduler: Whose.
        model_output: What the loop made of the network's outputs.
        t: The time, as the loop gave it.
        sample: The state x_i.
        generator: Of its noise: one, a list of them, or None for the default one.
        options: Other keyword arguments, such as eta.
    """

    scheduler: Any
    model_output: Tensor
    t: Any
    sample: Tensor
    generator: Any
    options: dict[str, Any]


def is_scheduler(value: Any) -> bool:
    """Return whether an object is stepped as diffusers' schedulers are: step(output, t, sample) at its timesteps."""
    kind: Any = type(value)
    return _is_scheduler_class(kind) and hasattr(value, "__dict__")


@functools.lru_cache(maxsize=1024)  # all that a network holds is looked at
def _is_scheduler_class(kind: Any) -> bool:
    if issubclass(kind, (type, nn.Module, torch.optim.Optimizer)):
        return False
    return callable(getattr(kind, "step", None)) and hasattr(kind, "set_timesteps")


def schedulers_in(values: Iterable[Any]) -> list[Any]:
    """Return the schedulers among objects and within modules among them."""
    schedulers: dict[int, Any] = {}
    for value in values:
        parts = [held for part in value.modules() for held in vars(part).values()] if _holds(value) else [value]
        schedulers |= {id(part): part for part in parts if is_scheduler(part)}
    return list(schedulers.values())


def _holds(value: Any) -> bool:
    return isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule)


@contextmanager
def watch(schedulers: Sequence[Any], stepped: Callable[[SchedulerStep, Callable[[], Any]], Any]) -> Iterator[None]:
    """Send the steps of schedulers through ``stepped(step, run)``, which returns what ``run()`` returns.

    Loops inspect the signature of ``step`` to find out which options it takes: the watched one keeps it.
    """
    watched = []
    try:
        for scheduler in schedulers:
            scheduler.__dict__["step"] = _WatchedStep(scheduler, stepped, scheduler.__dict__.get("step"))
            watched.append(scheduler)
        yield
    finally:
        for scheduler in watched:
            before = scheduler.__dict__["step"].before
            if before is None:
                del scheduler.__dict__["step"]
            else:
                scheduler.__dict__["step"] = before


class _WatchedStep:
    """In the place of a scheduler's ``step``."""

    def __init__(self, scheduler: Any, stepped: Callable[..., Any], before: Any) -> None:
        self.scheduler, self.stepped, self.before = scheduler, stepped, before
        self.original = scheduler.step
        functools.update_wrapper(self, self.original)
        self._names = tuple(inspect.signature(self.original).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(self.original, *args, **kwargs)
        if len(args) == 3 and isinstance(args[0], Tensor) and isinstance(args[2], Tensor):  # as it is called mostly
            options = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
            return self.stepped(SchedulerStep(self.scheduler, *args, kwargs.get("generator"), options), run)
        values = dict(zip(self._names, args, strict=False)) | kwargs
        names = [name for name in self._names if name in values][:3]
        if len(names) < 3 or not all(isinstance(values[names[i]], Tensor) for i in (0, 2)):
            return run()
        output, t, sample = (values.pop(name) for name in names)
        generator = values.pop("generator", None)
        options = {name: value for name, value in values.items() if name != "return_dict"}
        return self.stepped(SchedulerStep(self.scheduler, output, t, sample, generator, options), run)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A loop may copy its scheduler: the copy steps by itself.
        twin = memo.get(id(self.scheduler))
        return self.original if twin is None else type(twin).step.__get__(twin)


def unwatched_copy(scheduler: Any) -> Any:
    """Return a deep copy of a scheduler, whose steps are not watched."""
    twin = copy.copy(scheduler)
    twin.__dict__.pop("step", None)
    return copy.deepcopy(twin)


def read_sampler(scheduler: Any, first: int, options: dict[str, Any]) -> Sampler:
    """Return the sampler of a scheduler's timesteps from number ``first`` on, read once for its configuration.

    Raises:
        ValueError: If its loop is not linear; see :func:`from_scheduler`.
    """
    options = {
        name: value
        for name, value in options.items()
        if value is not inspect.signature(scheduler.step).parameters[name].default
    }
    held = {name: _trait(value) for name, value in vars(scheduler).items() if name != "_internal_dict"}
    key = (type(scheduler), first, repr(getattr(scheduler, "config", None)), repr(held), repr(options))
    sampler = _SAMPLERS.pop(key, None)
    if sampler is None:
        # Whatever the loop's own context is: the sampler outlives it.
        with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            sampler = from_scheduler(scheduler, timesteps=scheduler.timesteps[first:], **options)
    _SAMPLERS[key] = sampler
    if len(_SAMPLERS) > MAX_CACHED_SAMPLERS:
        del _SAMPLERS[next(iter(_SAMPLERS))]
    return sampler


def _trait(value: Any) -> Any:
    return value.detach().cpu().numpy().tobytes() if isinstance(value, Tensor) and value.numel() < 1 << 14 else value
