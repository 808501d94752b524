"""Samplers: which recurrence defines the sample; from :data:`SAMPLERS`, or read from a diffusers scheduler.

The files in the order of the data: noise levels (``schedules``, ``grids``), the coefficients of every step
(``coefficients``), the recurrence of a batch (``recurrence``), the sampler that draws its noise (``sampler``); then
the samplers themselves (``one_step``, ``euler``, ``second_order``) and any other by ``from_scheduler``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .euler import euler, euler_ancestral
from .one_step import ddim, ddpm, flow_euler
from .sampler import OutputTransform, Prediction, Sampler, data_prediction
from .second_order import dpmpp_2m, heun

__all__ = [
    "SAMPLERS",
    "OutputTransform",
    "Prediction",
    "Sampler",
    "data_prediction",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "heun",
    "options",
]

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "flow_euler": flow_euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def options(sampler: str) -> dict[str, inspect.Parameter]:
    """Return the options of a registered sampler by name, without schedule and steps."""
    parameters = inspect.signature(SAMPLERS[sampler], eval_str=True).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("schedule", "steps")}
