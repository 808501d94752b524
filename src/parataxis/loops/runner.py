"""Runs a loop's own Python, with stubs instead of its networks: one pass after another.

Every pass starts from the same random state, so it draws what the unmodified loop draws. A stub answers with what the
pass is for: random outputs, the affine model of earlier evaluations, or what a module answered before. A pass that has
seen what it is for ends by a private signal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from ..engine.latency import timed
from .answers import Answers
from .beginning import Beginning
from .calls import Call, Output, autocast_of, copy_leaves, equal, flatten_output
from .loop import Loop
from .memo import ModuleMemo
from .merger import Merger
from .passes import PassRecord, StageRecord
from .purity import check_pure
from .randomness import RandomState
from .signals import CallbackChangedLoop, LoopChanged, NotParallelizable, PassComplete
from .spool import Spool
from .stage_plan import StagePlan, answer_call
from .structure import MIN_STEPS, random_outputs
from .stubs import AlreadyParallel, OriginalCall, Stub, StubSwitch, install
from .world import World

__all__ = ["FIRST_CALLS", "LoopRunner", "same_leaves"]

FIRST_CALLS = 64  # that are recorded, before a loop of more is recorded as a whole
MOST_CALLS = 20_000  # of a recording
WRITES = "the denoiser writes into a tensor that it is given, which the loop may use again: let it work on a copy."


class LoopRunner:
    """Runs one call of a loop, as often as it takes.

    Attributes:
        loop: The loop.
        args: Its arguments.
        kwargs: Its keyword arguments.
        key: What its coefficients may depend on.
        passes: How often its Python has run.
        callbacks_in_every_pass: Whether callbacks change what the loop does.
        trainable: Whether the unmodified loop's result would require gradients.
        loop_constants: Arguments of modules that the loop calls along the way and that do not depend on outputs.
        merger: Evaluates recorded calls by the real denoisers.
        held_by_modules: What these modules held when each was run last.
        other_seconds: Seconds of other modules that the loop calls, which run once for all passes.
        spool: Keeps states and outputs of all passes.
        beginning: To which the loop is put back before every pass.
    """

    def __init__(self, loop: Loop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the random state; nothing runs yet."""
        self.loop, self.args, self.kwargs = loop, args, kwargs
        self.key = loop.key(args, kwargs)
        self.passes = 0
        self.callbacks_in_every_pass = self.key in loop.changed_by_callbacks
        self.trainable = False
        self.loop_constants: list[list[Any]] = []
        self.held_by_modules: dict[int, World] = {}
        self.merger = Merger(self.evaluate, loop.layouts, loop.limit, loop.buckets, ranks=loop.ranks, times=loop.times)
        self.other_seconds = 0.0
        self.memo = ModuleMemo()
        self.spool = Spool()
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self._autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
        self.world = World(loop.roots(args, kwargs), ignore=Stub)
        self._random = RandomState(self.world.random)
        self.beginning = Beginning(self.world, self._random)
        self._switch = StubSwitch()
        self._originals: list[OriginalCall] = []
        self.modules_inside: set[int] = set()  # that the loop calls between its steps, and that are a part of it
        self._setting: World | None = None  # what the denoisers held when the pass around this one came to them
        self._pass: _Pass | None = None  # the one that is running; stubs answer for it

    def __repr__(self) -> str:
        """Return how often the loop has run."""
        return f"LoopRunner({self.passes} passes)"

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the networks' calls by stubs, and put everything back at the end.

        Raises:
            AlreadyParallel: If the calls of a denoiser are replaced already, or those of another module in another
                thread.
        """
        loop = self.loop
        stubs = install(self._switch, loop.denoisers, loop.memoized, self._answer_denoiser, self._answer_module)
        with stubs as self._originals:
            yield

    def run(
        self,
        plans: Sequence[StagePlan] = (),
        *,
        seed: int = 0,
        callbacks: bool = False,
        accept: Callable[[StageRecord], bool] | None = None,
        at_stage: Callable[[], Answers | None] | None = None,
        most_calls: int | None = None,
    ) -> PassRecord:
        """Run the loop once, and return what the pass saw.

        Args:
            plans: How the calls of the stages that are known are answered.
            seed: Of the outputs of calls behind them; these calls are recorded.
            callbacks: Run callbacks.
            accept: Decides whether the loop may go on behind the last stage; None ends the pass there.
            at_stage: Called at the first call of the last stage, within whatever context the loop has set up for its
                networks; returns how the stage is answered from there on, or None to end the pass.
            most_calls: The pass ends behind so many recorded calls; None for :data:`MOST_CALLS`, and an error there.
        """
        self.passes += 1
        self.beginning.restore()
        # A pass that cannot get farther than the ones before meets no generator that they have not.
        watched = self.passes == 1 or callbacks or accept is not None or not plans or plans[-1].answers.records_calls
        outer, current = self._pass, _Pass(self, plans, seed, callbacks, accept, at_stage)
        current.most_calls = most_calls
        self._pass, started = current, time.perf_counter()
        try:
            with self._random if watched else nullcontext(), _autocast(self._autocast):
                value = self.loop.run(self.args, self.kwargs, not (callbacks or self.callbacks_in_every_pass))
                current.record.ended_at_module = False
                current.leave(tree_leaves(value))
        except BaseException as error:
            self._end_early()
            if isinstance(error, Exception) and not callbacks and current.explains(error):
                raise NotParallelizable(f"it raised {error!r} on trial outputs.") from error
            if not isinstance(error, PassComplete):
                raise
            value = None
            if current.module_inside is None:
                return current.record
        finally:
            self.loop.times.add_pass(current.calls, time.perf_counter() - started - current.stub_seconds)
            self._pass = outer
            current.release()
        if current.module_inside is not None:  # it is called between steps: part of the loop
            self.modules_inside.add(current.module_inside)
            return self.run(plans, seed=seed, callbacks=callbacks, accept=accept, most_calls=most_calls)
        current.record.complete, current.record.value = not current.record.calls, value
        return current.record

    def sequential(self) -> Any:
        """Run the unmodified loop, from the state at the beginning."""
        self.passes += 1
        value, seconds = timed(partial(self.loop.run, self.args, self.kwargs, False), self.loop.device)
        self.loop.times.add_loop(self.key, seconds)
        return value

    def evaluate(self, module: int, args: Any, kwargs: Any) -> Any:
        """Call a real denoiser."""
        with self.real_calls():
            return self._originals[module](*args, **kwargs)

    @contextmanager
    def real_calls(self) -> Iterator[None]:
        """Run real modules: no stub answers, and nothing watches their torch calls."""
        with self._switch.off(), self._random.paused():
            yield

    @contextmanager
    def inner_passes(self) -> Iterator[None]:
        """Run passes within a pass: each ends with the denoisers as this one has set them up."""
        self._setting = self.denoisers_now()
        plain = {kind: (False, dtype) for kind, (_, dtype) in self._autocast.items()}
        try:
            with self._random.paused(), _autocast(plain):
                yield
        finally:
            self._setting = None

    def output_form(self, call: Call) -> Output:
        """Return the form of a call's output; a new one is found by calls of the network, which check it."""
        denoiser, outputs = self.loop.denoisers[call.module], self.loop.outputs
        name = denoiser.training, call.signature()
        if name not in outputs:
            outputs[name] = self._find_output_form(call)
        if outputs[name].writes:  # a stub does not
            raise NotParallelizable(WRITES)
        return outputs[name]

    def close(self) -> None:
        """Let go of what holds this runner: a cycle would keep it until the garbage collector runs."""
        del self.merger  # it calls :meth:`evaluate`
        self.memo, self.loop_constants = ModuleMemo(), []
        del self._random.worlds[1:]  # they hold stubs

    def _find_output_form(self, call: Call) -> Output:
        rows = next((len(leaf) for leaf in call.leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)

        def run(args: Any, kwargs: Any) -> Any:
            self.merger.calls, self.merger.rows = self.merger.calls + 1, self.merger.rows + rows
            network = partial(self._originals[call.module], *args, **kwargs)
            return self.loop.times.call(call.signature(), network, call.device)

        result, writes = check_pure(self.loop.denoisers[call.module], run, call, self.world)
        ranks = self.loop.ranks
        if ranks is not None:
            ranks.compare(arguments=[leaf for leaf in call.leaves if isinstance(leaf, (Tensor, int, float))])
            ranks.agree(next(leaf for leaf in flatten_output(result)[0] if isinstance(leaf, Tensor)))
        return Output.of(result, writes=writes)

    def _answer_denoiser(self, number: int, args: Any, kwargs: Any) -> Any:
        if self._pass is None:
            return self._originals[number](*args, **kwargs)
        return self._pass.answer(lambda current: current.denoiser_called(number, args, kwargs))

    def _answer_module(self, number: int, original: OriginalCall, args: Any, kwargs: Any) -> Any:
        if self._pass is None:
            return original(*args, **kwargs)
        return self._pass.answer(lambda current: current.module_called(number, original, args, kwargs))

    def denoisers_now(self) -> World:
        """Return what the denoisers hold now."""
        modules = [(type(module).__name__, module) for module in self.loop.denoisers]
        return World(modules, ignore=Stub, skipped=self.world.skipped)

    def watch(self, world: World) -> None:
        """Let a world of the pass that is running hear of it before something writes to a tensor."""
        self._random.worlds[1:] = [world]

    def _end_early(self) -> None:
        """Leave nothing behind of a pass that did not come to its end."""
        if self._setting is not None:
            self._setting.restore()
        else:
            self.world.restore()


class _Pass:
    """One pass while it runs: answers the stubs and fills in the record."""

    def __init__(
        self,
        runner: LoopRunner,
        plans: Sequence[StagePlan],
        seed: int,
        callbacks: bool,
        accept: Callable[[StageRecord], bool] | None,
        at_stage: Callable[[], Answers | None] | None,
    ) -> None:
        self.runner, self.plans, self.callbacks = runner, list(plans), callbacks
        self.accept, self.at_stage = accept, at_stage
        self.record = PassRecord([StageRecord(plan.structure, spool=runner.spool) for plan in plans], seed)
        self.stub_seconds = 0.0  # all that is not the loop's own Python
        self._index = 0  # of the next call of a denoiser
        self._answered = False  # the loop has been given an output
        self._stub_error: Exception | None = None  # raised within a stub: by a network, a solver
        self._random_outputs: dict[int, tuple[Tensor, int, int]] = {}  # by id: tensor, call, leaf
        self._setting: World | None = None  # what the denoisers held at the first call
        self.most_calls: int | None = None
        self.module_inside: int | None = None  # a module that was called between the first steps

    @property
    def calls(self) -> int:
        """How many calls of denoisers have been answered."""
        return self._index

    def answer(self, call: Callable[[_Pass], Any]) -> Any:
        """Answer a call of a stub."""
        started = time.perf_counter()
        try:
            return call(self)
        except Exception as error:
            self._stub_error = error
            raise
        finally:
            self.stub_seconds += time.perf_counter() - started

    def explains(self, error: Exception) -> bool:
        """Return whether the outputs that the loop was given may be why it raised this."""
        own_error = error is self._stub_error or isinstance(
            error, (AlreadyParallel, MemoryError, torch.OutOfMemoryError)
        )
        return self._answered and not own_error

    def release(self) -> None:
        """Let go of what holds this pass."""
        self.accept = self.at_stage = self._stub_error = self._setting = None
        self._random_outputs = {}

    def denoiser_called(self, module: int, args: Any, kwargs: Any) -> Any:
        """Answer a call of a denoiser."""
        leaves, spec = tree_flatten((args, kwargs))
        _check_forward_mode(leaves)
        if torch.is_grad_enabled():
            self._check_gradients(module, leaves)
        if self.at_stage is not None and self._index == self.plans[-1].first:
            at_stage, self.at_stage = self.at_stage, None
            with self.runner.inner_passes():
                answers = at_stage()
            if answers is None:
                raise PassComplete
            self.plans[-1] = replace(self.plans[-1], answers=answers)
        self._answered = True
        with self.runner.real_calls(), torch.no_grad():
            index, self._index = self._index, self._index + 1
            self._check_setting(index)
            for plan, record in zip(self.plans, self.record.stages, strict=True):
                if index < plan.stop:
                    output = plan.structure.outputs[index - plan.first]
                    return output.tree(answer_call(plan, record, index - plan.first, module, spec, leaves))
            self.leave(None)
            return self._record_call(index, module, spec, leaves)

    def module_called(self, number: int, original: OriginalCall, args: Any, kwargs: Any) -> Any:
        """Answer a call of another module: from memory, or by running it, if its inputs are the loop's own."""
        leaves, spec = tree_flatten((args, kwargs))

        def before() -> None:
            inside = bool(self.plans) and self._index < self.plans[-1].stop
            constant = any(same_leaves(leaves, constants) for constants in self.runner.loop_constants)
            if number in self.runner.modules_inside:
                return
            if self._index and not inside and not constant:
                if not self.plans and self.record.calls and len(self.record.calls) <= MIN_STEPS:
                    self.module_inside = number
                    raise PassComplete
                self.record.ended_at_module = True
                self.leave(leaves)

        def run() -> Any:
            owner, held = self.runner.loop.memoized[number][0], self.runner.held_by_modules
            state = held.pop(number, None)
            # To compare is much cheaper than to note everything anew.
            if state is None or next(state.changes(), None) is not None:
                state = World([(type(owner).__name__, owner)], ignore=Stub)
            with self.runner.real_calls():
                result, seconds = timed(partial(original, *args, **kwargs), self.runner.loop.device)
            self.runner.other_seconds += seconds
            changes = list(state.changes())
            for change in changes:
                self.runner.world.skip(change)  # it runs once for all passes, and what it writes stays
            if not changes:
                held[number] = state
            return result

        if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            before()
            return run()  # what is differentiated must see this input
        return self.runner.memo.call(number, leaves, spec, run, before)

    def leave(self, leaves: list[Any] | None) -> None:
        """Leave the last stage: the loop returns or calls another module with these leaves, or goes on (None)."""
        record = self.record
        if record.calls:
            if leaves is not None:
                record.ending = copy_leaves(leaves)
                raise PassComplete
            return
        if not self.plans or self.plans[-1].accepted:
            return
        plan, followed = self.plans[-1], leaves is None
        record.followed = followed if plan.followed is None else plan.followed
        if self._index - followed < plan.stop or followed > record.followed:
            if self.callbacks:
                return  # a callback ended the loop, as it may
            raise LoopChanged("the number of denoiser calls changes from pass to pass: it depends on the outputs.")
        record.last.finish(leaves)
        if self.accept is None or not self.accept(record.last):
            raise PassComplete
        self.plans[-1] = replace(plan, accepted=True)

    def _check_setting(self, index: int) -> None:
        """Raise if the loop, or a callback, has changed what the denoisers hold since the first call."""
        recorded = not self.plans or self.plans[-1].answers.records_calls
        # The first two recordings show it; those that follow are more of the same, and looking costs more than a call.
        if not (self.callbacks or (recorded and self.record.seed <= 1)):
            return
        if self._setting is None:
            self._setting = self.runner.denoisers_now()
            self.runner.watch(self._setting)
            return
        change = next(self._setting.changes(), None)
        if change is not None and self.callbacks:
            raise CallbackChangedLoop
        if change is not None:
            raise NotParallelizable(
                f"the loop changes its denoiser between steps: {change.name} is another one at call {index + 1}."
            )

    def _check_gradients(self, module: int, leaves: Sequence[Any]) -> None:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise NotParallelizable(
                "the loop takes gradients through the denoiser: if it need not, call it in torch.no_grad()."
            )
        if self.runner.passes == 1 and not self._answered:
            parameters = self.runner.loop.denoisers[module].parameters()
            self.runner.trainable |= any(parameter.requires_grad for parameter in parameters)

    def _record_call(self, index: int, module: int, spec: TreeSpec, leaves: list[Any]) -> Any:
        """Record a call behind the known stages, and answer it with random outputs."""
        first = self.plans[-1].stop if self.plans else 0
        calls, outputs = self.record.calls, self._random_outputs
        feeds = {i: outputs[id(leaf)][1:] for i, leaf in enumerate(leaves) if id(leaf) in outputs}
        previous = next((call for call in reversed(calls) if call.spec == spec), None)
        copies = copy_leaves(leaves, None if previous is None else previous.leaves, self.runner.spool)
        call = Call(module, spec, copies, feeds, autocast_of(leaves), Output(spec, []))
        call.output = self.runner.output_form(call)
        calls.append(call)
        if self.most_calls is not None and len(calls) >= self.most_calls:
            self.record.cut = True
            raise PassComplete
        if len(calls) > MOST_CALLS:
            raise NotParallelizable(f"it calls its denoiser more than {MOST_CALLS} times.")
        answer = random_outputs(call.output, self.record.seed, index)
        if len(self.runner.loop.denoisers) > 1:
            for i, leaf in enumerate(answer):
                if isinstance(leaf, Tensor):
                    outputs[id(leaf)] = (leaf, index - first, i)
        return call.output.tree(answer)


def _check_forward_mode(leaves: Sequence[Any]) -> None:
    """Raise within forward-mode derivatives and function transforms: the denoiser's part of them would be lost."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(leaf).tangent is not None  # type: ignore[no-untyped-call]
        for leaf in tensors
    )
    if dual or any(torch._C._functorch.is_functorch_wrapped_tensor(leaf) for leaf in tensors):
        raise NotParallelizable("the loop takes derivatives of the denoiser (jvp, vmap or another function transform).")


def same_leaves(left: Sequence[Any] | None, right: Sequence[Any] | None) -> bool:
    """Return whether two lists of leaves are the same to the bit."""
    return left is not None and right is not None and len(left) == len(right) and all(map(equal, left, right))


@contextmanager
def _autocast(state: dict[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Set the autocast of every kind of device."""
    with ExitStack() as stack:
        for kind, (enabled, dtype) in state.items():
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield
