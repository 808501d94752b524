"""Draw the figures and the tables of ``docs/`` from the committed CSV files: ``make figures``."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

import parataxis as px
from parataxis.denoisers import mixture

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
LABELS = {
    "paradigms": "ParaDiGMS (Picard, copied entries)",
    "picard": "Picard, ours",
    "fixed-point": "fixed point, order N",
    "parataa": "ParaTAA",
    "srds": "SRDS, sqrt(N) blocks",
    "parareal": "parareal, two-step",
    "secant": "secant, ours",
}
Row = dict[str, Any]


def rounds() -> list[Row]:
    """Return the rows of rounds.csv with numbers as numbers."""
    with (RESULTS / "rounds.csv").open() as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for name in ("steps", "seed", "rounds", "evaluations", "peak_width"):
            row[name] = int(row[name])
        row["target"], row["relative_error"] = float(row["target"]), float(row["relative_error"])
    return rows


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by columns."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def middle(rows: Iterable[Row], name: str) -> float:
    """Return the median of a column."""
    return float(np.median([row[name] for row in rows]))


def full_width(rows: list[Row]) -> str:
    """Return the table of medians (worst) to 1e-2 at full width."""
    chosen = [row for row in rows if row["width"] == "full" and row["target"] == 1e-2]
    groups = grouped(chosen, "model", "sampler", "steps", "solver")
    lines = ["| model | sampler | N | " + " | ".join(LABELS.values()) + " |", "|---" * (3 + len(LABELS)) + "|"]
    for model, sampler, steps in sorted({key[:3] for key in groups}):
        cells = []
        for solver in LABELS:
            group = groups.get((model, sampler, steps, solver))
            if group:
                work = middle(group, "evaluations") / steps
                cells.append(f"{middle(group, 'rounds'):g} ({max(row['rounds'] for row in group)}), {work:.1f}")
            else:
                cells.append("-")
        lines.append(f"| {model} | {sampler} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside_best(rows: list[Row], steps: int = 100) -> str:
    """Return our rounds over those of the best published method, for N steps to 1e-2 at full width, in a sentence."""
    chosen = [r for r in rows if r["width"] == "full" and r["target"] == 1e-2 and r["steps"] == steps]
    medians: dict[Any, dict[str, float]] = defaultdict(dict)
    for (model, sampler, solver), group in grouped(chosen, "model", "sampler", "solver").items():
        medians[model, sampler][solver] = middle(group, "rounds")
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for (_, sampler), of in medians.items():
        if "secant" in of and len(of) > 2:
            best = min(rounds for solver, rounds in of.items() if solver != "secant")
            ratios[bool(px.SAMPLERS[sampler](steps=2).coefficients.stochastic)].append(of["secant"] / best)
    return "\n".join(
        f"Secant's rounds over the fewest of the others, N = {steps}, samplers that {what} noise: median "
        f"{np.median(values):.2f}, {min(values):.2f} to {max(values):.2f}, {len(values)} networks and samplers."
        for what, values in (("add", ratios[True]), ("add no", ratios[False]))
    )


def narrow(rows: list[Row]) -> str:
    """Return the table of narrow windows: rounds, work and error at the loosest setting with median error <= 1e-2."""
    chosen = [row for row in rows if row["width"] != "full"]
    groups = grouped(chosen, "model", "sampler", "steps", "width", "solver", "options", "target")
    best: dict[tuple[Any, ...], tuple[float, float, float]] = {}
    for key, group in groups.items():
        error = middle(group, "relative_error")
        found = (middle(group, "rounds"), middle(group, "evaluations") / key[2], error)
        if error <= 1e-2 and (key[:5] not in best or found < best[key[:5]]):
            best[key[:5]] = found
    solvers = ("paradigms", "picard", "parataa", "secant")
    lines = ["| model | sampler | N | width | " + " | ".join(LABELS[name] for name in solvers) + " |", "|---" * 8 + "|"]
    for model, sampler, steps, width in sorted({key[:4] for key in best}, key=lambda key: (*key[:3], int(key[3]))):
        cells = []
        for solver in solvers:
            found = best.get((model, sampler, steps, width, solver))
            cells.append("-" if found is None else f"{found[0]:g}, {found[1]:.2f}, {found[2]:.0e}")
        lines.append(f"| {model} | {sampler} | {steps} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def equal_error(rows: list[Row]) -> str:
    """Return the table of secant beside ParaDiGMS in narrow windows, where both reach the same median error.

    Between the settings that were run, rounds and evaluations are on straight lines against the logarithm of the error;
    compared is the middle of the errors that both reach. Where ours is below all of theirs, its largest is compared
    with their smallest, which does ours no favour.
    """
    chosen = [row for row in rows if row["width"] != "full" and row["solver"] in ("paradigms", "secant")]
    curves: dict[Any, dict[str, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, group in grouped(chosen, "model", "sampler", "steps", "width", "solver", "options", "target").items():
        figures = (np.log(middle(group, "relative_error")), middle(group, "rounds"), middle(group, "evaluations"))
        curves[key[:4]][key[4]].append(figures)
    lines = ["| model | sampler | N | width | error | ParaDiGMS | secant | rounds | evaluations |", "|---" * 9 + "|"]
    ratios = []
    for key in sorted(curves, key=lambda key: (*key[:3], int(key[3]))):
        if len(curves[key]) < 2:
            continue
        theirs, ours = (np.array(sorted(curves[key][name])).T for name in ("paradigms", "secant"))
        least, most = max(theirs[0, 0], ours[0, 0]), min(theirs[0, -1], ours[0, -1])
        if least > most and ours[0, 0] > theirs[0, -1]:
            continue
        at = [(least + most) / 2] * 2 if least <= most else [theirs[0, 0], ours[0, -1]]
        (r, e), (own_r, own_e) = (
            [np.interp(where, curve[0], curve[i]) for i in (1, 2)]
            for where, curve in zip(at, (theirs, ours), strict=True)
        )
        ratios.append(own_r / r)
        cells = [*key, f"{np.exp(at[0]):.0e}", f"{r:.1f}, {e / key[2]:.2f}", f"{own_r:.1f}, {own_e / key[2]:.2f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"x {own_r / r:.2f}", f"x {own_e / e:.2f}"])) + " |")
    return "\n".join([*lines, "", f"Rounds over theirs, median of {len(ratios)} cells: {np.median(ratios):.2f}."])


def own_end(rows: list[Row]) -> str:
    """Return the table of what our own solver takes, and reaches, with the default tolerance."""
    chosen = [row for row in rows if row["solver"] == "secant" and row["width"] != "full" and row["target"] == 1e-2]
    groups = grouped(chosen, "model", "sampler", "steps", "width")
    lines = ["| model | sampler | N | window | rounds | evaluations / N | error |", "|---" * 7 + "|"]
    for key in sorted(groups, key=lambda key: (*key[:3], int(key[3]))):
        group, window = groups[key], "all" if int(key[3]) == key[2] else key[3]
        rounds = f"{middle(group, 'rounds'):g} ({max(row['rounds'] for row in group)})"
        worst = max(row["relative_error"] for row in group)
        error = f"{middle(group, 'relative_error'):.0e} ({worst:.0e})"
        work = f"{middle(group, 'evaluations') / key[2]:.2f}"
        lines.append("| " + " | ".join(map(str, [*key[:3], window, rounds, work, error])) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], steps: int = 100) -> None:
    """Draw error against rounds and against evaluations, full width, one column a model and sampler."""
    chosen = [row for row in rows if row["width"] == "full" and row["steps"] == steps]
    panels = sorted({(row["model"], row["sampler"]) for row in chosen})
    panels = [panel for panel in panels if panel[1] in ("ddim", "ddpm", "flow_euler") and panel[0] != "mixture-256"]
    # A panel compares: what has been run with one or two solvers only has none yet.
    panels = [
        panel for panel in panels if len({r["solver"] for r in chosen if (r["model"], r["sampler"]) == panel}) > 2
    ]
    if not panels:
        return
    figure, axes = plt.subplots(2, len(panels), figsize=(max(7.5, 2.6 * len(panels)), 5.6), sharey=True, squeeze=False)
    for column, (model, sampler) in enumerate(panels):
        for solver, label in LABELS.items():
            own = [r for r in chosen if (r["model"], r["sampler"], r["solver"]) == (model, sampler, solver)]
            groups = sorted(grouped(own, "target").items(), reverse=True)
            for line, name in enumerate(("rounds", "evaluations")):
                scale = 1 if name == "rounds" else steps
                x = [middle(group, name) / scale for _, group in groups]
                axes[line][column].plot(x, [target for (target,), _ in groups], marker="o", markersize=3, label=label)
        axes[0][column].set_title(f"{model}\n{sampler}", fontsize=9)
        axes[0][column].set_xlabel("rounds", fontsize=8)
        axes[1][column].set_xlabel("evaluations / N", fontsize=8)
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative error", fontsize=8)
    axes[1][0].set_ylabel("relative error", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=7)
    figure.suptitle(f"Error to the sequential sample, N = {steps}, full width, medians", fontsize=10)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(DOCS / "rounds.png", dpi=130)
    plt.close(figure)


def asked(solver: Any, steps: int = 64) -> list[tuple[Any, Any]]:
    """Return for every round of one exact run the points asked for and their relative errors."""
    sampler = px.samplers.ddim(steps=steps)
    network, times = mixture(64).network(px.vp()), sampler.network_times(torch.float64)
    noise = torch.randn(1, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = px.sample(network, noise, sampler, px.Sequential(), keep_trajectory=True).trajectory
    assert exact is not None
    [run] = px.start(sampler, sampler.recurrence(noise), solver, tolerance=1e-4)
    rounds = []
    while not run.done:
        query = run.query
        away = (query.x - exact[0, query.step]).norm(dim=1) / exact[0, query.step].norm(dim=1)
        rounds.append((query.step.numpy(), away.numpy()))
        run.answer(network(query.x, times[query.step]))
    return rounds


def draw_methods() -> None:
    """Draw what each method asks for, round by round, coloured by the error of the state that is evaluated."""
    shown = {
        "paradigms": ("ParaDiGMS: Picard in a window of 24", px.Picard(window=24, rule="paradigms", entry="copy")),
        "parataa": ("ParaTAA: triangular Anderson acceleration", px.Anderson()),
        "srds": ("SRDS: pipelined parareal, 8 blocks", px.Parareal(blocks=8)),
    }
    for name, (title, solver) in shown.items():
        figure, axis = plt.subplots(figsize=(6.4, 3.2))
        for number, (point, away) in enumerate(asked(solver), 1):
            colour = np.log10(np.maximum(away, 1e-6))
            dots = axis.scatter(np.full(len(point), number), point, c=colour, s=9, cmap="viridis", vmin=-6, vmax=0)
        figure.colorbar(dots, ax=axis, label="log10 of the state's relative error")
        axis.set_xlabel("round")
        axis.set_ylabel("step evaluated")
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        figure.tight_layout()
        figure.savefig(DOCS / f"{name}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    """Write docs/rounds.md and the figures."""
    draw_methods()
    rows = rounds()
    draw(rows)
    text = f"""# Rounds

Made by `make figures` from `benchmarks/results/rounds.csv`, which `benchmarks/rounds.py` fills (it is not complete: the
cheapest cells come first). Sequential sampling takes N rounds. Seeds: 16 up to N = 100, 4 at 250, 2 at 1000.

![Error to the sequential sample against rounds and evaluations](rounds.png)

## Secant with its default tolerance

What `px.Secant(window=W)` takes until its own estimate is within 1e-2, and how far the sample then is from the
sequential one: median (worst).

{own_end(rows)}

## Full width, to relative error 1e-2

The first round after which the sample is within 1e-2 of the sequential one, median (worst), and evaluations / N so far:
a comparison of methods, as no solver knows that round. For parareal a round is a tick of the pipeline.

{full_width(rows)}

{beside_best(rows)}

## Narrow windows, beside ParaDiGMS at equal error

Rounds and evaluations / N of each, and ours over theirs, at the median error in the middle of what both reach with the
settings that were run; where ours is always smaller, its largest beside their smallest.

{equal_error(rows)}

## Narrow windows, at median error 1e-2 or below

Median rounds, evaluations / N and error at the loosest tolerance or threshold that was run and reaches 1e-2. Those of
Picard and ParaTAA are of an earlier version, where states entered on a straight line.

{narrow(rows)}
"""
    (DOCS / "rounds.md").write_text(text)


if __name__ == "__main__":
    main()
