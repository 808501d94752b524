"""Stubs instead of module calls, for as long as a loop is solved.

A stub takes the whole call of a module: hooks, compiled code and offloading stay inside what it replaces.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

__all__ = ["AlreadyParallel", "Stub", "StubSwitch", "has_stub", "install"]

_MISSING = object()
_REPLACING = threading.Lock()

OriginalCall = Callable[..., Any]


class AlreadyParallel(RuntimeError):
    """A denoiser's calls are replaced for another loop."""


class StubSwitch:
    """Whether stubs answer: not while real modules run, and not in other threads.

    Attributes:
        thread: The thread that the loop runs in.
    """

    def __init__(self) -> None:
        """Let stubs answer in this thread."""
        self.thread = threading.get_ident()
        self._running = 0  # real modules

    @property
    def is_off(self) -> bool:
        """Whether real modules run."""
        return self._running > 0

    @property
    def answers(self) -> bool:
        """Whether a stub that is called now answers."""
        return not self._running and threading.get_ident() == self.thread

    def off(self) -> StubSwitch:
        """Return a context in which real modules run."""
        return self

    def __enter__(self) -> None:
        self._running += 1

    def __exit__(self, *raised: object) -> None:
        self._running -= 1


class Stub:
    """In the place of a call: it answers the loop; real modules, and other threads, make the call itself.

    Attributes:
        held: What its owner held in this place: one value, or none where the call is that of its class.
    """

    def __init__(
        self, switch: StubSwitch, original: OriginalCall, answer: Callable[[Any, Any], Any], held: Sequence[Any] = ()
    ) -> None:
        self.switch, self.original, self.answer, self.held = switch, original, answer, held
        self.__wrapped__ = original  # whoever looks at what a network holds looks behind its stub
        # A function that is given the stub: a method of its own would be a cycle, which keeps all that a call holds.
        self._uncompiled = _uncompiled()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer, or make the call itself; a function that somebody compiles is compiled around its stubs."""
        if self.switch.is_off:
            return self.original(*args, **kwargs)
        return self._uncompiled(self, args, kwargs) if torch.compiler.is_compiling() else _either(self, args, kwargs)


def _either(stub: Stub, args: Any, kwargs: Any) -> Any:
    return stub.answer(args, kwargs) if stub.switch.answers else stub.original(*args, **kwargs)


def _uncompiled() -> Callable[[Stub, Any, Any], Any]:
    """Return the same for whoever compiles what calls a stub."""
    # Importing Dynamo takes seconds, and nobody has compiled anything without it.
    return _disabled() if "torch._dynamo" in sys.modules else _either


@cache
def _disabled() -> Callable[[Stub, Any, Any], Any]:
    disabled: Callable[[Stub, Any, Any], Any] = torch.compiler.disable(_either)  # type: ignore[no-untyped-call]
    return disabled


def has_stub(module: nn.Module) -> bool:
    """Return whether a module's call is a stub at the moment."""
    return _stub(module, "_compiled_call_impl") is not None


@contextmanager
def install(
    switch: StubSwitch,
    denoisers: Sequence[nn.Module],
    methods: Sequence[tuple[Any, str]],
    answer_denoiser: Callable[[int, Any, Any], Any],
    answer_method: Callable[[int, OriginalCall, Any, Any], Any],
) -> Iterator[list[OriginalCall]]:
    """Replace calls by stubs, and put everything back at the end.

    Args:
        switch: Whether the stubs answer.
        denoisers: Modules; ``answer_denoiser(number, args, kwargs)`` answers their calls.
        methods: (object, name of its method; ``__call__`` for a module itself);
            ``answer_method(number, original, args, kwargs)`` answers these.
        answer_denoiser: See above.
        answer_method: See above.

    Yields:
        The denoisers' own calls.

    Raises:
        AlreadyParallel: If the calls of a denoiser are replaced already, or those of another module in another thread.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []

    def put(owner: Any, name: str, original: OriginalCall, answer: Callable[[Any, Any], Any]) -> None:
        # Through __dict__: wrapped modules send ordinary assignments on to what they wrap.
        before = owner.__dict__.get(name, _MISSING)
        replaced.append((owner.__dict__, name, before))
        owner.__dict__[name] = Stub(switch, original, answer, () if before is _MISSING else (before,))

    # A module's call looks for this attribute first, whatever its class does.
    places = [(owner, "_compiled_call_impl" if name == "__call__" else name) for owner, name in methods]
    try:
        with _REPLACING:
            stubs = [stub for owner, name in places if (stub := _stub(owner, name)) is not None]
            beside = any(stub.switch.thread != switch.thread for stub in stubs)
            if beside or any(has_stub(module) for module in denoisers):
                raise AlreadyParallel(
                    "another parallel loop is calling a module of this one: loops that share modules cannot run inside "
                    "one another, nor in two threads at the same time."
                )
            originals = []
            for number, module in enumerate(denoisers):
                originals.append(_original(module))
                put(module, "_compiled_call_impl", originals[-1], partial(answer_denoiser, number))
                put(module, "forward", module.forward, partial(answer_denoiser, number))  # some loops call it directly
            for number, (owner, name) in enumerate(places):
                original = _original(owner) if name == "_compiled_call_impl" else getattr(owner, name)
                put(owner, name, original, partial(answer_method, number, original))
        yield originals
    finally:
        with _REPLACING:
            for place, name, value in reversed(replaced):
                if value is _MISSING:
                    del place[name]
                else:
                    place[name] = value


def _stub(owner: Any, name: str) -> Stub | None:
    stub = owner.__dict__.get(name)
    return stub if isinstance(stub, Stub) else None


def _original(module: nn.Module) -> OriginalCall:
    """Return what a call of the module runs, hooks and compiled code included."""
    compiled = module.__dict__.get("_compiled_call_impl")
    return module._call_impl if compiled is None else partial(_call_compiled, module, compiled)


def _call_compiled(module: nn.Module, compiled: OriginalCall, *args: Any, **kwargs: Any) -> Any:
    """Call a module that was compiled in place, with its own ``forward`` in the place of a stub.

    Dynamo begins to compile at ``forward``: behind a stub it would begin at the stub's code, so every shape that is
    compiled already would be compiled again, and all networks together would count towards its limit.
    """
    stub = module.__dict__.get("forward")
    if not isinstance(stub, Stub):
        return compiled(*args, **kwargs)
    module.__dict__["forward"] = stub.original
    try:
        return compiled(*args, **kwargs)
    finally:
        module.__dict__["forward"] = stub
