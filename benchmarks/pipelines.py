"""Every option of every pipeline of the tests' zoo, each against its own sequential run: the page docs/coverage.md.

    python benchmarks/pipelines.py [pipelines]

Checks, each for one call of `parallel(pipe)`:

- *window 1*: one recorded call at a time, replayed and never merged, is the sequential run to the bit, and the networks
  are called by the library only: every output came through the stub;
- *tolerance 0*: relative error <= 1e-5 in float32, or twice the loop's floor where that is larger;
- *default*: error estimate <= tolerance and relative error <= 1e-2 in float32;
- *bfloat16*: relative error <= 1e-2, or twice the loop's floor where that is larger: how far the sequential run itself
  moves when all its outputs move by a unit in their last place.

Writes ``results/pipelines.csv`` row by row, goes on where it stopped, and tries again what fell short.
"""

from __future__ import annotations

import csv
import ctypes
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

import parataxis as px

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import zoo

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "pipelines.csv"
PAGE = ROOT / "docs" / "coverage.md"
KEY = ["pipeline", "option", "check"]
COLUMNS = [
    *KEY,
    "falls_short",
    "mode",
    "reason",
    "steps",
    "samples",
    "rounds",
    "evaluations",
    "calls",
    "passes",
    "error_estimate",
    "floor",
    "error",
    "loop_floor",
]
Row = dict[str, str]


@dataclass(frozen=True)
class Check:
    """How a pipeline is run, and how near it must come to its sequential run."""

    solver: px.Solver = px.Secant(window=8)  # noqa: RUF009  # frozen
    tolerance: float = 1e-2
    bound: float = 1e-2
    dtype: torch.dtype = torch.float32
    rounds: bool = False  # twice the loop's floor is near enough


CHECKS = {
    "window 1": Check(px.Secant(window=1), bound=0.0),
    "tolerance 0": Check(tolerance=0.0, bound=1e-5, rounds=True),
    "default": Check(),
    "bfloat16": Check(dtype=torch.bfloat16, rounds=True),
}


class Case:
    """One option of a pipeline in one dtype: built once, run sequentially, then in parallel as often as asked."""

    def __init__(self, name: str, option: str, dtype: torch.dtype) -> None:
        """Build it and run it."""
        self.dtype = dtype
        self.pipe, self.call = zoo.make(name, option, dtype)
        # Numbers and lists are put back before every pass of a loop; this is not. The hook holds nothing else: what a
        # network reaches is watched from step to step.
        self.calls = calls = ctypes.c_long()

        def count(*arguments: Any) -> None:
            calls.value += 1

        for net in (*zoo.denoisers(self.pipe).values(), getattr(self.pipe, "controlnet", None)):
            if net is not None:
                net.register_forward_hook(count)
        self.expected = zoo.run(self.pipe, self.call)

    @cached_property
    def floor(self) -> float:
        """How far the sequential run moves when its outputs move by a unit in their last place."""
        return zoo.floor(self.pipe, self.call)

    def run(self, check: Check) -> Row:
        """Run it in parallel, and judge."""
        parallel = px.parallel(self.pipe, check.solver, tolerance=check.tolerance)
        self.calls.value = 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the (rest of the )?loop runs sequentially", RuntimeWarning)
            warnings.filterwarnings("ignore", "running in parallel was slower", RuntimeWarning)  # networks cost nothing
            warnings.filterwarnings("ignore", "the result may be .* away from the loop", RuntimeWarning)  # its floor
            sample = zoo.run(parallel, self.call)
        report, error = parallel.report, zoo.distance(sample, self.expected)
        calls, short, floor = self.calls.value, [], None
        if not error <= check.bound and check.rounds:
            floor = self.floor
        if not error <= max(check.bound, 2 * (floor or 0)):
            short.append("error")
        if check.tolerance and not report.error_estimate <= max(check.tolerance, 2 * report.floor):
            short.append("error_estimate")
        if not report.converged and check.tolerance and report.error_estimate > report.floor:
            short.append("not converged")
        # One pass makes the checks of a denoiser behind its hooks, so they are not counted here.
        if report.mode != "sequential" and (
            calls > report.calls if report.mode == "one pass" else calls != report.calls
        ):
            short.append("calls that are not counted")
        if report.mode == "replay" and check.solver == CHECKS["window 1"].solver and report.rounds != report.steps:
            short.append("more rounds than steps")
        row = {name: str(value) for name, value in vars(report).items()}
        row |= {name: f"{vars(report)[name]:.1e}" for name in ("error_estimate", "floor")}
        row |= {"falls_short": ", ".join(short), "error": f"{error:.1e}"}
        row["loop_floor"] = "" if floor is None else f"{floor:.1e}"
        return row


def cases(names: Iterable[str]) -> Iterator[tuple[str, str, torch.dtype]]:
    """Yield the cases: plain pipelines first."""
    every = [(name, option) for name in names for option, _ in zoo.variants(name)]
    for plain in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            yield from ((*one, dtype) for one in every if (one[1] == "plain") == plain)


def attempt(name: str, option: str, dtype: torch.dtype) -> list[Row]:
    """Return the rows of a case: one for every check of this dtype."""
    rows = []
    checks = {label: check for label, check in CHECKS.items() if check.dtype == dtype}
    try:
        case = Case(name, option, dtype)
    except Exception as error:  # whatever diffusers says to 16 bits
        if dtype == torch.float32:
            raise
        told = " ".join(str(error).split())[:150]
        return [
            {"pipeline": name, "option": option, "check": label, "mode": "none", "reason": told} for label in checks
        ]
    for label, check in checks.items():
        try:
            row = case.run(check)
        except Exception as error:
            row = {"falls_short": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
        rows.append({"pipeline": name, "option": option, "check": label} | row)
    if not torch.equal(zoo.run(case.pipe, case.call), case.expected):
        rows[-1]["falls_short"] += " not put back as it was"
    return rows


def rows() -> dict[tuple[str, ...], Row]:
    """Return the rows of the table by pipeline, option and check; of rows that were tried again, the last."""
    if not OUT.exists():
        return {}
    with OUT.open() as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


@contextmanager
def table(mode: str) -> Iterator[Any]:
    """Open the table."""
    with OUT.open(mode, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        yield writer
        file.flush()


def main(names: Iterable[str]) -> int:
    """Fill the table and write the page; return how many checks fall short."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"__array_(_ implementation|wrap__ must)", DeprecationWarning)
    warnings.filterwarnings("ignore", "Dynamo detected a call", UserWarning)
    warnings.filterwarnings("ignore", ".* is deprecated and will be removed", FutureWarning)  # of diffusers' own parts
    done = {key for key, row in rows().items() if not row["falls_short"]}
    todo = [
        case
        for case in cases(names or zoo.PIPELINES)
        if any((*case[:2], label) not in done for label, check in CHECKS.items() if check.dtype == case[2])
    ]
    for case in tqdm(todo):
        found = attempt(*case)
        with table("a") as writer:
            writer.writerows(found)
        for row in found:
            if row.get("falls_short"):
                tqdm.write(f"{row['pipeline']}, {row['option']}, {row['check']}: {row['falls_short']}")
    return write_page()


def write_page() -> int:
    """Bring the rows of the table into order, write the page, and return how many checks fall short."""
    known = rows()
    order = [(name, option, label) for name in zoo.PIPELINES for option, _ in zoo.variants(name) for label in CHECKS]
    known = {key: known[key] for key in order if key in known}
    with table("w") as writer:
        writer.writerows(known.values())
    PAGE.write_text(page(known.values()))
    return sum(bool(row["falls_short"]) for row in known.values())


def page(found: Iterable[Row]) -> str:
    """Return docs/coverage.md: by pipeline, by option, and what falls short."""
    found = list(found)
    pipelines, options = groups(found, "pipeline"), groups(found, "option")
    sequential = groups([row for row in found if row["mode"] == "sequential"], "reason")
    refused = groups([row for row in found if row["mode"] == "none"], "reason")
    default = [row for row in found if row["check"] == "default"]
    parallel = sum(row["mode"] not in ("sequential", "none") and not row["falls_short"] for row in default)
    rounding = [row for row in found if row["check"] == "tolerance 0" and float(row["error"] or 0) > 1e-5]
    lines = [
        "# Pipelines of diffusers",
        "",
        f"Made by `benchmarks/pipelines.py` with diffusers {diffusers.__version__}: {len(pipelines)} pipelines with",
        f"tiny random weights, {zoo.STEPS} steps, {len(options)} options, each where a pipeline takes it, each against",
        "its own sequential run; `benchmarks/results/pipelines.csv` has every row.",
        "",
        "- *window 1* is the sequential run to the bit, and every network call is the library's own: every output that",
        "  the loop saw came through the stub;",
        "- *tolerance 0*: relative error <= 1e-5 in float32, or twice the loop's floor where that is larger;",
        "- *default*: error estimate <= 1e-2 and relative error <= 1e-2 in float32;",
        "- *bfloat16*: relative error <= 1e-2, or twice the loop's floor where that is larger.",
        "",
        "The loop's floor is measured on the sequential run: how far the sample moves when every output moves by a",
        "unit in its last place. *Rounds* are those of the pipeline as it comes, at the default tolerance. Where",
        "*window 1* has the mode *replay*, rows are from before loops with a scheduler ran in one pass.",
        "",
        f"**{parallel} of {len(default)} configurations run in parallel** at the default tolerance;",
        "why the others do not stands below.",
        "",
        "| pipeline | mode | rounds of steps | " + " | ".join(f"{label}: passed, worst" for label in CHECKS) + " |",
        "|---" * (3 + len(CHECKS)) + "|",
    ]
    for name, rows in pipelines.items():
        plain = next((row for row in rows if row["option"] == "plain" and row["check"] == "default"), rows[0])
        gain = f"{plain['rounds']} of {plain['steps']}" if plain["mode"] != "sequential" else ""
        cells = [summary([row for row in rows if row["check"] == label]) for label in CHECKS]
        lines.append(f"| {name} | {plain['mode']} | {gain} | " + " | ".join(cells) + " |")
    lines += ["", "| option | pipelines | " + " | ".join(CHECKS) + " |", "|---" * (2 + len(CHECKS)) + "|"]
    for option, rows in options.items():
        cells = [passed([row for row in rows if row["check"] == label]) for label in CHECKS]
        lines.append(f"| {option} | {len(groups(rows, 'pipeline'))} | " + " | ".join(cells) + " |")
    lines += ["", "## What falls short", ""]
    lines += [
        f"- {row['pipeline']}, {row['option']}, {row['check']}: {row['falls_short']}"
        + (f" ({row['error']})" if row["error"] else "")
        for row in found
        if row["falls_short"]
    ] or ["Nothing."]
    lines += ["", "## What is at the loop's own floor", ""]
    lines += [
        f"- {row['pipeline']}, {row['option']}, tolerance 0: error {row['error']}, floor {row['loop_floor']}"
        for row in rounding
        if not row["falls_short"]
    ] or ["Nothing."]
    lines += ["", "## What runs sequentially", ""]
    lines += [f"- {reason} {named(rows)}" for reason, rows in sequential.items()] or ["Nothing."]
    lines += ["", "## What diffusers itself does not run", ""]
    lines += [f"- In bfloat16: {reason} {named(rows)}" for reason, rows in refused.items()] or ["Nothing."]
    return "\n".join(lines) + "\n"


def named(found: Iterable[Row]) -> str:
    """Return the pipelines with the options of rows."""
    told = {name: list(groups(rows, "option")) for name, rows in groups(found, "pipeline").items()}
    return "; ".join(
        f"{name} ({', '.join(some) if len(some) < 8 else f'{len(some)} options'})" for name, some in told.items()
    )


def groups(found: Iterable[Row], column: str) -> dict[str, list[Row]]:
    """Group rows by a column, in their order."""
    known: dict[str, list[Row]] = {}
    for row in found:
        known.setdefault(row[column], []).append(row)
    return known


def passed(found: Iterable[Row]) -> str:
    """Return how many of how many rows passed; those that diffusers cannot run do not count."""
    ran = [row for row in found if row["mode"] != "none"]
    return f"{sum(not row['falls_short'] for row in ran)} of {len(ran)}" if ran else ""


def summary(found: Iterable[Row]) -> str:
    """Return the same with the worst error, in 16 bits with the floor that it is measured by."""
    ran = [row for row in found if row["mode"] != "none" and row["error"]]
    worst = max(ran, key=lambda row: float(row["error"]), default=None)
    if worst is None:
        return ""
    floor = f", floor {worst['loop_floor']}" if worst["loop_floor"] else ""
    return f"{passed(found)}, {worst['error']}{floor}"


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
