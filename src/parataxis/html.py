"""Small tables for notebooks: what ``_repr_html_`` of results returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["figures", "preformatted"]


def figures(title: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a caption; the first cell of a row is its head.

    Args:
        title: The caption.
        rows: Cells as plain text.
    """
    lines = []
    for head, *cells in rows:
        data = "".join(f'<td style="text-align:right">{escape(cell)}</td>' for cell in cells)
        lines.append(f'<tr><th style="text-align:left">{escape(head)}</th>{data}</tr>')
    caption = f'<caption style="text-align:left;caption-side:top"><b>{escape(title)}</b></caption>'
    return f"<table>{caption}{''.join(lines)}</table>"


def preformatted(text: str) -> str:
    """Return a table that is text already."""
    return f"<pre>{escape(text)}</pre>"
