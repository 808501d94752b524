"""The networks of a loop that runs once: stubs in their places, what they are called for, and what they hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Output, flatten_output
from .loop import Loop
from .merger import Merger
from .module_watch import ModuleWatch
from .purity import check_pure
from .signals import NotParallelizable
from .stubs import OriginalCall, StubSwitch, install
from .world import World

__all__ = ["Networks"]

FIRST_CALLS = 8  # of denoisers in a run
GRADIENTS = "the loop takes gradients through the denoiser: if it need not, call it in torch.no_grad()."


class Networks:
    """The denoisers of a loop.

    Attributes:
        switch: Whether stubs answer.
        watch: Whether the denoisers have changed since they were last evaluated.
        merger: Evaluates rows of many steps.
        real_calls: Calls of the loop that were evaluated for themselves.
        calls: All calls of networks.
        answers: Calls of the loop.
    """

    def __init__(self, loop: Loop, world: World | None = None) -> None:
        """Look at the denoisers; nothing runs yet. What they write and never read is skipped in a world."""
        self.loop, self._world = loop, world
        self.switch, self._looked = StubSwitch(), 0
        if loop.watch is None or loop.watch.changed(thorough=True):
            loop.watch = ModuleWatch(loop.denoisers)
        self.watch = loop.watch
        self.merger = Merger(self.evaluate, loop.layouts, loop.limit, loop.buckets, times=loop.times)
        self.real_calls = self.calls = 0
        self._trainable: dict[int, bool] = {}  # of every denoiser that was called with gradients enabled
        self.answers = 0
        self._seconds = 0.0  # of these answers
        self._kinds: set[Any] = set()  # of calls
        self._originals: list[OriginalCall] = []

    @contextmanager
    def installed(self, answer: Callable[[int, Any, Any], Any]) -> Iterator[None]:
        """Let ``answer(module, args, kwargs)`` answer the loop's calls."""

        def timed_answer(module: int, args: Any, kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return answer(module, args, kwargs)
            finally:
                self.answers += 1
                self._seconds += time.perf_counter() - started

        with install(self.switch, self.loop.denoisers, (), timed_answer, _no_method) as self._originals:
            yield

    def sequential_seconds(self, seconds: float) -> float:
        """Return about how long the loop takes by itself, if this run took so many seconds; 0 if that is not known."""
        single = [median(times) for kind in self._kinds if (times := self.loop.times.calls.get(kind))]
        return seconds - self._seconds + self.answers * sum(single) / len(single) if single else 0.0

    @property
    def trainable(self) -> bool:
        """Whether the unmodified loop's result would require gradients."""
        return any(self._trainable.values())

    def changed(self) -> bool:
        """Return whether the loop has changed the denoisers since they were last evaluated."""
        return self.watch.changed()

    def look(self) -> None:
        """Take the denoisers as they are now, behind evaluations: tables that fill in on a call are no change.

        They fill in on the first calls, which are looked at in full.
        """
        if self.calls != self._looked and self.watch.changed(thorough=self.calls <= FIRST_CALLS):
            self.watch.take()
        self._looked = self.calls

    def close(self) -> None:
        """Let go of what holds this object: a cycle would keep it until the garbage collector runs."""
        self.loop.limit = self.merger.limit
        del self.merger  # it calls :meth:`evaluate`

    def evaluate(self, module: int, args: Any, kwargs: Any) -> Any:
        """Call a denoiser."""
        self.calls += 1
        with self.switch.off():
            return self._originals[module](*args, **kwargs)

    def real(self, module: int, args: Any, kwargs: Any) -> Any:
        """Call a denoiser for the loop itself."""
        self.real_calls += 1
        return self.evaluate(module, args, kwargs)

    def check_gradients(self, module: int, leaves: Sequence[Any]) -> None:
        """Raise :class:`NotParallelizable` if the loop takes gradients through a call."""
        if not torch.is_grad_enabled():
            return
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise NotParallelizable(GRADIENTS)
        if module not in self._trainable:  # once a run: a walk through all modules takes as long as a small network
            parameters = self.loop.denoisers[module].parameters()
            self._trainable[module] = any(value.requires_grad for value in parameters)

    def observe(self, call: Call, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """Call a denoiser for the loop itself; a new form of call is checked by one or two calls more.

        Returns:
            What it returns, and the leaves of that; ``call`` takes its form.

        Raises:
            NotParallelizable: If the denoiser answers by more than its arguments.
        """
        kind = call.signature()
        self._kinds.add(kind)
        name = self.loop.denoisers[call.module].training, kind

        def run(args: Any, kwargs: Any) -> Any:
            return self.loop.times.call(kind, partial(self.evaluate, call.module, args, kwargs), call.device)

        self.real_calls += 1
        if name in self.loop.outputs:
            result = run(args, kwargs)
        else:
            with torch.no_grad():
                result, writes = check_pure(self.loop.denoisers[call.module], run, call, self._world)
                if writes:  # what it leaves in the loop's own tensors, the loop may go on from
                    result = run(args, kwargs)
            self.loop.outputs[name] = Output.of(result, writes=writes)
        self.look()
        leaves, spec, shell = flatten_output(result)
        call.output = Output(spec, self.loop.outputs[name].leaves, shell)
        # The tensors themselves, where they can be kept: the loop may pass them on to another denoiser.
        detached = [leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
        return result, detached


def _no_method(number: int, original: OriginalCall, args: Any, kwargs: Any) -> Any:
    raise AssertionError("no method is replaced in one pass.")
