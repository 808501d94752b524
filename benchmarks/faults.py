"""Faults of ranks: rank 1 of three is killed, hangs, fails, returns NaN, or changes its weights in a solve.

``python benchmarks/faults.py [--repeat 5] [--out benchmarks/results/faults.csv]``. Each run starts three processes as a
launcher does, lets rank 1 fail in the fourth call of its network, and waits for the others to end. A line of the table
has the seconds from the fault to the end of the last other rank, how many of the ranks that could still speak name
rank 1, and how many processes were left once the launcher had killed what hung. Runs that are in the table already are
left out, so the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import parataxis as px
from parataxis.engine.distributed import Ranks

FAULTS = ("kill", "hang", "error", "nan", "weights")
RANKS, FAULTY, CALL, TIMEOUT = 3, 1, 4, 15.0
OUT = Path(__file__).parent / "results" / "faults.csv"
FIELDS = ("fault", "run", "seconds", "spoke", "named", "left", "error")


class Network(torch.nn.Module):
    """A small network that meets its fault in one call, on one rank."""

    def __init__(self, fault: str, faulty: bool, folder: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(32, 32)
        self.fault, self.faulty, self.folder, self.calls = fault, faulty, folder, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return an output, or meet the fault."""
        self.calls += 1
        if self.faulty and self.calls == CALL:
            (self.folder / "fault").write_text(str(time.time()))
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hang":
                time.sleep(600)
            if self.fault == "error":
                raise ValueError("this network is broken")
            if self.fault == "weights":
                self.layer.weight.data.mul_(1.05)
        out = torch.tanh(self.layer(x)) * 0.5
        return out * torch.nan if self.faulty and self.fault == "nan" and self.calls >= CALL else out


def rank(fault: str, folder: Path, number: int) -> None:
    """Draw samples on one rank, and write down how that ended."""
    os.environ["RANK"] = str(number)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(init_device_mesh("cpu", (RANKS,), mesh_dim_names=("time",)), timeout=TIMEOUT)
    noise = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    said = "no error"
    try:
        with torch.no_grad():
            network = Network(fault, number == FAULTY, folder)
            px.sample(network, noise, px.SAMPLERS["ddim"](steps=60), px.Secant(window=8), mesh=ranks, tolerance=1e-4)
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{number}.txt").write_text(said)
    os._exit(0)  # without waiting for ranks that are gone


def run(fault: str) -> dict[str, object]:
    """Start the ranks, and return what became of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Forked, as torch takes longest to import.
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=rank, args=(fault, folder, number)) for number in range(RANKS)]
        for process in processes:
            process.start()
        try:
            for number, process in enumerate(processes):
                if number != FAULTY:
                    process.join(timeout=180)
            seconds = time.time() - float((folder / "fault").read_text())
            if fault in ("kill", "hang"):
                processes[FAULTY].kill()  # as the launcher does
            processes[FAULTY].join(timeout=60)
        finally:
            left = sum(process.is_alive() for process in processes)
            for process in processes:
                process.kill()
                process.join()
        texts = {number: folder / f"{number}.txt" for number in range(RANKS)}
        said = {number: path.read_text() for number, path in texts.items() if path.exists()}
    # The rank that fails says what happened to it; the others say whose fault it was.
    named = [number for number, text in said.items() if "rank 1 (" in text or "this network is broken" in text]
    other = next(text for number, text in said.items() if number != FAULTY)
    return {
        "fault": fault,
        "seconds": f"{seconds:.1f}",
        "spoke": len(said),
        "named": len(named),
        "left": left,
        "error": re.sub(r" ?\(.*", "", other)[:100],
    }


def main() -> None:
    """Run what is not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    known = set()
    if options.out.exists():
        with options.out.open() as file:
            known = {(line["fault"], int(line["run"])) for line in csv.DictReader(file)}
    with options.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        if not known:
            table.writeheader()
        for number in range(options.repeat):
            for fault in FAULTS:
                if (fault, number) not in known:
                    line = run(fault) | {"run": number}
                    table.writerow(line)
                    file.flush()
                    print(line)


if __name__ == "__main__":
    main()
