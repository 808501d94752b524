"""Do robots act as well on plans drawn side by side in time, and how much sooner: paired episodes, and milliseconds.

    python benchmarks/episodes.py --success            # Meta-World, needs the extra policy; resumable
    python benchmarks/episodes.py --calibrate          # settings for --seconds, into out/policy
    python benchmarks/episodes.py --seconds            # on a quiet machine; resumable
    python benchmarks/episodes.py --print

``--success`` drives the policies of ``examples/policy`` through episodes of the same seeds, in which every plan has the
same noise, and writes one row an episode and method to ``results/policy_episodes.csv``: solved or not, steps, plans,
rounds and evaluations a plan, and, for the first 25 seeds, the largest deviation of an action from the plan that the
loop draws for the same observation and noise. Episodes go on side by side, which changes nothing but the seconds.

``--seconds`` draws the plans of each policy's recorded episode, one at a time, all methods in turn, and writes median
and 95th percentile to ``results/policy_seconds.csv``. Policies of 4.4 and 16 M parameters are taken from ``out/policy``
(``examples/policy/train.py --size 4.4M``) where they have been trained. Each network is timed as it is written, with
packed convolutions, and compiled, loop and solver alike; speed-ups are over the plain loop, and over the fastest of all
loops. ``--calibrate`` runs :func:`parataxis.calibrate` on 59 observations of the demonstrations, with windows of 8, 16
and 32, each by itself, for the network and for the plain loop.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import parataxis as px

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ROOT / "examples" / "policy"
sys.path.insert(0, str(POLICIES))
from diffusion_policy import Plan, Policy, folder_of, load, plain_loop  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from train import windows  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
EPISODES, SECONDS = RESULTS / "policy_episodes.csv", RESULTS / "policy_seconds.csv"
TASKS = ("reach-v3", "button-press-topdown-v3", "drawer-open-v3")
FLOW = "button-press-topdown-v3-flow"
BATCH = 25
CALIBRATED = (8, 16, 32)  # windows
# Also solved with a compiled network.
COMPILED = ("secant 16", "calibrated 16", "px.parallel(loop), 16", "px.parallel(loop), calibrated 16")
BUCKETS = (1, 4, 8, 16)
EPISODE_COLUMNS = ["policy", "method", "seed", "solved", "steps", "plans", "rounds", "evaluations", "deviation"]
SECONDS_COLUMNS = [
    "policy", "parameters", "convolutions", "threads", "method", "plans", "p50_ms", "p95_ms", "rounds", "evaluations",
    "deviation",
]  # fmt: skip
Rows = list[dict[str, Any]]


class Sampler:
    """Draws plans by the library; keeps rounds and evaluations of every plan.

    Args:
        policy: Gives network and scheduler.
        solver: How they are solved.
        tolerance: Relative error allowed in a plan.
        buckets: Numbers of rows of a network call, as what is compiled is compiled for each anew; None for any.
    """

    def __init__(
        self, policy: Policy, solver: Any, tolerance: float = 1e-2, *, buckets: Sequence[int] | None = None
    ) -> None:
        self.policy, self.solver, self.tolerance, self.buckets = policy, solver, tolerance, buckets
        self.sampler = px.from_scheduler(policy.config.scheduler())
        self.rounds: list[int] = []
        self.evaluations: list[int] = []

    def __call__(self, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return plans (B, horizon, A)."""
        drawn = px.sample(
            self.policy.network,
            self.policy.noise(generators),
            self.sampler,
            self.solver,
            tolerance=self.tolerance,
            condition=condition,
            generator=generators,
            buckets=self.buckets,
        )
        self.rounds += [solution.rounds for solution in drawn]
        self.evaluations += [solution.evaluations for solution in drawn]
        return drawn.x


class Unchanged:
    """Draws plans by the plain loop as it is, through :func:`parataxis.parallel`; keeps rounds and evaluations.

    Args:
        policy: Whose loop.
        solver: How it is solved, or a calibration of it.
        buckets: As for :class:`Sampler`.
    """

    def __init__(self, policy: Policy, solver: Any, *, buckets: Sequence[int] | None = None) -> None:
        self.solver = solver
        self.loop = px.parallel(plain_loop(policy), solver, denoisers=[policy.network], buckets=buckets)
        self.rounds: list[int] = []
        self.evaluations: list[int] = []

    def __call__(self, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return plans (B, horizon, A)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "running in parallel was slower")
            drawn: Tensor = self.loop(condition, generators)
        self.rounds.append(self.loop.report.rounds)
        self.evaluations.append(self.loop.report.evaluations)
        return drawn


def ddim(policy: Policy, steps: int) -> Plan:
    """Return the loop of DDIM with few steps: another sampler, with which people save time."""
    scheduler = DDIMScheduler.from_config(policy.config.scheduler().config)
    scheduler.set_timesteps(steps)
    return plain_loop(policy, scheduler)


def methods(policy: Policy) -> dict[str, Callable[[], Any]]:
    """Return the ways to draw plans, each to be made anew."""
    ways: dict[str, Callable[[], Any]] = {
        "loop": lambda: plain_loop(policy),
        "secant 8": lambda: Sampler(policy, px.Secant(window=8)),
        "secant 16": lambda: Sampler(policy, px.Secant(window=16)),
        "secant 16, 1e-1": lambda: Sampler(policy, px.Secant(window=16), 1e-1),
        "paradigms 16": lambda: Sampler(policy, px.Picard(window=16, rule="paradigms", entry="copy"), 1e-1),
    }
    if policy.config.noise_scheduler_type == "DDPM":
        ways |= {f"ddim-{steps}": (lambda steps=steps: ddim(policy, steps)) for steps in (10, 5)}
    return ways


# Success


def success(names: Sequence[str], episodes: int, chosen: Sequence[str]) -> None:
    """Drive the episodes that are missing."""
    from simulator import Simulator

    from evaluate import roll_out

    warnings.filterwarnings("ignore", "Constant")  # the simulator says that it scales nothing
    done = {(row["policy"], row["method"], int(row["seed"])) for row in read(EPISODES)}
    for name in names:
        policy = load(folder_of(name))
        simulators = [Simulator(policy.config.task) for _ in range(min(BATCH, episodes))]
        for method, make in methods(policy).items():
            if chosen and method not in chosen:
                continue
            for begin in range(0, episodes, BATCH):
                seeds = [s for s in range(begin, min(begin + BATCH, episodes)) if (name, method, s) not in done]
                if not seeds:
                    continue
                plan, deviations = make(), []
                loop = plain_loop(policy)

                def compared(condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
                    states = [generator.get_state() for generator in generators]
                    drawn = plan(condition, generators)  # noqa: B023
                    if isinstance(plan, Sampler) and begin == 0:  # noqa: B023
                        for generator, state in zip(generators, states, strict=True):
                            generator.set_state(state)
                        difference = drawn - loop(condition, generators)  # noqa: B023
                        deviations.append(float(difference.abs().max()))  # noqa: B023
                    return drawn

                clock = time.perf_counter()
                for episode in roll_out(policy, simulators[: len(seeds)], seeds, compared):
                    row = {"policy": name, "method": method, "seed": episode.seed, "solved": int(episode.solved)}
                    row |= {"steps": len(episode.actions), "plans": len(episode.plans)}
                    if isinstance(plan, Sampler):
                        row |= {
                            "rounds": statistics.mean(plan.rounds),
                            "evaluations": statistics.mean(plan.evaluations),
                        }
                        row |= {"deviation": f"{max(deviations):.1e}"} if deviations else {}
                    append(EPISODES, EPISODE_COLUMNS, row)
                print(f"{name} {method}: {len(seeds)} episodes, {time.perf_counter() - clock:.0f} s", flush=True)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval of paired differences of success, in points.

    The half width is that of the paired score interval at no difference (Tango 1998 gives the same to first order): n
    pairs of which d differ have a standard error of sqrt(d) / n, or less. No pair that differs leaves the rule of
    three, 3 / n.
    """
    count, differing = len(differences), sum(difference != 0 for difference in differences)
    half = 1.96 * math.sqrt(differing) / count if differing else 3 / count
    return 100 * statistics.mean(differences), 100 * half


# Seconds


def seconds(names: Sequence[str], threads: Sequence[int], repeats: int) -> None:
    """Time the plans of recorded episodes, one at a time, all methods in turn."""
    done = {(row["policy"], row["convolutions"], int(row["threads"]), row["method"]) for row in read(SECONDS)}
    for name, count in ((name, count) for name in names for count in threads):
        torch.set_num_threads(count)
        folder = folder_of(name)
        ways: dict[tuple[str, str], Any] = {}
        policies = {"plain": load(folder, pack=False), "packed": load(folder)}
        for convolutions, policy in policies.items():
            ways |= {(convolutions, method): make() for method, make in methods(policy).items()}
        for window in CALIBRATED:
            if calibration_of(name, window).exists():
                setting = px.Calibration.load(calibration_of(name, window))
                ways["packed", f"calibrated {window}"] = Sampler(policies["packed"], setting)
            if calibration_of(name, window, loop=True).exists():
                setting = px.Calibration.load(calibration_of(name, window, loop=True))
                ways["packed", f"px.parallel(loop), calibrated {window}"] = Unchanged(policies["packed"], setting)
        ways |= {
            ("packed", f"px.parallel(loop), {window}"): Unchanged(policies["packed"], px.Secant(window=window))
            for window in CALIBRATED
        }
        compiled, fused = load(folder, pack=False), load(folder)
        ways |= {("compiled", "loop"): plain_loop(compiled), ("packed, compiled", "loop"): plain_loop(fused)}
        for method in COMPILED:
            plan = ways.get(("packed", method))
            if isinstance(plan, (Sampler, Unchanged)):
                ways["packed, compiled", method] = type(plan)(fused, plan.solver, buckets=BUCKETS)
        if all((name, *way[:1], count, way[1]) in done for way in ways):
            continue
        policy = policies["plain"]
        conditions = policy.recorded(folder_of(task_of(name))) * repeats
        for compiled_policy, sizes in ((compiled, (1,)), (fused, BUCKETS)):
            compile_for(compiled_policy, conditions[0], sizes)
        taken: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        deviations = dict.fromkeys(ways, 0.0)
        for turn, condition in enumerate([conditions[0], *conditions]):  # the first turn is for what happens once
            reference = None
            for way, plan in ways.items():
                generators = [torch.Generator().manual_seed(turn)]
                clock = time.perf_counter()
                drawn = plan(condition, generators)
                if turn:
                    taken[way].append(time.perf_counter() - clock)
                reference = drawn if reference is None else reference
                deviations[way] = max(deviations[way], float((drawn - reference).abs().max()))
        for way, plan in ways.items():
            if (name, way[0], count, way[1]) in done:
                continue
            p50, p95 = np.percentile(1e3 * np.array(taken[way]), [50, 95])
            row = {"policy": name, "parameters": sum(p.numel() for p in policy.network.parameters()), "threads": count}
            row |= {"convolutions": way[0], "method": way[1], "plans": len(conditions)}
            row |= {"p50_ms": f"{p50:.1f}", "p95_ms": f"{p95:.1f}", "deviation": f"{deviations[way]:.1e}"}
            if isinstance(plan, (Sampler, Unchanged)):
                row |= {"rounds": statistics.median(plan.rounds), "evaluations": statistics.median(plan.evaluations)}
            append(SECONDS, SECONDS_COLUMNS, row)
            print(name, count, *way, row["p50_ms"], row["p95_ms"], row["deviation"], flush=True)


def calibration_of(name: str, window: int, *, loop: bool = False) -> Path:
    """Return the file of a calibration: of the network, or of the plain loop."""
    return ROOT / "out" / "policy" / f"{Path(name).name}-calibration-{'loop-' * loop}{window}.json"


def calibrate(names: Sequence[str], runs: int = 59) -> None:
    """Calibrate windows on observations of the demonstrations, for the network and for the plain loop."""
    for name, window, loop in product(names, CALIBRATED, (False, True)):
        path = calibration_of(name, window, loop=loop)
        if path.exists():
            continue
        policy = load(folder_of(name))
        demonstrations = load_file(POLICIES / "demonstrations" / f"{task_of(name).removesuffix('-flow')}.safetensors")
        conditions = windows(demonstrations, policy.config)[0]
        conditions = conditions[np.random.default_rng(0).choice(len(conditions), runs, replace=False)]
        generators = [torch.Generator().manual_seed(1000 + run) for run in range(runs)]
        solver = px.Secant(window=window)
        if loop:
            calls = [(condition[None], [source]) for condition, source in zip(conditions, generators, strict=True)]
            calibration = px.calibrate_loop(plain_loop(policy), calls, solver, denoisers=[policy.network])
        else:
            calibration = px.calibrate(
                policy.network,
                policy.noise(generators),
                px.from_scheduler(policy.config.scheduler()),
                solver,
                condition=conditions,
                generator=torch.Generator().manual_seed(0),
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(path)
        print(path.stem, calibration, flush=True)


@torch.no_grad()  # Dynamo compiles for each mode, and rows of many steps are evaluated without gradients
def compile_for(policy: Policy, condition: Tensor, sizes: Sequence[int]) -> None:
    """Compile a network in place, so that a calibration of it still holds, for these numbers of rows."""
    torch._dynamo.config.recompile_limit = 64  # networks of one class share their code, and each shape counts
    policy.network.compile(dynamic=False)
    for size in sizes:
        rows = policy.noise([torch.Generator().manual_seed(row) for row in range(size)])
        policy.network(rows, torch.zeros(size, dtype=torch.int64), global_cond=condition.repeat(size, 1))


def task_of(name: str) -> str:
    """Return the policy whose recorded episode is drawn again."""
    stem = Path(name).name
    return next(task for task in sorted((*TASKS, FLOW), key=len, reverse=True) if stem.startswith(task))


# Tables


def read(path: Path) -> Rows:
    """Return the rows of a table."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Add a row."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def success_table() -> Iterator[str]:
    """Yield the lines of a table: success, and its paired difference to the loop."""
    rows = read(EPISODES)
    solved = {(row["policy"], row["method"], row["seed"]): int(row["solved"]) for row in rows}
    yield "| policy | method | solved | difference, 95 % interval (points) | rounds | evaluations | deviation |"
    yield "|---|---|---|---|---|---|---|"
    names = [*dict.fromkeys(row["policy"] for row in rows)]
    for name in [*names, "all"]:
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if row["method"] == method and name in (row["policy"], "all")]
            if not chosen:
                continue
            mean = 100 * statistics.mean(int(row["solved"]) for row in chosen)
            pairs = [
                int(row["solved"]) - solved[row["policy"], "loop", row["seed"]]
                for row in chosen
                if (row["policy"], "loop", row["seed"]) in solved
            ]
            difference = "" if method == "loop" or not pairs else "{:+.1f} ± {:.1f}".format(*interval(pairs))
            work = ["", "", ""]
            if chosen[0]["rounds"]:
                numbers = {key: [float(row[key]) for row in chosen if row[key]] for key in EPISODE_COLUMNS[6:]}
                work = [f"{statistics.mean(numbers[key]):.1f}" for key in ("rounds", "evaluations")]
                work.append(f"{max(numbers['deviation'], default=math.nan):.0e}")
            count = len(chosen)
            yield f"| {name} | {method} | {mean:.1f} % of {count} | {difference} | {' | '.join(work)} |"


def seconds_table() -> Iterator[str]:
    """Yield the lines of a table: milliseconds a plan, and how many times sooner than two loops."""
    rows = read(SECONDS)
    yield (
        "| policy | parameters | threads | method | convolutions | p50 ms | p95 ms | over the plain loop | over the "
        "fastest | rounds | deviation |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        same = [other for other in rows if all(other[key] == row[key] for key in ("policy", "threads"))]
        loops = {other["convolutions"]: float(other["p50_ms"]) for other in same if other["method"] == "loop"}
        sooner = [f"{base / float(row['p50_ms']):.2f}" for base in (loops["plain"], min(loops.values()))]
        size = f"{int(row['parameters']) / 1e6:.1f} M"
        cells = [Path(row["policy"]).name, size, row["threads"], row["method"], row["convolutions"], row["p50_ms"]]
        yield f"| {' | '.join([*cells, row['p95_ms'], *sooner, row['rounds'], row['deviation']])} |"


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--success", action="store_true", help="drive episodes in the simulator")
    parser.add_argument("--calibrate", action="store_true", help="choose settings for --seconds")
    parser.add_argument("--seconds", action="store_true", help="time single plans")
    parser.add_argument("--print", action="store_true", help="print the tables")
    parser.add_argument("--policies", nargs="+", help="folders, or names of shipped policies; default all there are")
    parser.add_argument("--methods", nargs="+", default=[], help="of --success; default all")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="times that each recorded episode is drawn again")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    shipped = [*TASKS, FLOW]
    if options.success:
        torch.set_num_threads(1)
        success(options.policies or shipped, options.episodes, options.methods)
    trained = [str(path.parent) for path in sorted((ROOT / "out" / "policy").glob("*M/config.json"))]
    if options.calibrate:
        calibrate(options.policies or [*shipped, *trained])
    if options.seconds:
        seconds(options.policies or [*shipped, *trained], options.threads, options.repeats)
    if options.print or not (options.success or options.calibrate or options.seconds):
        print("\n".join([*success_table(), "", *seconds_table()]))


if __name__ == "__main__":
    main()
