"""Several processes for one sample: identical bits, and no rank waits for one that does not come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import main as torchrun

import parataxis as px
import ranks
import zoo
from parataxis import pipelines
from parataxis.engine.distributed import fingerprint

SCRIPT = Path(ranks.__file__)
FORK = multiprocessing.get_context("fork")  # torch takes a rank longer to import than all else


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started(case, folder, size):
    """Start the ranks of a case."""
    port = free_port()
    processes = [FORK.Process(target=ranks.run, args=(case, folder, rank, size, port)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def ended(process, folder, rank, seconds):
    """Wait for a rank; return its exit code and what it wrote."""
    process.join(seconds)
    return process.exitcode, (folder / f"{rank}.txt").read_text()


def finished(case, folder, size):
    """Run the ranks of a case and return what each has found."""
    processes = started(case, folder, size)
    try:
        for rank, process in enumerate(processes):
            assert ended(process, folder, rank, 240)[0] == 0, ended(process, folder, rank, 0)[1]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def near(x, y, bound=1e-5):
    return (x - y).norm() <= bound * y.norm()


def test_three_ranks_have_identical_bits_and_the_result_of_one_process(tmp_path):
    found = finished("samples", tmp_path, 3)
    for one in found[1:]:
        for name in ("x", "wave", "together", "refilled", "auto", "loop", "unmerged"):
            assert torch.equal(one[name], found[0][name])
        assert one["auto solver"] == found[0]["auto solver"]
    alone = ranks.draw(None)
    assert near(found[0]["x"], alone.x)
    assert near(found[0]["refilled"], alone.x)
    assert near(found[0]["wave"], ranks.draw(None, solver=px.Parareal(blocks=5)).x)
    assert found[0]["rounds"] == alone.rounds
    assert near(found[0]["loop"], ranks.looped(ranks.Net(), None)[0])
    # What one process would rather call one by one, ranks share.
    assert near(found[0]["unmerged"], found[0]["loop"], 1e-2)
    assert found[0]["unmerged mode"] == "recurrence"
    # A call a round (but for ranks without a row); in every fourth, from the first on, one row more on every rank, to
    # compare the networks.
    rows = [one["rows"] for one in found]
    assert sum(map(sum, rows)) == alone.evaluations + 3 * -(-alone.rounds // 4)
    whole = [own for own in zip(*(own[1:4] for own in rows), strict=True) if sum(own) == 16]
    assert whole
    assert all(sorted(own) == [5, 5, 6] for own in whole)


def test_pipeline_on_three_ranks_has_identical_bits(tmp_path):
    """A pipeline on three ranks has identical bits and the result of one process."""
    pytest.importorskip("transformers")  # which the pipeline needs, and the oldest versions do not have
    found = finished("pipeline", tmp_path, 3)
    pipe, call = zoo.make("stable_diffusion_3")
    pipelines.enable(pipe, px.Secant(window=6), tolerance=1e-4)
    x = zoo.run(pipe, call)
    pipelines.disable(pipe)
    assert all(torch.equal(one["x"], found[0]["x"]) for one in found)
    assert near(found[0]["x"], x)
    assert len({(one["rounds"], one["evaluations"]) for one in found}) == 1
    # The rows of the rounds are shared; those that find the layout and the form of outputs are not.
    rows = [sum(one["calls"]) for one in found]
    assert max(rows) < 0.6 * sum(rows)


def test_what_differs_between_ranks_is_named_on_all_of_them(tmp_path):
    for rank, found in enumerate(finished("unequal", tmp_path, 3)):
        for case in ("seed", "noise", "dtype", "solver", "tolerance", "device", "weights", "loop"):
            assert found[case].startswith("RankError"), (case, found[case])
            assert "rank 1 (" in found[case], (case, found[case])
            assert "rank 2 (" not in found[case]
        assert "added: rank 1" in found["seed"]
        assert "arguments: rank 1" in found["loop"]
        assert "Secant(window=4" in found["solver"]
        assert "float64" in found["dtype"]
        assert "device: rank 1" in found["device"]
        assert "load the same weights" in found["weights"]
        assert "load the same weights" in found["drift"]
        assert "rank 1 (" in found["drift"]
        assert "rank 2 (" not in found["drift"]
        broken = "ValueError: the network of rank 1 is broken"
        assert found["failure"] == broken if rank == 1 else broken in found["failure"]
        broken = "ValueError: the third call fails"
        assert found["trial"] == broken if rank == 1 else broken in found["trial"]
        assert "expected that of its input, (6, 64)" in found["shape"]
        assert "rank 1 (" in found["stop"]
        assert "other rows" in found["stop"]
        assert "none is named 'time'" in found["unnamed"]
        assert "init_device_mesh" in found["no mesh"] if rank == 1 else not found["no mesh"]
        assert found["afterwards"] == "no error"


def test_interrupted_rank_returns_its_estimates_and_the_others_end_at_once(tmp_path):
    """An interrupted rank returns its estimates and the others end at once."""
    found = finished("interrupted", tmp_path, 2)
    for name in ("network", "between", "stream"):
        assert found[1][name] == ["interrupted"] * 2
        assert found[0][name].startswith("rank 1 (")
        assert found[0][name].endswith(") was interrupted")
    assert all(one["afterwards"] == ["converged"] * 2 for one in found)
    assert all(one["seconds"] < 30 for one in found)


def test_network_may_be_sharded_along_another_dimension_of_the_mesh(tmp_path):
    """The network may be sharded along another dimension of the mesh."""
    found = finished("tensors", tmp_path, 4)
    assert all(torch.equal(one["x"], found[0]["x"]) for one in found)
    assert near(found[0]["x"], ranks.draw(None).x)


@pytest.mark.parametrize("case", ["killed", "hanging"])
def test_rank_that_is_lost_ends_the_others_with_its_name(case, tmp_path):
    """A rank that is lost ends the others with its name."""
    processes = started(case, tmp_path, 3)
    try:
        for rank in (0, 2):
            code, error = ended(processes[rank], tmp_path, rank, 120)
            assert code == 1
            assert "RankError: rank 1 (" in error
            assert "is lost in round 3" in error or "is lost in round 4" in error
        if case == "killed":
            processes[1].join(30)
            assert processes[1].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_two_agents_of_torchrun_act_as_two_machines(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    port = free_port()
    agents = [
        FORK.Process(
            target=torchrun,
            args=(
                ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
                + ["--master-addr", "127.0.0.1", "--master-port", port, str(SCRIPT), "plain", str(tmp_path)],
            ),
        )
        for node in range(2)
    ]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join(240)
        assert agent.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["x"], second["x"])
    assert near(first["x"], ranks.draw(None).x)


def test_fingerprints_tell_values_apart():
    values = [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2).double(), torch.ones(2), None, 0.1, [torch.ones(2), 3]]
    values += [px.Secant(window=8), px.Secant(window=4), px.SAMPLERS["ddim"](steps=9).coefficients]
    values.append(px.SAMPLERS["ddpm"](steps=9).coefficients)
    texts = [fingerprint(value) for value in values]
    assert len(set(texts)) == len(texts)
    assert fingerprint(px.SAMPLERS["ddim"](steps=9).coefficients) == texts[-2]
    assert fingerprint(torch.zeros(2, dtype=torch.bfloat16)) == fingerprint(torch.zeros(2, dtype=torch.bfloat16))
