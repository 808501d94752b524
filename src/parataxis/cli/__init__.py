"""The command line, on typer and rich: one file a subcommand, and :func:`main`.

To add a subcommand, write ``cli/NAME.py`` with a function whose parameters are its flags, and name it in ``COMMANDS``
of ``cli/app.py``. Its module must not import torch: import the library inside the function, so that help and shell
completion answer at once. Flags that several subcommands have are in ``flags.py``; results go through ``output.py``,
which loses none of them; a mistake that the user can correct is a :class:`Wrong`.
"""

from __future__ import annotations

from .app import main
from .errors import Wrong

__all__ = ["Wrong", "main"]
