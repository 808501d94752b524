r"""Recordings: what the equation of a loop is, found by running it with outputs at random.

Two recordings of one loop, with outputs V and V', start from the same random state, so their inputs U and U' differ
only by what the outputs did. A sampling loop is linear in them, with a short memory:

    U_{i+1} - U'_{i+1} = sum_{l=0..L} [ a_{i,l} (U_{i-l} - U'_{i-l}) + b_{i,l} (V_{i-l} - V'_{i-l}) ]

with scalars a, b: a small least-squares problem at each level, on a few thousand random elements, whose residual
proves or disproves it. The states are eliminated by the recursion itself, which leaves the table. The calls or rows
of a level whose inputs are equal (guidance) enter through one combination of their outputs, sum_r g_r V_r with
sum_r g_r = 1. What the loop adds along the way is the rest of a third pass, whose outputs f = d u + noise, with d such
that states keep their size, keep rounding small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..arrays import Indices, upload
from ..samplers.coefficients import Coefficients

from .merge import Call, Calls, Output, Piece, Refused, Site, equal

__all__ = ["Changed", "Ended", "Minded", "Refused", "Stage", "Structure", "analyse", "drawn", "fit"]

Array = NDArray[np.float64]
LAGS = 5  # most earlier levels that a step may use: third-order multistep methods with corrector use three
ELEMENTS = 4096  # rows of the least-squares problem
CLOSE = 0.05  # part of the rounding allowed, below which no longer memory is tried
WANDER = 0.1  # noise of the combined outputs of the third pass, relative to their inputs


class Ended(BaseException):
    """A pass has seen what it was for."""


class Minded(BaseException):
    """A callback has changed what the loop does."""


class Changed(Refused):
    """A pass went another way than the ones before."""


def drawn(output: Output, *seed: int) -> list[Any]:
    """Return leaves like a denoiser's output, standard normal, from a counter."""
    leaves: list[Any] = []
    for i, leaf in enumerate(output.leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            leaves.append(leaf)
            continue
        mixed = int(np.random.SeedSequence([*seed, i]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        generator = torch.Generator(leaf.device).manual_seed(mixed)
        wide = torch.promote_types(leaf.dtype, torch.float32)
        leaves.append(torch.randn(leaf.shape, generator=generator, device=leaf.device, dtype=wide).to(leaf.dtype))
    return leaves


@dataclass(eq=False)
class Structure:
    """What stays the same of a stage from call to call.

    Attributes:
        signatures: Of every call.
        outputs: Form of every call's output.
        sites: How the rows of every call belong to states.
        feeds: Of every call: which arguments are outputs of earlier calls.
        levels: The calls of every level; feeding calls belong to none.
        level_of: Level of every call, that of the fed call for feeding ones.
        groups: Samples: rows of a level with different inputs.
        dim: Elements of a state.
        dtype: Of the states: float32, or float64 where the loop's own is.
        network: Dtype of the loop's states.
        coefficients: The equation; a heuristic for the slopes where ``linear`` is false.
        linear: Whether the equation was proved.
        weights: g of every level, for its calls' rows in the order of a group.
        final: Whether the loop ends with a tensor that is one more state.
        scale: How much larger it is than a state: what a decoder is given has been scaled for it.
        floor: Relative change of the last state when all outputs change by their rounding; 0 until it is measured.
        precision: Rounding of a step, relative to its terms.
        slopes: (N,) of outputs with which states keep their size.
        joint: Samples cannot be evaluated apart: one run for all.
        proof: (elements, what the first recording added at them, how much rounding may change that).
    """

    signatures: list[Any]
    outputs: list[Output]
    sites: list[Site]
    feeds: list[dict[int, tuple[int, int]]]
    levels: list[list[int]]
    level_of: list[int]
    groups: int
    dim: int
    dtype: torch.dtype
    network: torch.dtype
    coefficients: Coefficients
    linear: bool
    weights: list[Array]
    final: bool
    slopes: Array
    scale: float = 1.0
    floor: float = 0.0
    precision: float = 0.0
    joint: bool = False
    proof: tuple[Tensor, Array, Array] | None = None

    @property
    def steps(self) -> int:
        """N."""
        return len(self.levels)

    def take(self, local: Coefficients) -> None:
        """Take the coefficients; without a last state one is added that equals the one before."""
        decay, weight = local.state_weight, local.output_weight
        if len(decay) < self.steps:
            decay, weight = np.append(decay, 1.0), np.append(weight, np.zeros((1, weight.shape[1])), 0)
        self.coefficients = Coefficients(decay, weight, np.zeros(self.steps))
        slopes = self.coefficients.slopes(np.ones(self.steps))
        moved = np.abs(self.coefficients.output_weight.sum(1)) > 1e-8
        # Without an equation they are rough: larger ones would drive what wanders where no trajectory goes.
        most = np.inf if self.linear else 1.0
        self.slopes = np.where(moved & (np.abs(slopes) < 1e3), np.clip(slopes, -most, most), 0.0)

    def combine(self, level: int, rows: Sequence[Tensor]) -> Tensor:
        """Return sum_r g_r f_r of the output rows (n, dim) of a group's places."""
        total = rows[0] * float(self.weights[level][0])
        for weight, row in zip(self.weights[level][1:], rows[1:], strict=True):
            total.add_(row, alpha=float(weight))
        return total


@dataclass(eq=False)
class Stage:
    """One stage of one call of the loop: its calls as recorded, and the evaluations known so far.

    Attributes:
        structure: What it shares with other calls of the same loop.
        first: Number of its first call in a pass.
        calls: As recorded.
        mode: How calls are answered: ``wander`` (f = d u + noise; records the calls) or ``affine`` in what is known.
        settled: Whether the loop may go on behind it.
        reach: Last level of a pass.
        seed: Of the noise of a pass that wanders.
        nudge: Noise that a pass adds to its outputs, relative to those of the network.
        inputs: States given by the loop in the last pass, (G, dim) a level.
        end: (G, dim) the last state, if the loop has one.
        answered: Outputs of the last pass, where there is an equation.
        expected: Inputs of a pass without callbacks, to tell whether callbacks change them.
        start: (G, dim) the first state.
        added: What the loop adds at every step, (G, dim) each.
        nudged: (G, dim) the last state of a pass with ``nudge``, to be compared with the next replay.
        solved: (G, dim) the last state as the solver left it.
        estimate: The solver's own estimate of its relative error.
        known: (N, G) whether there is an evaluation.
        anchors: Inputs X at which outputs were computed.
        raw: Output leaves of every call.
        slopes: (N, G).
        beyond: (G,) slopes with which the last evaluation answers for later levels.
    """

    structure: Structure
    first: int
    calls: list[Call | None]
    mode: str = "affine"
    settled: bool = False
    reach: int = 0
    nudge: float = 0.0
    seed: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    end: Tensor | None = None
    answered: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] | None = None
    start: Tensor | None = None
    added: list[Tensor] = field(default_factory=list)
    nudged: Tensor | None = None
    solved: Tensor | None = None
    estimate: float = 0.0
    known: NDArray[np.bool_] = field(init=False)
    anchors: list[Tensor | None] = field(init=False)
    raw: list[list[Any] | None] = field(init=False)
    slopes: Array = field(init=False)
    beyond: Array = field(init=False)

    def __post_init__(self) -> None:
        structure = self.structure
        self.reach = structure.steps
        self.known = np.zeros((structure.steps, structure.groups), bool)
        self.anchors = [None] * structure.steps
        self.raw = [None] * len(structure.sites)
        self.slopes = np.zeros((structure.steps, structure.groups))
        self.beyond = np.full(structure.groups, np.nan)

    @property
    def stop(self) -> int:
        """Number of the call behind its last one."""
        return self.first + len(self.structure.sites)

    def output(self, call: int) -> Output:
        """Return the form of a call's output."""
        return self.structure.outputs[call]

    @cached_property
    def recorded(self) -> Calls:
        """The calls, once a pass has recorded them."""
        calls = [call for call in self.calls if call is not None]
        assert len(calls) == len(self.calls)
        return Calls(calls, self.structure.sites)

    def begin(self) -> None:
        """Begin a pass."""
        self.inputs, self.answered, self.end = [], [], None

    def answer(self, call: int, module: int, spec: TreeSpec, leaves: list[Any]) -> list[Any]:
        """Return the output leaves of a call of this stage."""
        structure = self.structure
        level, site = structure.level_of[call], structure.sites[call]
        made = Call(module, spec, leaves, structure.feeds[call], None, structure.outputs[call])
        if made.signature() != structure.signatures[call]:
            raise Changed("the arguments of the denoiser change their form from pass to pass.")
        if self.mode == "wander":
            self._record(call, made)
        if call not in structure.levels[level]:
            return drawn(structure.outputs[call], self.seed, call)  # goes into another stub's arguments only
        states = site.states(leaves, structure.dtype)
        if call == structure.levels[level][0]:
            if level > self.reach:
                raise Ended
            index = np.array([np.flatnonzero(site.owner == g)[0] for g in range(structure.groups)])
            self.inputs.append(states[upload(index, states.device)])
            if self.expected is not None and not torch.equal(self.inputs[-1], self.expected[level]):
                raise Minded
        if self.expected is not None and not self._told_the_same(call, leaves):
            raise Minded
        if self.mode == "wander":
            return self._wander(call, level, states)
        return self._affine(call, level, states)

    def _told_the_same(self, call: int, leaves: Sequence[Any]) -> bool:
        """Return whether a call is told what was recorded, besides its live inputs."""
        live = {piece.leaf for piece in self.structure.sites[call].pieces} | set(self.structure.feeds[call])
        recorded = self.recorded.calls[call].leaves
        return all(i in live or equal(one, two) for i, (one, two) in enumerate(zip(leaves, recorded, strict=True)))

    def _record(self, call: int, made: Call) -> None:
        kind = next((leaf.device.type for leaf in made.leaves if isinstance(leaf, Tensor)), "cpu")
        if torch.is_autocast_enabled(kind):
            made.autocast = (kind, torch.get_autocast_dtype(kind))
        alike = (c for c in reversed(self.calls[:call]) if c is not None and c.spec == made.spec)
        previous = next(alike, None)
        leaves = []
        for i, leaf in enumerate(made.leaves):
            before = previous.leaves[i] if previous is not None else None
            leaves.append(
                before if equal(leaf, before) else leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
            )
        made.leaves = leaves
        self.calls[call] = made

    def _wander(self, call: int, level: int, states: Tensor) -> list[Any]:
        """Answer so that states keep their size, plus noise."""
        structure, site = self.structure, self.structure.sites[call]
        leaves = drawn(structure.outputs[call], self.seed, call)
        small = WANDER * float(states.square().mean().sqrt()) / float(np.abs(structure.weights[level]).sum())
        leaves = [leaf * small if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
        site.add(leaves, states * float(structure.slopes[level]))
        self._tell(call, leaves)
        return leaves

    def _tell(self, call: int, leaves: Sequence[Any]) -> None:
        """Keep what a call was answered, (G, dim) for every place of a group."""
        structure, site = self.structure, self.structure.sites[call]
        rows = site.answers(leaves, structure.dtype)
        places = [upload(np.flatnonzero(site.owner == g), rows.device) for g in range(structure.groups)]
        self.answered += [torch.stack([rows[place[k]] for place in places]) for k in range(len(places[0]))]

    def _affine(self, call: int, level: int, states: Tensor) -> list[Any]:
        """Answer f_q + d_q (u - u_q) with what is known of this level, else of the last known one before."""
        structure, site = self.structure, self.structure.sites[call]
        leaves = [
            torch.zeros_like(leaf, memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf
            for leaf in structure.outputs[call].leaves
        ]
        sources = self._sources(call, level)
        change = torch.zeros_like(states)
        for source in {own for own in sources.values() if own is not None}:
            near, q = source
            rows = np.flatnonzero([sources[int(g)] == source for g in site.owner])
            index = upload(rows, states.device)
            for leaf, known in zip(leaves, self.raw[near] or [], strict=True):
                if isinstance(leaf, Tensor) and site.view(leaf).shape[0] == site.rows:
                    site.view(leaf)[index] = site.view(known)[index]
            owner = upload(site.owner[rows], states.device)
            anchor = self.anchors[q]
            assert anchor is not None
            slopes = self.slopes[q] if q == level else np.where(np.isnan(self.beyond), self.slopes[q], self.beyond)
            factor = upload(slopes[site.owner[rows]], states).unsqueeze(1)
            change[index] = factor * (states[index] - anchor[owner])
        site.add(leaves, change)
        if self.nudge:
            for leaf, noise in zip(leaves, drawn(structure.outputs[call], self.seed, call), strict=True):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf.add_(noise, alpha=self.nudge * float(leaf.float().square().mean().sqrt()))
        if structure.linear:
            self._tell(call, leaves)
        return leaves

    def _sources(self, call: int, level: int) -> dict[int, tuple[int, int] | None]:
        """Return, for every group, the call and level whose evaluation answers for it."""
        structure = self.structure
        place = structure.levels[level].index(call)
        owner = structure.sites[call].owner
        found: dict[int, tuple[int, int] | None] = {}
        for g in range(structure.groups):
            found[g] = None
            for q in range(level, -1, -1):
                near = structure.levels[q][place] if place < len(structure.levels[q]) else -1
                if self.known[q, g] and near >= 0 and np.array_equal(structure.sites[near].owner, owner):
                    found[g] = (near, q)
                    break
        return found

    def finish(self, leaves: Sequence[Any] | None) -> None:
        """Take the last state from what the loop ends with."""
        structure = self.structure
        if structure.final and leaves is not None:
            end = ending(leaves, structure.groups, structure.dim, structure.dtype)
            self.end = None if end is None else end / structure.scale

    def learn(self, call: int, rows: NDArray[np.int64], output: Sequence[Any]) -> None:
        """Keep the outputs (their leaves, these rows only) of an evaluated call."""
        site = self.structure.sites[call]
        kept = self.raw[call]
        if kept is None:
            like = self.structure.outputs[call].leaves
            kept = [leaf.contiguous().clone() if isinstance(leaf, Tensor) else leaf for leaf in like]
            self.raw[call] = kept
        for mine, leaf in zip(kept, output, strict=True):
            if isinstance(mine, Tensor) and site.view(mine).shape[0] == site.rows:
                site.view(mine)[upload(rows, mine.device)] = site.view(leaf).to(mine)

    def runs(self, states: Tensor) -> Tensor:
        """Return states (G, dim) as the solver sees them: a row a run."""
        return states.reshape(1, -1) if self.structure.joint else states

    def place(self, level: int, groups: NDArray[np.int64], states: Tensor, finite: NDArray[np.bool_]) -> None:
        """Keep at which states (n, dim) these groups of a level were evaluated."""
        anchor = self.anchors[level]
        if anchor is None:
            anchor = self.anchors[level] = states.new_zeros(self.structure.groups, self.structure.dim)
        anchor[upload(groups, anchor.device)] = states
        self.known[level, groups] = finite

    def state(self, level: int, run: int) -> Tensor:
        """Return a state that the last pass has gone through, as the solver sees it."""
        return self.runs(self.inputs[level] if level < len(self.inputs) else self.last())[run]

    def last(self) -> Tensor:
        """Return the last state of the last pass, (G, dim)."""
        return self.inputs[-1] if self.end is None else self.end

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes d (S, W) of runs, of the steps first .. first + count - 1; the last holds for later steps."""
        for run, start, count, own in zip(sample, first, counts, slopes, strict=True):
            groups = slice(None) if self.structure.joint else slice(run, run + 1)
            if count:
                self.slopes[start : start + count, groups] = own[:count, None]
                self.beyond[groups] = own[count - 1]

    def certificate(self) -> float:
        """Return what error to expect of the last pass: the solver's own, and how far it came out from what was solved.

        Relative; the largest of all samples.
        """
        assert self.solved is not None
        last, solved = self.runs(self.last()), self.runs(self.solved)
        away = (last - solved).norm(dim=1) / last.norm(dim=1).clamp(min=1e-30)
        worst = self.estimate + float(away.max())
        return worst if np.isfinite(worst) else float("inf")

    def roughness(self, asked: Sequence[tuple[int, Sequence[Any]]]) -> float:
        """Return how much the outputs of calls differ from those evaluated before, relative to these."""
        away = size = 0.0
        for call, output in asked:
            site, known = self.structure.sites[call], self.raw[call]
            assert known is not None
            before = site.answers(known, self.structure.dtype)
            away += float((site.answers(output, self.structure.dtype) - before).square().sum())
            size += float(before.square().sum())
        return float(np.sqrt(away / max(size, 1e-30)))

    def measure(self) -> None:
        """Take the floor from the last pass and the one before it, which was nudged."""
        if self.nudged is not None:
            last = self.last()
            away = (self.nudged - last).norm(dim=1) / last.norm(dim=1).clamp(min=1e-30)
            self.structure.floor, self.nudged = float(away.max()), None

    def proved(self) -> bool:
        """Return whether the pass that has just wandered obeys the equation, too."""
        assert self.structure.proof is not None
        pick, added, allowed = self.structure.proof
        for own, before, bound in zip(self.added, added, allowed, strict=False):
            now = own.reshape(-1)[pick.to(own.device)].cpu().double().numpy()
            if not np.sqrt(((now - before) ** 2).mean()) <= bound:
                return False
        return True

    def combined(self) -> list[Tensor]:
        """Return the combined outputs of the last pass, (G, dim) a level."""
        outputs, first = [], 0
        for level in range(self.structure.steps):
            count = len(self.structure.weights[level])
            outputs.append(self.structure.combine(level, self.answered[first : first + count]))
            first += count
        return outputs

    def obeys(self) -> bool:
        """Return whether the last pass obeys the equation: it adds along the way what the first one did.

        In 16 bits terms within a step may cancel, which makes single steps a poor proof: half of them must be good.
        """
        away = [float((rest - old).norm()) / max(size, 1e-30) for old, (rest, size) in zip(self.added, self._rests())]  # noqa: B905
        half = torch.finfo(self.structure.network)
        close = half.bits >= 32 or bool(np.median(away) <= 2 * half.eps)
        return close and max(away) <= 4 * self.structure.precision

    def anchor(self) -> None:
        """Take what the loop adds along the way from the last pass."""
        self.start = self.inputs[0]
        rests = [rest for rest, _ in self._rests()]
        self.added = rests + [torch.zeros_like(self.start) for _ in range(self.structure.steps - len(rests))]

    def _rests(self) -> Iterator[tuple[Tensor, float]]:
        """Yield what each step of the last pass added, with the size of the terms that it is the rest of."""
        local, outputs = self.structure.coefficients, self.combined()
        states = [*self.inputs, *([] if self.end is None else [self.end])]
        for i in range(len(states) - 1):
            rest = states[i + 1] - float(local.state_weight[i]) * states[i]
            size = float(states[i + 1].norm()) + abs(float(local.state_weight[i])) * float(states[i].norm())
            for lag in range(min(local.lags, i) + 1):
                rest.sub_(outputs[i - lag], alpha=float(local.output_weight[i, lag]))
                if lag < 2:
                    size += abs(float(local.output_weight[i, lag])) * float(outputs[i - lag].norm())
            yield rest, size


def ending(leaves: Sequence[Any], groups: int, dim: int, dtype: torch.dtype) -> Tensor | None:
    """Return the tensor that may be the last state of all samples, (G, dim)."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() != groups * dim:
            continue
        if groups == 1 or (leaf.ndim and len(leaf) == groups):
            return leaf.detach().reshape(groups, dim).to(dtype)
    return None


def analyse(
    recordings: Sequence[Sequence[Call]], endings: Sequence[Sequence[Any] | None], seeds: Sequence[int], base: int
) -> tuple[Structure, int]:
    """Find the levels, samples and live inputs of a loop, and fit its equation.

    Args:
        recordings: The calls of two or more passes with random outputs.
        endings: What each pass ended with.
        seeds: Of their outputs.
        base: Number of the first call.

    Returns:
        The structure, and how many of the calls belong to it: the rest is a stage of its own.

    Raises:
        Refused: With the reason, if the loop cannot be solved in parallel.
    """
    first, second = recordings[0], recordings[1]
    if len(first) != len(second) or any(a.signature() != b.signature() for a, b in zip(first, second, strict=True)):
        raise Refused("the number or the form of the denoiser's calls depends on what it returned.")
    sites = _sites(first, second)
    feeding = {feeder for call in first for feeder, _ in call.feeds.values()}
    levels = _levels(first, second, sites, feeding)
    sites = _grouped(first, second, sites, levels)
    groups = int(sites[levels[0][0]].owner.max()) + 1
    dtype = torch.promote_types(_live(first, sites, levels[0][0]).dtype, torch.float32)

    def state(calls: Sequence[Call], call: int) -> Tensor:
        return sites[call].states(calls[call].leaves, dtype)

    dim = state(first, levels[0][0]).shape[1]
    cut = 0
    for level in levels:
        rows = {len(np.unique(sites[call].owner)) for call in level}
        if rows != {groups} or state(first, level[0]).shape[1] != dim:
            break
        cut += 1
    levels = levels[:cut]
    count = max(levels[-1]) + 1
    last = endings[0] if count == len(first) else None
    level_of = [next((i for i, level in enumerate(levels) if max(level) >= c), cut - 1) for c in range(count)]
    for calls in recordings:
        for level in levels:
            if not bool(torch.isfinite(state(calls, level[0])).all()):
                raise Refused(
                    f"the input of call {level[0]} is not finite although every output was: this scheduler divides by "
                    "zero there; choose another spacing, prediction type or number of steps."
                )
    structure = Structure(
        signatures=[call.signature() for call in first[:count]],
        outputs=[call.output for call in first[:count]],
        sites=sites[:count],
        feeds=[call.feeds for call in first[:count]],
        levels=levels,
        level_of=level_of,
        groups=groups,
        dim=dim,
        dtype=dtype,
        network=_live(first, sites, levels[0][0]).dtype,
        coefficients=Coefficients(np.zeros(cut), np.zeros((cut, 1)), np.zeros(cut)),
        linear=False,
        weights=[],
        final=last is not None and ending(last, groups, dim, dtype) is not None,
        slopes=np.zeros(cut),
    )
    fit(structure, recordings, endings, seeds, base)
    return structure, count


def _live(calls: Sequence[Call], sites: Sequence[Site], call: int) -> Tensor:
    leaf = calls[call].leaves[sites[call].pieces[0].leaf]
    assert isinstance(leaf, Tensor)
    return leaf


def _sites(first: Sequence[Call], second: Sequence[Call]) -> list[Site]:
    """Find the live leaves of each kind of call, and their live parts."""
    names = [call.signature() for call in first]
    live: dict[Any, dict[int, Tensor]] = {}
    for name, one, two in zip(names, first, second, strict=True):
        for i, (left, right) in enumerate(zip(one.leaves, two.leaves, strict=True)):
            if i in one.feeds or equal(left, right):
                continue
            if not isinstance(left, Tensor) or not left.is_floating_point():
                raise Refused("an argument of the denoiser that is no floating-point tensor depends on its outputs.")
            moved = (left != right).reshape(left.shape)
            known = live.setdefault(name, {})
            known[i] = moved | known[i] if i in known else moved
    found: dict[Any, Site] = {}
    for name, call in zip(names, first, strict=True):
        if name not in found:
            own = live.get(name) or next((v for k, v in live.items() if k[:2] == name[:2] and k[2] == name[2]), None)
            own = own or _by_place(live, call)
            if own is None:
                raise Refused("no argument of the denoiser depends on its earlier outputs.")
            found[name] = _site(call, own)
    return [found[name] for name in names]


def _by_place(live: dict[Any, dict[int, Tensor]], call: Call) -> dict[int, Tensor] | None:
    """Take the live leaves of other calls of the same form, for a kind that occurs at the first level only."""
    for name, own in live.items():
        if name[1] == str(call.spec) and all(isinstance(call.leaves[i], Tensor) for i in own):
            return {i: torch.ones_like(call.leaves[i], dtype=torch.bool) for i in own}
    return None


def _site(call: Call, live: dict[int, Tensor]) -> Site:
    leaves = [call.leaves[i] for i in live]
    batched = all(leaf.ndim > 1 and len(leaf) == len(leaves[0]) for leaf in leaves)
    rows = len(leaves[0]) if batched else 1
    answers = [i for i, leaf in enumerate(call.output.leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    pieces = []
    for place, (i, moved) in enumerate(live.items()):
        mask = moved if batched else moved[None]
        box = []
        for axis in range(1, mask.ndim):
            line = mask.movedim(axis, 0).flatten(1).any(1).nonzero()
            box.append((int(line[0]), int(line[-1]) + 1))
        if place >= len(answers):
            raise Refused(
                f"{len(live)} arguments of the denoiser depend on its earlier outputs, but it returns {len(answers)}."
            )
        leaf = call.output.leaves[answers[place]]
        leaf = leaf if batched else leaf[None]
        sizes = [stop - first for first, stop in box]
        if (
            leaf.ndim != mask.ndim
            or len(leaf) != rows
            or any(a < b for a, b in zip(leaf.shape[1:], sizes, strict=True))
        ):
            raise Refused(
                f"an output of shape {tuple(leaf.shape)} does not answer an input whose live part is {(rows, *sizes)}."
            )
        pieces.append(Piece(i, tuple(box), answers[place]))
    return Site(tuple(pieces), rows, batched, np.arange(rows))


def _levels(first: Sequence[Call], second: Sequence[Call], sites: Sequence[Site], feeding: set[int]) -> list[list[int]]:
    """Collect successive calls with the same inputs: they do not wait for one another."""
    levels: list[list[int]] = []
    for c in range(len(sites)):
        if c in feeding:
            continue
        if levels and _within(first, second, levels[-1][0], c, sites):
            levels[-1].append(c)
        else:
            levels.append([c])
    return levels


def _same_rows(calls: Sequence[Call], one: int, two: int, sites: Sequence[Site]) -> Tensor | None:
    """Return which rows of two calls are equal to the bit, (R, R'), or None where their states differ in size."""
    dtype = torch.promote_types(_live(calls, sites, one).dtype, torch.float32)
    left, right = (sites[c].states(calls[c].leaves, dtype) for c in (one, two))
    if left.shape[1] != right.shape[1]:
        return None
    return torch.stack([(left == row).all(1) for row in right], 1).cpu()


def _within(first: Sequence[Call], second: Sequence[Call], one: int, two: int, sites: Sequence[Site]) -> bool:
    found = [_same_rows(calls, one, two, sites) for calls in (first, second)]
    return found[0] is not None and found[1] is not None and bool((found[0] & found[1]).any(0).all())


def _grouped(
    first: Sequence[Call], second: Sequence[Call], sites: Sequence[Site], levels: Sequence[Sequence[int]]
) -> list[Site]:
    """Find which rows of calls have equal inputs at every level: they belong to one sample."""
    tables: dict[tuple[int, ...], Tensor] = {}
    # Equal at all levels, for samples may start from the same noise.
    for level in levels:
        for place, c in enumerate(level):
            for calls in (first, second):
                same = _same_rows(calls, level[0], c, sites)
                assert same is not None
                key = (place, *same.shape)
                tables[key] = tables[key] & same if key in tables else same
    grouped = list(sites)
    for level in levels:
        for place, c in enumerate(level):
            head, site = sites[level[0]], sites[c]
            own = tables[(0, head.rows, head.rows)].numpy()
            labels = np.unique(own.argmax(0), return_inverse=True)[1]
            match = tables[(place, head.rows, site.rows)].numpy()
            grouped[c] = Site(site.pieces, site.rows, site.batched, labels[match.argmax(0)])
    for c, site in enumerate(sites):
        if not any(c in level for level in levels):  # a feeding call has the rows of the fed one behind it
            fed = next((level[0] for level in levels if level[0] > c), None)
            if fed is not None and sites[fed].rows == site.rows:
                grouped[c] = Site(site.pieces, site.rows, site.batched, grouped[fed].owner)
    return grouped


def fit(
    structure: Structure,
    recordings: Sequence[Sequence[Call]],
    endings: Sequence[Sequence[Any] | None],
    seeds: Sequence[int],
    base: int,
) -> None:
    """Fit the equation to recordings with random outputs, into ``structure``."""
    total = structure.groups * structure.dim
    wide = torch.finfo(structure.network).bits < 32
    size = min(total, ELEMENTS * (8 if wide else 1))
    chosen = np.random.default_rng(0).choice(total, size, replace=False) if size < total else np.arange(total)
    pick = torch.from_numpy(chosen)
    states: list[list[Array]] = []
    outputs: list[list[Array]] = []
    for calls, end, seed in zip(recordings, endings, seeds, strict=True):
        own, answers = [], []
        for level in structure.levels:
            site = structure.sites[level[0]]
            index = [int(np.flatnonzero(site.owner == g)[0]) for g in range(structure.groups)]
            rows = site.states(calls[level[0]].leaves, structure.dtype).cpu().double()[index]
            own.append(rows.reshape(-1)[pick].numpy())
            answers.append(np.stack([row[pick].numpy() for row in _answers(structure, level, seed, base)]))
        last = ending(end, structure.groups, structure.dim, structure.dtype) if structure.final and end else None
        if last is not None:
            sample = last.cpu().double().reshape(-1)[pick].numpy()
            if not states:
                structure.scale = max(1.0, _size(sample) / max(_size(own[-1]), 1e-30))
            own.append(sample / structure.scale)
        states.append(own)
        outputs.append(answers)
    precision = torch.finfo(structure.network).eps
    bound = 6 * precision if wide else 32 * precision  # terms within a step may cancel
    structure.precision = bound
    complete = structure.final
    for final in (True, False) if complete else (False,):
        # A tensor at the end that does not obey may be no state: clipped, say.
        found = _equation(states, outputs, structure.steps - 1 + final, bound)
        if found is not None:
            break
    structure.linear, structure.final = found is not None, final if found is not None else complete
    if found is None:
        found = _equation(states, outputs, structure.steps - 1 + complete, np.inf)
        assert found is not None
    structure.weights, local = found
    # At the first level nothing moved: A_0 says how much of the start is in the next state.
    start = states[0][0]
    rest = states[0][1] - local.output_weight[0, 0] * (outputs[0][0].T @ structure.weights[0])
    local.state_weight[0] = start @ rest / max(start @ start, 1e-300)
    structure.take(local)
    if structure.linear:
        added, scale = [], []
        for i in range(local.steps):
            terms = [local.state_weight[i] * states[0][i]]
            for lag in range(min(local.lags, i) + 1):
                terms.append(local.output_weight[i, lag] * (outputs[0][i - lag].T @ structure.weights[i - lag]))
            added.append(states[0][i + 1] - np.sum(terms, 0))
            scale.append(_size(states[0][i + 1]) + sum(_size(term) for term in terms))
        structure.proof = pick, np.array(added), 4 * bound * np.array(scale) + 1e-5


def _size(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def linearise(structure: Structure, one: Stage, two: Stage) -> None:
    """Take the coefficients from the difference of two passes that wandered, where there is no equation.

    They only turn slopes into growth and back: what follows from an output is asked of the loop itself.
    """
    states, outputs = [], []
    for stage in (one, two):
        ends = [] if stage.end is None else [stage.end]
        states.append([state.cpu().double().reshape(-1).numpy() for state in (*stage.inputs, *ends)])
        outputs.append([out[None].cpu().double().reshape(1, -1).numpy() for out in stage.combined()])
    found = _equation(states, outputs, len(states[0]) - 1, np.inf)
    assert found is not None
    found[1].state_weight[0] = structure.coefficients.state_weight[0]
    structure.take(found[1])


def _equation(
    states: Sequence[Sequence[Array]], outputs: Sequence[Sequence[Array]], count: int, bound: float
) -> tuple[list[Array], Coefficients] | None:
    """Fit g and the equation of the first ``count`` steps; None if more than rounding is left."""

    def moved(values: Sequence[Array]) -> Array:
        return np.concatenate([value - values[0] for value in values[1:]])

    x = [moved([own[i] for own in states]) for i in range(count + 1)]
    f = [[moved([own[i][k] for own in outputs]) for k in range(len(outputs[0][i]))] for i in range(len(outputs[0]))]
    sizes = np.array([max(_size(own[i]) for own in states) for i in range(count + 1)])
    apart = _least(x, f, sizes, bound)
    if apart is None:
        return None
    weights = _proportions(len(f), apart[1], [len(one) for one in f])
    combined = [[np.tensordot(g, rows, 1)] for g, rows in zip(weights, f, strict=True)]
    found = _least(x, combined, sizes, bound)
    if found is None:
        return None
    memory, entering = found[0], found[1][:, :, 0]
    if memory.shape[1] == 1:
        return weights, Coefficients(memory[:, 0].copy(), entering.copy(), np.zeros(count))
    dense = np.zeros((count + 1, count))
    for i in range(count):
        for lag in range(min(memory.shape[1] - 1, i) + 1):
            dense[i + 1] += memory[i, lag] * dense[i - lag]
            dense[i + 1, i - lag] += entering[i, lag]
    local = Coefficients.from_dense(dense)
    least = bound / 32 * np.abs(dense[1:]).max(1, keepdims=True)
    weight = np.where(np.abs(local.output_weight) > least, local.output_weight, 0.0)
    used = int(np.flatnonzero(weight.any(0))[-1]) + 1
    return weights, Coefficients(local.state_weight, weight[:, :used].copy(), local.noise_std)


def _answers(structure: Structure, level: Sequence[int], seed: int, base: int) -> list[Tensor]:
    """Return the random outputs of a level, one (G dim,) for every place of a group."""
    found = []
    for call in level:
        site = structure.sites[call]
        rows = site.answers(drawn(structure.outputs[call], seed, base + call), structure.dtype).cpu().double()
        places = [np.flatnonzero(site.owner == g) for g in range(structure.groups)]
        if len({len(place) for place in places}) > 1:
            raise Refused("some samples are given to the denoiser more often than others.")
        found += [torch.stack([rows[place[k]] for place in places]).reshape(-1) for k in range(len(places[0]))]
    return found


def _least(x: Sequence[Array], f: Sequence[Sequence[Array]], sizes: Array, bound: float) -> tuple[Array, Array] | None:
    """Fit a (n, L + 1) and b (n, L + 1, k) with the shortest memory that leaves no more than rounding, or None.

    n is the number of states behind the first; ``bound`` is relative to the largest term; infinite: L = 0.
    """
    n, places = len(x) - 1, max(len(one) for one in f)
    most = min(LAGS, max(n - 1, 0)) if np.isfinite(bound) else 0
    fits, worst = [], []
    for lags in range(most + 1):
        memory, entering, rest = np.zeros((n, lags + 1)), np.zeros((n, lags + 1, places)), np.zeros(n)
        for i in range(n):
            columns = [column for lag in range(min(lags, i) + 1) for column in (x[i - lag], *f[i - lag])]
            matrix = np.stack(columns)
            scale = np.maximum(np.sqrt((matrix**2).sum(1)), 1e-150)
            matrix = matrix / scale[:, None]
            solved = np.linalg.lstsq(matrix @ matrix.T, matrix @ x[i + 1], rcond=1e-14)[0]
            term = max(np.abs(solved) * np.sqrt(1 / len(x[0])), default=0.0)
            allowed = max(sizes[i + 1], term) * bound + 1e-5 * _size(x[i + 1]) if np.isfinite(bound) else np.inf
            rest[i] = _size(x[i + 1] - solved @ matrix) / allowed
            first = 0
            for lag in range(min(lags, i) + 1):
                count = len(f[i - lag])
                back = solved[first : first + 1 + count] / scale[first : first + 1 + count]
                memory[i, lag], entering[i, lag, :count] = back[0], back[1:]
                first += 1 + count
        fits.append((memory, entering))
        worst.append(float(rest.max()))
        if worst[-1] <= CLOSE:
            break
    if min(worst) > 1:
        return None
    return fits[next(lags for lags, own in enumerate(worst) if own <= 1.3 * min(worst) + 1e-2)]


def _proportions(steps: int, weight: Array, counts: Sequence[int]) -> list[Array]:
    """Return g of every level: the proportions in which its rows enter where they enter most, of sum 1."""
    found = []
    for q in range(steps):
        uses = [weight[q + lag, lag, : counts[q]] for lag in range(weight.shape[1]) if q + lag < len(weight)]
        most = max(uses, key=lambda use: float(np.abs(use).sum()), default=np.ones(counts[q]))
        total = float(most.sum())
        large = float(np.abs(most).max())
        found.append(most / total if abs(total) > 1e-3 * large > 0 else np.full(counts[q], 1 / counts[q]))
    return found
