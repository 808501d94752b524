"""ComfyUI nodes of parataxis: a SAMPLER becomes one that takes fewer rounds of model calls."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

try:
    from .extension import comfy_entrypoint
except ImportError:  # a ComfyUI without comfy_api
    pass
else:
    __all__ += ["comfy_entrypoint"]
