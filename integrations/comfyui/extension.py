"""The node's face for ComfyUI's V3 API."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from . import nodes

INPUTS = {"SAMPLER": io.Sampler, "LATENT": io.Latent, "INT": io.Int, "FLOAT": io.Float}


def schema(name: str) -> io.Schema:
    """Return the inputs and outputs of a node as the first API has them."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    inputs = []
    for key, (kind, options) in node.INPUT_TYPES()["required"].items():
        if isinstance(kind, list):
            inputs.append(io.Combo.Input(key, options=kind, **options))
        else:
            inputs.append(INPUTS[kind].Input(key, **options))
    outputs = {"SAMPLER": io.Sampler.Output, "LATENT": io.Latent.Output, "STRING": io.String.Output}
    titles = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    return io.Schema(
        node_id=name,
        display_name=nodes.NODE_DISPLAY_NAME_MAPPINGS[name],
        category=node.CATEGORY,
        description=node.DESCRIPTION,
        inputs=inputs,
        outputs=[outputs[kind](display_name=title) for kind, title in zip(node.RETURN_TYPES, titles, strict=True)],
        is_output_node=getattr(node, "OUTPUT_NODE", False),
    )


class ParallelSampler(io.ComfyNode):
    """Turns a SAMPLER into one that takes fewer rounds of model calls."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return schema(nodes.NODE_ID)

    @classmethod
    def execute(cls, sampler: Any, window: int, tolerance: float, solver: str) -> io.NodeOutput:
        """Run the node."""
        return io.NodeOutput(nodes.parallel(sampler, window, tolerance, solver))


class ParallelReport(io.ComfyNode):
    """Says what the last run of a parallel sampler took."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return schema(nodes.REPORT_ID)

    @classmethod
    def execute(cls, sampler: Any, latent: Any) -> io.NodeOutput:
        """Run the node."""
        said = nodes.ParallelReport().execute(sampler, latent)
        return io.NodeOutput(*said["result"], ui=said["ui"])


class Extension(ComfyExtension):
    """All nodes of the package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes."""
        return [ParallelSampler, ParallelReport]


async def comfy_entrypoint() -> Extension:
    """Return the extension, as ComfyUI asks for it."""
    return Extension()
