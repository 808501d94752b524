"""Speed-up against ranks, on paper: a measured latency curve, the rounds that were measured, and what links cost.

A solve of R rounds and E evaluations in windows of W on P ranks takes, round by round,

    tau(ceil(w / P)) + gather(P) + meet(P) + own

with w the rows of the round, tau a measured call, ``own`` the solver's own work and two exchanges a round: outputs over
the GPUs' links, and the meeting of the ranks over the CPUs. An exchange among P ranks takes ceil(log2 P) latencies, one
for each doubling, inside a machine and between machines, and the time of the bytes that a rank receives. The rows of a
round are W at first and fall along a line to 1 in as many rounds as make E.

Links are what vendors state, with the part of the bandwidth that gathers reach: figures to choose by, not to promise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import parataxis as px
from meter import merge, read

RANKS = (1, 2, 4, 8, 16, 32, 64)
KEY = ("kind", "network", "sampler", "steps", "window", "cluster", "ranks")
# Published: what, ranks, speed-up over one; sequence parallelism splits one call, so it stands beside, not against.
PUBLISHED = (
    ("sequence parallel, FLUX.1-dev 1024px, H100 (xDiT)", (2, 4), (1.65, 2.64)),
    ("sequence parallel, HunyuanVideo 720p, H100 (xDiT)", (2, 4, 8), (2.06, 3.70, 5.64)),
    ("displaced patches, SDXL 3840px, A100 (2402.19481), approximate", (8,), (6.1,)),
    ("CHORDS, large DiTs (2507.15260), approximate", (4, 8), (2.1, 2.9)),
)


@dataclass(frozen=True)
class Link:
    """A link: seconds of one message, and bytes a second that a rank receives over it."""

    latency: float
    bandwidth: float

    def seconds(self, ranks: int, received: float) -> float:
        """Return the seconds in which so many ranks exchange, each receiving so many bytes."""
        return 0.0 if ranks == 1 else math.ceil(math.log2(ranks)) * self.latency + received / self.bandwidth


NVLINK = Link(5e-6, 300e9)  # H100: 450 GB/s each way
INFINIBAND = Link(10e-6, 40e9)  # NDR, 400 Gb/s for each GPU
ETHERNET = Link(50e-6, 10e9)  # 100 Gb/s for each machine
HOST = Link(60e-6, 1e9)  # the meeting of the ranks: TCP between processes


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs.

    Attributes:
        name: What it is called.
        inside: Link of the GPUs of a machine.
        between: Link of two machines.
        size: GPUs of a machine.
        shared: Whether the GPUs of a machine share the link to others.
    """

    name: str
    inside: Link
    between: Link
    size: int = 8
    shared: bool = False

    def gather(self, ranks: int, sent: float) -> float:
        """Return the seconds in which all ranks receive what each sends, in bytes."""
        here = min(ranks, self.size)
        machines = math.ceil(ranks / self.size)
        beyond = (ranks - here) * sent * (here if self.shared else 1)
        return self.inside.seconds(here, (here - 1) * sent) + self.between.seconds(machines, beyond)


CLUSTERS = (
    Cluster("8 GPUs a machine, NVLink, InfiniBand", NVLINK, INFINIBAND),
    Cluster("8 GPUs a machine, NVLink, Ethernet", NVLINK, ETHERNET, shared=True),
    Cluster("1 GPU a machine, Ethernet", ETHERNET, ETHERNET, size=1),
)


def rows_of_rounds(rounds: int, evaluations: float, window: int) -> np.ndarray:
    """Return the rows (R,) of every round: W, then along a line to 1, together as many as were evaluated."""
    if window == 1 or rounds == 1:
        return np.full(rounds, evaluations / rounds)
    full = (evaluations - rounds * (window + 1) / 2) / ((window - 1) / 2)
    full = min(max(full, 0.0), float(rounds))
    top = float(window) if full > 0 else max(2 * evaluations / rounds - 1, 1.0)  # too few for a window
    rows = np.interp(np.arange(rounds) + 0.5, [full, rounds], [top, 1])
    return np.clip(rows * (evaluations / rows.sum()), 1.0, window)


def seconds(
    known: px.Latency,
    rows: np.ndarray,
    ranks: int,
    row_bytes: float,
    own: float,
    cluster: Cluster,
    host: Link = HOST,
) -> float:
    """Return the seconds of a solve with these rows a round on so many ranks."""
    most = np.ceil(np.maximum(np.rint(rows), 1) / ranks)
    calls = float(np.sum(known.seconds(most)))
    sent = float(np.sum(most)) * row_bytes
    exchanges = sum(cluster.gather(ranks, row_bytes * one) for one in most) if sent else 0.0
    return calls + exchanges + len(rows) * (own + host.seconds(ranks, 64.0 * ranks))


def check(runs: Sequence[dict[str, Any]], milliseconds: float) -> list[dict[str, Any]]:
    """Return simulated and measured seconds of real runs of the sleeping network, and by how much they are apart.

    What a round costs besides the network is taken from runs with as many ranks of a network that does not sleep: on
    one machine ranks share cores, which no link does. So this checks how rounds and rows become seconds.
    """
    known = px.Latency((1, 2), (1e-3 * milliseconds, 2e-3 * milliseconds))
    own = {
        (row["width"], row["ranks"]): float(row["seconds"]) / int(row["rounds"])
        for row in runs
        if row["network"] == "idle"
    }
    nothing, samples, every = Link(0.0, math.inf), 2, []  # a run draws two samples
    for row in runs:
        if row["network"] != "sleeping" or (row["width"], row["ranks"]) not in own:
            continue
        rounds, window, ranks = int(row["rounds"]), int(row["width"]), int(row["ranks"])
        each = [rounds // samples, rounds - rounds // samples]
        evaluations = int(row["evaluations"]) / rounds
        rows = np.concatenate([rows_of_rounds(one, one * evaluations, window) for one in each])
        besides = own[row["width"], row["ranks"]]
        simulated = seconds(known, rows, ranks, 0.0, besides, Cluster("", nothing, nothing), nothing)
        measured = float(row["seconds"])
        about = {"kind": "check", "network": "sleeping", "sampler": "ddpm", "steps": row["steps"], "window": window}
        about |= {"cluster": "processes of one machine", "ranks": ranks, "rounds": rounds / samples}
        figures = {"seconds": f"{simulated:.3f}", "measured": f"{measured:.3f}"}
        every.append({**about, **figures, "off_by_percent": f"{100 * (simulated / measured - 1):.1f}"})
    return every


def measured(rounds: Path, sampler: str, steps: int, window: int) -> tuple[int, float] | None:
    """Return median rounds and evaluations of trained networks to 1e-2, or None."""
    rows = [
        row
        for row in read(rounds)
        if (row["sampler"], int(row["steps"]), row["solver"], float(row["target"])) == (sampler, steps, "secant", 1e-2)
        and row["width"] == ("full" if window >= steps else str(window))
        and not row["model"].startswith("mixture")
    ]
    if not rows:
        return None
    both = (statistics.median(int(row[name]) for row in rows) for name in ("rounds", "evaluations"))
    return round(next(both)), float(next(both))


def curves(path: Path) -> dict[str, px.Latency]:
    """Return the measured curves of a table, those from CUDA where there are any."""
    rows = read(path)
    rows = [row for row in rows if row.get("driver")] or rows
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append((int(row["rows"]), float(row["milliseconds"]) / 1e3))
    known = {}
    for name, points in found.items():
        sizes, times = zip(*sorted(points), strict=True)
        known[name] = px.Latency(sizes, times)
    return known


def forecast(
    known: dict[str, px.Latency], rounds: Path, row_bytes: float = 4 * 64 * 64 * 4, own: float = 5e-4
) -> list[dict[str, Any]]:
    """Return the speed-up over the loop on one GPU for every network, sampler, cluster and number of ranks.

    Args:
        known: Measured curves by network.
        rounds: The table of measured rounds.
        row_bytes: Of one output: a latent of Stable Diffusion in float32.
        own: Seconds of the solver's own work in a round.
    """
    every = []
    for name, curve in known.items():
        for sampler, steps in (("ddim", 100), ("ddpm", 100), ("ddpm", 1000)):
            loop = steps * float(curve.seconds(1))
            for window in (8, 16, 32, steps):
                found = measured(rounds, sampler, steps, window)
                if found is None:
                    continue
                rows = rows_of_rounds(*found, window)
                for cluster in CLUSTERS:
                    for ranks in RANKS:
                        if ranks > 8 * cluster.size:  # eight machines at most
                            continue
                        spent = seconds(curve, rows, ranks, row_bytes, own, cluster)
                        about = {"kind": "forecast", "network": name, "sampler": sampler, "steps": steps}
                        about |= {"window": window, "cluster": cluster.name, "ranks": ranks, "rounds": found[0]}
                        every.append({**about, "seconds": f"{spent:.4g}", "speedup": f"{loop / spent:.3f}"})
    return every


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up of the best window against ranks, beside published figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names) + 1, figsize=(4.2 * (len(names) + 1), 4), sharey=True, squeeze=False, layout="constrained"
    )
    cells = list(dict.fromkeys((row["sampler"], row["steps"]) for row in rows))
    for axis, name in zip(axes[0], names, strict=False):
        for color, (sampler, steps) in enumerate(cells):
            for style, cluster in zip(("-", "--", ":"), CLUSTERS, strict=True):
                best: dict[int, float] = {}
                for row in rows:
                    of = (row["network"], row["sampler"], row["steps"], row["cluster"])
                    if of == (name, sampler, steps, cluster.name):
                        ranks = int(row["ranks"])
                        best[ranks] = max(best.get(ranks, 0.0), float(row["speedup"]))
                label = f"{sampler}-{steps}" if style == "-" else None
                axis.plot(list(best), list(best.values()), style, color=f"C{color}", marker="o", ms=3, label=label)
        axis.axhline(1, color="0.8", lw=1)
        axis.set(title=name, xlabel="ranks", xscale="log", yscale="log", xticks=RANKS, xticklabels=RANKS)
        axis.legend(frameon=False, fontsize=7)
    for style, cluster in zip(("-", "--", ":"), CLUSTERS, strict=True):
        axes[0][-1].plot([], [], style, color="0.3", label=cluster.name)
    for name, counts, values in PUBLISHED:
        axes[0][-1].plot(counts, values, "s-", ms=4, label=name)
    axes[0][-1].axhline(1, color="0.8", lw=1)
    axes[0][-1].set(title="published", xlabel="GPUs", xscale="log", xticks=RANKS, xticklabels=RANKS)
    axes[0][-1].legend(frameon=False, fontsize=6)
    axes[0][0].set_ylabel("speed-up over the loop on one GPU, best window")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def simulate(results: Path, figures: Path, curve: Path, milliseconds: float) -> list[dict[str, Any]]:
    """Write ``simulation.csv`` and its figure from what was measured; return the rows."""
    here = {"device": "simulated"}
    rows = [{**row, **here} for row in check(read(results / "scaling.csv"), milliseconds)]
    known = curves(curve)
    forecasts = forecast(known, Path(__file__).parent / "results" / "rounds.csv")
    rows += [{**row, **here} for row in forecasts]
    if rows:
        merge(results / "simulation.csv", KEY, rows)
    if forecasts:
        draw(forecasts, figures / "scaling-simulated.png")
    return rows
