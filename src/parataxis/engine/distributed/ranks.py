r"""Many devices for one sample: every rank runs the same solver and evaluates its share of each round.

All ranks run the same program (started by ``torchrun``) on the same noise, so they hold the same states and take the
same decisions. Of a round with R rows, rank r of P evaluates the rows

    floor(r R / P) .. floor((r + 1) R / P) - 1,

and outputs are gathered: only they cross the wire, and every rank goes on from the same bits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..fingerprint import as_bytes, fingerprint
from ..rows import EvalBatch, expect
from ..run import Group
from .control import ControlChannel, RankError, differing
from .gather import byte_count, check_forms, pack, unpack

__all__ = ["Ranks", "Sharded", "sharded"]

Result = TypeVar("Result")

TIMEOUT = 600.0  # seconds that ranks wait for one another
AGREE_EVERY = 4  # rounds between two looks whether all networks still give the same output for the same input
UNLIKE = 3.0  # times sqrt(eps): relative difference of outputs for one input that rounding does not explain


class Ranks:
    """The ranks along the dimension ``time`` of a mesh, as one of them sees them.

    Args:
        mesh: From ``torch.distributed.device_mesh.init_device_mesh``, with a dimension named ``time``; other dimensions
            belong to whatever shards the network itself.
        timeout: Seconds to wait for another rank before it counts as lost; more than a round takes, with compilation.

    Attributes:
        size: P, how many there are.
        rank: Number of this one, 0 .. P - 1.
        device_type: Where outputs are gathered.
        agree_every: Rounds between two looks whether the networks of all ranks agree.

    Raises:
        ValueError: If the mesh has no dimension ``time``.
    """

    agree_every = AGREE_EVERY

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
        self._group = along.get_group()
        self._control = ControlChannel(dist.get_process_group_ranks(self._group), self.rank, timeout)

    def __repr__(self) -> str:
        """Return which of how many this is."""
        return f"Ranks(rank {self.rank} of {self.size}, {self.device_type})"

    @classmethod
    def of(cls, mesh: DeviceMesh | Ranks) -> Ranks:
        """Return the ranks of a mesh; they are set up once for each mesh."""
        if isinstance(mesh, Ranks):
            return mesh
        known = _known.get(id(mesh))
        if known is None or known[0] is not mesh:
            known = _known[id(mesh)] = (mesh, cls(mesh))
        return known[1]

    @property
    def names(self) -> list[str]:
        """What each rank is called in errors."""
        return self._control.names

    def share(self, count: int) -> slice:
        """Return which of ``count`` rows are this rank's: as many as any other's, or one less or more."""
        return self._share(count, self.rank)

    def _share(self, count: int, rank: int) -> slice:
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def name_of_row(self, row: int, count: int) -> str:
        """Return what the rank is called that evaluates this one of ``count`` rows."""
        return next(name for rank, name in enumerate(self.names) if row in range(count)[self._share(count, rank)])

    def compare(self, **facts: Any) -> None:
        """Raise unless all ranks state the same facts.

        Raises:
            RankError: With what differs, and which ranks differ from the majority.
        """
        self._control.round = -1
        self.run_checked(b"start", lambda: None)
        texts = {"torch": torch.__version__, **{name: fingerprint(value) for name, value in facts.items()}}
        texts_of_ranks = self._control.all_gather(texts)
        differences = []
        for name in texts:
            values = [texts_of_rank.get(name) for texts_of_rank in texts_of_ranks]
            odd = differing(values)
            if odd:
                others = values[next(r for r in range(self.size) if r not in odd)]
                odd_values = ", ".join(f"{self.names[r]} has {values[r]}" for r in odd)
                differences.append(f"{name}: {odd_values}, others {others}")
        if differences:
            raise RankError(
                f"ranks must do the same work, and differ in {'; '.join(differences)}. Seed all generators equally, "
                "and pass the same arguments on all ranks."
            )

    def broadcast(self, value: Result, classes: Iterable[type] = ()) -> Result:
        """Return what the first rank has, on all of them; it may hold objects of these classes."""
        first: Result = self._control.all_gather(value, classes)[0]
        return first

    def agree(self, output: Tensor) -> None:
        """Raise unless networks of all ranks give the same output for the same input, up to rounding.

        Raises:
            RankError: With the ranks whose networks differ.
        """
        outputs = self.gather_rows(output.reshape(1, -1), self.size).double().nan_to_num()
        distances = (outputs - outputs[0]).norm(dim=1) / outputs[0].norm().clamp_min(1e-30)
        bound = UNLIKE * torch.finfo(output.dtype).eps ** 0.5
        odd = [rank for rank, distance in enumerate(distances.tolist()) if distance > bound]
        if odd:
            raise RankError(
                f"for the same input, the network of {' and '.join(self.names[r] for r in odd)} gives another output "
                f"than that of {self.names[0]}: load the same weights on all ranks, and call eval()."
            )

    def run_checked(self, subject: bytes, evaluate: Callable[[], Result]) -> Result:
        """Do this rank's share of a round, and check that the others have done theirs.

        Args:
            subject: What the whole round is about; the same on all ranks.
            evaluate: The share.

        Raises:
            RankError: If another rank failed, was interrupted, is lost, or works on something else.
        """
        control = self._control
        failure: BaseException | None = None
        try:
            result = evaluate()
        except BaseException as error:  # KeyboardInterrupt as well: the others must know
            failure = error
        control.round += 1
        statuses = control.exchange_status([control.round, zlib.crc32(subject), failure is not None])
        if any(failed for _, _, failed in statuses):
            reasons = control.all_gather(_reason(failure))
            control.idle = False
            if failure is not None:
                raise failure
            raise RankError("; ".join(f"{name} {text}" for name, text in zip(self.names, reasons, strict=True) if text))
        odd = differing([status[:2] for status in statuses])
        if odd:
            raise RankError(
                f"{' and '.join(self.names[r] for r in odd)} {'asks' if len(odd) == 1 else 'ask'} for other rows than "
                f"the other ranks in round {control.round}, or for none: an error that was caught, a callback, a "
                "stopping rule or the kernels differ between ranks."
            )
        return result

    def end(self) -> None:
        """See that all ranks are at the end of a solve; raises as :meth:`run_checked` does."""
        self.run_checked(b"end", lambda: None)

    def interrupted(self) -> None:
        """Let the others know that this rank was interrupted, unless they know or wait for something else from it."""
        if self._control.idle:
            with suppress(KeyboardInterrupt, RankError):
                self.run_checked(b"", _interrupt)

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """Return all ``count`` rows, (count, *shape), from the shares (R, *shape) of all ranks, in their order."""
        size = rows.element_size() * math.prod(rows.shape[1:])
        shares = [range(count)[self._share(count, rank)] for rank in range(self.size)]
        message = self._gather(as_bytes(rows), [size * len(share) for share in shares])
        return message.view(rows.dtype).view(count, *rows.shape[1:])

    def gather_trees(
        self, subject: bytes, evaluate: Callable[[], list[list[Any]]], forms: Sequence[Sequence[Any]]
    ) -> list[list[Any]]:
        """Do this rank's share of a round as :meth:`run_checked` does, and return the leaves of all outputs.

        Args:
            subject: What the whole round is about.
            evaluate: The leaves of this rank's share.
            forms: Those of all, with leaves of the same shapes and dtypes; what is no tensor is taken from here.
        """
        expected = forms[self.share(len(forms))]
        outputs = self.run_checked(subject, lambda: check_forms(evaluate(), expected))
        sizes = [sum(map(byte_count, form)) for form in forms]
        totals = [sum(sizes[self._share(len(forms), rank)]) for rank in range(self.size)]
        like = next(leaf for form in forms for leaf in form if isinstance(leaf, Tensor))
        return unpack(self._gather(pack(outputs, like), totals), forms)

    def _gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the messages of all ranks, of these sizes in bytes, one behind the other."""
        if message.device.type != self.device_type:
            raise ValueError(
                f"outputs are on {message.device}, and the mesh is of {self.device_type}: make it by "
                f"init_device_mesh({message.device.type!r}, ..)."
            )
        largest = max(sizes)
        padded = message
        if len(message) < largest:
            padded = torch.cat([message, message.new_zeros(largest - len(message))])
        messages = [torch.empty_like(padded) for _ in range(self.size)]
        try:
            with self._control.uninterruptible():
                dist.all_gather(messages, padded, group=self._group)
        except RuntimeError as error:
            self._control.find_lost()
            raise RankError(f"outputs could not be gathered: {error}") from error
        return torch.cat([part[:size] for part, size in zip(messages, sizes, strict=True)])


_known: dict[int, tuple[DeviceMesh, Ranks]] = {}


class Sharded:
    """Rows to outputs, each rank evaluating its share; see :func:`sharded`."""

    def __init__(self, evaluate: Callable[[EvalBatch], Tensor], ranks: Ranks) -> None:
        """Wrap ``evaluate``."""
        self.ranks = ranks
        self._evaluate = evaluate
        self._rounds = 0
        self._rows: tuple[Tensor, Tensor] | None = None  # steps and samples of the latest round

    def __call__(self, rows: EvalBatch) -> Tensor:
        """Evaluate the rows, on all ranks together."""
        ranks, count = self.ranks, len(rows.x)
        subject = rows.step.numpy().tobytes() + rows.sample.numpy().tobytes()
        if not self._rounds:
            ranks.compare(states=rows.x)
        agrees = self._rounds % AGREE_EVERY == 0  # weights may also change on one rank later
        self._rounds, self._rows = self._rounds + 1, (rows.step, rows.sample)
        index = torch.arange(count, device="cpu")
        # Every rank also evaluates the last row: in the same call it costs hardly any time.
        share = rows.take(torch.cat([index[ranks.share(count)], index[-1:]]) if agrees else index[ranks.share(count)])
        outputs = ranks.run_checked(subject, lambda: self._checked(share) if len(share.x) else share.x)
        if agrees:
            ranks.agree(outputs[-1:])
            outputs = outputs[:-1]
        return ranks.gather_rows(outputs, count)

    def name_ranks(self, group: Group) -> None:
        """Let errors of these samples say which rank an output came from."""
        group.batch.origin = lambda place, step: self._origin(int(group.slots[place]), step)

    def _origin(self, sample: int, step: int) -> str:
        """Return which rank has evaluated a row of the latest round, as errors say it."""
        assert self._rows is not None
        steps, samples = self._rows
        row = int(torch.nonzero((steps == step) & (samples == sample))[0])
        return f"evaluated by {self.ranks.name_of_row(row, len(steps))}, "

    def _checked(self, rows: EvalBatch) -> Tensor:
        return expect(self._evaluate(rows), tuple(rows.x.shape), rows.x.dtype, rows.step.numpy())


def sharded(evaluate: Callable[[EvalBatch], Tensor], mesh: DeviceMesh | Ranks) -> Sharded:
    """Evaluate the rows of a round on all ranks of a mesh, each its share.

    Every rank must make the same calls: run the same program on all of them, with the same noise.

    Args:
        evaluate: Rows to outputs of the same shape and dtype, as :func:`parataxis.drive` takes it.
        mesh: A mesh with a dimension ``time``, or its :class:`Ranks`, with another timeout.

    Returns:
        The same function for all ranks together: the same rows in, the same outputs out, with the same bits on all
        ranks. The first call also compares states, and every fourth whether the networks of all ranks give the same
        output for one of its rows.

    Raises:
        RankError: When called: a rank died, hangs, failed, has other states, rows or weights; it is named.
        OutputError: When called: this rank's network returned something else than an output.
    """
    return Sharded(evaluate, Ranks.of(mesh))


def _reason(failure: BaseException | None) -> str:
    """Return what a failure is called on the other ranks."""
    if failure is None:
        return ""
    if isinstance(failure, KeyboardInterrupt):
        return "was interrupted"
    return f"failed: {type(failure).__name__}: {failure}"


def _interrupt() -> None:
    raise KeyboardInterrupt
