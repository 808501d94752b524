"""A loop that belongs to someone else, and what is kept of it from call to call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from .batch import Layout
from .calls import Output
from .structure import Structure
from .times import LoopTimes

if TYPE_CHECKING:
    from ..engine.distributed.ranks import Ranks
    from .module_watch import ModuleWatch

MOST_REFUSALS = 64  # that are remembered
MOST_CHANGES = 3  # of settings with which a loop that was refused is tried again: a counter changes at every call

__all__ = ["Loop", "Refusal", "check_denoisers", "is_library_object", "names_in", "reachable"]


class Refusal(NamedTuple):
    """Why calls of one key are not solved in parallel.

    Attributes:
        reason: Why.
        calls: How many there have been.
        settings: Of the loop at the latest call, see :meth:`.world.World.settings`.
        changes: How often it was tried again because they had changed.
    """

    reason: str
    calls: int = 1
    settings: int = 0
    changes: int = 0


@dataclass(eq=False)
class Loop:
    """A loop as it belongs to someone else, and what is kept of it from call to call.

    Attributes:
        run: Runs it once: ``run(args, kwargs, quiet)``; ``quiet`` leaves out callbacks and progress bars.
        denoisers: The modules that it calls at every step.
        memoized: Other costly calls: (object, name of its method; ``__call__`` for a module itself).
        unsupported: Returns why the loop cannot be solved in parallel in its present configuration, or None.
        state: What its numbers depend on besides its arguments (the scheduler's configuration).
        calls_back: Whether these keyword arguments hold a callback, which then runs once, in the final replay.
        on_round: Called after every round with the numbers of accepted steps and of all steps of the stage.
        outputs: Form of the output of every kind of call.
        layouts: How each kind of call is batched.
        limit: Most rows of a network call, lowered when memory runs out; None for no limit.
        buckets: The numbers of rows that such a call may have, in order; any, where there are none.
        structures: What stays the same of the first stage, by :meth:`key`; the latest ones.
        choices: Which solver was chosen, by :meth:`key`; the latest ones.
        changed_by_callbacks: Keys of calls whose callbacks change what the loop does.
        schedulers: Returns the schedulers that a call with these arguments can see, and classes of those it may make.
        recorded: Keys of calls that are recorded, because one pass found no step of a scheduler that it could foresee.
        foreseen: Keys of calls that one pass has foreseen.
        watch: What the denoisers held when one pass last looked at them.
        ranks: Those that share the network's calls; None without.
        times: What the unmodified loop takes.
        warned_floor: Whether the user has been warned that rounding moves the result by more than the tolerance.
        warned_slower: Whether the user has been warned that a call was slower than the unmodified loop.
        refused: Why calls were not solved in parallel, by :meth:`key`.
        owner: (name, object) that the loop reaches besides its arguments: the function itself, the pipeline.
    """

    run: Callable[[tuple[Any, ...], dict[str, Any], bool], Any]
    denoisers: tuple[nn.Module, ...]
    memoized: tuple[tuple[Any, str], ...] = ()
    unsupported: Callable[[], str | None] = lambda: None
    state: Callable[[], Any] = lambda: None
    calls_back: Callable[[dict[str, Any]], bool] = lambda kwargs: False
    on_round: Callable[[int, int], object] = lambda accepted, steps: None
    outputs: dict[Any, Output] = field(default_factory=dict)
    layouts: dict[Any, Layout] = field(default_factory=dict)
    limit: int | None = None
    buckets: tuple[int, ...] = ()
    structures: dict[Any, Structure] = field(default_factory=dict)
    choices: dict[Any, Any] = field(default_factory=dict)
    changed_by_callbacks: set[Any] = field(default_factory=set)
    schedulers: Callable[[tuple[Any, ...], dict[str, Any]], list[Any]] = lambda args, kwargs: []
    recorded: set[Any] = field(default_factory=set)
    foreseen: set[Any] = field(default_factory=set)
    watch: ModuleWatch | None = None
    ranks: Ranks | None = None
    times: LoopTimes = field(default_factory=LoopTimes)
    warned_floor: bool = False
    warned_slower: bool = False
    refused: dict[Any, Refusal] = field(default_factory=dict)
    owner: tuple[str, Any] = ("", None)

    @property
    def device(self) -> torch.device:
        """Where the denoisers are."""
        parameters = (parameter for denoiser in self.denoisers for parameter in denoiser.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @property
    def few_bits(self) -> bool:
        """Whether a denoiser computes in 16 bits, as its parameters or autocast say."""
        if torch.is_autocast_enabled(self.device.type):
            return True
        first = (next(denoiser.parameters(), None) for denoiser in self.denoisers)
        return any(value is not None and value.is_floating_point() and value.element_size() < 4 for value in first)

    def roots(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return what the loop reaches, by names: its owner, its arguments and its modules."""
        modules = [*self.denoisers, *(module for module, _ in self.memoized)]
        arguments = [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]
        return [self.owner, *arguments, *((type(module).__name__, module) for module in modules)]

    def known_refusal(self, key: Any, settings: Callable[[], int]) -> str | None:
        """Return why such a call cannot be solved in parallel, if that is known.

        With other settings it is tried again, and at times with the same.
        """
        refusal = self.refused.get(key)
        if refusal is None:
            return None
        now, calls = settings(), refusal.calls
        changed = now != refusal.settings and refusal.changes < MOST_CHANGES
        self.refused[key] = refusal._replace(calls=calls + 1, settings=now, changes=refusal.changes + changed)
        again = calls >= 3 and not (calls + 1) & calls  # the fourth call, the eighth, ...
        return None if again or changed else refusal.reason

    def refuse(self, key: Any, reason: str, settings: int) -> None:
        """Remember that such a call cannot be solved in parallel."""
        before = self.refused.get(key, Refusal(reason))
        self.refused[key] = before._replace(reason=reason, settings=settings)
        if len(self.refused) > MOST_REFUSALS:
            del self.refused[next(iter(self.refused))]

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the loop's coefficients may depend on: shapes, numbers and options, not texts and contents."""
        leaves, spec = tree_flatten((args, kwargs))
        training = tuple(
            getattr(denoiser, "training", False) for denoiser in self.denoisers
        )  # frozen TorchScript has none
        autocast = torch.is_autocast_enabled(self.device.type)
        return str(spec), tuple(_trait(leaf) for leaf in leaves), repr(self.state()), training, autocast


def _trait(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    return repr(leaf) if isinstance(leaf, (bool, int, float)) or leaf is None else type(leaf).__name__


def reachable(function: Any, *values: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the objects that a function can see: its arguments, its closure, the globals it names, its owner."""
    stack = [(function, 0), *((leaf, 0) for leaf in tree_leaves(values))]
    seen: set[int] = set()
    while stack:
        value, distance = stack.pop()
        if id(value) in seen or distance > depth:
            continue
        seen.add(id(value))
        yield value
        inside: list[Any] = []
        if isinstance(value, (type, ModuleType)):
            continue  # a class, or a package: what it names are no objects of the loop
        if isinstance(value, FunctionType):
            inside += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            inside += [value.__globals__[name] for name in names_in(value.__code__) if name in value.__globals__]
            inside += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, (list, tuple, dict)):
            inside += tree_leaves(value) if len(value) < 1000 else []
        elif isinstance(value, functools.partial):
            inside += [value.func, *value.args, *value.keywords.values()]
        elif not isinstance(value, (nn.Module, Tensor)):
            inside += [getattr(value, "__self__", None), getattr(value, "__func__", None)]
            inside += list(getattr(value, "__dict__", {}).values()) if not is_library_object(value) else []
        stack += [(held, distance + 1) for held in inside if held is not None]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def names_in(code: CodeType) -> set[str]:
    """Return the names that code looks up, functions within it included."""
    return set(code.co_names).union(*(names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def is_library_object(value: Any) -> bool:
    """Return whether an object is of a class of torch, numpy or Python itself."""
    return getattr(type(value), "__module__", "").split(".")[0] in ("torch", "numpy", "builtins")


def check_denoisers(denoisers: Sequence[nn.Module] | None) -> tuple[nn.Module, ...] | None:
    """Return the denoisers that were passed, or None for none, or raise."""
    if denoisers is None:
        return None
    modules = tuple(denoisers) if isinstance(denoisers, (list, tuple)) else None
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        names = [type(value).__name__ for value in modules or ()]
        got = type(denoisers).__name__ if modules is None else f"[{', '.join(names)}]"
        raise TypeError(f"denoisers must be a list of the modules that the loop calls, such as [unet], got {got}.")
    return modules
