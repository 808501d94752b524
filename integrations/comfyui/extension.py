"""The node's face for ComfyUI's V3 API."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .nodes import (
    CATEGORY,
    DESCRIPTION,
    DISPLAY_NAME,
    LATENT_TIP,
    NODE_ID,
    PARALLEL_TIP,
    REPORT_DESCRIPTION,
    REPORT_ID,
    REPORT_NAME,
    SAMPLER_TIP,
    SOLVER_TIP,
    SOLVERS,
    TOLERANCE,
    WINDOW,
    describe,
    parallel,
)


class ParallelSampler(io.ComfyNode):
    """Turns a SAMPLER into one that takes fewer rounds of model calls."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id=NODE_ID,
            display_name=DISPLAY_NAME,
            category=CATEGORY,
            description=DESCRIPTION,
            inputs=[
                io.Sampler.Input("sampler", tooltip=SAMPLER_TIP),
                io.Int.Input("window", **WINDOW),
                io.Float.Input("tolerance", **TOLERANCE),
                io.Combo.Input("solver", options=list(SOLVERS), default="secant", tooltip=SOLVER_TIP),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, sampler: Any, window: int, tolerance: float, solver: str) -> io.NodeOutput:
        """Run the node."""
        return io.NodeOutput(parallel(sampler, window, tolerance, solver))


class ParallelReport(io.ComfyNode):
    """Says what the last run of a parallel sampler took."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id=REPORT_ID,
            display_name=REPORT_NAME,
            category=CATEGORY,
            description=REPORT_DESCRIPTION,
            inputs=[
                io.Sampler.Input("sampler", tooltip=PARALLEL_TIP),
                io.Latent.Input("latent", tooltip=LATENT_TIP),
            ],
            outputs=[io.Latent.Output(display_name="latent"), io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, sampler: Any, latent: Any) -> io.NodeOutput:
        """Run the node."""
        text = describe(sampler)
        return io.NodeOutput(latent, text, ui={"text": [text]})


class Extension(ComfyExtension):
    """All nodes of the package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes."""
        return [ParallelSampler, ParallelReport]


async def comfy_entrypoint() -> Extension:
    """Return the extension, as ComfyUI asks for it."""
    return Extension()
