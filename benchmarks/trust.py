"""Write docs/trust.md from the tables of faults, mutations, properties and soak.

``python benchmarks/trust.py``.
"""

from __future__ import annotations

import csv
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENTS = "oldest", "newest"
# Why a survivor stays, where that is known: by its name.
REASONS = {
    "window of one keeps slopes": "changes nothing: the first state of a window depends on no slope",
    "first sample may be the last": "changes nothing: a first sample has none before it, so its error is infinite",
    "a failed sample stays active": "changes nothing: the end of its run takes it out in the same round",
    "third pass proves nothing": "noticed later, by a replay: its end is compared with what was solved",
    "places are not used again": "costs memory only: a place for every sample of a stream",
}


def rows(name: str) -> list[dict[str, str]]:
    """Return a table, empty where it has not been made."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def faults() -> str:
    """Return the section on faults of ranks."""
    lines = ["| fault | runs | longest end | ranks that name rank 1 | processes left |", "|---|---|---|---|---|"]
    table = rows("faults")
    for fault in dict.fromkeys(line["fault"] for line in table):
        runs = [line for line in table if line["fault"] == fault]
        named = f"{sum(int(r['named']) for r in runs)} of {sum(int(r['spoke']) for r in runs)}"
        longest = max(float(r["seconds"]) for r in runs)
        lines.append(f"| {fault} | {len(runs)} | {longest:.1f} s | {named} | {sum(int(r['left']) for r in runs)} |")
    return "\n".join(
        [
            "## Faults of ranks",
            "",
            f"Rank 1 of three is faulty in its fourth network call; {len(table)} runs. A rank that hangs counts as",
            "lost after the timeout, 15 seconds here. `make faults`.",
            "",
            *lines,
        ]
    )


def mutations() -> str:
    """Return the section on mutations."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from mutants import MUTATIONS

    table = rows("mutants")
    killed = [line for line in table if line["killed"] == "1"]
    lines = [
        "## Mutations",
        "",
        f"Each of {len(MUTATIONS)} mechanisms is broken once. A mutation meets the tests that execute its line, the",
        f"fastest first; what survives them is tried with whole test files. Tried so far: {len(table)}; noticed:",
        f"{len(killed)}. `make mutants` goes on where it was stopped.",
        "",
    ]
    survivors = [line for line in table if line["killed"] != "1"]
    if survivors:
        lines += ["| survivor | file | why |", "|---|---|---|"]
        lines += [
            f"| {line['mutation']} | `{line['file']}` | {REASONS.get(line['mutation'], 'not looked at yet')} |"
            for line in survivors
        ]
    return "\n".join(lines)


def verification() -> str:
    """Return the section on networks and loops that are wrong in a known way."""
    tests = (ROOT / "tests" / "test_verification.py").read_text()
    networks = len(re.findall(r'^    "[^"]+": \(', tests.split("FAULTS = {")[1].split("\n}")[0], re.MULTILINE))
    loops = len(re.findall(r'^        \("[^"]+", ', tests.split("TWICE, PARALLEL")[1].split("def ")[0], re.MULTILINE))
    return "\n".join(
        [
            "## Networks and loops that are wrong",
            "",
            f"{networks} networks that break a law of parallel sampling in a known way (random numbers, caches, rows",
            "that mix, the time of another row, NaN, wrong shapes ..), three that take another row's condition, and",
            f"{loops} loops: `px.verify` and `parataxis verify` name the law that each of them breaks, and no other",
            "(`tests/test_verification.py`).",
        ]
    )


def properties() -> str:
    """Return the section on laws over inputs that nobody chose."""
    lines = ["| law | examples | held |", "|---|---|---|"]
    for line in rows("properties"):
        name = line["law"].removeprefix("test_").replace("_", " ")
        examples = line["examples"] if line["given"] == "1" else "one by one"
        lines.append(f"| {name} | {examples} | {'yes' if line['held'] == '1' else 'NO'} |")
    tests = (ROOT / "tests" / "test_properties.py").read_text()
    bad = sum(len(re.findall(r"pytest\.raises\(", path.read_text())) for path in (ROOT / "tests").rglob("*.py"))
    text = [
        "## Laws over inputs that nobody chose",
        "",
        f"{tests.count('@given')} laws over dtypes, shapes, numbers of steps, solvers and samplers, and the contexts",
        "of torch and Python, run in every test with few examples, and by `benchmarks/properties.py` with many.",
        f"{bad} places in the tests pass bad input and look at the error.",
        "",
    ]
    return "\n".join(text + (lines if rows("properties") else []))


def soak() -> str:
    """Return the section on long runs."""
    lines = ["| what | samples | N | peak before | peak after | ratio | converged |", "|---|---|---|---|---|---|---|"]
    for line in rows("soak"):
        lines.append(
            f"| {line['what']} | {line['samples']} | {line['steps']} | {line['peak_before_mb']} MB | "
            f"{line['peak_after_mb']} MB | {line['ratio']} | {line['converged']} |"
        )
    return "\n".join(
        [
            "## Soak",
            "",
            "Resident memory: of the stream, the peak of the second hundred samples and of the last hundred; of the",
            "large latents, of the second and the last fifth of the rounds. `make soak`.",
            "",
            *lines,
        ]
    )


def versions() -> str:
    """Return the section on versions."""
    tables = {name: {line["package"]: line["version"] for line in rows(f"versions-{name}")} for name in ENVIRONMENTS}
    tables = {name: table for name, table in tables.items() if table}
    packages = [line.split("==")[0] for line in (ROOT / ".ci" / "oldest.txt").read_text().split()]
    lines = [
        f"| | {' | '.join(f'`make {name}`' for name in tables)} | these tables |",
        "|---" * (len(tables) + 2) + "|",
    ]
    present = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    for name, version in present.items():
        lines.append(f"| {name} | {' | '.join(table[name] for table in tables.values())} | {version} |")
    tests = [f"`make {name}`: {table['tests'].replace('tests/', '')}." for name, table in tables.items()]
    return "\n".join(
        ["## Versions", "", "The tests that passed with them, in environments of their own:", *tests, "", *lines]
    )


def main() -> None:
    """Write the page."""
    head = (
        "# What was broken on purpose\n\nFaults, bad input and mutations, and what became of them. Written by "
        "`make trust` from the tables in\n`benchmarks/results`."
    )
    page = "\n\n".join([head, faults(), verification(), properties(), mutations(), soak(), versions()])
    (ROOT / "docs" / "trust.md").write_text(page + "\n")


if __name__ == "__main__":
    main()
