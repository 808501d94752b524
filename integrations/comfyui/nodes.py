"""The node: what it does with a SAMPLER, and its face for ComfyUI's first node API."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from torch.utils._pytree import tree_leaves

from parataxis import Picard, Secant, kdiffusion

NODE_ID = "ParataxisParallelSampler"
DISPLAY_NAME = "Parallel Sampler (parataxis)"
CATEGORY = "sampling/custom_sampling/samplers"
DESCRIPTION = "The same images in fewer rounds of model calls: steps are evaluated side by side and corrected."
REPORT_ID = "ParataxisReport"
REPORT_NAME = "Parallel Sampler Report (parataxis)"
REPORT_DESCRIPTION = "What the last run of a parallel sampler took: seconds, rounds and estimated error, as text."
SAMPLER_TIP = "The sampler to run in parallel: of KSamplerSelect or any node that makes a SAMPLER."
SOLVER_TIP = "secant: ours, the fewest rounds. picard: ParaDiGMS."
PARALLEL_TIP = "The output of Parallel Sampler (parataxis)."
LATENT_TIP = "The latents that it has drawn: they pass through, so that the report is read after the run."
SOLVERS = {"secant": Secant, "picard": Picard}
WINDOW = {"default": 8, "min": 0, "max": 1000, "tooltip": "Steps evaluated side by side; 0: all of them."}
TOLERANCE = {
    "default": 0.01,
    "min": 0.0,
    "max": 1.0,
    "step": 0.001,
    "round": False,
    "tooltip": "Relative error of the latents, compared with the sampler's own.",
}

logger = logging.getLogger("parataxis")


def parallel(sampler: Any, window: int, tolerance: float, solver: str) -> Any:
    """Return a SAMPLER of the same kind and with the same options, whose loop is solved in parallel."""
    base = getattr(sampler, "sampler_function", None)
    if base is None:
        raise TypeError(
            f"sampler must have a sampler_function, as those of KSamplerSelect have, got a {type(sampler).__name__}."
        )
    new = copy.copy(sampler)
    new.sampler_function = function(getattr(base, "sequential", base), window, tolerance, solver)
    return new


def function(base: Callable[..., Any], window: int, tolerance: float, solver: str) -> Callable[..., Any]:
    """Return a sampler function that runs another one in parallel and says in the log how it went."""
    run = kdiffusion.parallel(
        base,
        SOLVERS[solver](window=window or None),
        tolerance=tolerance,
        boundaries=boundaries,
        on_round=lambda accepted, steps: _show(accepted, steps, run.preview, previewer[-1]),
    )
    previewer: list[Any] = []  # of the run that goes on

    @functools.wraps(base)
    def sample(model: Any, x: Any, sigmas: Any, *args: Any, **options: Any) -> Any:
        if any(len(hook.hook_keyframe.keyframes) > 1 for cond in _conds(model) for hook in _hooks(cond)):
            logger.info("[parataxis] %s: sequential: hooks with several keyframes count their steps.", run.__name__)
            return base(model, x, sigmas, *args, **options)
        previewer[:] = [_previewer(model)]
        result = run(model, x, sigmas, *args, **options)
        logger.info("[parataxis] %s: %s", run.__name__, run.report)
        return result

    sample.sequential = base
    sample.report = run.report
    return sample


def boundaries(model: Any, extra_args: dict[str, Any] | None) -> list[float]:
    """Return the sigmas at which something begins or ends for all rows of a call.

    Conditionings, ControlNets and functions among the model's options compare the sigma of the first row with them.
    """
    found: list[Any] = []
    for cond in _conds(model):
        found += [cond[name] for name in ("timestep_start", "timestep_end") if name in cond]
        control = cond.get("control")
        while control is not None:
            found += getattr(control, "timestep_range", None) or ()
            control = getattr(control, "previous_controlnet", None)
    for leaf in tree_leaves((extra_args or {}).get("model_options")):
        names = getattr(getattr(leaf, "__code__", None), "co_freevars", ())
        for name, cell in zip(names, getattr(leaf, "__closure__", None) or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                if "sigma" in name and isinstance(cell.cell_contents, (int, float)):
                    found.append(cell.cell_contents)
    return [float(sigma) for sigma in found]


def _conds(model: Any) -> Iterator[dict[str, Any]]:
    """Yield the conditionings of the guider behind a model."""
    while model is not None:
        for conds in (getattr(model, "conds", None) or {}).values():
            yield from conds or ()
        model = getattr(model, "inner_model", None)


def _hooks(cond: dict[str, Any]) -> list[Any]:
    return getattr(cond.get("hooks"), "hooks", [])


def _previewer(model: Any) -> Any:
    """Return what makes previews of this model's latents, as ComfyUI is set up; None for none."""
    while model is not None:
        patcher = getattr(model, "model_patcher", None)
        if patcher is not None:
            return latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)
        model = getattr(model, "inner_model", None)
    return None


def _show(accepted: int, steps: int, denoised: Any, previewer: Any) -> None:
    """Show after a round how many steps are accepted, and what the images look like."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    image = None
    if previewer is not None and denoised is not None:
        image = previewer.decode_latent_to_preview_image("JPEG", denoised)
    comfy.utils.ProgressBar(steps).update_absolute(accepted, steps, image)


class ParallelSampler:
    """Turns a SAMPLER into one that takes fewer rounds of model calls."""

    CATEGORY = CATEGORY
    DESCRIPTION = DESCRIPTION
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # ComfyUI's name
        """Return the node's inputs."""
        return {
            "required": {
                "sampler": ("SAMPLER", {"tooltip": SAMPLER_TIP}),
                "window": ("INT", WINDOW),
                "tolerance": ("FLOAT", TOLERANCE),
                "solver": (list(SOLVERS), {"default": "secant", "tooltip": SOLVER_TIP}),
            }
        }

    def execute(self, sampler: Any, window: int, tolerance: float, solver: str) -> tuple[Any]:
        """Run the node."""
        return (parallel(sampler, window, tolerance, solver),)


class ParallelReport:
    """Says what the last run of a parallel sampler took; the latents make it run after the sampling."""

    CATEGORY = CATEGORY
    DESCRIPTION = REPORT_DESCRIPTION
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    OUTPUT_NODE = True
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # ComfyUI's name
        """Return the node's inputs."""
        return {
            "required": {
                "sampler": ("SAMPLER", {"tooltip": PARALLEL_TIP}),
                "latent": ("LATENT", {"tooltip": LATENT_TIP}),
            }
        }

    def execute(self, sampler: Any, latent: Any) -> dict[str, Any]:
        """Run the node: its text is shown on it, and is its second output."""
        text = describe(sampler)
        return {"ui": {"text": [text]}, "result": (latent, text)}


def describe(sampler: Any) -> str:
    """Return how the last run of a parallel sampler went."""
    report = getattr(getattr(sampler, "sampler_function", None), "report", None)
    if report is None:
        return "this sampler is not one of Parallel Sampler (parataxis)."
    return str(report)


NODE_CLASS_MAPPINGS = {NODE_ID: ParallelSampler, REPORT_ID: ParallelReport}
NODE_DISPLAY_NAME_MAPPINGS = {NODE_ID: DISPLAY_NAME, REPORT_ID: REPORT_NAME}
