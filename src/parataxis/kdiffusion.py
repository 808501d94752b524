r"""Sampler functions with the signature of k-diffusion, solved side by side.

``sample(model, x, sigmas, extra_args, callback, disable, **options)``: x is the state at sigmas[0] in coordinates
alpha = 1, and ``model(x, sigma, **extra_args)`` returns the denoised state D. With rho = sigma' / sigma the loops are

    Euler           x' = rho x + (1 - rho) D,  sigma' replaced by sigma_down where noise is added
    Heun            trial y = rho x + (1 - rho) D(x),  then  x' = y + (1 - rho) / (2 rho) (D(y) - D(x))
    DPM-Solver++ 2M x' = rho x + (1 - rho) (D + (D - D_before) h / (2 h_before)),  h = log(sigma / sigma')

The last two are first order into sigma' = 0, 2M also in its first step. Churn raises sigma to sigma (1 + gamma) by
noise before a step, so that noise belongs to the step before it. All noise is drawn first, in the loop's order.

:func:`parallel` takes any other sampler function of that signature: its loop is recorded, solved and replayed, see
:mod:`parataxis.loops`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm.auto import tqdm

from .arrays import upload
from .checks import describe, is_finite
from .engine.executor import Executor, row_limits
from .engine.rows import EvalBatch, OutputError
from .engine.run import drive, start
from .loops.auto import run_loop
from .loops.loop import Loop, reachable
from .loops.randomness import RandomState
from .loops.report import Report
from .loops.signals import NotParallelizable
from .loops.solver import check_options
from .loops.stubs import has_stub
from .samplers.coefficients import Coefficients
from .samplers.recurrence import Recurrence
from .samplers.sampler import Sampler
from .solvers.base import Solver

__all__ = ["Parallel", "parallel", "sample_dpmpp_2m", "sample_euler", "sample_euler_ancestral", "sample_heun"]

Array = NDArray[np.float64]
Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]
FORMS = 16  # forms of models and arguments that a sampler remembers


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    solver: Solver | str | None = None,
    tolerance: float = 1e-2,
    max_rows: int | None = None,
) -> Tensor:
    """Euler steps (EDM, 2206.00364, algorithm 2 without its correction).

    Args:
        model: ``model(x, sigma, **extra_args)``: x (R, *shape), sigma (R,), to the denoised x. Rows of a call belong to
            different steps and samples.
        x: (B, *shape) the state at ``sigmas[0]``; its dtype is what the model is given.
        sigmas: (N + 1,) falling noise levels; the last may be 0.
        extra_args: Passed to the model; tensors in it with B rows follow the samples, also inside dicts and sequences.
            Everything else is passed unchanged, to calls of any number of rows.
        callback: Called once a step, in order, when the step is accepted for all samples, with a dict of ``x``
            (B, *shape), ``i``, ``sigma``, ``sigma_hat`` and ``denoised`` (B, *shape).
        disable: Hide the progress bar; None hides it where there is no terminal.
        s_churn: Noise added in all steps together; 0 for none.
        s_tmin: Smallest sigma with churn.
        s_tmax: Largest sigma with churn.
        s_noise: Factor of that noise.
        solver: How the loop is solved; default ``Secant(window=8)``, as for :func:`parallel`: a call then has at most
            8 B rows, which suits large models.
        tolerance: Relative error allowed in each sample, compared with the sequential loop.
        max_rows: Most rows of one call; larger rounds are split. It is lowered when memory runs out.

    Returns:
        (B, *shape) the state at the last sigma.

    Raises:
        TypeError: If the solver is not one.
        ValueError: For sigmas that do not fall, a state that is not a batch, or options out of range.
        OutputError: If the model returns a wrong type, shape or dtype, or NaN or Inf for a final state.
    """
    sigma = _falling(x, sigmas)
    hat, added = _churn(sigma, s_churn, s_tmin, s_tmax)
    rho, leading = sigma[1:] / hat, np.append(s_noise * added, 0.0)
    # k-diffusion draws in every step, also in those without churn: the random stream has to advance alike.
    noise = {i: torch.randn_like(x) for i in range(len(hat))} if s_churn > 0 else {}
    local = _coefficients(rho, 1 - rho, np.append(hat, sigma[-1]), leading)
    call = KSamplerCall(model, x, sigmas, hat, range(len(rho)), extra_args, callback, disable)
    return call.solve(local, leading[0], noise, solver, tolerance, max_rows)


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    solver: Solver | str | None = None,
    tolerance: float = 1e-2,
    max_rows: int | None = None,
) -> Tensor:
    """Euler steps to sigma_down, and noise of sigma_up = min(sigma', eta (sigma'/sigma) sqrt(sigma^2 - sigma'^2)).

    Args:
        model: See :func:`sample_euler`.
        x: See :func:`sample_euler`.
        sigmas: See :func:`sample_euler`.
        extra_args: See :func:`sample_euler`.
        callback: See :func:`sample_euler`.
        disable: See :func:`sample_euler`.
        eta: How much noise; 0 is :func:`sample_euler`.
        s_noise: Factor of the noise.
        noise_sampler: ``noise_sampler(sigma, sigma')`` draws (B, *shape), once for each step into sigma' > 0; default
            ``torch.randn_like(x)``.
        solver: See :func:`sample_euler`.
        tolerance: See :func:`sample_euler`.
        max_rows: See :func:`sample_euler`.
    """
    if not (is_finite(eta) and eta >= 0):
        raise ValueError(f"eta must be at least 0, got {eta!r}.")
    sigma = _falling(x, sigmas)
    before, after = sigma[:-1], sigma[1:]
    up = np.minimum(after, eta * after / before * np.sqrt(before**2 - after**2))
    rho = np.sqrt(after**2 - up**2) / before
    noise = {}
    for i in np.flatnonzero(after):
        noise[int(i) + 1] = torch.randn_like(x) if noise_sampler is None else noise_sampler(sigmas[i], sigmas[i + 1])
    local = _coefficients(rho, 1 - rho, sigma, np.append(0.0, s_noise * up))
    call = KSamplerCall(model, x, sigmas, before, range(len(rho)), extra_args, callback, disable)
    return call.solve(local, 0.0, noise, solver, tolerance, max_rows)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    solver: Solver | str | None = None,
    tolerance: float = 1e-2,
    max_rows: int | None = None,
) -> Tensor:
    """Heun's second-order steps (EDM, 2206.00364, algorithm 2); every argument as in :func:`sample_euler`."""
    sigma = _falling(x, sigmas)
    hat, added = _churn(sigma, s_churn, s_tmin, s_tmax)
    first: list[int] = []
    steps: list[tuple[float, ...]] = []  # rho, weights of D and of the D before, sigma, noise that leads there
    for now, then, before in zip(hat, sigma[1:], s_noise * added, strict=True):
        first.append(len(steps))
        steps.append((then / now, 1 - then / now, 0.0, now, before))
        if then > 0:
            half = (now / then - 1) / 2
            steps.append((1.0, half, -half, then, 0.0))
    rho, weight, weight_before, levels, leading = np.array(steps).T
    noise = {step: torch.randn_like(x) for step in first} if s_churn > 0 else {}
    weights = np.stack([weight, weight_before], 1)
    local = _coefficients(rho, weights, np.append(levels, sigma[-1]), np.append(leading, 0.0))
    call = KSamplerCall(model, x, sigmas, hat, first, extra_args, callback, disable)
    return call.solve(local, leading[0], noise, solver, tolerance, max_rows)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    solver: Solver | str | None = None,
    tolerance: float = 1e-2,
    max_rows: int | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (2211.01095, algorithm 2); every argument as in :func:`sample_euler`."""
    sigma = _falling(x, sigmas)
    rho = sigma[1:] / sigma[:-1]
    weight = np.stack([1 - rho, np.zeros(len(rho))], 1)
    for i in range(1, len(rho)):
        if sigma[i + 1] > 0:
            correction = (1 - rho[i]) * math.log(rho[i]) / math.log(rho[i - 1]) / 2
            weight[i] += correction, -correction
    call = KSamplerCall(model, x, sigmas, sigma[:-1], range(len(rho)), extra_args, callback, disable)
    return call.solve(_coefficients(rho, weight, sigma, np.zeros(len(sigma))), 0.0, {}, solver, tolerance, max_rows)


def _falling(x: Tensor, sigmas: Tensor) -> Array:
    """Return the noise levels in float64, or raise unless they fall and x is a batch."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a floating-point tensor (B, *shape) of at least one sample, got {got}.")
    if not isinstance(sigmas, Tensor):
        raise ValueError(f"sigmas must be a tensor (N + 1,) of falling noise levels, got {type(sigmas).__name__}.")
    sigma = np.asarray(sigmas.detach().cpu().double().numpy())
    if sigma.ndim != 1 or len(sigma) < 2 or not (np.diff(sigma) < 0).all() or not sigma[-1] >= 0:
        raise ValueError(f"sigmas must be (N + 1,) falling noise levels, of which the last may be 0, got {sigma}.")
    return sigma


def _churn(sigma: Array, churn: float, smallest: float, largest: float) -> tuple[Array, Array]:
    """Return sigma_hat of every step and the standard deviation of the noise that leads there, (N,) each."""
    if not (is_finite(churn) and churn >= 0):
        raise ValueError(f"s_churn must be at least 0, got {churn!r}.")
    before = sigma[:-1]
    gamma = np.where((before >= smallest) & (before <= largest), min(churn / len(before), math.sqrt(2) - 1), 0.0)
    hat = before * (1 + gamma)
    return hat, np.sqrt(hat**2 - before**2)


def _coefficients(rho: Array, weight: Array, sigma: Array, noise: Array) -> Coefficients:
    """Return the coefficients of steps on D; the noise (N + 1,) leads to every state and to the end."""
    zeros, ones = np.zeros(len(rho)), np.ones(len(sigma))
    weight = weight.reshape(len(rho), -1)
    return Coefficients(rho, weight, noise[1:], ones, sigma, ones, x0_from_input=zeros, x0_from_output=ones[:-1])


class KSamplerCall:
    """One call of a sampler function: its model, its callback and their arguments."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        hat: Array,
        first: Sequence[int],
        extra_args: Mapping[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
    ) -> None:
        """Take the arguments of k-diffusion's signature; ``first`` (S,) is the first evaluation of every step."""
        self.model, self.x, self.sigmas, self.hat, self.first = model, x, sigmas, hat, first
        self.extra_args, self.callback, self.disable = dict(extra_args or {}), callback, disable
        self.step = 0
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def solve(
        self,
        local: Coefficients,
        leading: float,
        noise: dict[int, Tensor],
        solver: Solver | str | None,
        tolerance: float,
        max_rows: int | None,
    ) -> Tensor:
        """Solve the loop; ``noise`` is standard normal, by the state that it leads to."""
        method, tolerance = check_options(solver, tolerance)
        execute = Executor(self.denoised, max_rows=max_rows)
        x = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        drawn = x.new_zeros(len(x), local.steps, *x.shape[1:]) if local.noise_std.any() else None
        if drawn is not None:
            for state, normal in noise.items():
                if state > 0:
                    drawn[:, state - 1] = float(local.noise_std[state - 1]) * normal
        recurrence = Recurrence(local, x + leading * noise[0] if leading else x, drawn)
        assert local.sigma is not None
        self.levels = torch.from_numpy(local.sigma[:-1]).to(self.x)
        sampler = Sampler("k-diffusion", local.sigma[:-1], local)
        runs = start(sampler, recurrence, method, tolerance=tolerance, dtype=self.x.dtype)
        with torch.no_grad(), tqdm(total=len(self.first), disable=self.disable) as bar:
            for rounds in drive(runs, lambda rows: self.keep(rows, execute(rows))):
                self.report(min(local.steps if run.done else run.accepted for run in runs))
                bar.set_postfix(rounds=rounds, refresh=False)
                bar.update(self.step - bar.n)
        return torch.stack([run.solution.x for run in runs]).to(self.x)

    def denoised(self, rows: EvalBatch) -> Tensor:
        """Call the model."""
        sample = upload(rows.sample, rows.x.device)

        def follow(leaf: Any) -> Any:
            with_rows = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(self.x)
            return leaf[upload(sample, leaf.device)] if with_rows else leaf

        sigma = self.levels[upload(rows.step, self.levels.device)]
        return self.model(rows.x, sigma, **tree_map(follow, self.extra_args))

    def keep(self, rows: EvalBatch, denoised: Tensor) -> Tensor:
        """Copy outputs for the callback: the model's next call may write to their memory."""
        if self.callback is not None:
            keys = zip(rows.sample.tolist(), rows.step.tolist(), strict=True)
            self.seen.update(zip(keys, zip(rows.x, denoised.clone(), strict=True), strict=True))
        return denoised

    def report(self, accepted: int) -> None:
        """Call the callback for the steps whose first evaluation is accepted for all samples."""
        while self.step < len(self.first) and self.first[self.step] < accepted:
            if self.callback is not None:
                evaluation = self.first[self.step]
                pairs = [self.seen[b, evaluation] for b in range(len(self.x))]
                x, denoised = (torch.stack(rows) for rows in zip(*pairs, strict=True))
                sigma, hat = self.sigmas[self.step], self.sigmas.new_tensor(self.hat[self.step])
                self.callback({"x": x, "i": self.step, "sigma": sigma, "sigma_hat": hat, "denoised": denoised})
                self.seen = {key: value for key, value in self.seen.items() if key[1] > evaluation}
            self.step += 1


Boundaries = Sequence[float] | Callable[[Any, Any], Sequence[float]]


def parallel(
    sampler: Callable[..., Tensor],
    solver: Solver | str | None = None,
    *,
    tolerance: float = 1e-2,
    boundaries: Boundaries = (),
    on_round: Callable[[int, int], object] | None = None,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
) -> Parallel:
    """Return a sampler function that gives the samples of another one, in fewer rounds of model calls.

    The function's own loop runs, unmodified (:mod:`parataxis.loops`), so its noise is that of the seed.

    - The model is any callable; the loop reads and writes its real attributes. Tensors of x's shape that it holds (the
      image and noise of an inpainting mask) follow the samples.
    - A ``noise_sampler`` may have state: it is called once for each draw, however often the loop runs.
    - ``callback`` is called in a last replay, once a step and in order, with the x and denoised of that step.
    - A loop that hooks into its model's call (CFG++) runs sequentially, with a warning; so does a loop whose model
      gives other outputs for a batch of steps than for single ones.

    Args:
        sampler: ``sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, **options)``.
        solver: A solver, or its name; default ``Secant(window=8)``.
        tolerance: Relative error allowed in each sample, compared with the unmodified loop.
        boundaries: Noise levels at which the model changes for all rows of a call, because it reads the sigma of the
            first row only; or a function of (model, extra_args) that returns them. Steps on different sides of a
            boundary, or on it, never share a call.
        on_round: Called after every round with the numbers of accepted steps and of all steps; an exception that it
            raises ends the sampling.
        max_rows: As in :func:`parataxis.parallel`.
        buckets: As in :func:`parataxis.parallel`.

    Returns:
        A function with the sampler's arguments, options by name, and with ``.report``. What was recorded of a model
        is reused in the next call with the same networks and arguments of the same form.

    Raises:
        TypeError: If the sampler is not callable, or the solver is not one.
        ValueError: For a negative tolerance, or a number of rows that is not an integer of at least 1.
    """
    if isinstance(sampler, type) or not callable(sampler):
        raise TypeError(f"sampler must be a function with k-diffusion's signature, got {describe(sampler)}.")
    limits = row_limits(max_rows, buckets)
    return Parallel(sampler, *check_options(solver, tolerance), boundaries, on_round, *limits)


class Parallel:
    """A sampler function, solved in parallel.

    Attributes:
        sampler: The unmodified function.
        solver: How its loop is solved.
        tolerance: Relative error allowed.
        boundaries: Noise levels at which the model changes.
        on_round: Called after every round.
        report: How the latest call went.
        loops: What is kept from call to call, by the form of model and arguments.
    """

    def __init__(
        self,
        sampler: Callable[..., Tensor],
        solver: Solver,
        tolerance: float,
        boundaries: Boundaries,
        on_round: Callable[[int, int], object] | None,
        limit: int | None = None,
        buckets: tuple[int, ...] = (),
    ) -> None:
        """See :func:`parallel`."""
        self._limit, self._buckets = limit, buckets
        functools.update_wrapper(self, sampler, updated=())
        self.sampler, self.solver, self.tolerance = sampler, solver, tolerance
        self.boundaries, self.on_round = boundaries, on_round
        self.report = Report()
        self.loops: dict[Any, Loop] = {}
        self._samples = 0  # of the latest call

    def __repr__(self) -> str:
        """Return what is solved, and how."""
        name = getattr(self.sampler, "__qualname__", type(self.sampler).__qualname__)
        return f"Parallel({name}, {self.solver!r}, tolerance={self.tolerance:g})"

    def __call__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample."""
        loop, self._samples = self._loop(model, extra_args), len(x)
        network: Any = loop.denoisers[0]
        network.model = model
        loop.state = sigmas.tolist
        boundaries = self.boundaries(model, extra_args) if callable(self.boundaries) else self.boundaries
        levels = torch.tensor(sorted({float(level) for level in boundaries}), dtype=torch.float64, device="cpu")
        proxy = ModelProxy(network, model, x, levels, extra_args)
        if options.get("noise_sampler") is not None:
            options["noise_sampler"] = NoiseSamplerReplay(options["noise_sampler"])
        keywords = {"extra_args": extra_args, "callback": callback, "disable": disable, **options}
        bar: tqdm[Any] | None = None

        def update_progress(accepted: int, steps: int) -> None:
            nonlocal bar
            if bar is None:
                bar = tqdm(total=steps, disable=disable)
            bar.update(accepted - bar.n)
            if self.on_round is not None:
                self.on_round(accepted, steps)

        loop.on_round = update_progress
        try:
            return run_loop(loop, (proxy, x, sigmas), keywords, self.solver, self.tolerance, self.report)
        except OutputError:
            self.loops = {form: known for form, known in self.loops.items() if known is not loop}
            raise
        finally:
            if bar is not None:
                bar.close()
            network.model, loop.on_round = None, lambda accepted, steps: None

    @property
    def preview(self) -> Tensor | None:
        """(n, *shape) the samples that the model's latest call has denoised at its lowest noise level, or None.

        For ``on_round``: n <= B, as some samples may be ahead of others. A callback has all samples of every step, in
        order, when the loop has ended.
        """
        loops = list(self.loops.values())
        sigma, denoised = _DENOISED.get(loops[-1].denoisers[0], (None, None)) if loops else (None, None)
        if sigma is None or denoised is None:
            return None
        # Calls that check a layout hold the same rows several times.
        return denoised[sigma.reshape(-1) == sigma.min()][-self._samples :]

    def _loop(self, model: Model, extra_args: Mapping[str, Any] | None) -> Loop:
        """Return the loop with the same networks and arguments of this form."""
        plain = (int, float, str, bytes)
        reached = [value for value in reachable(model, extra_args) if type(value) not in plain]
        networks: list[Any] = [value for value in reached if isinstance(value, nn.Module)] or [model]
        form = (*map(_identity, networks), *map(_feature, reached))
        loop = self.loops.pop(form, None)
        if loop is None:
            network = (_Network(),)
            loop = Loop(self._run, network, calls_back=_has_callback, limit=self._limit, buckets=self._buckets)
        self.loops[form] = loop
        if len(self.loops) > FORMS:
            del self.loops[next(iter(self.loops))]
        return loop

    def _run(self, args: tuple[Any, ...], keywords: dict[str, Any], quiet: bool) -> Tensor:
        """Run the loop once, with arguments that it may write to."""
        model, x, sigmas = args
        if isinstance(noise := keywords.get("noise_sampler"), NoiseSamplerReplay):
            noise.restart()
        keywords = {**keywords, "extra_args": tree_map(lambda leaf: leaf, keywords["extra_args"])}
        if quiet:
            keywords = {**keywords, "callback": None, "disable": True}
        return self.sampler(model, x.clone(), sigmas, **keywords)


def _has_callback(keywords: dict[str, Any]) -> bool:
    return keywords["callback"] is not None


# Of every network the rows of its latest call. A module that kept them itself would count as one with a state.
_DENOISED: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()


class _Network(nn.Module):
    """The model's call, as a module that stubs can replace."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def forward(self, x: Tensor, sigma: Tensor, side: str, held: dict[str, Tensor], extra: dict[str, Any]) -> Tensor:
        """Call the model, with the rows of the tensors that it holds; ``side`` keeps calls apart."""
        before = {name: getattr(self.model, name) for name in held}
        try:
            for name, rows in held.items():
                setattr(self.model, name, rows)
            denoised = self.model(x, sigma, **extra)
            if isinstance(denoised, Tensor) and len(denoised) == len(sigma):
                _DENOISED[self] = sigma, denoised
            return denoised
        finally:
            for name, tensor in before.items():
                setattr(self.model, name, tensor)


class ModelProxy:
    """What the loop sees instead of the model: it shows the model's attributes, and its call can be replaced."""

    def __init__(
        self, network: nn.Module, model: Any, x: Tensor, boundaries: Tensor, extra_args: Mapping[str, Any] | None
    ) -> None:
        attributes = getattr(model, "__dict__", {})
        held = {k: v for k, v in attributes.items() if isinstance(v, Tensor) and v.shape == x.shape}
        self.__dict__.update(_network=network, _model=model, _boundaries=boundaries, _held=held)
        self.__dict__["_functions"] = [leaf for leaf in tree_leaves(extra_args) if callable(leaf)]

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        for leaf in tree_leaves(extra) if has_stub(self._network) else ():
            if callable(leaf) and not any(leaf is function for function in self._functions):
                raise NotParallelizable("the sampler hooks into the model's call by its own function (CFG++).")
        return self._network(x, sigma, self._side(sigma), self._held, extra)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def _side(self, sigma: Tensor) -> str:
        """Return on which side of every boundary the first row is: ``<``, ``=`` or ``>`` each."""
        if not len(self._boundaries):
            return ""
        first = sigma.detach().reshape(-1)[:1].cpu()
        return "".join("<=>"[int(sign) + 1] for sign in torch.sign(first - self._boundaries.to(first.dtype)))


class NoiseSamplerReplay:
    """A noise sampler that draws the same in every pass, whatever state it has."""

    def __init__(self, draw: Callable[..., Tensor]) -> None:
        self.draw, self.next = draw, 0
        self.seen = [value for value in reachable(draw) if not isinstance(value, Tensor)]
        self.drawn: list[tuple[Tensor, RandomState]] = []

    def restart(self) -> None:
        """Begin a pass."""
        self.next = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.next == len(self.drawn):
            noise = self.draw(*args, **kwargs)
            self.drawn.append((noise.clone(), RandomState(self.seen)))
        noise, after = self.drawn[self.next]
        self.next += 1
        after.restore()
        return noise.clone()


def _identity(value: Any) -> Any:
    """Return a key that is equal for the same object only, and does not keep it alive."""
    try:
        hash(weak := weakref.ref(value))
    except TypeError:  # a kind without weak references
        return object()
    return weak


def _feature(value: Any) -> Any:
    """Return what distinguishes forms of models and arguments: types, shapes and flags, not numbers and texts."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return value if isinstance(value, bool) else getattr(value, "__qualname__", type(value).__qualname__)
