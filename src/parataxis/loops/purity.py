"""Whether a denoiser answers by its arguments alone: no hidden state, no random numbers, nothing written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calls import Call, copy_leaves, equal, flatten_output
from .module_state import is_counter, keeps_data, watch
from .randomness import RandomState
from .signals import NotParallelizable
from .world import World

__all__ = ["check_pure"]

SAME = 5e-3  # by which answers to the same input may differ, relative


def check_pure(
    denoiser: nn.Module, run: Callable[[Any, Any], Any], call: Call, world: World | None = None
) -> tuple[Any, bool]:
    """Return what the denoiser answers to a call, and whether it writes into tensors that it is given.

    It is called two or three times, on copies.

    Args:
        denoiser: The module.
        run: ``run(args, kwargs)`` calls it.
        call: With which arguments.
        world: Of the loop: what the denoiser writes and never reads is not put back there.

    Raises:
        NotParallelizable: If the answer depends on anything else.
    """
    held = [leaf for leaf in call.leaves if not isinstance(leaf, Tensor)]
    roots = [(type(denoiser).__name__, denoiser), *(("an argument", leaf) for leaf in held)]
    before = World(roots)
    random = RandomState(before.random)
    try:
        return _check_pure(run, call, roots, before, world)
    except NotParallelizable as reason:
        random.restore()
        if before.restore():
            raise
        raise NotParallelizable(f"{reason} It has written to large tensors, so the result may differ.") from None


def _check_pure(
    run: Callable[[Any, Any], Any], call: Call, roots: Sequence[tuple[str, Any]], before: World, world: World | None
) -> tuple[Any, bool]:
    leaves, generators = call.leaves, before.random
    result, writes = call_checked(run, call, leaves, generators)
    first_result = result
    changes, after = list(before.changes(thorough=True)), before
    if not all(map(is_counter, changes)):
        # Tables that fill in on the first call are no state; what was computed of one input and answers another is.
        after = World(roots)
        leaves = flip_input(leaves, result)
        result, _ = call_checked(run, call, leaves, generators)
        changes = list(after.changes(thorough=True))
        for change in changes:
            if not is_counter(change):
                raise NotParallelizable(f"the denoiser has hidden state that changes with every call: {change.name}.")
    for change in changes:
        if keeps_data(change, flatten_output(result)[0]):
            raise NotParallelizable(
                f"the denoiser has hidden state: it keeps results of its calls in {change.name}. Call its eval() first "
                "if these are running statistics, or remove the hook that collects them."
            )
    before.restore()
    with watch(changes, after) as reads:
        again, _ = call_checked(run, call, leaves, generators) if reads is not None else (None, False)
    if changes and (reads is None or reads):
        names = ", ".join(change.name for change in changes)
        raise NotParallelizable(f"the denoiser has hidden state: it counts its calls and reads the count ({names}).")
    if outputs_differ(result, again):
        raise NotParallelizable(
            "the denoiser has hidden state: it answers the same input in different ways (a cache, a counter, its own "
            "random generator)."
        )
    before.restore()
    if world is not None:
        for change in changes:
            world.skip(change)
    return first_result, writes


def call_checked(
    run: Callable[[Any, Any], Any], call: Call, leaves: Sequence[Any], generators: Sequence[Any]
) -> tuple[Any, bool]:
    """Call the denoiser once on copies; return its output, and whether it writes into them.

    Raises:
        NotParallelizable: If it draws random numbers, or puts tensors into its arguments.
    """
    copies = copy_leaves(leaves)
    args, kwargs = call.arguments(copies)
    random = RandomState(generators)
    with call.context():
        result = run(args, kwargs)
    if random.advanced():
        raise NotParallelizable("the denoiser draws random numbers: call its eval() first.")
    written = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    if written - {id(leaf) for leaf in copies}:
        raise NotParallelizable("the denoiser writes into its arguments, which the loop passes on (a KV cache).")
    return result, not all(map(_unwritten, copies, leaves))


def flip_input(leaves: Sequence[Any], result: Any) -> list[Any]:
    """Return leaves with another state: a tensor of the output's shape, else the first one, flipped."""
    states = [i for i, leaf in enumerate(leaves) if _is_floating(leaf) and leaf.numel() > 1]
    shapes = [leaf.shape for leaf in flatten_output(result)[0] if isinstance(leaf, Tensor)]
    chosen = next((i for i in states if leaves[i].shape in shapes), next(iter(states), None))
    return [leaf.flip(tuple(range(leaf.ndim))) if i == chosen else leaf for i, leaf in enumerate(leaves)]


def outputs_differ(left_output: Any, right_output: Any) -> bool:
    """Return whether outputs differ by more than rounding."""
    lefts, rights = (
        [leaf for leaf in flatten_output(output)[0] if _is_floating(leaf)] for output in (left_output, right_output)
    )
    if [left.shape for left in lefts] != [right.shape for right in rights]:
        return True
    for left, right in zip(lefts, rights, strict=True):
        bound = max(SAME, 4 * torch.finfo(left.dtype).eps)
        if float((left.float() - right.float()).norm()) > bound * float(left.float().norm()):
            return True
    return False


def _unwritten(copy: Any, leaf: Any) -> bool:
    """Return whether a tensor still is as it was given; NaN are themselves."""
    if not isinstance(leaf, Tensor) or equal(copy, leaf):
        return True
    return copy.shape == leaf.shape and bool(((copy == leaf) | ((copy != copy) & (leaf != leaf))).all())


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
