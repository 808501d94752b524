"""The application: its subcommands, and how it ends."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from signal import SIGTERM, signal
from typing import Annotated, Any

import typer

import parataxis

from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .errors import INTERRUPTED, TERMINATED, WRONG, Failed, NoReader, Wrong, choose
from .models import models
from .output import check_standard_output
from .plan import plan
from .sample import sample
from .solvers import solvers
from .verify import verify

__all__ = ["main"]

COMMANDS: dict[str, Callable[..., Any]] = {
    "sample": sample,
    "plan": plan,
    "bench": bench,
    "calibrate": calibrate,
    "demo": demo,
    "verify": verify,
    "solvers": solvers,
    "models": models,
}
EPILOG = (
    "Exit status: 0 done, 1 the work was done but a sample is not within its tolerance or a file could not be written "
    "where it was wanted, 2 the command is wrong and nothing was done, 130 Ctrl-C, 143 SIGTERM."
)

app = typer.Typer(
    name="parataxis",
    help="Sample diffusion models parallel in time: the sequential loop's sample in fewer rounds of network calls.",
    epilog=EPILOG,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"parataxis {parataxis.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Sample diffusion models parallel in time: the sequential loop's sample in fewer rounds of network calls."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those after the program's name; default: of the process.

    Returns:
        The exit status; see ``parataxis --help``.
    """
    words, signals = list(sys.argv[1:] if arguments is None else arguments), set[int]()
    try:
        check_standard_output()
        if words and not words[0].startswith("-"):
            choose("command", words[0], COMMANDS)
        with _terminated_as_interrupted(signals):
            return _run(words)
    except NoReader:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Failed as error:
        return _say(error, TERMINATED if signals else error.status)
    except Wrong as error:
        return _say(error, WRONG)
    except (KeyboardInterrupt, typer.Abort):
        return _say("terminated", TERMINATED) if signals else _say("interrupted", INTERRUPTED)
    except (ValueError, ModuleNotFoundError, MemoryError) as error:
        return _say(str(error) or "there is not enough memory: draw fewer samples.", WRONG)


def _run(words: list[str]) -> int:
    """Run a subcommand; its mistakes in flags are raised as :class:`Wrong`."""
    usage_error: Any = typer.BadParameter.__base__  # typer names only one of its mistakes in public
    command = typer.main.get_command(app)
    if not words:
        command.main(["--help"], prog_name="parataxis", standalone_mode=False)
        return WRONG
    try:
        status = command.main(words, prog_name="parataxis", standalone_mode=False)
    except usage_error as error:
        path = error.ctx.command_path if error.ctx is not None else "parataxis"
        raise Wrong(f"{_mistake(error)} (see {path} --help).") from None
    return status if isinstance(status, int) else 0


def _mistake(error: Any) -> str:
    """Return what is wrong with a flag, in one sentence without a full stop."""
    option = getattr(error, "option_name", None)
    near = difflib.get_close_matches(str(option), getattr(error, "possibilities", None) or [], 1)
    if near:
        return f"there is no option {option}. Did you mean {near[0]}?"
    message = error.format_message().rstrip(".")
    # the library's sentence on a number that cannot be read is longer than what it says
    message = re.sub(r"Input should be a valid (\w+).*", r"must be a valid \1", message)
    return f"{message[:1].lower()}{message[1:]}"


def _say(message: object, status: int) -> int:
    """Say in one line on standard error why the command ended."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error may be closed or full too
        print(f"parataxis: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def _terminated_as_interrupted(signals: set[int]) -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that its results are written; ``signals`` then holds it."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled there only
        yield
        return

    def terminate(number: int, frame: object) -> None:
        signals.add(number)
        raise KeyboardInterrupt

    before = signal(SIGTERM, terminate)
    try:
        yield
    finally:
        signal(SIGTERM, before)
