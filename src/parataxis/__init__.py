"""Sample diffusion models parallel in time: the same sample as the sequential loop's, in far fewer rounds.

The public names stand in ``_api.py``. They are loaded, and torch with them, when the first of them is read: the command
line's help and completion need neither.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._api import *  # noqa: F403

__version__ = "0.1.0"


FUNCTIONS = "sample", "parallel"  # are called as the modules that they stand in


class _Package(ModuleType):
    """The package, whose names are loaded when they are first read."""

    def __getattr__(self, name: str) -> Any:
        """Load a module, or else all public names; called for names that are not there yet."""
        if name.startswith("__") and name != "__all__":  # what tools look for in any module
            raise AttributeError(f"module 'parataxis' has no attribute {name!r}")
        if name not in FUNCTIONS and find_spec(f"parataxis.{name}") is not None:
            return import_module(f"parataxis.{name}")
        api, names = import_module("parataxis._api"), self.__dict__
        names["__all__"] = api.__all__
        for public in api.__all__:
            names[public] = getattr(api, public)
        if name not in names:
            raise AttributeError(f"module 'parataxis' has no attribute {name!r}")
        return names[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a name. Python names each module here when it imports it: a function of the same name stays."""
        if name in FUNCTIONS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Return the public names only, not the modules behind them."""
        return [*self.__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
