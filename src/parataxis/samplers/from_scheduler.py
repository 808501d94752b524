r"""Samplers from diffusers schedulers: any linear one, by unit vectors through its own ``step``, without code for each.

A scheduler is a loop body. From t = timesteps[i] and the output f_i at u_i = scale_model_input(x_i, t) its ``step``
makes x_{i+1}, from x_i and from whatever it remembers of earlier calls. If it is linear, one run of the loop shows all
of its coefficients: every state, output and draw of noise is a unit vector,

    x_{i+1} = sum_j S_{ij} x_j + sum_j F_{ij} f_j + sum_k Z_{ik} z_k

in float64, exact zeros included, since a state that comes out is not the unit vector that goes in next. Two things
make that a recurrence (:mod:`parataxis.samplers.recurrence`):

- What a multistep scheduler remembers of a step is rarely the output itself but a prediction p u + q f made of it, as
  the tensors in its attributes show. With y = p u + q f instead of f the earlier states drop out (the sampler's
  ``transform`` makes y of f).
- Earlier states that remain, as in the second call of a Heun step, follow from later ones:
  x_j = (x_{j+1} - sum_l B_{jl} y_{j-l} - C_j z) / A_j.

A clipped data prediction is not linear, but linear in the clipped value: coefficients are read with the option off, and
the gain of the clipped part (:class:`parataxis.samplers.OutputTransform`) from a pair of runs with the option on and
off.

alpha and sigma are what the scheduler's ``add_noise`` makes of ones and of noise. Every recurrence is compared with the
scheduler's own loop, step by step, on random outputs and with its noise drawn from a generator, before it is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import describe
from .coefficients import Coefficients
from .sampler import OutputTransform, Sampler, data_prediction
from .scheduler_loop import NoiseInterceptor, SchedulerLoop, UnitResponses

__all__ = ["as_sampler", "from_scheduler"]

Array = NDArray[np.float64]

SHAPE = (2, 1, 4, 4)  # of the states in runs with random numbers
AGREES = 1e-5  # relative, with the scheduler's own step, which may compute in float32
ZERO = 1e-9  # relative to the terms that cancelled
SAME = 1e-4  # relative, of the ratio of two predictions: schedulers keep noise levels in float32
CLIPS = ("thresholding", "clip_sample", "clip_denoised")  # they clip the data prediction; the first that is on counts
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


def as_sampler(sampler: Any) -> Sampler:
    """Return a sampler: this one, or that of a diffusers scheduler whose timesteps are set.

    Raises:
        TypeError: If it is neither, with the line to write.
        ValueError: If the scheduler's timesteps are not set, or its loop is not linear.
    """
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, type):
        raise TypeError(
            f"sampler is the class {sampler.__name__}: make one, such as parataxis.samplers.ddim(steps=50)."
        )
    if callable(getattr(sampler, "step", None)) and hasattr(sampler, "timesteps"):
        if getattr(sampler, "num_inference_steps", 0) is None:
            name = type(sampler).__name__
            raise ValueError(f"the timesteps of this {name} are not set: call scheduler.set_timesteps(50) first.")
        return from_scheduler(sampler)
    name = sampler if isinstance(sampler, str) else getattr(sampler, "__name__", "ddim")
    raise TypeError(
        "sampler must be a sampler with its steps, or a diffusers scheduler, got "
        f"{describe(sampler)}: write parataxis.samplers.{name if name.isidentifier() else 'ddim'}(steps=50)."
    )


def from_scheduler(scheduler: Any, *, timesteps: Tensor | None = None, **options: Any) -> Sampler:
    """Return the sampler of a diffusers scheduler, or of anything with its methods.

    :func:`parataxis.sample` with this sampler gives the result of the scheduler's loop: it starts at
    ``noise * scheduler.init_noise_sigma`` and, for each t of ``scheduler.timesteps``, calls the network on
    ``scheduler.scale_model_input(x, t)`` and ``scheduler.step`` on the output. With the same generator, seed for seed.

    Args:
        scheduler: With its timesteps set; it is copied, not changed.
        timesteps: (N,) the times that the loop visits; default all of ``scheduler.timesteps``. A loop that starts in
            the middle, at another state x, is solved for the noise x / ``scheduler.init_noise_sigma``.
        **options: Keyword arguments of every ``step``, such as ``eta=1.0``.

    Raises:
        TypeError: If it is not a scheduler, or its ``step`` does not take such an option.
        ValueError: If its loop is not linear, with the option or the step that is not.
    """
    # Within a device's context every call of torch takes longer.
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        return _read_sampler(SchedulerLoop(scheduler, timesteps, options))


def _read_sampler(loop: SchedulerLoop) -> Sampler:
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=random, dtype=torch.float64)
    outputs = torch.randn(loop.steps, *SHAPE, generator=random, dtype=torch.float64)
    outputs[:, 1] *= 100  # a bound that small outputs do not reach is not linear either
    with NoiseInterceptor(loop, SHAPE) as draws:
        trajectory = loop.run(noise, lambda i, u: outputs[i])
    finite = np.isfinite(_rms(trajectory[0]))
    if not finite.all():
        options = {**loop.options, "prediction_type": loop.config("prediction_type")}
        raise loop.unsupported(
            f"step {int(np.argmin(finite)) - 1} of {loop.steps} makes NaN or Inf of finite outputs, with "
            f"{', '.join(f'{name}={value!r}' for name, value in options.items())}; choose another, or other timesteps"
        )
    clips = [option for option in CLIPS if loop.config(option)]
    sampler = _build(loop, loop.unit_responses(draws.count, clips), clips)
    sampler = dataclasses.replace(sampler, draw_dtype=draws.dtype)
    if clips:
        beyond = torch.Generator().manual_seed(1)
        trajectory = loop.run(
            noise, lambda i, u: torch.cat([outputs[i][:1], output_beyond_clip(sampler.transform, i, u, beyond)[1:]])
        )
    _compare(loop, sampler, noise, *trajectory, clips)
    return sampler


class _Form(NamedTuple):
    """A (N,), B (N, L) and the factors of the draws (N, K), for outputs y = p u + q f with basis (N, 2)."""

    decay: Array
    weight: Array
    noise: Array
    basis: Array


def _build(loop: SchedulerLoop, rows: UnitResponses, clips: list[str]) -> Sampler:
    """Build the sampler from these responses."""
    schedule = loop.alpha_sigma()
    data = rows.data if rows.data is not None else _data(loop, rows, schedule)
    if clips and data is None:
        raise loop.unsupported(f"{clips[0]} clips a data prediction that is not known at every step; switch it off")
    if data is not None and np.allclose(rows.memory, data, rtol=SAME, atol=0):
        data = rows.memory  # the same, with the rounding of its steps
    form = _form(loop, rows, data if clips else None)
    p, q = form.basis.T
    transform = OutputTransform(p, q, np.ones(loop.steps)) if p.any() or (q != 1).any() or clips else None
    if transform is not None and clips:
        transform = _clipped(loop, rows, form, transform, clips)
    local = Coefficients(form.decay, form.weight, np.linalg.norm(form.noise, axis=1))
    if data is not None and schedule is not None:
        local = _with_schedule(local, form, rows.scale, data, schedule)
    if transform is not None:
        local = transform.coefficients(local)
    return Sampler(
        loop.name,
        loop.times.double().numpy(),
        local,
        loop.first() * rows.scale[0],
        transform,
        draws=tuple(tuple((int(i), float(factors[i])) for i in np.flatnonzero(factors)) for factors in form.noise.T),
        draw_steps=rows.draw_steps,
    )


def _data(loop: SchedulerLoop, rows: UnitResponses, schedule: tuple[Array, Array] | None) -> Array | None:
    """Return p and q of xhat = p u + q f, (N, 2), by prediction type and schedule, or None."""
    kind = PREDICTIONS.get(loop.config("prediction_type"), "flow")
    spread = loop.config("sigma_data")
    if spread is not None and kind == "eps":
        kind = "edm"
    if schedule is None:
        return None
    try:
        p, q = data_prediction(kind, *schedule, spread or 0.5)
    except ValueError:  # this prediction is undefined at one of these noise levels
        return None
    return np.stack([p / rows.scale[:-1], q], 1)


def _form(loop: SchedulerLoop, rows: UnitResponses, data: Array | None) -> _Form:
    """Return the form with these data predictions; None: the shorter one of raw outputs and what is remembered."""
    raw = np.tile([0.0, 1.0], (loop.steps, 1))
    bases = [raw, rows.memory] if np.tril(rows.states, -1).any() else [raw]
    forms = [_eliminate(rows, basis) for basis in (bases if data is None else [data])]
    possible = [form for form in forms if form is not None]
    if not possible:
        raise loop.unsupported("a step uses an earlier state that does not follow from later ones")
    return min(possible, key=lambda form: form.weight.shape[1])


def _eliminate(rows: UnitResponses, basis: Array) -> _Form | None:
    """Return the form with outputs in this basis, or None if earlier states do not follow from later ones."""
    steps = len(rows.scale) - 1
    p, q = basis.T
    states, outputs = rows.states - rows.outputs * (p / q), rows.outputs / q
    states[np.abs(states) <= ZERO * (np.abs(rows.states) + np.abs(rows.outputs * (p / q)))] = 0.0
    last = np.where(states != 0, np.arange(1, steps + 1)[:, None], 0).max(0)  # state j is used by steps before this one
    result = np.zeros((steps, 1 + steps + rows.noise.shape[1]))  # A | B | C
    behind = np.zeros_like(result)  # row j: state j by the present state, outputs and draws
    for i in range(steps):
        direct = np.concatenate([states[i, i : i + 1], outputs[i], rows.noise[i]])
        used = np.flatnonzero(states[i, :i])
        result[i] = direct + states[i, used] @ behind[used]
        size = np.abs(direct) + np.abs(states[i, used]) @ np.abs(behind[used])
        result[i, np.abs(result[i]) <= ZERO * size] = 0.0
        needed = np.flatnonzero(last[: i + 1] > i + 1)  # states that later steps use
        if not len(needed):
            continue
        if result[i, 0] == 0:
            return None
        behind[i, 0] = 1.0
        behind[needed, 0] /= result[i, 0]
        behind[needed, 1:] -= behind[needed, :1] * result[i, 1:]
    square = result[:, 1 : 1 + steps]
    later, earlier = square.nonzero()
    weight = np.zeros((steps, int((later - earlier).max(initial=0)) + 1))
    for lag in range(weight.shape[1]):
        weight[lag:, lag] = np.diagonal(square, -lag)
    return _Form(result[:, 0], weight, result[:, 1 + steps :], basis)


def _with_schedule(
    local: Coefficients, form: _Form, scale: Array, data: Array, schedule: tuple[Array, Array]
) -> Coefficients:
    """Add alpha, sigma and the data prediction, if they fit the steps.

    They do if a network that always predicts the same datum keeps it at alpha: the state is then followed through the
    loop as its share of the datum and of the noises, and that of the last step gives alpha and sigma of the sample.
    """
    alpha, sigma = schedule
    p, q = form.basis.T
    gain = data[:, 1] / q  # xhat = p_data u + q_data (y - p u) / q
    into = data[:, 0] - gain * p
    steps = local.steps
    state = np.zeros((steps + 1, 2 + form.noise.shape[1]))  # shares of the datum, of the initial noise, of the draws
    outputs = np.zeros((steps, state.shape[1]))
    state[0, :2] = alpha[0] * scale[0], sigma[0] * scale[0]
    for i in range(steps):
        outputs[i] = -into[i] * state[i] / gain[i]
        outputs[i, 0] += 1 / gain[i]
        state[i + 1] = local.state_weight[i] * state[i]
        for lag in range(min(local.lags, i) + 1):
            state[i + 1] += local.output_weight[i, lag] * outputs[i - lag]
        state[i + 1, 2:] += form.noise[i]
    share = state[:, 0] / scale
    if not (np.abs(share[:-1] - alpha) <= 0.05).all():
        return local
    ends = np.array([share[-1], np.linalg.norm(state[-1, 1:])])
    ends = np.where(np.abs(ends - [1, 0]) <= AGREES, [1.0, 0.0], ends)
    return dataclasses.replace(
        local,
        alpha=np.append(alpha, ends[0]),
        sigma=np.append(sigma, ends[1]),
        scale=scale,
        x0_from_input=into,
        x0_from_output=gain,
    )


def _clipped(
    loop: SchedulerLoop, rows: UnitResponses, form: _Form, transform: OutputTransform, clips: list[str]
) -> OutputTransform:
    """Add the clipping of the scheduler's configuration, with the gain that its steps show."""
    if clips[0] == "thresholding":
        transform = dataclasses.replace(
            transform,
            quantile=loop.config("dynamic_thresholding_ratio"),
            largest=loop.config("sample_max_value"),
        )
    else:
        transform = dataclasses.replace(transform, clip=loop.config("clip_sample_range") or 1.0)
    if np.tril(rows.states, -1).any() or np.tril(rows.outputs, -1).any():
        return transform  # only what is clipped can be remembered by several steps
    random, seeds = torch.Generator().manual_seed(0), [torch.Generator().manual_seed(0) for _ in range(2)]
    pair = loop.fresh(), loop.fresh(clips)
    responses: list[tuple[Tensor, Tensor, Tensor]] = []  # input, output, and what the option changes in the next state
    for i in range(loop.steps):
        x = torch.randn(SHAPE, generator=random, dtype=torch.float64)
        u, _ = (loop.scale_input(scheduler, i, x) for scheduler in pair)
        f = output_beyond_clip(transform, i, u, random)
        on, off = (loop.step(scheduler, i, f, x, seed)[0] for scheduler, seed in zip(pair, seeds, strict=True))
        responses.append((u, f, on - off))
    if not form.weight[:, 0].all():
        step = int(np.argmin(form.weight[:, 0] != 0))
        raise loop.unsupported(f"{clips[0]} acts in step {step} on a data prediction that does not enter it")
    steps = np.arange(loop.steps).repeat(SHAPE[0])
    plain = dataclasses.replace(transform, clip=None, quantile=None)
    u, f, difference = (torch.cat(values) for values in zip(*responses, strict=True))
    cut = (transform(steps, u, f) - plain(steps, u, f)).view(loop.steps, -1)
    used = (difference.view(loop.steps, -1) * cut).sum(1) / cut.square().sum(1)
    gain = used.numpy() * rows.scale[1:] / form.weight[:, 0]
    return dataclasses.replace(transform, gain=np.where(np.isclose(gain, 1.0, rtol=ZERO), 1.0, gain))


def output_beyond_clip(transform: OutputTransform | None, i: int, u: Tensor, random: torch.Generator) -> Tensor:
    """Return an output whose data prediction is far beyond the clip."""
    assert transform is not None
    target = 3 * (transform.clip or 1.0) * torch.randn(u.shape, generator=random, dtype=u.dtype)
    return (target - transform.x0_from_input[i] * u) / transform.x0_from_output[i]


def _compare(
    loop: SchedulerLoop, sampler: Sampler, noise: Tensor, states: Tensor, outputs: Tensor, clips: Sequence[str]
) -> None:
    """Compare every step of the recurrence with a run of the scheduler's loop, from the states of that run."""
    index = torch.arange(loop.steps).repeat(len(noise))
    entered = sampler.output(index, states[:, :-1].flatten(0, 1), outputs.flatten(0, 1)).view(outputs.shape)
    local, recurrence = sampler.coefficients, sampler.recurrence(noise, torch.Generator().manual_seed(0))
    size = np.abs(local.state_weight) * _rms(states[:, :-1]) + _rms(states[:, 1:])
    for lag in range(local.lags + 1):
        size[lag:] += np.abs(local.output_weight[lag:, lag]) * _rms(entered[:, : loop.steps - lag])
    errors = _rms(recurrence.residual(states, entered)) / size
    if not (errors <= AGREES).all():
        step = int(np.argmin(errors <= AGREES))
        raise loop.unsupported(
            f"step {step}{f' with {clips[0]}' if clips else ''} is not linear, it differs by {errors[step]:.0e} from "
            "its own coefficients"
        )


def _rms(values: Tensor) -> Array:
    """Return the root mean square at each step, (B, N, ..) to (N,)."""
    return values.transpose(0, 1).flatten(1).square().mean(1).sqrt().numpy()
