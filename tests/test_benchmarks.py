"""The benchmarks of speed run at reduced size, and write what they say they write."""

from __future__ import annotations

import csv
import sys

import latency
import overhead
import scaling
from meter import write


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


def test_latency(monkeypatch, tmp_path):
    options = ("--models", "digits-unconditional", "--steps", "10", "--repeats", "1", "--most", "2", "--no-compile")
    rows = run(latency, monkeypatch, tmp_path, *options)
    methods = ["loop", "diffusers pipeline", "paradigms", "secant", "secant"]
    assert [row["method"] for row in rows] == methods * 2
    for row in rows:
        assert float(row["seconds"]) > 0
        if row["method"] == "secant":
            assert float(row["relative_error"]) < 2e-2
            assert float(row["rounds"]) <= 10
    assert (tmp_path / "latency_curve.csv").read_text().count("digits-unconditional") == 2


def test_scaling(monkeypatch, tmp_path):
    options = ("--ranks", "2", "--networks", "sleeping", "--widths", "4", "--steps", "12", "--milliseconds", "20")
    one, two = run(scaling, monkeypatch, tmp_path, *options)
    assert (one["ranks"], two["ranks"]) == ("1", "2")
    assert one["rounds"] == two["rounds"]
    assert float(two["speedup"]) > 1.2


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
