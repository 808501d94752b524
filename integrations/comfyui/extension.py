"""The node's face for ComfyUI's V3 API."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .nodes import CATEGORY, DESCRIPTION, DISPLAY_NAME, NODE_ID, SOLVERS, TOLERANCE, WINDOW, parallel


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
                io.Sampler.Input("sampler"),
                io.Int.Input("window", **WINDOW),
                io.Float.Input("tolerance", **TOLERANCE),
                io.Combo.Input("solver", options=list(SOLVERS)),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, sampler: Any, window: int, tolerance: float, solver: str) -> io.NodeOutput:
        """Run the node."""
        return io.NodeOutput(parallel(sampler, window, tolerance, solver))


class Extension(ComfyExtension):
    """All nodes of the package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes."""
        return [ParallelSampler]


async def comfy_entrypoint() -> Extension:
    """Return the extension, as ComfyUI asks for it."""
    return Extension()
