"""Take the rows of ``make gpu`` into ``benchmarks/results``, and write the tables and figures of ``docs/gpus.md``.

    python benchmarks/report.py [out/gpu]

Without a folder the page is written again from the committed rows. Rows of a dry run are refused: its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meter import merge, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
KEYS = {
    "policy_latency": ("size", "sampler", "method", "window", "dtype"),
    "latency": ("model", "sampler", "steps", "dtype", "method", "window"),
    "latency_curve": ("model", "dtype", "rows"),
    "forecast": ("model", "dtype", "sampler", "steps", "window"),
    "profile": ("state", "sampler", "solver", "window", "samples"),
    "throughput": ("model", "sampler", "steps", "method", "rows"),
    "cuda_tests": ("test",),
}
LOOPS = ("loop", "compiled loop", "whole-loop graph", "diffusers loop", "diffusers pipeline")
NONE = ""
Row = dict[str, Any]


def on_cuda(name: str) -> list[Row]:
    """Return the rows of a table that were measured on CUDA."""
    return [row for row in read(RESULTS / f"{name}.csv") if row.get("driver")]


def number(row: Row, name: str) -> float:
    """Return a figure, NaN where there is none."""
    return float(row.get(name) or "nan")


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines))


def ms(value: float) -> str:
    """Return milliseconds with three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def where(rows: Sequence[Row]) -> str:
    """Say where rows were measured."""
    kinds = {(row["device"], row["driver"], row["torch"], row["parataxis"]) for row in rows}
    return "; ".join(f"{d}, driver {v}, torch {t}, parataxis {p}" for d, v, t, p in sorted(kinds))


def latencies(rows: list[Row], groups: Sequence[str]) -> str:
    """Return the table of methods against what they solve: p50 (p95) of loops, and of each solver's best window.

    Of ours, that is the fastest window whose median error is at most 1e-2.
    """
    head = [*groups, "compiled loop", "whole-loop graph", "diffusers", "ours: window, rounds", "p50 (p95)"]
    head += [
        "over the compiled loop",
        "over the whole-loop graph",
        "error (worst)",
        "ParaDiGMS",
        "its error",
        "DDIM-10",
    ]
    lines = []
    for cell in dict.fromkeys(tuple(row[name] for name in groups) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in groups) == cell]
        by = {row["method"]: row for row in own if row["method"] in (*LOOPS, "ddim-10")}

        def text(*names: str) -> str:
            row = next((by[name] for name in names if name in by), None)  # noqa: B023
            return "" if row is None else f"{ms(number(row, 'p50_ms'))} ({ms(number(row, 'p95_ms'))})"

        ours = [row for row in own if row["method"] == "secant"]
        kept = [row for row in ours if number(row, "error") <= 1e-2]
        best = [min_of(kept or ours), min_of([row for row in own if row["method"] == "paradigms"])]
        line = [*cell, text("compiled loop"), text("whole-loop graph"), text("diffusers loop", "diffusers pipeline")]
        if best[0] is not None:
            line += [f"{best[0]['window']}, {number(best[0], 'rounds'):g}", f"{ms(number(best[0], 'p50_ms'))} "]
            line[-1] += f"({ms(number(best[0], 'p95_ms'))})"
            line += [f"**{number(best[0], 'speedup'):.2f}**", f"{number(best[0], 'over_whole_graph'):.2f}"]
            line += [f"{number(best[0], 'error'):.0e} ({number(best[0], 'worst_error'):.0e})"]
        else:
            line += [""] * 5
        if best[1] is not None:
            line += [f"{best[1]['window']}, {ms(number(best[1], 'p50_ms'))}", f"{number(best[1], 'error'):.0e}"]
        else:
            line += [""] * 2
        lines.append([*line, text("ddim-10")])
    return table(head, lines)


def min_of(rows: Sequence[Row]) -> Row | None:
    """Return the fastest row, or None."""
    return min(rows, key=lambda row: number(row, "p50_ms"), default=None)


def policies() -> str:
    """Return the table of policies."""
    rows = on_cuda("policy_latency")
    if not rows:
        return NONE
    text = f"{where(rows)}; milliseconds.\n\n{latencies(rows, ('size', 'sampler', 'dtype'))}"
    return f"{text}\n\n![Milliseconds a plan, by policy and method](gpu-policies.png)"


def images() -> str:
    """Return the table of image models."""
    rows = on_cuda("latency")
    if not rows:
        return NONE
    return f"{where(rows)}; milliseconds.\n\n{latencies(rows, ('model', 'sampler', 'steps', 'dtype'))}"


def rounds() -> str:
    """Return the table of the solver's own work."""
    rows = on_cuda("profile")
    if not rows:
        return NONE
    names = ["state", "sampler", "samples", "window", "rounds", "milliseconds_a_round", "launches", "graph_launches"]
    names += ["copies", "synchronisations", "device_ms", "draw_ms", "captured"]
    return f"{where(rows)}.\n\n" + table(
        [name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows]
    )


def costs() -> str:
    """Return the table of curves: a call with n rows over one with one."""
    rows = on_cuda("latency_curve")
    if not rows:
        return NONE
    sizes = sorted({int(row["rows"]) for row in rows})
    lines = []
    for name, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = {int(row["rows"]): row for row in rows if (row["model"], row["dtype"]) == (name, dtype)}
        cells = [f"{number(own[size], 'of_one_row'):.2f}" if size in own else "" for size in sizes[1:]]
        lines.append([name, dtype, ms(number(own[1], "milliseconds")), *cells])
    text = table(["network", "dtype", "1 row, ms", *map(str, sizes[1:])], lines)
    return f"{where(rows)}.\n\n{text}\n\n![Cost of a call against its rows](gpu-curves.png)"


def forecasts() -> str:
    """Return the table of large networks: the best window for each, and where there is none."""
    rows = on_cuda("forecast")
    if not rows:
        return NONE
    lines = []
    for cell in dict.fromkeys((row["model"], row["sampler"], row["steps"]) for row in rows):
        own = [row for row in rows if (row["model"], row["sampler"], row["steps"]) == cell]
        best = max(own, key=lambda row: number(row, "speedup") if row["speedup"] != "nan" else 0.0)
        plan = f"{number(best, 'planned_speedup'):.2f} ({number(best, 'planned_low'):.2f} to "
        plan += f"{number(best, 'planned_high'):.2f})"
        lines.append([*cell, ms(number(best, "loop_ms")), best["window"], best["rounds"], best["speedup"], plan])
    head = ["network", "sampler", "steps", "loop, ms", "best window", "rounds of trained networks"]
    text = (
        "For large networks with random weights only the cost of calls means anything. Here it is combined with the\n"
        "rounds that the trained, shipped models need for a relative error of 1e-2 in the same window; *planned* is\n"
        "what `px.plan` expects from the same curve, with the range of eight cases in ten.\n\n"
    )
    return f"{text}{where(rows)}.\n\n" + table([*head, "speed-up in the network", "planned"], lines)


def refill() -> str:
    """Return the table of throughput."""
    rows = on_cuda("throughput")
    if not rows:
        return NONE
    names = ("model", "sampler", "steps", "method", "rows", "samples", "rounds", "samples_a_second")
    return f"### Throughput with refill\n\n{where(rows)}.\n\n" + table(
        [name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows]
    )


def simulation() -> str:
    """Return the table of simulated against real runs, and of the best forecasts on eight and 64 ranks."""
    rows = read(RESULTS / "simulation.csv")
    checks = [row for row in rows if row["kind"] == "check"]
    text = table(
        ["window", "ranks", "rounds a sample", "simulated, s", "measured, s", "off by"],
        [
            [
                *(row[name] for name in ("window", "ranks", "rounds", "seconds", "measured")),
                f"{row['off_by_percent']} %",
            ]
            for row in checks
        ],
    )
    forecasts = [row for row in rows if row["kind"] == "forecast"]
    if not forecasts:
        return text
    names = ("network", "sampler", "steps", "cluster")
    lines = []
    for cell in dict.fromkeys(tuple(row[name] for name in names) for row in forecasts):
        own = [row for row in forecasts if tuple(row[name] for name in names) == cell]
        cells = []
        for ranks in ("1", "2", "4", "8", "16", "32", "64"):
            best = max((row for row in own if row["ranks"] == ranks), key=lambda r: number(r, "speedup"), default=None)
            cells.append("" if best is None else f"{number(best, 'speedup'):.1f} ({best['window']})")
        lines.append([*cell, *cells])
    head = [*names, *(f"{ranks} ranks" for ranks in (1, 2, 4, 8, 16, 32, 64))]
    text += "\n\nSpeed-up over the loop on one GPU, and in brackets the window that gives it:\n\n"
    return text + table(head, lines) + "\n\n![Simulated speed-up against ranks](scaling-simulated.png)"


def missing() -> str:
    """Return which parts of the page no GPU has measured yet."""
    parts = {
        "policies": policies(),
        "image models": images(),
        "the solver's own work": rounds(),
        "the cost of rows": costs(),
        "large networks with random weights": forecasts(),
        "throughput with refill": refill(),
    }
    names = [name for name, text in parts.items() if text == NONE]
    if not any(row["kind"] == "forecast" for row in read(RESULTS / "simulation.csv")):
        names.append("the curve that a forecast for more ranks needs")
    return f"Not measured on a GPU yet: {', '.join(names)}." if names else NONE


SECTIONS: dict[str, Callable[[], str]] = {
    "policies": policies,
    "images": images,
    "rounds": rounds,
    "costs": costs,
    "forecasts": forecasts,
    "refill": refill,
    "missing": missing,
    "simulation": simulation,
}


def put(page: Path) -> None:
    """Write every table between its marks."""
    text = page.read_text()
    for name, make in SECTIONS.items():
        block = f"<!-- {name}: written by benchmarks/report.py -->\n{make()}\n<!-- end -->"
        text = re.sub(f"<!-- {name}: written by benchmarks/report.py.*?<!-- end -->", lambda _: block, text, flags=re.S)  # noqa: B023
    page.write_text(text)


def draw(folder: Path) -> None:
    """Draw the cost of rows, and milliseconds a plan and a sample by method."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    curves, plans = on_cuda("latency_curve"), on_cuda("policy_latency")
    if curves:
        figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
        for name, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in curves):
            own = [row for row in curves if (row["model"], row["dtype"]) == (name, dtype)]
            sizes = [int(row["rows"]) for row in own]
            axis.plot(sizes, [number(row, "of_one_row") for row in own], "o-", ms=3, label=f"{name}, {dtype}")
        most = max(int(row["rows"]) for row in curves)
        axis.plot([1, most], [1, most], color="0.8", lw=1, label="no gain from batching")
        axis.set(xscale="log", yscale="log", xlabel="rows of a call", ylabel="its time, in calls of one row")
        axis.legend(frameon=False, fontsize=7)
        axis.set_title(curves[0]["device"], fontsize=9)
        figure.savefig(folder / "gpu-curves.png", dpi=150)
        plt.close(figure)
    if plans:
        samplers = list(dict.fromkeys(row["sampler"] for row in plans))
        kinds = [size for size in ("0.5M", "4.4M", "16M", "63M") if any(row["size"] == size for row in plans)]
        figure, axes = plt.subplots(
            1, len(samplers), figsize=(4.2 * len(samplers), 3.8), squeeze=False, sharey=True, layout="constrained"
        )
        ways = ("diffusers loop", "compiled loop", "whole-loop graph", "paradigms", "secant")
        for axis, sampler in zip(axes[0], samplers, strict=True):
            for place, way in enumerate(ways):
                best = [
                    min_of([r for r in plans if (r["sampler"], r["size"], r["method"]) == (sampler, size, way)])
                    for size in kinds
                ]
                heights = [float("nan") if row is None else number(row, "p50_ms") for row in best]
                offsets = [i + 0.16 * (place - 2) for i in range(len(kinds))]
                axis.bar(offsets, heights, 0.15, label=f"{way}, best window" if place > 2 else way)
            axis.set(title=sampler, xticks=range(len(kinds)), xticklabels=kinds, yscale="log")
        axes[0][0].set_ylabel("milliseconds a plan, p50")
        axes[0][0].legend(frameon=False, fontsize=7)
        figure.suptitle(plans[0]["device"], fontsize=9)
        figure.savefig(folder / "gpu-policies.png", dpi=150)
        plt.close(figure)


def main() -> None:
    """Take the rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="results of make gpu")
    options = parser.parse_args()
    for name, key in KEYS.items() if options.folder is not None else ():
        rows = read(options.folder / f"{name}.csv")
        if any(not row.get("driver") for row in rows):
            parser.error(f"{options.folder} holds rows of a dry run: nothing is taken from it.")
        if rows:
            merge(RESULTS / f"{name}.csv", key, rows)
            print(f"{name}: {len(rows)} rows")
    put(DOCS / "gpus.md")
    draw(DOCS)


if __name__ == "__main__":
    main()
