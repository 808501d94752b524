"""The laws of tests/test_properties.py on more examples than `make test` has time for.

``python benchmarks/properties.py [--examples 300]``. Writes ``results/properties.csv``: a line for each law, with how
many examples were tried and whether one broke it. Laws that are in the table with as many examples are left out.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "properties.csv"
TESTS = ROOT / "tests" / "test_properties.py"


def main() -> int:
    """Fill the table; return how many laws are broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=300)
    options = parser.parse_args()
    tests = TESTS.read_text()
    laws = re.findall(r"^def (test_\w+)", tests, re.MULTILINE)
    known: dict[str, dict[str, str]] = {}
    if OUT.exists():
        with OUT.open() as file:
            known = {line["law"]: line for line in csv.DictReader(file)}
    for law in laws:
        if int(known.get(law, {"examples": "0"})["examples"]) >= options.examples:
            continue
        given = "@given" in tests.split(f"def {law}(")[0].rsplit("\n\n\n", 1)[-1]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{TESTS}::{law}"]
        held = subprocess.run(command, env={**os.environ, "EXAMPLES": str(options.examples)}, cwd=ROOT).returncode == 0
        known[law] = {
            "law": law,
            "examples": str(options.examples),
            "given": str(int(given)),
            "held": str(int(held)),
        }
        with OUT.open("w", newline="") as file:
            table = csv.DictWriter(file, ("law", "examples", "given", "held"))
            table.writeheader()
            table.writerows(known.values())
    return sum(line["held"] != "1" for line in known.values())


if __name__ == "__main__":
    raise SystemExit(main())
