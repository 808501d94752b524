"""Sphinx: ``make docs`` builds this folder, without a network and with warnings as errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "src"))

project = "parataxis"
author = "The parataxis developers"
copyright = "The parataxis developers"
version = release = re.search(r'__version__ = "(.*)"', (DOCS.parent / "src/parataxis/__init__.py").read_text()).group(1)  # type: ignore[union-attr]

extensions = [
    "myst_parser",  # pages in Markdown
    "sphinx.ext.autodoc",  # the API from docstrings
    "sphinx.ext.napoleon",  # which are in Google's style
    "sphinx_copybutton",  # code blocks with a button
]
html_theme = "furo"
html_math_renderer = "mathml"  # which browsers show without scripts and without a network
html_title = f"parataxis {release}"
html_theme_options = {"source_repository": "https://github.com/parataxis-dev/parataxis", "source_directory": "docs/"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures stay readable; docstrings give the types
autodoc_member_order = "bysource"
nitpicky = False  # docstrings name private modules, which have no page
suppress_warnings = ["ref.python"]  # a class is shown by its public name only


def _outside(app: Any, docname: str, source: list[str]) -> None:
    """Point links to files outside of this folder at the repository, and complete the list of pages."""
    base = "https://github.com/parataxis-dev/parataxis/blob/main/"
    if docname == "index":  # pages that it does not name stand at its end
        named = set(re.findall(r"^[\w-]+$", source[0], re.MULTILINE))
        others = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in named | {"index"})
        source[0] = source[0].replace("(others)", "\n".join(others))
    source[0] = re.sub(r"\]\(\.\./([^)#]+)", rf"]({base}\1", source[0])


def _plain(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Escape what docstrings write as formulas and reStructuredText reads as markup, such as (B, *shape) and |x|."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.*?``|:\w+:`.*?`)", line)
        parts[::2] = [
            re.sub(r"(?<!\\)([*|])|(?<=\w)_(?=\W|$)", lambda m: "\\" + m.group(), part) for part in parts[::2]
        ]
        lines[number] = "".join(parts)


def _inline_formula(writer: Any, node: Any) -> None:
    """Write a formula within a line as MathML."""
    writer.body.append(convert(node.astext()))
    raise SkipNode


def _displayed_formula(writer: Any, node: Any) -> None:
    """Write a formula on a line of its own as MathML."""
    writer.body.append(convert(node.astext(), display="block"))
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Connect the rules above."""
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_displayed_formula, None))
    app.connect("source-read", _outside)
    app.connect("autodoc-process-docstring", _plain, priority=100)  # before napoleon makes markup
    return {"parallel_read_safe": True}
