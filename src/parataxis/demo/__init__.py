"""A page to watch a solve converge, on gradio (``pip install 'parataxis[demo]'``); ``parataxis demo`` opens it.

What can be drawn is in ``sources.py``, a solve and its pictures in ``replay.py``, the page in ``page.py``.
"""

from __future__ import annotations

from .page import build, launch
from .replay import Replay, Settings, replay

__all__ = ["Replay", "Settings", "build", "launch", "replay"]
