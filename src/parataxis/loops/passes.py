r"""Passes: one run of a loop's own Python, with stubs in the place of its networks.

Every pass starts from the same random state, so it draws what the unmodified loop draws. A stub takes the whole call
of a module (hooks, compiled code and offloading stay inside what it replaces) and answers with what the present pass
is for: outputs at random, the affine model of earlier evaluations, or what a module said before. A pass that has seen
what it is for ends by a private exception.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from .merge import Call, Merger, Output, Refused, equal
from .recording import Changed, Ended, Stage, Structure, drawn

if TYPE_CHECKING:
    from ..engine.distributed.ranks import Ranks

__all__ = ["Loop", "AlreadyParallel", "Passes", "Randomness", "reachable", "replaced"]

_MISSING = object()
_REPLACING = threading.Lock()


class AlreadyParallel(RuntimeError):
    """A denoiser's calls are replaced for another loop."""


@dataclass(eq=False)
class Loop:
    """A loop as it belongs to someone else, and what is kept of it from call to call.

    Attributes:
        run: Runs it once: ``run(args, kwargs, quiet)``; ``quiet`` leaves out callbacks and progress bars.
        denoisers: The modules that it calls level by level.
        remembered: Other costly calls: (object, name of its method; ``__call__`` for a module itself).
        refuses: Why the loop cannot be solved in parallel as it is now, or None.
        state: What its numbers depend on besides its arguments (the scheduler's configuration).
        calls_back: Whether these keyword arguments hold a callback, which then runs once, in the final replay.
        on_round: Told after every round how many levels of the stage are settled, and how many there are.
        outputs: Form of the output of every kind of call.
        layouts: How each kind of call is merged.
        limit: Most rows that memory has had room for.
        learned: What stays the same of the first stage, by :meth:`key`.
        minded: Keys of calls whose callbacks change what the loop does.
        ranks: Those that share the network's calls; None for one alone.
    """

    run: Callable[[tuple[Any, ...], dict[str, Any], bool], Any]
    denoisers: tuple[nn.Module, ...]
    remembered: tuple[tuple[Any, str], ...] = ()
    refuses: Callable[[], str | None] = lambda: None
    state: Callable[[], Any] = lambda: None
    calls_back: Callable[[dict[str, Any]], bool] = lambda kwargs: False
    on_round: Callable[[int, int], object] = lambda settled, levels: None
    outputs: dict[Any, Output] = field(default_factory=dict)
    layouts: dict[Any, Any] = field(default_factory=dict)
    limit: int | None = None
    learned: dict[Any, Structure] = field(default_factory=dict)
    minded: set[Any] = field(default_factory=set)
    ranks: Ranks | None = None

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the loop's coefficients may depend on: shapes, numbers and options, not texts and contents."""
        leaves, spec = tree_flatten((args, kwargs))
        training = tuple(denoiser.training for denoiser in self.denoisers)
        return str(spec), tuple(_trait(leaf) for leaf in leaves), repr(self.state()), training


def _trait(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    return repr(leaf) if isinstance(leaf, (bool, int, float)) or leaf is None else type(leaf).__name__


def reachable(function: Any, *values: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the objects that a function can see: its arguments, its closure, the globals it names, its owner."""
    stack = [(function, 0), *((leaf, 0) for leaf in tree_leaves(values))]
    seen: set[int] = set()
    while stack:
        value, level = stack.pop()
        if id(value) in seen or level > depth:
            continue
        seen.add(id(value))
        yield value
        inside: list[Any] = []
        if isinstance(value, FunctionType):
            inside += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            inside += [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
            inside += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, (list, tuple, dict)):
            inside += tree_leaves(value) if len(value) < 1000 else []
        elif hasattr(value, "func") and hasattr(value, "args"):  # functools.partial
            inside += [value.func, *value.args, *getattr(value, "keywords", {}).values()]
        elif not isinstance(value, (nn.Module, Tensor, type)):
            inside += [getattr(value, "__self__", None), getattr(value, "__func__", None)]
            inside += list(getattr(value, "__dict__", {}).values()) if not _library(value) else []
        stack += [(found, level + 1) for found in inside if found is not None]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def _library(value: Any) -> bool:
    return getattr(type(value), "__module__", "").split(".")[0] in ("torch", "numpy", "builtins")


def _states(generators: Iterable[torch.Generator] = ()) -> list[tuple[torch.Generator, Tensor]]:
    """Return these generators and the default ones of all devices in use, with their states."""
    found = [torch.default_generator, *torch.cuda.default_generators, *torch.xpu.default_generators, *generators]
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return [(generator, generator.get_state()) for generator in found]


def _advanced(states: Sequence[tuple[torch.Generator, Tensor]]) -> list[tuple[torch.Generator, Tensor]]:
    """Return the generators that have drawn since, with their states as they are now."""
    now = [(generator, generator.get_state()) for generator, _ in states]
    return [new for new, (_, old) in zip(now, states, strict=True) if not torch.equal(new[1], old)]


class Randomness(TorchFunctionMode):
    """The random state that a loop starts from: of torch, numpy, Python, and of every generator that it uses."""

    def __init__(self, seen: Iterable[Any]) -> None:
        """Take the present state; ``seen`` are objects that may be generators, of torch, numpy or Python."""
        super().__init__()
        self._numpy = np.random.get_state()  # noqa: NPY002  # what the loop may use
        self._python = random.getstate()
        self._torch = {id(generator): (generator, state) for generator, state in _states()}
        self._others: list[tuple[Any, Any]] = []
        for value in seen:
            if isinstance(value, np.random.Generator):
                self._others.append((value, value.bit_generator.state))
            elif isinstance(value, torch.Generator):
                self._torch[id(value)] = (value, value.get_state())
            elif isinstance(value, random.Random):
                self._others.append((value, value.getstate()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the state of a torch generator at its first use, wherever the loop hides it."""
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if type(value) is torch.Generator and id(value) not in self._torch:
                self._torch[id(value)] = (value, value.get_state())
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Bring everything back to the state at the beginning."""
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)
        for generator, state in self._torch.values():
            generator.set_state(state)
        for other, state in self._others:
            if isinstance(other, random.Random):
                other.setstate(state)
            else:
                other.bit_generator.state = state


@dataclass(eq=False)
class _Memory:
    spec: TreeSpec
    leaves: list[Any]
    result: Any
    after: list[tuple[torch.Generator, Tensor]]  # the generators that it drew from, as it left them


class Passes:
    """All passes of one call of a loop."""

    def __init__(self, loop: Loop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the random state; nothing runs yet."""
        self.loop, self.args, self.kwargs = loop, args, kwargs
        self.key = loop.key(args, kwargs)
        self.always = self.key in loop.minded
        self.stages: list[Stage] = []
        self.count = 0  # passes made
        self.recorded: list[Call] = []
        self.ending: list[Any] | None = None
        self.called_out = False  # the recording ended with a call of another module
        self.constant: list[list[Any]] = []  # arguments of such calls that do not depend on outputs
        self.seed = 0
        self.certify: Callable[[Stage], bool] | None = None
        self.merger = Merger(self.evaluate, loop.layouts, loop.limit, ranks=loop.ranks)
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self._autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
        self._randomness = Randomness(reachable(loop.run, args, kwargs))
        self._memory: dict[int, list[_Memory]] = {}
        self._originals: list[Any] = []
        self.inside = 0  # real modules that are running
        self.thread = threading.get_ident()
        self._call = 0
        self.trainable = False  # by itself the loop's result would require gradients
        self.further: bool | None = None  # a call of a denoiser follows the last stage at once, if that is known
        self._answered = False  # the loop has been given an output
        self.stubbed: Exception | None = None  # raised within a stub: by a network, a solver
        self._made: dict[int, tuple[Tensor, int, int]] = {}
        self._loud = False
        self._work: Callable[[], bool] | None = None
        self._before: _Before | None = self._look()

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace the networks' calls by stubs, and put everything back as it was.

        Raises:
            AlreadyParallel: If the calls of a denoiser are replaced already, or those of another module in another
                thread.
        """
        loop = self.loop
        before: list[tuple[dict[str, Any], str, Any]] = []

        def put(owner: Any, name: str, original: Callable[..., Any], answer: Callable[[Any, Any], Any]) -> None:
            # Through __dict__: wrapped modules send ordinary assignments on to what they wrap.
            before.append((owner.__dict__, name, owner.__dict__.get(name, _MISSING)))
            owner.__dict__[name] = _Stub(self, original, answer)

        remembered = [(owner, "_compiled_call_impl" if name == "__call__" else name) for owner, name in loop.remembered]
        try:
            with _REPLACING:
                others = [stub for owner, name in remembered if (stub := _stub(owner, name)) is not None]
                beside = any(stub.passes.thread != self.thread for stub in others)
                if beside or any(replaced(module) for module in loop.denoisers):
                    raise AlreadyParallel(
                        "another parallel loop is calling a module of this one: it cannot run within another, nor "
                        "beside it in a second thread."
                    )
                for number, module in enumerate(loop.denoisers):
                    self._originals.append(_original(module))
                    put(module, "_compiled_call_impl", self._originals[-1], partial(self.called, number))
                for number, (owner, name) in enumerate(remembered):
                    original = _original(owner) if name == "_compiled_call_impl" else getattr(owner, name)
                    put(owner, name, original, partial(self.remembering, number, original))
            yield
        finally:
            with _REPLACING:
                for place, name, value in reversed(before):
                    if value is _MISSING:
                        del place[name]
                    else:
                        place[name] = value

    def _look(self) -> _Before:
        return _Before([*self.loop.denoisers, *(owner for owner, _ in self.loop.remembered)])

    def evaluate(self, module: int, args: Any, kwargs: Any) -> Any:
        """Call a real denoiser."""
        with self._real():
            return self._originals[module](*args, **kwargs)

    @contextmanager
    def _real(self) -> Iterator[None]:
        """Run real modules: no stub answers, and nothing watches their torch calls."""
        self.inside += 1
        try:
            with self._unwatched():
                yield
        finally:
            self.inside -= 1

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        watched = bool(stack) and stack[-1] is self._randomness
        if watched:
            self._randomness.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if watched:
                self._randomness.__enter__()  # type: ignore[no-untyped-call]

    def play(
        self,
        seed: int = 0,
        *,
        certify: Callable[[Stage], bool] | None = None,
        work: Callable[[], bool] | None = None,
        loud: bool = False,
    ) -> tuple[bool, Any]:
        """Run the loop once; return whether it came to its end with every stage settled, and what it returned.

        Args:
            seed: Of the outputs of calls that nothing is known of; they are recorded.
            certify: Decides whether a stage that was left is settled; None ends the pass there.
            work: Done at the first call of the last stage, within whatever context the loop has set up for its
                networks; it says whether the pass may go on.
            loud: Run callbacks.
        """
        self.count += 1
        self._work = work
        self.seed, self.certify, self._loud = seed, certify, loud
        self.recorded, self.ending, self._call, self._made = [], None, 0, {}
        self._answered, self.stubbed = False, None
        for stage in self.stages:
            stage.begin()
        self._randomness.restore()
        if self._before is None:
            self._before = self._look()
        # A pass that cannot get farther than the ones before meets no generator that they have not.
        new = self.count == 1 or loud or certify is not None or not self.stages
        try:
            with self._randomness if new else nullcontext(), _autocast(self._autocast):
                value = self.loop.run(self.args, self.kwargs, not (loud or self.always))
                self.called_out = False
                self._leave(tree_leaves(value))
        except BaseException as error:
            assert self._before is not None
            self._before.restore()
            if isinstance(error, Ended):
                return False, None
            if isinstance(error, Exception) and self._answered and not loud and not self._stays(error):
                raise Refused(f"it raised {error!r} on trial outputs.") from error
            raise
        finally:
            self.certify = self._work = self.stubbed = None  # they hold what holds the pass
        return not self.recorded, value

    def _stays(self, error: Exception) -> bool:
        """Return whether an error is none of the loop's own, or says nothing about the outputs that it was given."""
        return error is self.stubbed or isinstance(error, (AlreadyParallel, MemoryError, torch.OutOfMemoryError))

    def close(self) -> None:
        """Let go of what the passes have learned: a cycle would keep it until the garbage collector runs."""
        del self.merger  # it calls :meth:`evaluate`
        self.stages, self.recorded, self.ending, self.constant = [], [], None, []
        self._memory, self._made = {}, {}

    def sequential(self) -> Any:
        """Run the loop as it is, from the random state at the beginning."""
        self.count += 1
        self._randomness.restore()
        return self.loop.run(self.args, self.kwargs, False)

    def called(self, module: int, args: Any, kwargs: Any) -> Any:
        """Answer a call of a denoiser."""
        leaves, spec = tree_flatten((args, kwargs))
        if torch.is_grad_enabled():
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
                raise Refused(
                    "the loop takes gradients through the denoiser: if that is not meant, call it in torch.no_grad()."
                )
            if self.count == 1 and not self._answered:
                self.trainable |= any(one.requires_grad for one in self.loop.denoisers[module].parameters())
        if self._work is not None and self._call == self.stages[-1].first:
            work, self._work = self._work, None
            # Passes within the work end at what this one has set up; the first of them looks.
            before, self._before = self._before, None
            plain = {kind: (False, dtype) for kind, (_, dtype) in self._autocast.items()}
            try:
                with self._unwatched(), _autocast(plain):
                    going_on = work()
            finally:
                self._before = before
            if not going_on:
                raise Ended
        self._answered = True
        with self._real(), torch.no_grad():
            index, self._call = self._call, self._call + 1
            for stage in self.stages:
                if index < stage.stop:
                    output = stage.output(index - stage.first)
                    return output.tree(stage.answer(index - stage.first, module, spec, leaves))
            self._leave(None)
            return self._record(index, module, spec, leaves)

    def _record(self, index: int, module: int, spec: TreeSpec, leaves: list[Any]) -> Any:
        first = self.stages[-1].stop if self.stages else 0
        feeds = {i: self._made[id(leaf)][1:] for i, leaf in enumerate(leaves) if id(leaf) in self._made}
        previous = next((call for call in reversed(self.recorded) if call.spec == spec), None)
        kept = [keep(leaf, previous.leaves[i] if previous else None) for i, leaf in enumerate(leaves)]
        kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        autocast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        call = Call(module, spec, kept, feeds, autocast, Output(spec, []))
        name = self.loop.denoisers[module].training, call.signature()
        if name not in self.loop.outputs:
            self.loop.outputs[name] = self._try(call)
        call.output = self.loop.outputs[name]
        self.recorded.append(call)
        made = drawn(call.output, self.seed, index)
        if len(self.loop.denoisers) > 1:
            for i, leaf in enumerate(made):
                if isinstance(leaf, Tensor):
                    self._made[id(leaf)] = (leaf, index - first, i)
        return call.output.tree(made)

    def _try(self, call: Call) -> Output:
        """Call the network for the form of its output, and see that it answers by its arguments alone."""
        kept = _Kept(self.loop.denoisers[call.module], call.leaves)
        try:
            leaves, spec = tree_flatten(self._lone(call, kept))
        except Refused as refusal:
            if kept.restore():
                raise
            raise Refused(f"{refusal} It has written to large tensors, so the result may differ.") from None
        if self.loop.ranks is not None:
            self.loop.ranks.compare(arguments=[leaf for leaf in call.leaves if isinstance(leaf, (Tensor, int, float))])
            self.loop.ranks.agree(next(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        forms = [leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return Output(spec, forms)

    def _lone(self, call: Call, kept: _Kept) -> Any:
        """Return what the network answers, asked twice or three times, or refuse."""
        leaves = call.leaves
        result = one = self._ask(call, leaves, kept)
        after = kept.again()
        if not after.holds(kept):
            # Tables that fill in on the first call are no state; what was computed of one input and answers another is.
            leaves = _another(leaves, result)
            one = self._ask(call, leaves, kept)
            if not kept.again().holds(after):
                raise Refused("the denoiser has hidden state: what it keeps changes with every call (a cache).")
            kept.restore()
        if _away(one, self._ask(call, leaves, kept)):
            raise Refused(
                "the denoiser has hidden state: it answers the same input in different ways (a cache, a counter, a "
                "random generator of its own)."
            )
        return result

    def _ask(self, call: Call, leaves: Sequence[Any], kept: _Kept) -> Any:
        copies = [keep(leaf, None) for leaf in leaves]
        args, kwargs = call.arguments(copies)
        before = _states(generator for generator, _ in kept.generators)
        with call.context():
            result = self._originals[call.module](*args, **kwargs)
        rows = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)
        self.merger.calls, self.merger.rows = self.merger.calls + 1, self.merger.rows + rows
        if _advanced(before):
            raise Refused("the denoiser draws random numbers: put it in evaluation mode, with eval().")
        written = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if written - {id(leaf) for leaf in copies}:
            raise Refused("the denoiser writes into its arguments, which the loop hands on (a KV cache).")
        return result

    def remembering(self, number: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Answer a call of another module: from memory, or by running it, if its inputs are the loop's own."""
        leaves, spec = tree_flatten((args, kwargs))
        entries = self._memory.setdefault(number, [])
        for entry in entries:
            if entry.spec == spec and all(map(equal, entry.leaves, leaves)):
                for generator, state in entry.after:
                    generator.set_state(state)
                return tree_map(_copy, entry.result)
        inside = bool(self.stages) and self._call < self.stages[-1].stop
        if self._call and not inside and not any(_alike(leaves, one) for one in self.constant):
            self.called_out = True
            self._leave(leaves)
        kept = [keep(leaf, None) for leaf in leaves]
        before = _states(leaf for leaf in leaves if isinstance(leaf, torch.Generator))
        with self._real():
            result = original(*args, **kwargs)
        entries.append(_Memory(spec, kept, tree_map(_copy, result), _advanced(before)))
        return result

    def _leave(self, leaves: list[Any] | None) -> None:
        """The loop has left the last stage: it returns or calls another module with these leaves, or goes on."""
        if self.recorded:
            if leaves is not None:
                self.ending = [keep(leaf, None) for leaf in leaves]
                raise Ended
            return
        if not self.stages or self.stages[-1].settled:
            return
        stage, further = self.stages[-1], leaves is None
        self.further = further if self.further is None else self.further
        if self._call - further < stage.stop or further > self.further:
            if self._loud:
                return  # a callback ended the loop, as it may
            raise Changed(
                "the number of calls of the denoiser changes from pass to pass: it depends on what it returns."
            )
        stage.finish(leaves)
        if self.certify is None or not self.certify(stage):
            raise Ended


class _Before:
    """What a loop may set on its modules and put back at its end, which an ended pass does not reach.

    Objects that modules hold (attention processors) and the dtypes of parameters (a decoder cast up).
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        modules = {id(part): part for owner in owners if isinstance(owner, nn.Module) for part in owner.modules()}
        places = [place for part in modules.values() for place in (part.__dict__, part._modules)]
        self._held = [
            (place, {k: v for k, v in place.items() if _held(v) and k != "_compiled_call_impl"}) for place in places
        ]
        self._dtypes = [
            (value, value.dtype)
            for part in modules.values()
            for value in part._parameters.values()
            if value is not None
        ]

    def restore(self) -> None:
        """Put everything back."""
        for place, held in self._held:
            for name, value in held.items():
                if place.get(name) is not value:
                    place[name] = value
        for value, dtype in self._dtypes:
            if value.dtype != dtype:
                value.data = value.data.to(dtype)


PLAIN = (Tensor, bool, int, float, str, tuple, list, dict, type(None))
APART = frozenset({"_parameters", "_modules", "_compiled_call_impl"})  # of a module, no state
SMALL = 1 << 16  # elements of tensors that are copied
SAME = 5e-3  # by which answers to the same input may differ, relative
USUAL = frozenset({bool, dict, int, list, tuple, type(None), OrderedDict})  # most of what modules hold


def _held(value: Any) -> bool:
    return type(value) not in USUAL and not isinstance(value, PLAIN)


class _Stub:
    """In the place of a call: a pass answers the loop; real modules, and other threads, make the call itself."""

    def __init__(self, passes: Passes, original: Callable[..., Any], answer: Callable[[Any, Any], Any]) -> None:
        self.passes, self.original, self.answer = passes, original, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.passes.inside or threading.get_ident() != self.passes.thread:
            return self.original(*args, **kwargs)
        try:
            return self.answer(args, kwargs)
        except Exception as error:
            self.passes.stubbed = error
            raise


def _stub(owner: Any, name: str) -> _Stub | None:
    stub = owner.__dict__.get(name)
    return stub if isinstance(stub, _Stub) else None


def replaced(module: nn.Module) -> bool:
    """Return whether a module's call is a stub at the moment."""
    return _stub(module, "_compiled_call_impl") is not None


@contextmanager
def _autocast(state: dict[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Set the autocast of every kind of device."""
    with ExitStack() as stack:
        for kind, (enabled, dtype) in state.items():
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield


def _original(module: nn.Module) -> Callable[..., Any]:
    """Return what a call of the module runs, hooks and compiled code included."""
    compiled = module.__dict__.get("_compiled_call_impl")
    return compiled if compiled is not None else module._call_impl


def keep(leaf: Any, previous: Any) -> Any:
    """Copy a leaf, because the loop may write to it; what equals the same leaf of the call before is shared."""
    if not isinstance(leaf, Tensor):
        return leaf
    return previous if equal(leaf, previous) else leaf.detach().clone()


def _alike(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return len(one) == len(two) and all(map(equal, one, two))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _another(leaves: Sequence[Any], result: Any) -> list[Any]:
    """Return leaves with another state: a tensor of the output's shape, else the first one, turned round."""
    states = [i for i, leaf in enumerate(leaves) if _floating(leaf) and leaf.numel() > 1]
    shapes = [leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    chosen = next((i for i in states if leaves[i].shape in shapes), next(iter(states), None))
    return [leaf.flip(tuple(range(leaf.ndim))) if i == chosen else leaf for i, leaf in enumerate(leaves)]


def _away(one: Any, two: Any) -> bool:
    """Return whether outputs differ by more than rounding."""
    lefts, rights = ([leaf for leaf in tree_leaves(output) if _floating(leaf)] for output in (one, two))
    if [left.shape for left in lefts] != [right.shape for right in rights]:
        return True
    for left, right in zip(lefts, rights, strict=True):
        bound = max(SAME, 4 * torch.finfo(left.dtype).eps)
        if float((left.float() - right.float()).norm()) > bound * float(left.float().norm()):
            return True
    return False


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Kept:
    """What a module and the objects among its arguments hold besides parameters: values, tensors, generators."""

    def __init__(self, module: nn.Module, leaves: Sequence[Any]) -> None:
        self._module, self._leaves = module, leaves
        self.generators: list[tuple[torch.Generator, Tensor]] = []  # with their states
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []  # with their versions, and copies of small ones
        self._places: list[tuple[Any, Any]] = []  # dicts and lists, and what was in them
        plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
        stack: list[tuple[Any, int]] = [(one.__dict__, -1) for one in module.modules()]
        for leaf in leaves:
            own = leaf if isinstance(leaf, torch.Generator) else getattr(leaf, "__dict__", None)
            stack += [] if own is None or isinstance(leaf, (Tensor, *plain)) else [(own, -1)]
        while stack:
            value, depth = stack.pop()
            if isinstance(value, Tensor):
                small = value.numel() <= SMALL and not value.is_inference()
                self._tensors.append((value, _version(value), value.detach().clone() if small else None))
            elif isinstance(value, torch.Generator):
                self.generators.append((value, value.get_state()))
            elif isinstance(value, (list, tuple, dict)) and depth < 3:
                held = {k: v for k, v in value.items() if k not in APART} if isinstance(value, dict) else list(value)
                self._places += [] if isinstance(value, tuple) else [(value, held)]
                items = held.values() if isinstance(held, dict) else held
                stack += [(item, depth + 1) for item in items if not isinstance(item, plain)]
            elif not isinstance(value, (nn.Module, type, FunctionType)) and depth < 2 and not _library(value):
                stack += [(getattr(value, "__dict__", ()), depth)]

    def again(self) -> _Kept:
        """Return what they hold now."""
        return _Kept(self._module, self._leaves)

    def holds(self, other: _Kept) -> bool:
        """Return whether the tensors are those of another time, and nothing was written to them."""
        mine, others = ([(id(tensor), version) for tensor, version, _ in one._tensors] for one in (self, other))
        return mine == others

    def restore(self) -> bool:
        """Put back all but what has moved to another device; return whether all that was written to is as it was."""
        for place, held in self._places:
            if isinstance(place, list):
                place[:] = held
                continue
            for name in place.keys() - held.keys() - APART:
                del place[name]
            for name, value in held.items():
                now = place.get(name, _MISSING)
                moved = isinstance(value, Tensor) and isinstance(now, Tensor) and value.device != now.device
                if now is not value and not moved:
                    place[name] = value
        for generator, state in self.generators:
            generator.set_state(state)
        whole = True
        for tensor, version, copy in self._tensors:
            if copy is not None and _version(tensor) != version:
                tensor.data.copy_(copy)
            whole &= copy is not None or _version(tensor) == version
        return whole


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
