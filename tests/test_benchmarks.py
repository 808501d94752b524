"""The benchmarks of speed run at reduced size, and write what they say they write."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu
import overhead
import parataxis as px
import scaling
import simulation
from baselines import Coefficients, GraphedLoop, drawn, eager_loop
from meter import Results, read, write

ROOT = Path(__file__).parent.parent


def run(module, monkeypatch, folder, *options):
    """Run a benchmark as from the shell, and return its table."""
    arguments = [module.__file__, *options, "--results", str(folder), "--figures", str(folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    with (folder / f"{module.__name__}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["device"] and row["torch"] and row["parataxis"] for row in rows)
    assert (folder / f"{module.__name__}-cpu.png").stat().st_size > 1000
    return rows


def test_a_dry_run_of_everything_for_the_gpu(tmp_path):
    """Each part ends by itself and writes its rows."""
    command = ["make", "gpu", "DEVICE=cpu", f"PYTHON={sys.executable}", "BIN=none"]
    command += [f"OPTIONS=--results {tmp_path} --total 600 --keep {tmp_path}/kept"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
    assert (tmp_path / "kept" / "results.zip").stat().st_size > 1000
    tables = {path.stem: read(path) for path in tmp_path.glob("*.csv")}
    assert {"policy_latency", "profile", "latency", "latency_curve", "throughput", "cuda_tests"} <= set(tables)
    assert all(row["device"] and row["torch"] and row["parataxis"] for rows in tables.values() for row in rows)
    for name in ("policy_latency", "latency"):
        methods = {row["method"] for row in tables[name]}
        assert {"loop", "compiled loop", "secant", "paradigms"} <= methods
        for row in tables[name]:
            assert float(row["p50_ms"]) > 0
            if row["method"] == "secant":
                assert float(row["error"]) <= 1e-2


def test_a_part_that_holds_up_the_run_is_ended(tmp_path):
    begun = time.perf_counter()
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    state = gpu.watched(command, 2.0, tmp_path / "log", dict(os.environ))
    assert state == "ended by the watchdog"
    assert time.perf_counter() - begun < 20
    assert (tmp_path / "log").read_text() == "begun\n"


def test_rows_are_written_as_they_come_and_are_replaced_by_key(tmp_path):
    path = tmp_path / "table.csv"
    first = Results(path, ("name",))
    first.add({"name": "a", "value": 1})
    first.add({"name": "b", "value": 2})
    again = Results(path, ("name",), resume=True)
    assert again.done(name="a")
    assert not again.done(name="c")
    again.add({"name": "a", "value": 3, "more": 4})
    assert [(row["name"], row["value"], row["more"]) for row in read(path)] == [("a", "3", "4"), ("b", "2", "")]
    assert not Results(path, ("name",)).done(name="a")


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow_euler"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_loops_to_beat_give_the_sequential_sample(name, clip):
    if name == "flow_euler" and clip is not None:
        pytest.skip("flows do not clip")
    options = {} if clip is None else {"clip": clip}
    sampler = px.SAMPLERS[name](steps=12, **options)

    def denoise(x, t, condition=None):
        return torch.tanh(x.roll(1, 1) * (0.5 + t.to(x)[:, None] / 2000))

    start = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    plain = px.sample(denoise, start, sampler, px.Sequential(), generator=torch.Generator().manual_seed(1)).x
    begin, added = drawn(sampler, start, torch.Generator().manual_seed(1))
    coefficients = Coefficients.of(sampler)
    graphed = GraphedLoop(denoise, (16,), None, "cpu", compiled=False)
    assert torch.allclose(eager_loop(denoise, coefficients, begin, added, None), plain, atol=1e-5)
    for _ in range(2):
        assert torch.allclose(graphed(coefficients, begin, added, None), plain, atol=1e-5)


def test_scaling(monkeypatch, tmp_path):
    options = ("--ranks", "2", "--networks", "sleeping", "idle", "--widths", "4", "--steps", "12")
    rows = run(scaling, monkeypatch, tmp_path, *options, "--milliseconds", "20")
    (one, two), idle = [row for row in rows if row["network"] == "sleeping"], rows[1]
    assert (one["ranks"], two["ranks"]) == ("1", "2")
    assert one["rounds"] == two["rounds"] == idle["rounds"]
    assert float(two["speedup"]) > 1.2
    found = simulation.check(rows, 20.0)
    assert [row["ranks"] for row in found] == [1, 2]
    assert abs(float(found[0]["off_by_percent"])) < 30


def test_rows_of_rounds_add_up_to_the_evaluations():
    for rounds, evaluations, window in ((23, 178.5, 8), (15, 223.0, 16), (12, 572.0, 100), (6, 6.0, 8), (5, 40.0, 8)):
        rows = simulation.rows_of_rounds(rounds, evaluations, window)
        assert len(rows) == rounds
        assert rows.sum() == pytest.approx(evaluations, rel=0.02)
        assert rows.min() >= 1
        assert rows.max() <= window


def test_simulated_ranks_gain_what_their_links_allow(monkeypatch, tmp_path):
    flat = px.Latency((1, 8, 16), (0.02, 0.02, 0.02))  # a batch for nothing: more ranks gain nothing
    linear = px.Latency((1, 2), (0.02, 0.04))
    rows = simulation.rows_of_rounds(20, 20 * 16.0, 16)
    slow, fast = simulation.CLUSTERS[2], simulation.CLUSTERS[0]
    row = 1e6

    def seconds(known, ranks, cluster):
        return simulation.seconds(known, rows, ranks, row, 0.0, cluster)

    assert seconds(flat, 8, fast) >= seconds(flat, 1, fast)
    assert seconds(linear, 1, fast) / seconds(linear, 8, fast) == pytest.approx(8, rel=0.05)
    assert seconds(linear, 8, slow) > seconds(linear, 8, fast)
    assert seconds(linear, 64, fast) > seconds(linear, 16, fast)  # no rank has less than a row
    curve = tmp_path / "latency_curve.csv"
    write(curve, [{"model": "m", "rows": n, "milliseconds": 20.0 * n, "device": "x"} for n in (1, 2)])
    arguments = [scaling.__file__, "--simulate", "--curve", str(curve), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--figures", str(tmp_path)])
    scaling.main()
    found = [row for row in read(tmp_path / "simulation.csv") if row["kind"] == "forecast"]
    assert {int(row["ranks"]) for row in found} == set(simulation.RANKS)
    assert (tmp_path / "scaling-simulated.png").stat().st_size > 1000


def test_overhead(monkeypatch, tmp_path):
    rows = run(overhead, monkeypatch, tmp_path, "--sizes", "SDXL")
    assert [row["sampler"] for row in rows] == ["ddim", "ddpm"]
    for row in rows:
        assert 0 < float(row["operations_a_round"]) <= 150
        assert float(row["milliseconds_a_round"]) > 0


def test_new_rows_of_a_device_take_the_place_of_its_old_ones(tmp_path):
    path = tmp_path / "table.csv"
    write(path, [{"seconds": 1, "device": "a"}, {"seconds": 2, "device": "a"}])
    write(path, [{"seconds": 3, "device": "b"}])
    write(path, [{"seconds": 4, "device": "a"}])
    with path.open() as file:
        assert [(row["seconds"], row["device"]) for row in csv.DictReader(file)] == [("3", "b"), ("4", "a")]
