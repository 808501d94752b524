"""``parataxis demo``: a page to watch a solve converge."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import Wrong

__all__ = ["demo"]


def demo(
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's loopback are open.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Open a page to watch a solve converge, beside the sequential loop."""
    if not 0 <= port < 65536:
        raise Wrong(f"--port must lie in 0..65535, got {port}.")
    from ..demo import launch

    try:
        launch(host, port, open_browser=open_browser)
    except OSError as error:
        raise Wrong(f"the page cannot listen on {host}:{port} ({error}): choose another --port.") from None
