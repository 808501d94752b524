"""Seconds of every example and model, by the loop and side by side in time: one table.

    python benchmarks/seconds.py            # on a quiet machine; resumable, writes results/seconds.csv
    python benchmarks/seconds.py --write    # and puts the table between the markers of README.md and docs/plan.md

One sample at a time, one thread, loop and solver in turn, medians. The solver is the one that ``px.plan`` chooses
on this machine; where that is the loop, the speed-up is 1. Policies draw plans of the recorded episodes of
``examples/policy``; those of 4.4 and 16 M parameters are taken from ``out/policy`` where they have been trained. ``own
loop`` is diffusers' loop as it is written, through ``parataxis.parallel(loop, "auto")``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import re
import runpy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import parataxis as px
from parataxis import models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "policy"))
from diffusion_policy import folder_of, load, plain_loop  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "seconds.csv"
PAGES = ("README.md", "docs/plan.md")
COLUMNS = ["case", "steps", "way", "sequential_seconds", "seconds", "speedup", "rounds", "error"]
POLICIES = ("button-press-topdown-v3", "drawer-open-v3", "reach-v3", "button-press-topdown-v3-flow")
DRAWN = (
    ("digits", "ddim"),
    ("digits", "ddpm"),
    ("digits-unconditional", "ddim"),
    ("digits-flow", "flow_euler"),
    ("digits-v", "ddim"),
)


class Drawn(NamedTuple):
    """A sample, the seconds that it took, and its rounds."""

    x: Tensor
    seconds: float
    rounds: int


class Case(NamedTuple):
    """Something to draw.

    Attributes:
        name: What it is.
        steps: N.
        loop: Draws item i by the loop.
        ways: The others, by name, each made when it is its turn: returns how to draw item i.
    """

    name: str
    steps: int
    loop: Callable[[int], Drawn]
    ways: dict[str, Callable[[], Callable[[int], Drawn]]]


def by_solver(network: Any, noise: Tensor, sampler: px.Sampler, solver: Any, **options: Any) -> Drawn:
    """Draw by ``parataxis.sample``."""
    result = px.sample(network, noise, sampler, solver, **options)
    return Drawn(result.x, result.seconds, result.rounds)


def model_case(name: str, kind: str, steps: int = 100) -> Case:
    """Return a shipped model with a sampler."""
    model = models.load(name)
    sampler, network = model.sampler(kind, steps), model.denoiser(1.0)

    def draw(solver: Any, index: int) -> Drawn:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(1, *model.shape, generator=generator)
        label = None if model.classes is None else torch.tensor([index % model.classes])
        return by_solver(network, noise, sampler, solver, condition=label, generator=generator)

    def planned() -> Callable[[int], Drawn]:
        noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0))
        label = None if model.classes is None else torch.tensor([0])
        solver = px.plan(network, noise, sampler, condition=label, solvers=[px.Secant()]).solver
        return lambda index: draw(solver, index)

    return Case(f"{name}, {kind}", steps, lambda index: draw(px.Sequential(), index), {"px.sample": planned})


def posterior_case() -> Case:
    """Return the posterior of ``examples/posterior.py``, which trains its network."""
    with torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
        names = runpy.run_path(str(ROOT / "examples" / "posterior.py"))
    score, sampler = names["score"], names["sampler"]

    def draw(solver: Any, index: int) -> Drawn:
        generator = torch.Generator().manual_seed(index)
        return by_solver(score, torch.randn(1, 2, generator=generator), sampler, solver, generator=generator)

    def planned() -> Callable[[int], Drawn]:
        noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
        solver = px.plan(score, noise, sampler, solvers=[px.Secant()]).solver
        return lambda index: draw(solver, index)

    title = "posterior of sbi's NPSE, two moons"
    return Case(title, sampler.steps, lambda index: draw(px.Sequential(), index), {"px.sample": planned})


def policy_case(name: str) -> Case:
    """Return a policy: its plans of a recorded episode."""
    folder = folder_of(name)
    policy = load(folder)
    known = folder if (folder / "episode.safetensors").exists() else folder_of(policy.config.task)
    conditions = policy.recorded(known)
    sampler, loop = px.from_scheduler(policy.config.scheduler()), plain_loop(policy)

    def run(plan: Callable[..., Tensor], index: int) -> Drawn:
        generator = torch.Generator().manual_seed(index)
        clock = time.perf_counter()
        x = plan(conditions[index % len(conditions)], [generator])
        return Drawn(x, time.perf_counter() - clock, 0)

    def planned() -> Callable[[int], Drawn]:
        options: dict[str, Any] = {"condition": conditions[0]}
        noise = policy.noise([torch.Generator().manual_seed(0)])
        solver = px.plan(policy.network, noise, sampler, solvers=[px.Secant()], **options).solver

        def draw(index: int) -> Drawn:
            generator = torch.Generator().manual_seed(index)
            condition = conditions[index % len(conditions)]
            noise = policy.noise([generator])
            return by_solver(policy.network, noise, sampler, solver, condition=condition, generator=generator)

        return draw

    def unchanged() -> Callable[[int], Drawn]:
        parallel = px.parallel(loop, "auto", denoisers=[policy.network])
        for index in range(3):  # planned and observed once, not with every plan
            run(parallel, index)
        return lambda index: run(parallel, index)._replace(rounds=parallel.report.rounds)

    count = sum(parameter.numel() for parameter in load(folder, pack=False).network.parameters())
    title = f"policy {Path(name).name}, {count / 1e6:.1f} M"
    ways = {"px.sample": planned, "own loop, px.parallel": unchanged}
    return Case(title, len(sampler.times), lambda index: run(loop, index), ways)


def cases() -> Iterator[Callable[[], Case]]:
    """Yield the cases, each to be made when it is its turn."""
    trained = [str(path.parent) for path in sorted((ROOT / "out" / "policy").glob("*M/config.json"))]
    for name in (*POLICIES, *trained):
        yield lambda name=name: policy_case(name)
    yield posterior_case
    for name, kind in DRAWN:
        yield lambda name=name, kind=kind: model_case(name, kind)


def measure(case: Case, repeats: int) -> None:
    """Time what the table lacks of a case."""
    done = {(row["case"], row["way"]) for row in read()}
    for way, make in case.ways.items():
        if (case.name, way) in done:
            continue
        draw = make()
        for once in (case.loop, draw):  # the first calls are slower
            once(0)
        pairs = [(case.loop(index), draw(index)) for index in range(repeats)]
        sequential, seconds = (statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1))
        errors = [float((b.x - a.x).norm() / a.x.norm()) for a, b in pairs]
        row = {
            "case": case.name,
            "steps": case.steps,
            "way": way,
            "sequential_seconds": f"{sequential:.4g}",
            "seconds": f"{seconds:.4g}",
            "speedup": f"{sequential / seconds:.2f}",
            "rounds": statistics.median(b.rounds for _, b in pairs),
            "error": f"{max(errors):.1e}",
        }
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), flush=True)


def read() -> list[dict[str, str]]:
    """Return the rows of the table."""
    if not RESULTS.exists():
        return []
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| | steps | loop | parallel | speed-up | rounds | largest error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read():
        loop, parallel = (f"{1e3 * float(row[key]):.0f} ms" for key in ("sequential_seconds", "seconds"))
        name = row["case"] if row["way"] == "px.sample" else f"{row['case']}, {row['way']}"
        rounds = f"{float(row['rounds']):.0f}"
        cells = [name, row["steps"], loop, parallel, f"{row['speedup']} x", rounds, row["error"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the table between the markers of the pages that have them."""
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = re.sub(r"(<!-- seconds[^>]*-->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", before, flags=re.DOTALL)
        path.write_text(after)
        print(f"{page}: {'written' if after != before else 'unchanged, or without <!-- seconds --> and <!-- end -->'}")


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README and docs")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="samples of each case, both ways in turn")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "running in parallel was slower")
    if not options.print:
        for make in cases():
            measure(make(), options.repeats)
    print(table())
    if options.write:
        write(table())


if __name__ == "__main__":
    main()
