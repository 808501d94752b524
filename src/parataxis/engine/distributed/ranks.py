r"""Many devices for one sample: every rank runs the same solver and evaluates its share of each round.

All ranks run the same program (started by ``torchrun``) on the same noise, so they hold the same states and take the
same decisions. Of a round with R rows, rank r of P evaluates the rows

    floor(r R / P) .. floor((r + 1) R / P) - 1,

and outputs are gathered: only they cross the wire, and every rank goes on from the same bits. Before outputs are
gathered, ranks meet: a few numbers over the CPU say which round this is, what was asked, and whether the evaluation
failed. So a rank that died, hangs, raised or went another way is named, and no rank is left waiting for it.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from ..rows import EvalBatch, expect

__all__ = ["RankError", "Ranks", "Sharded", "fingerprint", "sharded"]

Result = TypeVar("Result")

TIMEOUT = 600.0  # seconds that ranks wait for one another
UNLIKE = 3.0  # times sqrt(eps): relative difference of outputs for one input that rounding does not explain


class RankError(RuntimeError):
    """A rank died, hangs, failed, or does something else than the others."""


class Ranks:
    """The ranks along the dimension ``time`` of a mesh, as one of them sees them.

    Args:
        mesh: From ``torch.distributed.device_mesh.init_device_mesh``, with a dimension named ``time``; other dimensions
            belong to whatever shards the network itself.
        timeout: Seconds to wait for another rank before it counts as lost; more than a round takes, compilation
            included.

    Attributes:
        size: P, how many there are.
        rank: Number of this one, 0 .. P - 1.
        names: What each is called in errors.

    Raises:
        ValueError: If the mesh has no dimension ``time``.
    """

    def __init__(self, mesh: DeviceMesh, *, timeout: float = TIMEOUT) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {mesh!r}: make it by init_device_mesh.")
        if "time" not in (mesh.mesh_dim_names or ()):
            raise ValueError(
                f"the mesh has the dimensions {mesh.mesh_dim_names}, and none is named 'time': make it by "
                "init_device_mesh(device_type, (ranks,), mesh_dim_names=('time',))."
            )
        along = mesh["time"]
        self.size, self.rank, self.device_type = along.size(), along.get_local_rank(), along.device_type
        self.timeout = timeout
        self._group = along.get_group()
        self._members = dist.get_process_group_ranks(self._group)
        self._control = dist.new_group(
            self._members, timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True
        )
        self._round = 0
        self._open = True  # nothing has been said that is not answered, so this rank can still say that it ends
        self.names: list[str] = []
        self.names = self._every(f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})")

    @classmethod
    def of(cls, mesh: DeviceMesh | Ranks) -> Ranks:
        """Return the ranks of a mesh; they are set up once for each mesh."""
        if isinstance(mesh, Ranks):
            return mesh
        kept = _known.get(id(mesh))
        if kept is None or kept[0] is not mesh:
            kept = _known[id(mesh)] = (mesh, cls(mesh))
        return kept[1]

    def share(self, count: int) -> slice:
        """Return which of ``count`` rows are this rank's: as many as any other's, or one less or more."""
        return self._share(count, self.rank)

    def _share(self, count: int, rank: int) -> slice:
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def compare(self, **facts: Any) -> None:
        """Raise unless all ranks state the same facts.

        Raises:
            RankError: With what differs, and which ranks differ from most.
        """
        self._round = -1
        self.work(b"start", lambda: None)
        facts = {"torch": torch.__version__, **{name: fingerprint(value) for name, value in facts.items()}}
        every = self._every(facts)
        found = []
        for name in facts:
            values = [one.get(name) for one in every]
            odd = _odd(values)
            if odd:
                most = values[next(r for r in range(self.size) if r not in odd)]
                found.append(f"{name}: {', '.join(f'{self.names[r]} has {values[r]}' for r in odd)}, others {most}")
        if found:
            raise RankError(
                f"ranks must do the same work, and differ in {'; '.join(found)}. Seed all generators equally, and pass "
                "the same arguments on all ranks."
            )

    def first(self, value: Result) -> Result:
        """Return what the first rank has, on all of them."""
        found: Result = self._every(value)[0]
        return found

    def agree(self, output: Tensor) -> None:
        """Raise unless networks of all ranks give the same output for the same input, up to rounding.

        Raises:
            RankError: With the ranks whose networks differ.
        """
        every = self.rows(output.reshape(1, -1), self.size).double().nan_to_num()
        apart = (every - every[0]).norm(dim=1) / every[0].norm().clamp_min(1e-30)
        odd = [rank for rank, far in enumerate(apart.tolist()) if far > UNLIKE * torch.finfo(output.dtype).eps ** 0.5]
        if odd:
            raise RankError(
                f"for the same input, the network of {' and '.join(self.names[r] for r in odd)} gives another output "
                f"than that of {self.names[0]}: load the same weights on all ranks, and call eval()."
            )

    def work(self, asked: bytes, evaluate: Callable[[], Result]) -> Result:
        """Do this rank's share of a round, and meet the others.

        Args:
            asked: What the whole round is about; the same on all ranks.
            evaluate: The share.

        Raises:
            RankError: If another rank failed, was interrupted, is lost, or was asked something else.
        """
        failure: BaseException | None = None
        try:
            result = evaluate()
        except BaseException as error:  # KeyboardInterrupt as well: the others are told
            failure = error
        self._round += 1
        heard = self._meet([self._round, zlib.crc32(asked), failure is not None])
        if any(failed for _, _, failed in heard):
            reasons = self._every(_reason(failure))
            self._open = False
            if failure is not None:
                raise failure
            told = [f"{name} {reason}" for name, reason in zip(self.names, reasons, strict=True) if reason]
            raise RankError("; ".join(told))
        odd = _odd([one[:2] for one in heard])
        if odd:
            raise RankError(
                f"{' and '.join(self.names[r] for r in odd)} {'asks' if len(odd) == 1 else 'ask'} for other rows than "
                f"the other ranks in round {self._round}, or for none: an error that was caught, a callback, a "
                "stopping rule or the kernels differ between ranks."
            )
        return result

    def end(self) -> None:
        """See that all ranks are at the end of a solve; raises as :meth:`work` does."""
        self.work(b"end", lambda: None)

    def interrupted(self) -> None:
        """Tell the others that this rank was interrupted, unless they know or wait for something else from it."""
        if self._open:
            with suppress(KeyboardInterrupt, RankError):
                self.work(b"", _interrupt)

    @contextmanager
    def _saying(self) -> Iterator[None]:
        self._open = False
        yield
        self._open = True

    def rows(self, own: Tensor, count: int) -> Tensor:
        """Return all ``count`` rows, (count, *shape), from the shares (R, *shape) of all ranks, in their order."""
        size = own.element_size() * math.prod(own.shape[1:])
        shares = [range(count)[self._share(count, rank)] for rank in range(self.size)]
        every = self._gather(_bits(own), [size * len(share) for share in shares])
        return every.view(own.dtype).view(count, *own.shape[1:])

    def gather_trees(
        self, asked: bytes, evaluate: Callable[[], list[list[Any]]], forms: Sequence[Sequence[Any]]
    ) -> list[list[Any]]:
        """Do this rank's share of a round as :meth:`work` does, and return the leaves of all outputs.

        Args:
            asked: What the whole round is about.
            evaluate: The leaves of this rank's share.
            forms: Those of all, with leaves of the same shapes and dtypes; what is no tensor is taken from here.
        """
        expected = forms[self.share(len(forms))]
        own = self.work(asked, lambda: _alike(evaluate(), expected))
        sizes = [sum(map(_bytes, form)) for form in forms]
        like = next(leaf for form in forms for leaf in form if isinstance(leaf, Tensor))
        parts = [_bits(leaf) for output in own for leaf in output if isinstance(leaf, Tensor)]
        packed = torch.cat(parts) if parts else like.new_empty(0, dtype=torch.uint8)
        totals = [sum(sizes[self._share(len(forms), rank)]) for rank in range(self.size)]
        every = iter(torch.split(self._gather(packed, totals), [_bytes(leaf) for form in forms for leaf in form]))
        found = []
        for form in forms:
            parts = [next(every) for _ in form]
            # A copy starts where its dtype may.
            found.append(
                [
                    bits.clone().view(leaf.dtype).view(leaf.shape) if isinstance(leaf, Tensor) else leaf
                    for leaf, bits in zip(form, parts, strict=True)
                ]
            )
        return found

    def _gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the bytes of all ranks, one rank behind the other."""
        if own.device.type != self.device_type:
            raise ValueError(
                f"outputs are on {own.device}, and the mesh is of {self.device_type}: make it by "
                f"init_device_mesh({own.device.type!r}, ..)."
            )
        most = max(sizes)
        padded = own if len(own) == most else torch.cat([own, own.new_zeros(most - len(own))])
        every = [torch.empty_like(padded) for _ in range(self.size)]
        try:
            with self._saying():
                dist.all_gather(every, padded, group=self._group)
        except RuntimeError as error:
            self._meet([self._round, 0, 0])  # who is lost does not come
            raise RankError(f"outputs could not be gathered: {error}") from error
        return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])

    def _meet(self, told: Sequence[int]) -> list[tuple[int, ...]]:
        """Tell every rank a few numbers, and return what each told."""
        own = torch.tensor([int(one) for one in told], device="cpu")
        heard = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        ends = time.monotonic() + self.timeout
        coming: list[tuple[int, Any]] = []
        with self._saying():
            for way, calls in ((dist.irecv, heard), (dist.isend, [own] * self.size)):
                for rank in others:
                    coming.append((rank, self._lost(rank, way, calls[rank], self._members[rank], group=self._control)))
            for rank, work in coming:
                self._lost(rank, work.wait, timedelta(seconds=max(ends - time.monotonic(), 0.01)))
        return [tuple(one.tolist()) for one in heard]

    def _lost(self, rank: int, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Make a call that waits for a rank, or raise that it is lost."""
        try:
            return call(*args, **options)
        except RuntimeError as error:
            raise RankError(
                f"{self.names[rank]} is lost in round {self._round}: it died, or hangs for more than "
                f"{self.timeout:g} s ({str(error).splitlines()[0]})."
            ) from error

    def _every(self, value: Any) -> list[Any]:
        """Return what every rank told, in their order."""
        told: list[Any] = [None] * self.size
        try:
            with self._saying():
                dist.all_gather_object(told, value, group=self._control)
        except RuntimeError as error:
            if self.names:
                self._meet([self._round, 0, 0])
            raise RankError(f"not all {self.size} ranks came within {self.timeout:g} s: {error}") from error
        return told


_known: dict[int, tuple[DeviceMesh, Ranks]] = {}


class Sharded:
    """Rows to outputs, each rank evaluating its share; see :func:`sharded`."""

    def __init__(self, evaluate: Callable[[EvalBatch], Tensor], ranks: Ranks) -> None:
        """Wrap ``evaluate``."""
        self.ranks = ranks
        self._evaluate = evaluate
        self._first = True

    def __call__(self, rows: EvalBatch) -> Tensor:
        """Evaluate the rows, on all ranks together."""
        ranks, count = self.ranks, len(rows.x)
        asked = rows.step.numpy().tobytes() + rows.sample.numpy().tobytes()
        if self._first:
            self._first = False
            ranks.compare(states=rows.x)
            one = EvalBatch(*(part[-1:] for part in rows))  # at pure noise networks differ least
            ranks.agree(ranks.work(asked, lambda: self._checked(one)))
        own = rows.take(torch.arange(count, device="cpu")[ranks.share(count)])
        return ranks.rows(ranks.work(asked, lambda: self._checked(own) if len(own.x) else own.x), count)

    def _checked(self, rows: EvalBatch) -> Tensor:
        return expect(self._evaluate(rows), tuple(rows.x.shape), rows.x.dtype, rows.step.numpy())


def sharded(evaluate: Callable[[EvalBatch], Tensor], mesh: DeviceMesh | Ranks) -> Sharded:
    """Evaluate the rows of a round on all ranks of a mesh, each its share.

    Every rank must make the same calls: run the same program on all of them, with the same noise.

    Args:
        evaluate: Rows to outputs of the same shape and dtype, as :func:`parataxis.drive` wants it.
        mesh: A mesh with a dimension ``time``, or its :class:`Ranks`, with a timeout of one's own.

    Returns:
        The same function for all ranks together: the same rows in, the same outputs out, with the same bits on all
        ranks. The first call also compares states and networks.

    Raises:
        RankError: When called: a rank died, hangs, failed, has other states, rows or weights; it is named.
        OutputError: When called: this rank's network returned something else than asked for.
    """
    return Sharded(evaluate, Ranks.of(mesh))


def _alike(outputs: list[list[Any]], forms: Sequence[Sequence[Any]]) -> list[list[Any]]:
    for output, form in zip(outputs, forms, strict=True):
        for leaf, like in zip(output, form, strict=True):
            if isinstance(like, Tensor) and (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"the network returned {leaf.dtype} {tuple(leaf.shape)} for merged calls, and {like.dtype} "
                    f"{tuple(like.shape)} by itself: ranks cannot share its calls."
                )
    return outputs


def fingerprint(value: Any) -> str:
    """Return a short text that is the same for the same value: of tensors and arrays a digest of their bits."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]} {tuple(value.shape)} on {value.device.type}, bits {_digest(value)}"
    if isinstance(value, np.ndarray):
        return fingerprint(torch.from_numpy(np.ascontiguousarray(value)))
    if is_dataclass(value) and any(isinstance(getattr(value, one.name), np.ndarray) for one in fields(value)):
        return " ".join(fingerprint(getattr(value, one.name)) for one in fields(value))
    leaves = tree_leaves(value)
    return repr(value) if leaves == [value] or not leaves else " ".join(fingerprint(leaf) for leaf in leaves)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha1(_bits(tensor.detach().cpu()).numpy().tobytes(), usedforsecurity=False).hexdigest()[:8]


def _bits(leaf: Tensor) -> Tensor:
    return leaf.contiguous().view(-1).view(torch.uint8)


def _bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def _reason(failure: BaseException | None) -> str:
    """Return what the other ranks are told of a failure."""
    if failure is None:
        return ""
    if isinstance(failure, KeyboardInterrupt):
        return "was interrupted"
    return f"failed: {type(failure).__name__}: {failure}"


def _interrupt() -> None:
    raise KeyboardInterrupt


def _odd(values: Sequence[Any]) -> list[int]:
    """Return the places of those that differ from most, or else from the first."""
    most = Counter(values).most_common(1)[0][0]
    return [place for place, value in enumerate(values) if value != most]
