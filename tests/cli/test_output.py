"""Files and standard output that cannot be written: refused before the work, and nothing is lost after it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

import parataxis.cli.output as output
from parataxis.cli import main

DRAW = ["sample", "--steps", "4", "--count", "1"]
PROGRAM = [sys.executable, "-m", "parataxis"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def written():
    """Return what was written here and when; files may be looked at."""
    found = {path: path.lstat() for path in Path().rglob("*")}
    return {path: (of.st_ino, of.st_size, of.st_mode, of.st_mtime_ns) for path, of in found.items()}


def refused(arguments, message, capsys):
    """Check that a command is refused in one line, and leaves every file as it was."""
    before = written()
    assert main([*DRAW, *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert written() == before


def test_place_that_is_no_file_is_refused(capsys):
    os.mkfifo("fifo.png")
    refused(["--out", "fifo.png"], "fifo.png is not a regular file", capsys)
    Path("folder.png").mkdir()
    refused(["--out", "folder.png"], "folder.png is not a regular file", capsys)
    Path("full.png").symlink_to("/dev/full")
    refused(["--trace", "full.png"], "full.png is not a regular file", capsys)
    Path("dangling.png").symlink_to("nowhere/x.png")
    refused(["--out", "dangling.png"], "dangling.png is a link to nowhere/x.png, which does not exist", capsys)
    refused(["--out", "x" * 300 + ".png"], "cannot be written (File name too long)", capsys)


def test_command_goes_on_from_its_checkpoint(capsys):
    """Ctrl-C in the middle writes it; the same command ends with the picture of one that was not interrupted."""
    calls, command = [], ["sample", "--steps", "8", "--count", "1", "--window", "3", "--json"]

    def press(module, inputs):
        if type(module).__name__.startswith("UNet2D") and "Block" not in type(module).__name__:
            calls.append(len(inputs[0]))
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)

    assert main([*command, "--out", "whole.png"]) == 0
    whole = json.loads(capsys.readouterr().out)
    pressed = register_module_forward_pre_hook(press)
    try:
        assert main([*command, "--out", "a.png", "--checkpoint", "a.safetensors"]) == 130
        assert "The same command goes on from a.safetensors" in capsys.readouterr().err
        assert main([*command, "--out", "a.png", "--checkpoint", "a.safetensors"]) == 0
    finally:
        pressed.remove()
    again = json.loads(capsys.readouterr().out)
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert Image.open("a.png").tobytes() == Image.open("whole.png").tobytes()
    assert len(calls) == whole["rounds"] + 1
    assert not Path("a.safetensors").exists()


def test_checkpoint_of_something_else_is_refused(capsys):
    Path("notes.txt").write_text("mine")
    now = time.time()
    os.utime("notes.txt", (now, now - 100))  # a file that has been read since it was written stays as it is when read
    refused(["--checkpoint", "notes.txt", "--force"], "notes.txt was not written by parataxis", capsys)
    refused(["--checkpoint", "a", "--solver", "auto"], "--checkpoint needs one solver", capsys)
    refused(["--checkpoint", "a.png", "--out", "a.png"], "a.png is named twice", capsys)


def test_files_of_others_are_not_replaced(capsys):
    Image.new("RGB", (2, 2)).save("photo.png")
    refused(["--out", "photo.png"], "photo.png was not written by parataxis: give another path, or --force", capsys)
    Path("sample.json").write_text('{"a": 1}')
    refused(["--out", "sample.png"], "sample.json was not written by parataxis", capsys)
    assert main([*DRAW, "--out", "photo.png", "--force"]) == 0


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_its_own_files_are_known_again(ending):
    picture = output.picture_writer(Image.new("RGB", (2, 2)))
    output.save({Path(f"x.{ending}"): picture, Path("x.json"): output.json_writer({"a": 1})})
    assert output.is_picture(Path(f"x.{ending}"))
    assert output.is_figures(Path("x.json"))
    output.check_output([Path(f"x.{ending}")], output.is_picture)


def test_link_to_a_file_stays_a_link():
    Path("real.json").write_text("{}")
    Path("link.json").symlink_to("real.json")
    output.save({Path("link.json"): output.json_writer({"a": 1})})
    assert Path("link.json").is_symlink()
    assert json.loads(Path("real.json").read_text())["a"] == 1


def test_full_disk_loses_nothing(monkeypatch, capsys, tmp_path):
    """A disk that is full when the pictures are written: they are somewhere else, and that place is named."""
    replace = os.replace

    def full(source, target):
        if Path(target).parent.name == "here":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    assert main([*DRAW, "--out", "x.png", "--trace", "trace.png"]) == 1
    errors = capsys.readouterr().err
    folder = Path(re.search(r"cannot be written \(No space left on device\): .* in (\S+) instead", errors).group(1))
    assert {path.name for path in folder.iterdir()} == {"x.png", "x.json", "trace.png"}
    assert json.loads((folder / "x.json").read_text())["steps"] == 4
    assert not list(Path().iterdir())


def test_disk_that_is_full_before_is_refused(monkeypatch, capsys):
    usage = output.shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=0))
    refused(["--out", "new/x.png"], "cannot be written (No space left on device)", capsys)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_standard_output_loses_nothing():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "models", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    path = re.search(r"cannot be written \(No space left on device\): the result is in (\S+)\.", done.stderr).group(1)
    assert "digits" in json.loads(Path(path).read_text())


def test_closed_standard_output_is_refused():
    done = subprocess.run(" ".join([*PROGRAM, "models", ">&-"]), shell=True, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "parataxis: standard output is closed: open it, or send it to a file or /dev/null.\n"


def test_interrupted_sample_is_written(monkeypatch, capsys):
    """SIGTERM ends a solve as Ctrl-C does: the present estimates are written."""
    from parataxis.engine import executor

    call, calls = executor.Executor.__call__, []

    def slow(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, rows)

    monkeypatch.setattr(executor.Executor, "__call__", slow)
    assert main([*DRAW, "--out", "x.png"]) == 143
    assert "interrupted" in capsys.readouterr().err
    assert json.loads(Path("x.json").read_text())["converged"] is False
    assert Path("x.png").stat().st_size > 0
