"""The application: help, lists, configuration files, completion, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import parataxis
from parataxis import models
from parataxis.cli import main
from parataxis.cli.options import TABLE, describe

PROGRAM = [sys.executable, "-m", "parataxis"]


def test_lists(capsys):
    assert main(["solvers"]) == 0
    same_sample, same_law = capsys.readouterr().out.split("the same distribution, another sample:")
    assert "--window" in same_sample
    assert "--verification" not in same_sample
    assert "speculative" in same_law
    assert main(["solvers", "picard"]) == 0
    assert "error|paradigms" in capsys.readouterr().out
    assert main(["models"]) == 0
    assert "digits-flow" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "sample" in capsys.readouterr().out
    assert main([]) == 2


def test_lists_are_printed_as_json(capsys):
    assert main(["solvers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["secant"]["options"]["window"]["default"] == "none"
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == models.available()
    for name, form in listed.items():
        model = models.load(name)
        assert (form["shape"], form["classes"]) == ([*model.shape], model.classes)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"parataxis {parataxis.__version__}\n"


def test_unknown_command_is_refused_with_the_nearest(capsys):
    assert main(["sampel"]) == 2
    assert "there is no command 'sampel'. Did you mean 'sample'?" in capsys.readouterr().err
    assert main(["solvers", "picrd"]) == 2
    assert "Did you mean 'picard'?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["solvers"], ["models"], ["--version"]])
def test_help_and_lists_do_not_import_torch(arguments):
    """Waiting seconds for torch is what a person would notice first."""
    code = "import sys; from parataxis.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_flags_are_the_options_of_solvers_and_samplers():
    assert describe() == TABLE, "write the table again: make options"


def test_every_option_has_help():
    for kind in TABLE.values():
        for name, entry in kind.items():
            assert entry["summary"], name
            assert all(form["help"] for form in entry["options"].values()), name


def test_completion_offers_commands_and_names():
    def complete(words):
        environment = {**os.environ, "_PARATAXIS_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        return subprocess.run(PROGRAM, capture_output=True, text=True, env=environment).stdout.split()

    assert complete("parataxis sam") == ["sample"]
    assert complete("parataxis sample --solver sec") == ["secant"]


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return str(path)

    return write


def test_config_file_gives_defaults_that_flags_replace(config, capsys):
    path = config('count = 1\n[sample]\nsteps = 6\nsolver = "picard"\nwindow = 4\nmax-rows = 64\nlabel = [7, 1]\n')
    assert main(["sample", "--config", path, "--steps", "5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["steps"] == 5
    assert figures["samples"] == 1
    assert figures["solver"].startswith("Picard(window=4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sample]\nstpes = 4\n", "parataxis sample has no flag 'stpes'. Did you mean 'steps'?"),
        ("sample = 3\n", "sample must be a table, [sample], got 3"),
        ("[sample\n", "cannot be read ("),
        ('[sample]\nsteps = "many"\n', "invalid value for '--steps'"),
    ],
)
def test_wrong_config_file_is_said_in_one_line(text, message, config, capsys):
    path = config(text)
    assert main(["sample", "--config", path]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_missing_config_file_is_said(capsys):
    assert main(["sample", "--config", "nowhere.toml"]) == 2
    assert "--config nowhere.toml cannot be read (No such file or directory)" in capsys.readouterr().err


def test_reader_that_stops_early_is_no_error(monkeypatch):
    """A reader that stops early is no error."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["solvers"]) == 0
