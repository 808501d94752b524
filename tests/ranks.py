"""What the ranks of tests/engine/test_distributed.py run.

``python ranks.py CASE FOLDER``, started with torchrun's variables, or :func:`run` in a fork.

A case is a function of a mesh; what it returns is saved as FOLDER/RANK.pt.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import parataxis as px
from parataxis import pipelines
from parataxis.denoisers import mixture
from parataxis.engine.distributed import RankError, Ranks, sharded

NOISE = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
SAMPLER = px.SAMPLERS["ddpm"](steps=40)
EXACT = mixture(64).network(px.vp())


def generators(seed=7):
    return [torch.Generator().manual_seed(seed + k) for k in range(2)]


def draw(mesh, network=EXACT, solver=None, seed=7, noise=NOISE, **options):
    solver = solver or px.Secant(window=8)
    return px.sample(network, noise, SAMPLER, solver, generator=generators(seed), mesh=mesh, **options)


def said(call):
    """Return the error that a call raises."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def samples(mesh):
    """Draw with every kind of driver, and record how many rows this rank's network was given."""
    rows = []

    def network(u, t):
        rows.append(len(u))
        return EXACT(u, t)

    plain = draw(mesh, network)
    counted = list(rows)
    table = SAMPLER.recurrence(NOISE, generators())
    runs = px.start(SAMPLER, table, px.Picard(window=5))
    times = SAMPLER.network_times()
    evaluate = sharded(lambda asked: EXACT(asked.x, times[asked.step]), mesh)
    for _ in px.drive(runs, evaluate):
        pass
    return {
        "x": plain.x,
        "rounds": plain.rounds,
        "rows": counted,
        "wave": draw(mesh, solver=px.Parareal(blocks=5)).x,
        "together": torch.stack([run.solution.x for run in runs]),
        "refilled": draw(mesh, rows_per_round=5).x,
        "auto": draw(mesh, solver="auto").x,
        "auto solver": repr(draw(mesh, solver="auto")[0].solver),
        "loop": looped(Net(), mesh)[0],
        "unmerged": (single := looped(First(), mesh))[0],
        "unmerged mode": single[1].mode,
    }


def pipeline(mesh):
    import zoo

    pipe, call = zoo.make("stable_diffusion_3")
    calls = []
    pipe.transformer.register_forward_hook(lambda *told: calls.append(len(told[2][0])))
    report = pipelines.enable(pipe, px.Secant(window=6), tolerance=1e-4, mesh=mesh)
    x = zoo.run(pipe, call)
    pipelines.disable(pipe)
    assert report.mode == "recurrence"
    return {"x": x, "rounds": report.rounds, "evaluations": report.evaluations, "calls": calls}


def unequal(mesh):
    """Let rank 1 differ in one thing at a time."""
    odd = mesh.get_rank() == 1

    def fails(u, t):
        raise ValueError("the network of rank 1 is broken")

    def late(run):
        return odd and run.rounds == 3

    def returns(u, t):
        return EXACT(u, t)[:, :5]

    other = mixture(64, seed=5).network(px.vp())
    found = {
        "seed": said(lambda: draw(mesh, seed=8 if odd else 7)),
        "noise": said(lambda: draw(mesh, noise=NOISE + odd)),
        "dtype": said(lambda: draw(mesh, noise=NOISE.double() if odd else NOISE)),
        "solver": said(lambda: draw(mesh, solver=px.Secant(window=4 if odd else 8))),
        "tolerance": said(lambda: draw(mesh, tolerance=0.1 if odd else 0.2)),
        "device": said(lambda: Ranks.of(mesh).compare(device="cuda" if odd else "cpu")),
        "weights": said(lambda: draw(mesh, other if odd else EXACT)),
        "failure": said(lambda: draw(mesh, fails if odd else EXACT)),
        "shape": said(lambda: draw(mesh, returns if odd else EXACT)),
        "stop": said(lambda: draw(mesh, stop=late)),
        "loop": said(loop(Net(), mesh, 8 if odd else 7)),
        "trial": said(loop(Failing() if odd else Net(), mesh, 7)),
        "drift": said(loop(Drifting(14 if odd else 10**9), mesh, 7)),
        "unnamed": said(lambda: draw(init_device_mesh("cpu", (3,), mesh_dim_names=("data",)))),
        "no mesh": said(lambda: draw(3)) if odd else "",
    }
    found["afterwards"] = said(lambda: draw(mesh))
    return found


def interrupted(mesh):
    """Interrupt rank 1 in its network, between two rounds and in a stream, and draw once more."""
    odd, ranks, calls = mesh.get_rank() == 1, Ranks(mesh, timeout=60.0), []

    def network(u, t):
        calls.append(u)
        if odd and len(calls) == 4:
            raise KeyboardInterrupt
        return EXACT(u, t)

    def between(runs):
        if odd and runs[0].rounds == 3:
            raise KeyboardInterrupt

    def reasons(network=EXACT, **options):
        calls.clear()
        return [one.reason for one in draw(ranks, network, **options)]

    found, begun = {}, time.monotonic()
    for name, options in {
        "network": {"network": network},
        "between": {"on_round": between},
        "stream": {"network": network, "rows_per_round": 5},
    }.items():
        try:
            found[name] = reasons(**options)
        except RankError as error:
            found[name] = str(error)
    return {**found, "afterwards": reasons(), "seconds": time.monotonic() - begun}


class Net(torch.nn.Module):
    def forward(self, u, t):
        return EXACT(u, torch.as_tensor(t).expand(len(u)))


class First(torch.nn.Module):
    """Its calls cannot be merged."""

    def forward(self, u, t):
        return EXACT(u, torch.as_tensor(t).reshape(-1)[0].expand(len(u)))


class Failing(Net):
    """Fails while it is tried how calls may be merged."""

    def __init__(self):
        super().__init__()
        self.calls = ctypes.c_long()  # a number would be found out as a state of the network

    def forward(self, u, t):
        self.calls.value += 1
        if self.calls.value == 3:
            raise ValueError("the third call fails")
        return super().forward(u, t)


class Drifting(Net):
    """Gives other outputs behind so many calls, as if its weights had changed on this rank."""

    def __init__(self, until):
        super().__init__()
        self.calls, self.until = ctypes.c_long(), ctypes.c_long(until)

    def forward(self, u, t):
        self.calls.value += 1
        return super().forward(u, t) * (1.2 if self.calls.value > self.until.value else 1)


def looped(net, mesh, seed=7):
    """Run a loop twice; return the second result and the report."""
    run = loop(net, mesh, seed)
    return [run(), run()][1], run.report


def loop(net, mesh, seed):
    times = SAMPLER.network_times().tolist()
    generator = torch.Generator().manual_seed(seed)

    def run():
        x = torch.randn(1, 64, generator=generator)
        for t in times:
            x = 0.9 * x + 0.1 * net(x, t) + 0.1 * torch.randn(x.shape, generator=generator)
        return x

    return px.parallel(run, denoisers=[net], mesh=mesh)


def tensors(mesh):
    """Shard the network itself along another dimension of the mesh."""
    group = mesh["tensor"].get_group()

    def network(u, t):
        half = EXACT(u, t)
        half[:, mesh["tensor"].get_local_rank() :: 2] = 0  # this rank has every other feature
        dist.all_reduce(half, group=group)
        return half

    return {"x": draw(mesh, network).x}


def lost(mesh, what):
    """Lose rank 1 in the third round."""
    calls = []

    def network(u, t):
        calls.append(u)
        if len(calls) == 4 and mesh.get_rank() == 1:
            what()
        return EXACT(u, t)

    draw(Ranks(mesh, timeout=4.0), network)


def killed(mesh):
    lost(mesh, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hanging(mesh):
    lost(mesh, lambda: time.sleep(600))


def plain(mesh):
    """Draw once."""
    return {"x": draw(mesh).x}


def run(case, folder, rank, size, port):
    """Be one of so many ranks, in a process that was forked; what it says goes to FOLDER/RANK.txt."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    os.environ.update(shared, RANK=str(rank))
    with (Path(folder) / f"{rank}.txt").open("w", buffering=1) as sys.stderr:
        try:
            main(case, folder)
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None


def main(case, folder):
    """Run a case on this rank."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
    warnings.filterwarnings("ignore", "running in parallel was slower", RuntimeWarning)  # networks cost nothing
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    shape, names = ((2, 2), ("time", "tensor")) if case == "tensors" else ((size,), ("time",))
    found = globals()[case](init_device_mesh("cpu", shape, mesh_dim_names=names))
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
