"""Schedulers that a loop steps: which it can see, and what it makes of the steps while they are watched."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..samplers.from_scheduler import from_scheduler
from ..samplers.sampler import Sampler
from .loop import names_in

__all__ = [
    "SchedulerStep",
    "is_scheduler",
    "read_sampler",
    "schedulers_in",
    "unwatched_copy",
    "watch",
    "writes_past_versions",
]

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
    names = set().union(*(vars(base) for base in kind.__mro__))  # not by getattr: placeholders of packages raise
    return {"step", "set_timesteps"} <= names


def schedulers_in(values: Iterable[Any]) -> list[Any]:
    """Return the schedulers among objects and within modules among them, and the classes of schedulers.

    Functions among the objects may make a scheduler of their own: their code names its class.
    """
    schedulers: dict[int, Any] = {}
    values = list(values)
    code = [value.__code__ for value in values if isinstance(value, FunctionType)]
    makes_steps = not code or any("step" in names_in(c) for c in code)  # a class may be there for its schedule alone
    for value in values:
        parts = [value]
        if _holds(value):
            parts = [held for part in value.modules() for held in vars(part).values()]
        elif isinstance(value, FunctionType):
            parts = _classes_named_in(value)
        schedulers |= {
            id(part): part for part in parts if (makes_steps and _is_named_class(part)) or is_scheduler(part)
        }
    return list(schedulers.values())


def writes_past_versions(values: Iterable[Any]) -> bool:
    """Return whether code among objects names ``.data``: what is written there leaves no trace in a parameter.

    Looked at are functions, methods and objects that are called, such as callbacks with a memory of their own.
    """
    for value in values:
        called = getattr(value, "__func__", value)
        if not isinstance(called, (FunctionType, nn.Module)):
            kinds = type(value).__mro__
            called = next((vars(kind)["__call__"] for kind in kinds if "__call__" in vars(kind)), None)
        if isinstance(called, FunctionType) and "data" in names_in(called.__code__):
            return True
    return False


def _holds(value: Any) -> bool:
    return isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule)


def _is_named_class(value: Any) -> bool:
    return isinstance(value, type) and _is_scheduler_class(value)


def _classes_named_in(function: FunctionType) -> list[Any]:
    """Return the classes of diffusers' schedulers that a function imports itself, or takes from the package."""
    package = sys.modules.get("diffusers")
    names = [name for name in names_in(function.__code__) if name.endswith("Scheduler")]
    return [getattr(package, name, None) for name in names] if package is not None else []


Stepped = Callable[[SchedulerStep, Callable[[], Any]], Any]


@contextmanager
def watch(schedulers: Sequence[Any], stepped: Stepped) -> Iterator[None]:
    """Send the steps of schedulers in this thread through ``stepped(step, run)``, which returns what ``run()`` returns.

    Loops inspect the signature of ``step`` to find out which options it takes: the watched one keeps it.

    Args:
        schedulers: Objects, and classes, all of whose objects are watched.
        stepped: See above; steps that are made within it are not watched.
    """
    thread, busy = threading.get_ident(), False

    def watched(step: SchedulerStep, run: Callable[[], Any]) -> Any:
        nonlocal busy
        if busy or threading.get_ident() != thread:
            return run()
        busy = True
        try:
            return stepped(step, run)
        finally:
            busy = False

    with ExitStack() as stack:
        for scheduler in schedulers:
            if not isinstance(scheduler, type):
                stack.enter_context(_watched_object(scheduler, watched))
        for kind in schedulers:
            if isinstance(kind, type):
                stack.enter_context(_watched_class(kind, watched))
        yield


@contextmanager
def _watched_object(scheduler: Any, stepped: Stepped) -> Iterator[None]:
    before = scheduler.__dict__.get("step")
    scheduler.__dict__["step"] = _WatchedStep(scheduler, stepped)
    try:
        yield
    finally:
        if before is None:
            del scheduler.__dict__["step"]
        else:
            scheduler.__dict__["step"] = before


class _WatchedStep:
    """In the place of a scheduler's ``step``."""

    def __init__(self, scheduler: Any, stepped: Stepped) -> None:
        self.scheduler, self.stepped = scheduler, stepped
        self.original = scheduler.step
        functools.update_wrapper(self, self.original)
        self._names = tuple(inspect.signature(self.original).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _send(self.scheduler, self.original, self._names, self.stepped, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A loop may copy its scheduler: the copy steps by itself.
        twin = memo.get(id(self.scheduler))
        return self.original if twin is None else type(twin).step.__get__(twin)


_REPLACING = threading.Lock()
_WATCHED: dict[type, dict[int, Stepped]] = {}  # classes whose ``step`` is replaced: by thread, who watches


@contextmanager
def _watched_class(kind: Any, stepped: Stepped) -> Iterator[None]:
    """Watch all objects of a class in this thread; its ``step`` is put back when no thread watches any more."""
    thread = threading.get_ident()
    with _REPLACING:
        if kind not in _WATCHED:
            _WATCHED[kind] = {}
            _replace_step(kind, _WATCHED[kind])
        watchers = _WATCHED[kind]
        before = watchers.get(thread)
        watchers[thread] = stepped
    try:
        yield
    finally:
        with _REPLACING:
            if before is None:
                del watchers[thread]
            else:
                watchers[thread] = before
            if not watchers:
                del _WATCHED[kind]
                _put_back_step(kind)


def _replace_step(kind: Any, watchers: dict[int, Stepped]) -> None:
    original, inherited = kind.step, "step" not in vars(kind)
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        stepped = watchers.get(threading.get_ident())
        if stepped is None or type(scheduler) is not kind:
            return original(scheduler, *args, **kwargs)
        return _send(scheduler, functools.partial(original, scheduler), names, stepped, args, kwargs)

    step.__dict__["inherited"] = inherited
    kind.step = step


def _put_back_step(kind: Any) -> None:
    step = vars(kind)["step"]
    if step.inherited:
        del kind.step
    else:
        kind.step = step.__wrapped__


def _send(
    scheduler: Any, original: Callable[..., Any], names: Sequence[str], stepped: Stepped, args: Any, kwargs: Any
) -> Any:
    """Send a call of ``step`` on, if it is one of (output, t, sample)."""
    run = functools.partial(original, *args, **kwargs)
    if len(args) == 3 and isinstance(args[0], Tensor) and isinstance(args[2], Tensor):  # as it is called mostly
        options = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
        output, t, sample = args
        return stepped(SchedulerStep(scheduler, output, t, sample, kwargs.get("generator"), options), run)
    values = dict(zip(names, args, strict=False)) | kwargs
    first = [name for name in names if name in values][:3]
    if len(first) < 3 or not all(isinstance(values[first[i]], Tensor) for i in (0, 2)):
        return run()
    output, t, sample = (values.pop(name) for name in first)
    generator = values.pop("generator", None)
    options = {name: value for name, value in values.items() if name != "return_dict"}
    return stepped(SchedulerStep(scheduler, output, t, sample, generator, options), run)


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
