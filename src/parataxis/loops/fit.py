r"""The recurrence of a loop, fitted to passes with random outputs.

Passes of one loop with outputs V and V' start from the same random state, so their inputs U and U' differ only by what
the outputs did. A sampling loop is linear in them, with a short memory:

    U_{i+1} - U'_{i+1} = sum_{l=0..L} [ a_{i,l} (U_{i-l} - U'_{i-l}) + b_{i,l} (V_{i-l} - V'_{i-l}) ]

with scalars a, b: a small least-squares problem at each step, on a few thousand random elements, whose residual
confirms or refutes it. The calls or rows of a step whose inputs are equal (guidance) enter through one combination of
their outputs, sum_r g_r V_r with sum_r g_r = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..samplers.coefficients import Coefficients
from .passes import StageRecord
from .rows import SMALLEST
from .signals import NotParallelizable
from .spool import looked_at
from .structure import Recording, Structure, final_state, random_outputs

__all__ = ["HeldOutCheck", "fit_recurrence", "fit_slopes"]

Array = NDArray[np.float64]
LAGS = 12  # most earlier steps that a step may use: as Adams methods of the highest order in use
ELEMENTS = 4096  # rows of the least-squares problem
OVERFLOWS = (
    "trial outputs lead it to states that are not finite, from which nothing can be fitted: it may square outputs, or "
    "take their exponential, so that only outputs of the network itself keep it finite."
)
SMALLEST_ROUNDING = 2e-14  # normal equations give the coefficients no more exactly
CLOSE = 0.05  # part of the rounding allowed, below which no longer memory is tried


class HeldOutCheck(NamedTuple):
    """What a pass that the fit has not seen must confirm.

    Attributes:
        elements: Of all states, that were looked at.
        noise_terms: (N, n) what the loop added at them in the first recording.
        allowed: (N,) how much rounding may change that.
    """

    elements: Tensor
    noise_terms: Array
    allowed: Array

    def passes(self, noise_terms: Sequence[Tensor]) -> bool:
        """Return whether a pass has added the same."""
        for term, expected, bound in zip(noise_terms, self.noise_terms, self.allowed, strict=False):
            actual = _at(term, self.elements)
            if not np.sqrt(((actual - expected) ** 2).mean()) <= bound:
                return False
        return True


def fit_recurrence(structure: Structure, recordings: Sequence[Recording], first: int) -> HeldOutCheck | None:
    """Fit the recurrence to recordings with random outputs, into ``structure``.

    Args:
        structure: Its steps and samples; coefficients, weights and flags are set.
        recordings: At least two.
        first: Number of the first call.

    Returns:
        What another pass must confirm; None where the loop is not linear.
    """
    half = torch.finfo(structure.network_dtype).bits < 32
    elements = _elements(structure, ELEMENTS * (8 if half else 1))
    states, outputs = _measured(structure, recordings, elements, first)
    epsilon = max(_rounding(structure), SMALLEST_ROUNDING)
    bound = structure.precision = 6 * epsilon if half else 32 * epsilon  # terms within a step may cancel
    has_final = structure.ends_with_state
    if has_final and not all(np.isfinite(states_of_pass[-1]).all() for states_of_pass in states):
        # What trial outputs led to has no logarithm, say: the loop computes it from the last state by itself.
        has_final, states = False, [states_of_pass[:-1] for states_of_pass in states]
    for ends_with_state in (True, False) if has_final else (False,):
        # A tensor at the end that does not obey may be no state: clipped, say.
        fitted = _fit_steps(states, outputs, structure.steps - 1 + ends_with_state, bound)
        if fitted is not None:
            break
    structure.alternates = fitted is not None and _alternates(fitted[1])
    if structure.alternates:
        fitted = None
    structure.linear = fitted is not None
    structure.ends_with_state = ends_with_state if fitted is not None else has_final
    if fitted is None:
        fitted = _fit_steps(states, outputs, structure.steps - 1 + has_final, np.inf)
        assert fitted is not None
    structure.guidance_weights, coefficients = fitted
    # At the first step nothing moved: A_0 says how much of the start is in the next state.
    start = states[0][0]
    target = states[0][1] - coefficients.output_weight[0, 0] * (outputs[0][0].T @ structure.guidance_weights[0])
    coefficients.state_weight[0] = start @ target / max(start @ start, 1e-300)
    structure.set_coefficients(coefficients)
    return _held_out_check(structure, coefficients, elements, states[0], outputs[0]) if structure.linear else None


def fit_slopes(structure: Structure, first: StageRecord, second: StageRecord) -> None:
    """Take the coefficients from the difference of two probe passes, where there is no recurrence.

    They only turn slopes into growth and back: the loop itself says what follows from an output.
    """
    elements = _elements(structure, ELEMENTS)
    states, outputs = [], []
    for record in (first, second):
        states.append([*_gather(record.states, elements, len(record.states))])
        outputs.append([*_gather(record.combined(), elements, structure.steps)[:, None]])
    fitted = _fit_steps(states, outputs, len(states[0]) - 1, np.inf)
    assert fitted is not None
    weights, coefficients = fitted
    structure.unexplained = _unexplained(states, outputs, weights, coefficients)
    coefficients.state_weight[0] = structure.coefficients.state_weight[0]
    structure.set_coefficients(coefficients)


def _alternates(coefficients: Coefficients) -> bool:
    """Return whether states continue others than the latest, as where several parts have calls of their own in turn.

    A recurrence of one state eliminates the others, which leaves a memory of all outputs since the first and hardly
    anything of the latest: no correction by slopes gets anywhere.
    """
    weights = np.abs(coefficients.output_weight[LAGS:])
    if not weights[:, LAGS + 1 :].any():
        return False
    shares = weights / weights.sum(1, keepdims=True).clip(min=1e-300)
    return float(np.median(shares[:, 0])) < 0.1 and float(np.median(shares[:, LAGS + 1 :].sum(1))) > 0.6


def _rounding(structure: Structure) -> float:
    """Return the unit roundoff of the states; of the outputs where they are float32 and the states float64."""
    call = structure.calls_of_step[0][0]
    leaves = [structure.outputs[call].leaves[piece.output] for piece in structure.row_maps[call].slices]
    wide = [leaf.dtype for leaf in leaves if torch.finfo(leaf.dtype).bits >= 32]
    return max(float(torch.finfo(dtype).eps) for dtype in (structure.network_dtype, *wide))


def _unexplained(
    states: Sequence[Sequence[Array]],
    outputs: Sequence[Sequence[Array]],
    weights: Sequence[Array],
    coefficients: Coefficients,
) -> Array:
    """Return what part of each change of a state one scalar for the state and one for the output do not explain."""
    left = []
    for i in range(coefficients.steps):
        x, after = (states[1][step] - states[0][step] for step in (i, i + 1))
        f = np.tensordot(weights[i], outputs[1][i] - outputs[0][i], 1)
        explained = coefficients.state_weight[i] * x + coefficients.output_weight[i, 0] * f
        left.append(_rms(after - explained) / max(_rms(after), 1e-300))
    return np.array(left)


def _gather(values: Iterable[Tensor], elements: Tensor, count: int) -> Array:
    """Return some elements of each, (count, n), in one array that is made before anything large."""
    gathered = np.empty((count, len(elements)))
    for row, value in zip(gathered, values, strict=False):
        row[:] = _at(value, elements)
    return gathered


def _at(values: Tensor, elements: Tensor) -> Array:
    """Return some elements."""
    looked_at(values)
    return values.reshape(-1)[elements.to(values.device)].cpu().double().numpy()


def _elements(structure: Structure, largest: int) -> Tensor:
    """Return which elements of all states are looked at."""
    total = structure.samples * structure.dim
    size = min(total, largest)
    chosen = np.random.default_rng(0).choice(total, size, replace=False) if size < total else np.arange(total)
    return torch.from_numpy(chosen)


def _measured(
    structure: Structure, recordings: Sequence[Recording], elements: Tensor, first: int
) -> tuple[list[list[Array]], list[list[Array]]]:
    """Return the states and outputs of every recording at these elements."""
    states: list[list[Array]] = []
    outputs: list[list[Array]] = []
    for calls, ending, seed in recordings:
        counts = [sum(len(structure.row_maps[call].rows_of(0)) for call in step) for step in structure.calls_of_step]
        # Made before anything large: small arrays would split the room that large ones leave.
        states_of_pass = [np.empty(len(elements)) for _ in counts]
        outputs_of_pass = [np.empty((count, len(elements))) for count in counts]
        for step, state, answers in zip(structure.calls_of_step, states_of_pass, outputs_of_pass, strict=True):
            row_map = structure.row_maps[step[0]]
            index = [int(row_map.rows_of(s)[0]) for s in range(structure.samples)]
            state[:] = _at(row_map.states(calls[step[0]].leaves, structure.dtype)[index], elements)
            for answer, row in zip(answers, _random_answers(structure, step, seed, first), strict=True):
                answer[:] = _at(row, elements)
        final = None
        if structure.ends_with_state and ending:
            final = final_state(ending, structure.samples, structure.dim, structure.dtype)
        if final is not None:
            sample = _at(final, elements)
            if not states:
                structure.final_scale = max(1.0, _rms(sample) / max(_rms(states_of_pass[-1]), SMALLEST))
            states_of_pass.append(sample / structure.final_scale)
        states.append(states_of_pass)
        outputs.append(outputs_of_pass)
    return states, outputs


def _random_answers(structure: Structure, step: Sequence[int], seed: int, first: int) -> list[Tensor]:
    """Return the random outputs of a step, one (S dim,) for every row of a sample."""
    answers = []
    for call in step:
        row_map = structure.row_maps[call]
        outputs = random_outputs(structure.outputs[call], seed, first + call)
        rows = row_map.answers(outputs, structure.dtype)
        places = [row_map.rows_of(s) for s in range(structure.samples)]
        if len({len(place) for place in places}) > 1:
            raise NotParallelizable("the denoiser evaluates some samples more often than others.")
        answers += [torch.stack([rows[place[k]] for place in places]).reshape(-1) for k in range(len(places[0]))]
    return answers


def _held_out_check(
    structure: Structure,
    coefficients: Coefficients,
    elements: Tensor,
    states: Sequence[Array],
    outputs: Sequence[Array],
) -> HeldOutCheck:
    noise_terms, scale = [], []
    for i in range(coefficients.steps):
        terms = [coefficients.state_weight[i] * states[i]]
        for lag in range(min(coefficients.lags, i) + 1):
            combined = outputs[i - lag].T @ structure.guidance_weights[i - lag]
            terms.append(coefficients.output_weight[i, lag] * combined)
        noise_terms.append(states[i + 1] - np.sum(terms, 0))
        scale.append(_rms(states[i + 1]) + sum(_rms(term) for term in terms))
    return HeldOutCheck(elements, np.array(noise_terms), 4 * structure.precision * np.array(scale) + 1e-5)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _fit_steps(
    states: Sequence[Sequence[Array]], outputs: Sequence[Sequence[Array]], count: int, bound: float
) -> tuple[list[Array], Coefficients] | None:
    """Fit g and the recurrence of the first ``count`` steps; None if more than rounding is left.

    Raises:
        NotParallelizable: If a state or an output is not finite, of which no least-squares problem makes anything.
    """
    if not all(np.isfinite(values).all() for recording in (*states, *outputs) for values in recording):
        raise NotParallelizable(OVERFLOWS)

    def differences(values: Sequence[Array]) -> Array:
        return np.concatenate([value - values[0] for value in values[1:]])

    x = [differences([recording[i] for recording in states]) for i in range(count + 1)]
    f = [
        [differences([recording[i][k] for recording in outputs]) for k in range(len(outputs[0][i]))]
        for i in range(len(outputs[0]))
    ]
    sizes = np.array([max(_rms(recording[i]) for recording in states) for i in range(count + 1)])
    separate = fit_lags(x, f, sizes, bound)
    if separate is None:
        return None
    weights = guidance_weights(len(f), separate[1], [len(rows) for rows in f])
    combined = [[np.tensordot(g, rows, 1)] for g, rows in zip(weights, f, strict=True)]
    fitted = fit_lags(x, combined, sizes, bound)
    if fitted is None:
        return None
    memory, entering = fitted[0], fitted[1][:, :, 0]
    if memory.shape[1] == 1:
        return weights, Coefficients(memory[:, 0].copy(), entering.copy(), np.zeros(count))
    # Earlier states are eliminated by the recursion itself.
    dense = np.zeros((count + 1, count))
    for i in range(count):
        for lag in range(min(memory.shape[1] - 1, i) + 1):
            dense[i + 1] += memory[i, lag] * dense[i - lag]
            dense[i + 1, i - lag] += entering[i, lag]
    coefficients = Coefficients.from_dense(dense)
    # Outputs may be as large as the states that they belong to, which in the first steps may be much larger than later.
    largest = np.array(
        [[max(1.0, sizes[max(i - lag, 0)]) for lag in range(coefficients.lags + 1)] for i in range(count)]
    )
    smallest = bound / 32 * np.abs(dense[1:]).max(1, keepdims=True) / largest
    weight = np.where(np.abs(coefficients.output_weight) > smallest, coefficients.output_weight, 0.0)
    used = int(np.flatnonzero(weight.any(0))[-1]) + 1
    return weights, Coefficients(coefficients.state_weight, weight[:, :used].copy(), coefficients.noise_std)


def fit_lags(
    x: Sequence[Array], f: Sequence[Sequence[Array]], sizes: Array, bound: float
) -> tuple[Array, Array] | None:
    """Fit a (n, L + 1) and b (n, L + 1, k) with the shortest memory that leaves no more than rounding, or None.

    n is the number of states behind the first; ``bound`` is relative to the largest term; infinite: L = 0.
    """
    n = len(x) - 1
    places = max(len(rows) for rows in f)
    longest = min(LAGS, max(n - 1, 0), len(x[0]) // (2 * (places + 1))) if np.isfinite(bound) else 0
    fits: dict[int, tuple[Array, Array]] = {}
    worst: dict[int, float] = {}
    for lags in range(longest + 1):
        # A few steps show that a memory is too short.
        few = sorted({n - 1, (n - 1) // 2, min(lags + 1, n - 1)})
        if lags < longest and np.isfinite(bound):
            worst[lags] = float(_fit_memory(x, f, sizes, bound, lags, few)[2].max())
            if worst[lags] > 1:
                continue
        memory, entering, residuals = _fit_memory(x, f, sizes, bound, lags, range(n))
        fits[lags] = memory, entering
        worst[lags] = float(residuals.max())
        if worst[lags] <= CLOSE or lags >= min(fits) + 3:
            break
    smallest = min(worst[lags] for lags in fits)
    if smallest > 1:
        return None
    return fits[next(lags for lags in fits if worst[lags] <= 1.3 * smallest + 1e-2)]


def _fit_memory(
    x: Sequence[Array], f: Sequence[Sequence[Array]], sizes: Array, bound: float, lags: int, steps: Iterable[int]
) -> tuple[Array, Array, Array]:
    """Return a, b and the residuals over what rounding explains, (n,), with a memory of so many lags, of some steps."""
    n, places = len(x) - 1, max(len(rows) for rows in f)
    memory, entering, residuals = np.zeros((n, lags + 1)), np.zeros((n, lags + 1, places)), np.zeros(n)
    for i in steps:
        columns = [column for lag in range(min(lags, i) + 1) for column in (x[i - lag], *f[i - lag])]
        matrix = np.stack(columns)
        scale = np.maximum(np.sqrt((matrix**2).sum(1)), 1e-150)
        matrix = matrix / scale[:, None]
        solution = np.linalg.lstsq(matrix @ matrix.T, matrix @ x[i + 1], rcond=1e-14)[0]
        term = max(np.abs(solution) * np.sqrt(1 / len(x[0])), default=0.0)
        allowed = max(sizes[i + 1], term) * bound + 1e-5 * _rms(x[i + 1]) if np.isfinite(bound) else np.inf
        residuals[i] = _rms(x[i + 1] - solution @ matrix) / allowed
        first = 0
        for lag in range(min(lags, i) + 1):
            count = len(f[i - lag])
            weights = solution[first : first + 1 + count] / scale[first : first + 1 + count]
            memory[i, lag], entering[i, lag, :count] = weights[0], weights[1:]
            first += 1 + count
    return memory, entering, residuals


def guidance_weights(steps: int, weight: Array, counts: Sequence[int]) -> list[Array]:
    """Return g of every step: the proportions in which its rows enter where they enter most, of sum 1."""
    weights = []
    for q in range(steps):
        uses = [weight[q + lag, lag, : counts[q]] for lag in range(weight.shape[1]) if q + lag < len(weight)]
        largest_use = max(uses, key=lambda use: float(np.abs(use).sum()), default=np.ones(counts[q]))
        total = float(largest_use.sum())
        largest = float(np.abs(largest_use).max())
        equal_parts = np.full(counts[q], 1 / counts[q])
        weights.append(largest_use / total if abs(total) > 1e-3 * largest > 0 else equal_parts)
    return weights
