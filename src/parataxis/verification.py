"""Is a network, or a loop, fit for parallel sampling? The laws that the package relies on, measured on yours.

Rows of a call belong to different steps and samples, so an output must depend on its own row only and be the same in
every call. :func:`verify` measures that at real states of a sampler, then solves a few samples and compares with the
sequential loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import OutputError, check_whole, wrap_denoiser
from .engine.executor import Network, check_inputs, out_of_memory
from .engine.rows import EvalBatch, expect
from .engine.run import drive, start
from .parallel import parallel
from .sample import numerical_floor, sample
from .samplers.sampler import Sampler
from .solvers.base import Solver
from .solvers.secant import Secant
from .solvers.sequential import Sequential

__all__ = ["Check", "Verification", "verify", "verify_loop"]

ROUNDING = 30.0  # units of rounding that kernels for other numbers of rows may differ by
MOST_SAMPLES = 4  # whose states are compared row by row
CLOSE = 2.0**-6  # relative distance of close states: a unit of the coarsest dtype, or two
SMALL = 4.0  # times sqrt(eps): a larger difference is no rounding


@dataclass(frozen=True)
class Check:
    """One law.

    Attributes:
        name: What must hold.
        passed: Whether it does.
        measured: What was measured.
        advice: What to do, where it does not hold or something is to be known; else empty.
    """

    name: str
    passed: bool
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Verification:
    """All laws; printed, a table with a verdict.

    Attributes:
        checks: In the order in which they were measured.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """What it comes to, in one sentence."""
        failed = [check.name for check in self.checks if not check.passed]
        if not failed:
            return "fit for parallel sampling."
        return f"not fit for parallel sampling: {', '.join(failed)}."

    def __str__(self) -> str:
        """Return the table."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{'pass' if check.passed else 'FAIL'}  {check.name:<{width}}  {check.measured}")
            lines += [f"{'':6}{check.advice}"] * bool(check.advice)
        return "\n".join([*lines, self.verdict])


def verify(
    denoise: Callable[..., Tensor],
    noise: Tensor,
    sampler: Sampler,
    solver: Solver | None = None,
    *,
    tolerance: float = 1e-2,
    condition: Any = None,
    seed: int = 0,
) -> Verification:
    """Measure whether a network keeps the laws of parallel sampling.

    It takes some (B + 4) N calls of the network. What the network raises in a call is a law that does not hold.

    Args:
        denoise: As for :func:`parataxis.sample`.
        noise: (B, *shape) as for :func:`parataxis.sample`; each sample is one seed that estimates are compared for.
        sampler: The equation.
        solver: How it is solved; default: ``Secant(window=8)``.
        tolerance: Relative error allowed in each sample.
        condition: As for :func:`parataxis.sample`.
        seed: Of the noise that stochastic samplers add.

    Returns:
        The laws, with what was measured and what to do where one does not hold. Laws that need those before are left
        out when one of these does not hold.

    Raises:
        ValueError: For inputs that do not fit together.
    """
    check_inputs(noise, condition)
    solver = Secant(window=8) if solver is None else solver
    network = Network(wrap_denoiser(denoise), sampler.network_times(noise.dtype), condition)
    checks: list[Check] = []
    with torch.no_grad():
        try:
            rows = _rows_of_a_round(network, noise, sampler, seed)
            for law in (_check_follows_state, _check_hidden_state, _check_rows):
                if all(check.passed for check in checks):
                    checks.append(law(network, rows))
        except Exception as error:  # whatever a network of someone else raises is what is wrong with it
            if out_of_memory(error):
                raise
            checks.append(_failed_call(error))
    if all(check.passed for check in checks):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "an output of the network changes by")  # it is measured above
            checks += _check_solves(denoise, noise, sampler, solver, tolerance, condition, seed)
    return Verification(tuple(checks))


def verify_loop(
    run: Callable[[torch.Generator], Any],
    solver: Solver | None = None,
    *,
    tolerance: float = 1e-2,
    seeds: int = 3,
    denoisers: Sequence[torch.nn.Module] | None = None,
) -> Verification:
    """Measure whether a sampling loop gives the same result in parallel, within its estimate, for a few seeds.

    Args:
        run: The loop, ``run(generator)``, to a tensor.
        solver: As for :func:`parataxis.parallel`.
        tolerance: Relative error allowed.
        seeds: How many generators are tried.
        denoisers: As for :func:`parataxis.parallel`.
    """
    check_whole("seeds", seeds)
    fast = parallel(run, solver, tolerance=tolerance, denoisers=denoisers)
    checks: list[Check] = []
    for seed in range(seeds):
        expected, again = (run(torch.Generator().manual_seed(seed)) for _ in range(2))
        if not isinstance(expected, Tensor):
            raise TypeError(f"the loop must return a tensor, got {type(expected).__name__}: return the latents.")
        if seed == 0:
            checks += _check_loop_alone(expected, again, tolerance)
        if not all(check.passed for check in checks[:2]):  # there is nothing that others could be compared with
            break
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error = _distance(fast(torch.Generator().manual_seed(seed)), expected)
        report = fast.report
        parallel_mode = report.mode != "sequential"
        advice = "" if parallel_mode else str(caught[-1].message) if caught else report.reason
        checks.append(Check(f"seed {seed} runs in parallel", parallel_mode, report.mode, advice))
        if not parallel_mode:  # it was the loop itself
            continue
        word, limit = ("tolerance", tolerance) if report.converged else ("estimate", report.error_estimate)
        within = error <= max(limit, report.floor, 1e-6)
        checks.append(
            Check(
                f"seed {seed} is within its {word}",
                within,
                f"error {error:.1e}, estimate {report.error_estimate:.1e}, {report.rounds} rounds",
                "" if within else "see that the loop reads no clock and keeps nothing; else please report it.",
            )
        )
    return Verification(tuple(checks))


def _check_loop_alone(expected: Tensor, again: Tensor, tolerance: float) -> list[Check]:
    """Look at what a loop returned twice from equal generators."""
    finite, same = bool(torch.isfinite(expected).all()), _distance(again, expected)
    return [
        Check(
            "the loop's result is finite",
            finite,
            "every element" if finite else "NaN or Inf",
            "" if finite else "the loop itself meets them: look at its network's outputs, dtype and conditioning.",
        ),
        Check(
            "same loop twice",
            not same > tolerance,  # NaN is named above
            f"differs by {same:.1e}" if same else "to the bit",
            "draw all noise from the generator that is passed, call eval(), and keep nothing from call to call."
            if same > 0
            else "",
        ),
    ]


def _rows_of_a_round(network: Network, noise: Tensor, sampler: Sampler, seed: int) -> EvalBatch:
    """Return some states of the sequential loop, from different steps and samples: one row of each step that is kept.

    No two have the same step, and each sample has one, so that neither a time nor a condition that is read from another
    row goes unnoticed.
    """
    samples = min(len(noise), MOST_SAMPLES)
    generators = [torch.Generator(noise.device).manual_seed(seed + b) for b in range(samples)]
    states = noise[:samples].to(torch.promote_types(noise.dtype, torch.float32))
    runs = start(sampler, sampler.recurrence(states, generators, noise.dtype), Sequential(), dtype=noise.dtype)
    stride = max(1, sampler.steps // 8)
    rows_of_steps: list[EvalBatch] = []

    def evaluate(rows: EvalBatch) -> Tensor:
        if int(rows.step[0]) % stride == 0:
            rows_of_steps.append(rows.take(torch.tensor([len(rows_of_steps) % samples], device="cpu")))
        return _outputs(network, rows)

    for _ in drive(runs, evaluate):
        pass
    rows_of_steps = rows_of_steps if len(rows_of_steps) > 1 else rows_of_steps * 2
    return EvalBatch(*(torch.cat(parts) for parts in zip(*rows_of_steps, strict=True)))


def _outputs(network: Network, rows: EvalBatch) -> Tensor:
    # Copies: a network may write into its input, and what it returns may lie in memory that the next call writes to.
    outputs = network(rows._replace(x=rows.x.clone()))
    return expect(outputs, tuple(rows.x.shape), rows.x.dtype, rows.step.numpy()).clone()


def _call(network: Network, rows: EvalBatch) -> Tensor:
    return _outputs(network, rows).double()


def _failed_call(error: Exception) -> Check:
    """Return the law that a network breaks which raises, or whose output is none."""
    if isinstance(error, OutputError):  # it says what to do
        return Check("calls of the network", False, str(error))
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    return Check(
        "calls of the network",
        False,
        text,
        "a call must take any number of rows, one or many: x is (R, *shape), t has one time for each row. Call eval().",
    )


def _distance(x: Tensor, reference: Tensor) -> float:
    """Return the largest |x - y| / |y| of the rows."""
    x, reference = (value.detach().double().flatten(1) for value in (x, reference))
    return float(((x - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=1e-300)).max())


def _check_follows_state(network: Network, rows: EvalBatch) -> Check:
    """Compare calls with the same times and other states: close ones, as a cache may take for the same, and others."""
    outputs, remembered = _call(network, rows).flatten(1), False
    for x in (rows.x * (1 + CLOSE), (rows.x + rows.x.roll(1, 0)) / 2):
        others = _call(network, rows._replace(x=x)).flatten(1)
        remembered |= bool((outputs == others).all() and outputs.any() and (rows.x != x).any())
    return Check(
        "outputs follow the state",
        not remembered,
        "the same for other states" if remembered else "other states, other outputs",
        "the network repeats what it returned at this time or for similar states: take out its cache."
        if remembered
        else "",
    )


def _check_hidden_state(network: Network, rows: EvalBatch) -> Check:
    """Compare two calls with the same rows."""
    first = _call(network, rows)
    _call(network, rows.take(torch.arange(len(rows.x) - 1, -1, -1, device="cpu")))
    difference = _distance(_call(network, rows), first)
    bound = ROUNDING * torch.finfo(rows.x.dtype).eps
    return Check(
        "same rows, same outputs",
        difference <= bound,
        f"differs by {difference:.1e}" if difference else "to the bit",
        ""
        if difference <= bound
        else "the network draws random numbers or remembers earlier calls: call eval(), take out caches.",
    )


def _check_rows(network: Network, rows: EvalBatch) -> Check:
    """Compare the rows of one call with calls of one row."""
    together, single = _call(network, rows), []
    for row in range(len(rows.x)):
        single.append(_call(network, rows.take(torch.tensor([row], device="cpu"))))
    difference = _distance(together, torch.cat(single))
    epsilon = torch.finfo(rows.x.dtype).eps
    same_time = rows._replace(step=rows.step[:1].expand(len(rows.step)).clone())
    ignores = len(rows.x) > 1 and _distance(_call(network, same_time), together) == 0 and difference > 0
    advice = ""
    if difference > SMALL * epsilon**0.5:
        advice = (
            "the network reads the first timestep only: let it use t row by row."
            if ignores
            else "an output depends on other rows of its call (batch statistics, dynamic quantization): take that out, "
            "or choose a tolerance well above this difference."
        )
    elif difference > ROUNDING * epsilon:
        advice = f"rounding depends on the number of rows: choose a tolerance of at least {10 * difference:.0e}."
    return Check(
        "each row alone",
        difference <= SMALL * epsilon**0.5,
        f"alone or among {len(rows.x)} rows differs by {difference:.1e}" if difference else "to the bit",
        advice,
    )


def _check_solves(
    denoise: Callable[..., Tensor],
    noise: Tensor,
    sampler: Sampler,
    solver: Solver,
    tolerance: float,
    condition: Any,
    seed: int,
) -> list[Check]:
    """Compare solves with the sequential loop."""

    def draw(method: Solver, allowed: float) -> Any:
        generators = [torch.Generator(noise.device).manual_seed(seed + b) for b in range(len(noise))]
        return sample(denoise, noise, sampler, method, tolerance=allowed, condition=condition, generator=generators)

    generators = [torch.Generator(noise.device).manual_seed(seed + b) for b in range(len(noise))]
    floor = numerical_floor(denoise, noise, sampler, condition=condition, generator=generators)
    checks = [
        Check(
            "numerical floor",
            floor <= tolerance,
            f"{floor:.1e}: the loop's own dependence on the number of rows",
            "" if floor <= tolerance else f"no tolerance below {floor:.0e} means anything here: choose a larger one.",
        )
    ]
    reference = draw(Sequential(), 0.0)
    exact = draw(solver, 0.0)
    error = _distance(exact.x, reference.x)
    bound = max(10 * floor, SMALL * torch.finfo(noise.dtype).eps ** 0.5)
    checks.append(
        Check(
            "tolerance 0 is the sequential loop",
            error <= bound and exact.rounds <= sampler.steps,
            f"error {error:.1e}, {exact.rounds} rounds for {sampler.steps} steps",
            "" if error <= bound else "the network's rounding grows along the loop: compare in float32 or float64.",
        )
    )
    solutions = draw(solver, tolerance)
    for b, solution in enumerate(solutions):
        error = _distance(solution.x[None], reference[b].x[None])
        # A run that has converged says that it is within the tolerance; of another one only its estimate is known.
        word, limit = ("tolerance", tolerance) if solution.converged else ("estimate", solution.error_estimate)
        within = error <= max(limit, bound)
        checks.append(
            Check(
                f"sample {b} is within its {word}",
                within,
                f"error {error:.1e}, estimate {solution.error_estimate:.1e}, {solution.rounds} rounds",
                "" if within else "choose a smaller tolerance here, and please report this network.",
            )
        )
    return checks
