"""Writing results: refused before the work where that is possible, and never lost after it.

A file is written beside its place under another name and then moved there: a full disk leaves the old one whole. What
cannot be written goes to a folder for temporary files, and the error names it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import Failed, NoReader, Wrong

__all__ = [
    "check_output",
    "check_pictures",
    "check_standard_output",
    "emit",
    "is_figures",
    "is_picture",
    "is_saved_solve",
    "save",
]

PICTURES = ".png", ".jpg", ".jpeg", ".webp"
SOFTWARE = 0x0131  # the EXIF tag for the program that wrote a picture
MARK = "parataxis"
ROOM = 2**20  # bytes that a disk must have free

Writer = Callable[[Path], None]


def check_output(paths: Sequence[Path], is_ours: Callable[[Path], bool], *, force: bool = False) -> None:
    """Raise unless files can be written at these paths, without a trace.

    Raises:
        Wrong: For a place that cannot be written, is no file, or has a file that this command has not written.
    """
    if len({os.path.abspath(path) for path in paths}) < len(paths):
        raise Wrong(f"{paths[0]} is named twice: give each file a path of its own.")
    for path in paths:
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            _check_folder(path)
            continue
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from None
        if stat.S_ISLNK(mode) and not path.exists():
            raise Wrong(f"{path} is a link to {os.readlink(path)}, which does not exist: give another path.")
        if not path.is_file():
            raise Wrong(f"{path} is not a regular file: give another path.")
        if not os.access(path, os.W_OK):
            raise Wrong(f"{path} cannot be written (it is read-only): give another path.")
        if not force and not is_ours(path):
            raise Wrong(f"{path} was not written by parataxis: give another path, or --force to replace it.")
        _check_folder(path)


def check_pictures(paths: Sequence[Path], *, force: bool = False) -> None:
    """Raise unless pictures can be made, and written at these paths."""
    for path in paths:
        if path.suffix.lower() not in PICTURES:
            raise Wrong(f"{path} has no picture's ending: use .png, .jpg or .webp.")
    if paths and not (find_spec("PIL") and find_spec("matplotlib")):
        raise Wrong("pictures need an extra: install it with  pip install 'parataxis[plots]'.")
    check_output(paths, is_picture, force=force)


def _check_folder(path: Path) -> None:
    """Raise unless a file can be made where ``path`` would be; makes no folder."""
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unwritable(path, error) from None
    if free < ROOM:
        raise Wrong(f"{path} cannot be written (No space left on device): give another path.")


def _unwritable(path: Path, error: Exception) -> Wrong:
    reason = getattr(error, "strerror", None) or error
    return Wrong(f"{path} cannot be written ({reason}): give another path.")


def is_picture(path: Path) -> bool:
    """Return whether this command has written this picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return bool(picture.getexif().get(SOFTWARE) == MARK)
    except (OSError, UnidentifiedImageError):
        return False


def is_figures(path: Path) -> bool:
    """Return whether these are figures that this command has written."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(figures, dict) and figures.get("made_by") == MARK


def is_saved_solve(path: Path) -> bool:
    """Return whether this command has written this checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {MARK, "runs"} <= set(file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def picture_writer(picture: Any) -> Writer:
    """Return how to write a Pillow picture that :func:`is_picture` knows again."""
    exif = picture.getexif()
    exif[SOFTWARE] = MARK
    return lambda path: picture.save(path, exif=exif)


def json_writer(figures: dict[str, Any]) -> Writer:
    """Return how to write figures that :func:`is_figures` knows again."""
    text = json.dumps({"made_by": MARK, **figures}, indent=2) + "\n"
    return lambda path: _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save(files: dict[Path, Writer]) -> None:
    """Write files, each whole or not at all.

    Raises:
        Failed: If one cannot be written, with the place where it lies instead.
    """
    lost = {}
    for path, write in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, write)
        except OSError as error:
            lost[path] = error.strerror or str(error)
    if lost:
        folder = Path(tempfile.mkdtemp(prefix="parataxis-", dir=_roomy_folder()))
        for path in lost:
            files[path](folder / path.name)
        path, reason = next(iter(lost.items()))
        names = " and ".join(path.name for path in lost)
        raise Failed(f"{path} cannot be written ({reason}): {names} is in {folder} instead.")


def _replace(path: Path, write: Writer) -> None:
    """Write a file beside its place, then move it there; a link stays one."""
    target = path.resolve()
    handle, name = tempfile.mkstemp(prefix=".parataxis-", suffix=path.suffix, dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        os.chmod(part, stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _roomy_folder() -> str | None:
    """Return a folder with room: that for temporary files, the home, or the current one."""
    for folder in (tempfile.gettempdir(), str(Path.home()), "."):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free > ROOM:
                return folder
    return None


def check_standard_output() -> None:
    """Raise if nothing can be printed."""
    if sys.stdout is None or sys.stdout.closed:
        raise Wrong("standard output is closed: open it, or send it to a file or /dev/null.")


def emit(text: str) -> None:
    """Print a result.

    Raises:
        Failed: If standard output takes nothing, with the file where the text lies.
    """
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise NoReader from None
    except OSError as error:
        # What is still in the buffer would fail again when Python ends, with a traceback.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        handle, name = tempfile.mkstemp(prefix="parataxis-", suffix=".txt", dir=_roomy_folder())
        os.close(handle)
        _write_text(Path(name), text + "\n")
        raise Failed(f"standard output cannot be written ({error.strerror}): the result is in {name}.") from None


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Return a table as text, as wide as the terminal and coloured where there is one.

    Args:
        title: Above the table.
        columns: Their heads.
        rows: The cells.
        numbers: Columns that are aligned to the right.
    """
    import io

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    for place, column in enumerate(columns):
        grid.add_column(column, justify="right" if place in numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    width = None if terminal else 120
    Console(file=buffer, force_terminal=terminal, width=width, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())
