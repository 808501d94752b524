"""Mutations: each mechanism of the package is broken once, and the tests have to notice.

``python benchmarks/mutants.py [--out benchmarks/results/mutants.csv] [--only WORD]``. A mutation is a line of the
package and what it becomes; it has to stand in exactly one place. First all tests run once under coverage, a few cases
of each, which says what test executes what line; that is kept in ``out/mutants.json`` until a file changes. Each
mutation then meets the tests that execute its line, the fastest first, on a changed copy of the package, in a process
of its own, forked with torch loaded. What survives these is tried with whole test files, which start processes too. A
mutation is only called killed if the same test passes on the package as it is. Mutations that are in the table already
are left out, so the script goes on where it was stopped.
"""

# ruff: noqa: E501  # one mutation a line, whatever its length
from __future__ import annotations

import argparse
import compileall
import contextlib
import csv
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Loaded once, here, as they take longest: every mutation is tried in a fork of this process.
import coverage
import diffusers  # noqa: F401
import hypothesis  # noqa: F401
import numpy as np
import pytest
import safetensors.torch  # noqa: F401
import torch
import torch.distributed.device_mesh
import tqdm.auto  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "parataxis"
OUT = ROOT / "benchmarks" / "results" / "mutants.csv"
KEPT = ROOT / "out" / "mutants.json"
FIELDS = ("mutation", "file", "line", "becomes", "killed", "by", "seconds")
# The tests that are traced, of which one case in four or so takes a minute or two: what is slow notices no more.
TRACED = [
    "samplers/test_recurrence.py",
    "samplers/test_redrawn.py",
    "samplers/test_samplers.py",
    "samplers/test_schedules.py",
    "solvers/test_correction.py",
    "solvers/test_extrapolation.py",
    "solvers/test_frame.py",
    "solvers/test_window.py",
    "solvers/test_error_estimate.py",
    "solvers/test_error_record.py",
    "solvers/test_picard.py",
    "solvers/test_secant.py",
    "solvers/test_anderson.py",
    "solvers/test_parareal.py",
    "solvers/test_speculative.py",
    "solvers/test_laws.py",
    "engine/test_failures.py",
    "engine/test_checkpoint.py",
    "engine/test_executor.py",
    "engine/test_plain.py",
    "loops/test_fit.py",
    "loops/test_solver.py",
    "loops/test_merger.py",
    "test_files.py",
    "test_stopping.py",
    "test_stream.py",
    "test_sample.py",
    "cli/test_problem.py",
    "cli/test_sample.py",
]
CASES, MORE_CASES = 3, 12  # of each parametrized test
SLOW = ("100_steps", "other_kinds", "two_agents", "scaling")  # tests that are left to the whole files
ENOUGH = 60.0  # seconds of tests that a mutation meets at first

# Whole files for what survives: those of the mechanism, which may start processes that coverage does not see.
FILES = {
    "laws": "solvers/test_laws.py solvers/test_hard_problems.py solvers/test_hard_laws.py solvers/test_low_precision.py",
    "picard": "solvers/test_picard.py solvers/test_paradigms.py solvers/test_laws.py",
    "anderson": "solvers/test_anderson.py solvers/test_laws.py",
    "secant": "solvers/test_laws.py solvers/test_hard_problems.py solvers/test_hard_laws.py solvers/test_low_precision.py",
    "window": "engine/test_failures.py engine/test_checkpoint.py solvers/test_window.py solvers/test_laws.py",
    "parareal": "solvers/test_parareal.py solvers/test_laws.py",
    "speculative": "solvers/test_speculative.py",
    "batch": "engine/test_failures.py engine/test_checkpoint.py test_stream.py",
    "run": "engine/test_failures.py engine/test_checkpoint.py solvers/test_window.py test_sample.py",
    "stream": "engine/test_failures.py test_stream.py",
    "executor": "engine/test_executor.py",
    "checkpoint": "engine/test_checkpoint.py test_files.py",
    "files": "test_files.py test_sample.py",
    "plain": "engine/test_plain.py engine/test_distributed.py",
    "samplers": "samplers/test_recurrence.py samplers/test_samplers.py samplers/test_from_scheduler.py test_sample.py",
    "loops": "loops/test_fit.py loops/test_solver.py loops/test_merger.py loops/test_runner.py",
    "cli": "cli/test_sample.py cli/test_plan.py cli/test_app.py",
    "ranks": "engine/test_distributed.py",
}


class Mutation(NamedTuple):
    """One line that is broken: which tests have to notice, what it does, and what becomes of it."""

    suite: str
    name: str
    line: str
    becomes: str


M = Mutation
MUTATIONS = [
    # -- acceptance ------------------------------------------------------------------------------------------------
    M("laws", "tolerance is not divided by the safety of reports", "allowed = tolerance / REPORTED", "allowed = 9 * tolerance"),
    M("laws", "every state fits", "count = np.minimum(np.logical_and.accumulate(fits, 1).sum(1), width)", "count = width"),
    M("laws", "states behind one that fails are counted", "np.logical_and.accumulate(fits, 1).sum(1), width)", "fits.sum(1), width)"),
    M("laws", "first state has to pass", "    fits[:, 0] = True\n", ""),
    M("laws", "last state is not kept back", "np.where((count == width) & ~last, np.maximum(count - 1, 1), count)", "count"),
    M("laws", "last state is kept back at the end too", "(count == width) & ~last, np.max", "count == width, np.max"),
    M("laws", "share of the loop is not asked for", "(estimate.planned <= allowed * share)", "(estimate.planned <= allowed)"),
    M("picard", "published test is passed one state later", "np.logical_and.accumulate(passed, 1).sum(1) + 1, width)", "np.logical_and.accumulate(passed, 1).sum(1) + 2, width)"),
    M("picard", "published test counts passes behind a failure", "np.logical_and.accumulate(passed, 1).sum(1) + 1, width)", "passed.sum(1) + 1, width)"),
    M("picard", "published test compares with the state itself", "state = np.minimum(window.steps + 1, window.problem.steps)\n        return np.asarray(window.moves**2", "state = window.steps\n        return np.asarray(window.moves**2"),
    M("picard", "threshold is not squared", "<= self.threshold**2 * window.problem.dim * variance[state])", "<= self.threshold * window.problem.dim * variance[state])"),
    M("laws", "convergence is always claimed", "window.batch.bounded[window.places] = ", "_ = "),
    M("window", "uncertain runs are called converged", 'self._end("converged" if batch.bounded[self.place] else UNCERTAIN', 'self._end("converged"'),
    # -- error estimate --------------------------------------------------------------------------------------------
    M("laws", "slope errors are ignored", "local = safety * np.exp(level[:, 1:] + np.logaddexp.accumulate(missed, 1))", "local = np.zeros_like(left[:, 1:])"),
    M("laws", "slope errors do not add up", "np.logaddexp.accumulate(missed, 1))", "missed)"),
    M("laws", "no safety of the slope error", "SLOPE_ERROR_SAFETY = 4.0", "SLOPE_ERROR_SAFETY = 0.04"),
    M("laws", "growth is forgotten in the local error", "level = np.add.accumulate(logs(growth), 1)  # log of", "level = np.zeros_like(growth)  # log of"),
    M("laws", "no cap by the moves", "np.minimum(cap[:, 1:], np.maximum(local, smallest))", "np.maximum(local, smallest)"),
    M("laws", "no least remainder of a move", "np.maximum(local, smallest)", "local"),
    M("laws", "something remains where nothing moved", "moved = np.logical_or.accumulate(moves > 0, 1)[:, 1:]", "moved = np.ones_like(moves, bool)[:, 1:]"),
    M("laws", "gain floor is gone", "whole = np.where(at_end, 1.0, reach)", "whole = np.where(at_end, 1.0, 1.0)"),
    M("laws", "sample itself gains", "whole = np.where(at_end, 1.0, reach)", "whole = reach"),
    M("laws", "gain ignores measured growth", "gain = behind * (whole.take(at)", "gain = 1.0 * (whole.take(at)"),
    M("laws", "gain trusts steps that were never measured", "last = np.where(measured[:, 0], (np.argmin(measured, 1) - 1) % width, 0)", "last = np.full(samples, width - 1)"),
    M("laws", "carried errors do not grow", "return error[:, None] * np.multiply.accumulate(gamma, 1)", "return error[:, None] * np.ones_like(gamma)"),
    M("laws", "carried errors are forgotten", "np.hypot(np.hypot(carry, left), FLOOR_SHARE * floor)", "np.hypot(left, FLOOR_SHARE * floor)"),
    M("laws", "report has no safety", "self.reported = REPORTED * self.accepted * share", "self.reported = 0.03 * self.accepted * share"),
    M("laws", "relative to nothing", "share = gain / size[:, None]", "share = gain"),
    M("laws", "overflows are not noticed", "                values[np.isnan(values)] = np.inf  # of an overflow nothing is known", "                values[np.isnan(values)] = 0.0"),
    M("laws", "unmeasured slope errors are zero", "UNMEASURED = 1e100", "UNMEASURED = 0.0"),
    M("laws", "large moves are trusted", "MAX_TRUSTED_MOVE = 0.1", "MAX_TRUSTED_MOVE = 1e9"),
    M("laws", "growth below one shrinks carried errors", "gamma = np.fmax(np.where(unknown, growth_before, measured), 1.0)", "gamma = np.where(unknown, growth_before, measured)"),
    M("laws", "growth for Gaussian data is not a floor", "np.maximum(gaussian, np.abs(growth)))", "np.abs(growth))"),
    M("laws", "smallest prediction is the present one", "smallest = self.variances.min(1)", "smallest = self.variances[:, 0]"),
    M("laws", "rounding of moves is taken for a slope", "near = frame.evaluated & (size > self.smallest_move)", "near = frame.evaluated & (size > 0)"),
    M("laws", "moves of steps that are new are measured", "near = frame.evaluated & (size > self.smallest_move)", "near = (size > self.smallest_move)"),
    M("laws", "largest growth is forgotten", "np.fmax(growth, np.sqrt(np.maximum(square, 0.0)) / moved, out=growth, where=telling)", "np.copyto(growth, np.sqrt(np.maximum(square, 0.0)) / moved, where=telling)"),
    M("laws", "error record does not move with the window", "        self.known = self.shifted[frame.rows, :, count]", "        pass"),
    # -- correction ------------------------------------------------------------------------------------------------
    M("laws", "residuals are not propagated", "        np.multiply.accumulate(chunk, axis=1, out=chunk)\n", "        chunk[:] = 0\n"),
    M("laws", "slope is not in the growth", "    growth = state_weight + output_weight[:, :, 0] * slopes\n    chunks", "    growth = state_weight\n    chunks"),
    M("laws", "lags have no slopes", "weight = output_weight[:, i, lag] * slopes[:, i - lag]", "weight = output_weight[:, i, lag] * slopes[:, i]"),
    M("laws", "order keeps one term more", "np.where(age < order, moved, 0.0)", "np.where(age <= order, moved, 0.0)"),
    M("laws", "states of a chunk start from nothing", "min(lags + 1, a) + min(size, width - a))", "min(lags, a) + min(size, width - a))"),
    M("laws", "overflow in one residual is ignored", "    overflow = not np.isfinite(gram.sum())", "    overflow = False"),
    # -- slopes ----------------------------------------------------------------------------------------------------
    M("secant", "secants are negated", "np.where(moved, df_dx / dx_dx, window.slopes)", "np.where(moved, -df_dx / dx_dx, window.slopes)"),
    M("secant", "secants of rounding are taken", "moved = ~window.evaluated | (dx_dx > rounding * rounding)", "moved = dx_dx > -1"),
    M("secant", "slopes that are not finite stay", "known = np.isfinite(slopes) & np.isfinite(pairs[..., 1, 1])", "known = np.isfinite(pairs[..., 1, 1])"),
    M("secant", "slopes of outputs that overflow stay", "known = np.isfinite(slopes) & np.isfinite(pairs[..., 1, 1])", "known = np.isfinite(slopes)"),
    M("secant", "slopes from interpolated outputs are taken", "        if window.strided:\n            known &= ~window.coarse[:, None]\n", ""),
    M("secant", "slopes of repaired outputs are taken", "        if measured.finite is not None:\n            known &= measured.finite\n", ""),
    M("secant", "growth may be negative", "np.minimum(np.maximum(growth, 0.0), MAX_GROWTH", "np.minimum(growth, MAX_GROWTH"),
    M("secant", "growth has no upper bound", "np.minimum(np.maximum(growth, 0.0), MAX_GROWTH * window.rms_ratio)", "np.maximum(growth, 0.0)"),
    M("secant", "window of one keeps slopes", "return np.zeros_like(window.a)", "return np.ones_like(window.a)"),
    M("picard", "growth is not that of the expected rms", "return window.slopes_for_growth(window.rms_ratio)", "return window.slopes_for_growth(0.5 * window.rms_ratio)"),
    M("window", "no slope for a growth", "return np.asarray((growth - self.a) * self.b_inverse)", "return np.asarray(growth * self.b_inverse)"),
    # -- windows ---------------------------------------------------------------------------------------------------
    M("window", "an output that is not finite is not repaired", "nearest = np.maximum.accumulate(np.where(finite, np.arange(len(finite)), -1))\n        outputs = outputs.index_select(0, upload(nearest, outputs.device))\n        flags", "flags"),
    M("window", "repaired outputs count as finite", "flags[nodes] = finite", "flags[nodes] = True"),
    M("window", "window does not end at the sample", "self.hi = np.minimum(self.lo + width, steps)", "self.hi = np.minimum(self.lo + width, steps - 1)"),
    M("window", "coarse strides have no last node", "return self.inside & ((offset % self.stride[:, None] == 0) | last)", "return self.inside & (offset % self.stride[:, None] == 0)"),
    M("window", "strides are ignored", "return self.inside & ((offset % self.stride[:, None] == 0) | last)", "return self.inside"),
    M("window", "interpolated outputs are accepted", "            count = np.where(window.rough, np.minimum(count, 1), count)", "            pass"),
    M("window", "stride is that of the next round", "at = np.minimum(self.rounds + 1, len(padded) - 1)", "at = np.minimum(self.rounds + 2, len(padded) - 1)"),
    M("window", "frozen states of a guess are not skipped", "        lo = problem.frozen_steps\n", "        lo = 0\n"),
    M("window", "estimate is the output", "return self.tables.p[step] * u + self.tables.q[step] * f", "return self.tables.q[step] * f"),
    M("window", "guess enters one state late", "state[new], guess.device)", "state[new] - 1, guess.device)"),
    M("laws", "entering states copy the line's end", "weight * (1 + place), -weight * place], 2)", "weight, 0 * weight], 2)"),
    M("laws", "frozen predictions drift", "factors[:, :, LAST_X] = -slope * factors[:, :, LATE]", "factors[:, :, LAST_X] = 0"),
    M("picard", "copied states do not keep their rms", "tables.rms[hi[:, None] + 1 + np.arange(count)] / tables.rms[hi][:, None]", "1.0"),
    M("laws", "interpolation is by the nearest node", "share = np.divide(place[i] - place[left_step], span, out=np.zeros(len(i)), where=span != 0)", "share = np.zeros(len(i))"),
    M("window", "samples of a batch share the first row's start", "states = batch.start.index_select(0, places)[:, None] * factors[:, None]", "states = batch.start.index_select(0, 0 * places)[:, None] * factors[:, None]"),
    # -- Anderson --------------------------------------------------------------------------------------------------
    M("anderson", "no acceleration at all", "        factors[..., :-1] -= weights\n        factors[..., 1:] += weights\n", ""),
    M("anderson", "acceleration has the wrong sign", "        factors[..., :-1] -= weights\n        factors[..., 1:] += weights\n", "        factors[..., :-1] += weights\n        factors[..., 1:] -= weights\n"),
    M("anderson", "accepted states are accelerated", "        weights[np.arange(window.W) < count[:, None]] = 0.0\n", ""),
    M("anderson", "sums are not triangular", "left_sum, right_sum = np.cumsum(left, axis=1), np.cumsum(right, axis=1)", "left_sum, right_sum = left, right"),
    M("anderson", "no ridge", "system = left_sum + ridge * np.eye(size)", "system = left_sum + 0 * ridge * np.eye(size)"),
    M("anderson", "absolute ridge is relative", "ridge = self.ridge if self.absolute else self.ridge * diagonal", "ridge = self.ridge * diagonal"),
    M("anderson", "published rule has no threshold", "floor = self.threshold**2", "floor = 1e9 * self.threshold**2"),
    M("anderson", "noise prediction is not frozen", "return np.asarray(alpha[1:] / alpha[:-1])", "return np.ones(len(alpha) - 1)"),
    # -- Parareal --------------------------------------------------------------------------------------------------
    M("parareal", "coarse corrections are left out", "memory[at[end]] + (memory[first + block] - memory[at[coarse]])", "memory[at[end]]"),
    M("parareal", "one block too few", "round(np.sqrt(3 * steps))", "round(np.sqrt(steps))"),
    M("parareal", "frontier does not go on", "if run.p < self.limit or (run.frontier and self._frontier_goes_on):", "if run.p < self.limit:"),
    M("parareal", "frontier is not served first", "key=lambda run: (not run.frontier, run.p, run.j)", "key=lambda run: (run.p, run.j)"),
    M("parareal", "blocks do not wait for the sweep", "ready = [run for run in ready if run.frontier or run.p <= swept or run.step == self.bounds[run.j]]", "pass"),
    M("parareal", "first sample may be the last", 'if p == 0 or self.solver.rule == "none":', 'if self.solver.rule == "none":'),
    M("parareal", "iterations with broken outputs may end", "return np.asarray(passed & ~self.nonfinite_iterations[:, p])", "return np.asarray(passed)"),
    M("parareal", "changes of earlier boundaries do not count", "        self.error = np.max(newest, axis=0)", "        self.error = newest[-1]"),
    M("parareal", "published rule has another threshold", "self.moved <= self.solver.threshold", "self.moved <= 5 * self.solver.threshold"),
    M("parareal", "noise of a block is not folded", "self.memory[noise_slots] = folded_noise(local, self.bounds, batch.noise)", "pass"),
    M("parareal", "sample is not exact after all iterations", "            if p == self.blocks:\n                self.test.error = np.zeros(len(places))\n", ""),
    M("parareal", "broken frontier is not named", "if self.tick.frontier and not finite[:, 0].all():", "if False:"),
    # -- Speculative -----------------------------------------------------------------------------------------------
    M("speculative", "everything is accepted", "accepted = np.log(uniforms[:, : log_ratio.shape[1]]) <= log_ratio", "accepted = np.ones(log_ratio.shape, bool)"),
    M("speculative", "rejected noise is not reflected", "coefficient = tested.whitened_offset() - 1", "coefficient = -tested.whitened_offset()"),
    M("speculative", "block decides with the plain ratio", "min(0.0, log_probabilities[-1] + float(ratio))", "min(0.0, float(ratio))"),
    M("speculative", "block's noise is not renewed", "        tested.renew_noise(rejected)\n", ""),
    M("speculative", "residual is drawn from its mode", "share = high - size - 40.0, uniform * mass_below(high, chance, size)", "share = high - size - 40.0, 0.5 * mass_below(high, chance, size)"),
    M("speculative", "rounds go on behind a step without noise", "stops = np.where(local.noise_std == 0, np.arange(1, self.steps + 1), self.steps)", "stops = np.full(self.steps, self.steps)"),
    M("speculative", "proposals have no noise", "added = tested.noise(step).addcmul_(f, factors[1])", "added = (0 * tested.noise(step)).addcmul_(f, factors[1])"),
    # -- batches, runs, failures -----------------------------------------------------------------------------------
    M("batch", "a failed sample ends its batch", "        if self.batch.returns_errors:\n            outputs = self._fail_broken(outputs)\n", ""),
    M("batch", "a failed sample stays active", "            self.active[place] = False\n        return np.asarray(failed)", "        return np.asarray(failed)"),
    M("batch", "failures are forgotten by the next sample of a place too late", "        self.failures.pop(place, None)\n", ""),
    M("batch", "samples that overflow are a success", "        if ended:\n            self.batch.check_results(ended)\n", ""),
    M("batch", "trajectories are kept one state early", "self.accepted[places][:, None] + 1 + offset)", "self.accepted[places][:, None] + offset)"),
    M("batch", "places share a random stream", "self.streams[place] = np.random.default_rng(seeds(generator[place], 1)[0])", "self.streams[place] = np.random.default_rng(0)"),
    M("run", "evaluations are not counted", "        self.evaluations += entry.width\n", ""),
    M("run", "stopped runs go on", "                run.stop(f\"stopped:", "                str(f\"stopped:"),
    M("run", "guess keeps its own start", "    copy[:, 0] = states\n", ""),
    M("run", "outputs are not copied where rows wait", "self.partial[place] = [*parts[:-1], parts[-1].clone()]", "self.partial[place] = [parts[-1].clone()]"),
    M("run", "network may write into the state", "rows = self.tensors.inputs.clone()  # the network may write into its input", "rows = self.tensors.inputs.contiguous()"),
    M("run", "plain loop is not looked at for NaN", "            self._raise_unless_finite(self.largest)\n", "            pass\n"),
    M("stream", "broken stream is at its end", "            self._error = error\n", ""),
    M("stream", "rounds are not filled", "            while more and room > 0:", "            while more and room > self._rows // 2:"),
    M("stream", "places are not used again", "            self._free += [run.slot for run in ended]\n", ""),
    M("stream", "conditions belong to the wrong place", "self._open[number], self._network.conditions[run.slot] = run, condition", "self._open[number] = run\n        self._network.conditions.setdefault(run.slot, condition)"),
    M("executor", "memory errors are raised at once", "                if not out_of_memory(error):\n                    raise\n                self._back_off(size", "                raise\n                self._back_off(size"),
    M("executor", "limit is not halved", "else size // 2", "else size - 1"),
    M("executor", "buckets are not padded", "size = next((bucket for bucket in self.buckets if bucket >= taken), taken)", "size = taken"),
    M("executor", "padding is not cut off", "part.step.numpy())[:taken]", "part.step.numpy())"),
    M("executor", "shapes are not looked at", "    if tuple(outputs.shape) != shape:", "    if False:"),
    M("executor", "dtypes are not looked at", " and outputs.shape == shape and outputs.dtype == dtype:", " and outputs.shape == shape:"),
    # -- stop and resume, files ------------------------------------------------------------------------------------
    M("checkpoint", "states of other solves are taken", "    if differing:\n        texts", "    if False:\n        texts"),
    M("checkpoint", "random stream is not kept", '    if "stream" in about:\n', "    if False:\n"),
    M("checkpoint", "noise drawn anew is not kept", '        state["noise"] = noise[place].flatten(1).clone()', "        pass"),
    M("checkpoint", "history is not kept", "    run.history = [Round(", "    _ = [Round("),
    M("checkpoint", "file is not removed at the end", "                checkpoint.unlink(missing_ok=True)", "                pass"),
    M("checkpoint", "signals end a solver between rounds", "        if self._open:\n            before = ", "        if True:\n            before = "),
    M("checkpoint", "a signal that came between rounds is lost", "            if self._pending:\n                raise KeyboardInterrupt\n            yield", "            yield"),
    M("checkpoint", "Parareal forgets how far it was", "        for tick in islice(self._schedule, self.ticks):", "        for tick in islice(self._schedule, 0):"),
    M("files", "times of a trajectory are not compared", "    if times != sampler.times.tolist():", "    if False:"),
    M("files", "floor may be NaN", "    if not (is_finite(floor) and floor >= 0):", "    if False:"),
    M("files", "preview streak of one is enough", "        return streak >= 2", "        return streak >= 1"),
    M("files", "previews that stand still before the sample count", "streak + 1 if quiet and change <= previous else 0", "streak + 1 if quiet else 0"),
    M("files", "change is absolute", "<= self.bound * float(estimate.norm())", "<= self.bound"),
    M("plain", "a class that nobody named is called", "    if kind is None:\n        raise ValueError(f\"another rank", "    if False:\n        raise ValueError(f\"another rank"),
    M("ranks", "changed weights are looked for once", "AGREE_EVERY = 4", "AGREE_EVERY = 10**9"),
    # -- samplers --------------------------------------------------------------------------------------------------
    M("samplers", "noise is not taken out of the direction", "direction = np.sqrt(np.maximum(sigma_next**2 - noise**2, 0.0))", "direction = sigma_next"),
    M("samplers", "noise has no coefficient", "            noise_std=noise * after,\n", "            noise_std=0 * noise,\n"),
    M("samplers", "scale of the next state is left out", "state_weight=decay * after / self.scale[:-1],", "state_weight=decay,"),
    M("samplers", "slope of Gaussian data has no signal", "alpha**2, sigma**2, alpha / scale", "alpha**2, sigma**2, 1 / scale"),
    M("samplers", "small weights are kept", "row[np.abs(row) < 1e-12 * max(", "row[np.abs(row) < 0 * max("),
    M("samplers", "coarse steps add no noise", "                state = state + added\n", "                pass\n"),
    # -- loops -----------------------------------------------------------------------------------------------------
    M("loops", "recordings that are not finite are fitted", "        raise NotParallelizable(OVERFLOWS)", "        pass"),
    M("loops", "third pass proves nothing", "            if not np.sqrt(((actual - expected) ** 2).mean()) <= bound:\n                return False", "            pass"),
    M("loops", "distance of the replay is left out", "error = solver_estimate + largest_relative_distance(as_runs(solution), as_runs(record.last_state))", "error = solver_estimate"),
    M("loops", "recurrence is not checked in the replay", "return half_good and max(errors) <= 4 * structure.precision", "return True"),
    M("loops", "no margin over the solver's estimate", "ESTIMATE_MARGIN = 2 ", "ESTIMATE_MARGIN = 0.002 "),
    M("loops", "replay above the tolerance is accepted", "        good = estimate <= allowed\n", "        good = True\n"),
    M("loops", "guidance weights are equal", "weights.append(largest_use / total if", "weights.append(equal_parts if"),
    M("loops", "no longer memory is tried", "LAGS = 12 ", "LAGS = 0 "),
    M("loops", "layouts are not compared", "        if distance != 0:  # or not a number", "        if False:"),
    # -- command line ----------------------------------------------------------------------------------------------
    M("cli", "all samples have one seed", "manual_seed(seed + index)", "manual_seed(seed)"),
    M("cli", "added noise has the seed of the first noise", "_generators(self.wanted.seed + NOISE_SEED, self.wanted.count)", "_generators(self.wanted.seed, self.wanted.count)"),
]  # fmt: skip


class Cases:
    """Keeps some cases of each parametrized test, spread over all of them; notes how long each takes, and what fails.

    Args:
        count: Of cases of a test.
        chosen: Node ids, in the order in which they are run; None for all.
        entered: Called with the id of each test before it runs.
    """

    def __init__(self, count: int, chosen: Sequence[str] | None, entered: Callable[[str], None] | None) -> None:
        self.count, self.chosen, self.entered, self.failed = count, chosen, entered, ""
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Drop the others."""
        if self.chosen is not None:
            of_id = {item.nodeid: item for item in items}
            items[:] = [of_id[name] for name in self.chosen if name in of_id]
            return
        of_test: dict[str, list[Any]] = {}
        for item in items:
            if self.count != CASES or not any(word in item.nodeid for word in SLOW):
                of_test.setdefault(item.nodeid.split("[")[0], []).append(item)
        # An odd part of the cases, so that products of parameters are not met at the same one each time.
        items[:] = [case for cases in of_test.values() for case in cases[:: -(-len(cases) // self.count) | 1]]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        """Say what runs, and take its time."""
        if self.entered is not None:
            self.entered(item.nodeid)
        began = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - began
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the test that fails."""
        if report.failed:
            self.failed = self.failed or report.nodeid


class Tests(NamedTuple):
    """Some tests, and how long they may take: seconds of the processor, as other work may slow the machine down."""

    files: Sequence[str]
    chosen: Sequence[str] | None = None
    cases: int = MORE_CASES
    seconds: int = 600


def run_tests(tests: Tests, cases: Cases, folder: str) -> int:
    """Run tests on a copy of the package, in this process, until one fails."""
    for name in [name for name in sys.modules if name.split(".")[0] == "parataxis"]:
        sys.exit(f"{name} is loaded already: the copy would not be tested.")
    sys.path[:0] = [folder, str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT / "tests")])
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they would say that they cannot be rewritten any more
    os.chdir(ROOT)
    stop = ["-x"] if cases.entered is None else []
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        return int(pytest.main([*stop, "-q", "-p", "no:cacheprovider", *tests.files], plugins=[cases]))


def in_fork(work: Callable[[Any], None], seconds: int) -> Any:
    """Return what ``work`` sends, ``"timeout"``, or None if its process ended without a word."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def limited(results: Any) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        work(results)

    process = fork.Process(target=limited, args=(results,))
    process.start()
    end = time.monotonic() + 10 * seconds  # it may also wait for something that does not come
    # Read while it works: a long answer does not fit into the pipe.
    while process.is_alive() and results.empty() and time.monotonic() < end:
        process.join(0.05)
    answer = results.get() if not results.empty() else "timeout" if process.is_alive() else None
    if answer == "timeout":
        process.kill()
    process.join()
    return "timeout" if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) else answer


def first_failure(folder: Path, tests: Tests) -> str:
    """Return the test that fails on a copy of the package, ``timeout``, or nothing."""

    def work(results: Any) -> None:
        cases = Cases(tests.cases, tests.chosen, None)
        code = run_tests(tests, cases, str(folder))
        results.put((code, cases.failed))

    answer = in_fork(work, tests.seconds)
    if answer == "timeout":
        return "timeout"
    if answer is None:
        return "crash"
    code, failed = answer
    if code not in (0, 1, 2, 5):  # 5: no test was chosen
        sys.exit(f"{tests} could not be run: pytest ended with {code}.")
    return failed or ("import" if code == 2 else "" if code in (0, 5) else "session")


@cache
def passes_unbroken(test: str) -> bool:
    """Return whether a test passes on the package as it is: else it would notice everything."""
    return first_failure(PACKAGE.parent, Tests([test.split("::")[0]], [test])) == ""


class Executed:
    """What test executes what line of the package."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.seconds: dict[str, float] = known["seconds"]
        self.lines: dict[str, dict[str, list[int]]] = known["lines"]
        self.names = list(self.seconds)

    @classmethod
    def of_package(cls) -> Executed:
        """Return it from the file, or trace all tests."""
        key = hashlib.sha256()
        for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
            key.update(path.read_bytes())
        if KEPT.exists():
            known = json.loads(KEPT.read_text())
            if known["key"] == key.hexdigest():
                return cls(known)

        def work(results: Any) -> None:
            # sysmon, the default of late Pythons, has no contexts.
            trace = coverage.Coverage(data_file=None, source=[str(PACKAGE)], config_file=False)
            trace.start()
            cases = Cases(CASES, None, trace.switch_context)
            run_tests(Tests([f"tests/{name}" for name in TRACED]), cases, str(PACKAGE.parent))
            trace.stop()
            number = {name: i for i, name in enumerate(cases.seconds)}
            lines = {
                str(Path(file).relative_to(PACKAGE)): {
                    str(line): [number[name] for name in names if name in number]
                    for line, names in trace.get_data().contexts_by_lineno(file).items()
                }
                for file in trace.get_data().measured_files()
            }
            results.put({"seconds": cases.seconds, "lines": lines})

        known = in_fork(work, 1800)
        if not isinstance(known, dict):
            sys.exit(f"the tests could not be traced: {known}.")
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps({"key": key.hexdigest(), **known}))
        return cls(known)

    def tests(self, file: Path, line: str) -> list[str]:
        """Return the tests that execute a line: of each test the fastest case, then the next, the fast ones first."""
        places = [(file, line)]
        constant = re.match(r"([A-Z_]+) = ", line)
        if constant is not None:  # it is executed where it is used
            word = re.compile(rf"\b{constant[1]}\b")
            for path in PACKAGE.rglob("*.py"):
                places += [(path, use) for use in path.read_text().split("\n") if word.search(use)]
        found: set[int] = set()
        for path, text in places:
            whole = path.read_text()
            first = whole[: whole.index(text)].count("\n") + 1
            for number in range(first, first + text.strip("\n").count("\n") + 1):
                found.update(self.lines.get(str(path.relative_to(PACKAGE)), {}).get(str(number), ()))
        ordered = sorted((self.names[number] for number in found), key=lambda name: self.seconds[name])
        cases: dict[str, int] = {}
        ranked = []
        for name in ordered:
            test = name.split("[")[0]
            cases[test] = cases.get(test, 0) + 1
            ranked.append((cases[test], self.seconds[name], name))
        chosen = [name for _, _, name in sorted(ranked)]
        total = np.cumsum([self.seconds[name] for name in chosen])
        return [name for name, until in zip(chosen, total, strict=True) if until <= ENOUGH or name == chosen[0]]


def place(line: str) -> Path:
    """Return the only file of the package in which this stands, or raise."""
    files = [path for path in PACKAGE.rglob("*.py") if line in path.read_text()]
    if len(files) != 1 or files[0].read_text().count(line) != 1:
        raise LookupError(
            f"a mutation must stand in one place, this one is in {[str(path) for path in files]}: {line!r}"
        )
    return files[0]


def killer(folder: Path, tests: Tests) -> str:
    """Return the test that fails on a copy of the package and passes on the package as it is, or nothing."""
    for _ in range(3):
        by = first_failure(folder, tests) if tests.files else ""
        # What does not end is compared with the same tests on the package as it is.
        if not by or (passes_unbroken(by) if "::" in by else not first_failure(PACKAGE.parent, tests)):
            return by
        if tests.chosen is None or by not in tests.chosen:
            break
        tests = tests._replace(chosen=[name for name in tests.chosen if name != by])  # one that depends on the load
    sys.exit(f"{by} fails on the package as it is: mend that first.")


def mutate(mutation: Mutation, executed: Executed, *, quick: bool) -> dict[str, Any]:
    """Return the line of the table for a mutation."""
    file, began = place(mutation.line), time.monotonic()
    names = executed.tests(file, mutation.line)
    estimate = sum(executed.seconds[name] for name in names)
    # Slower than three times what they take else: it does not end.
    stages = [Tests(sorted({name.split("::")[0] for name in names}), names, CASES, int(3 * estimate) + 30)]
    if not quick:
        stages.append(Tests([f"tests/{name}" for name in FILES[mutation.suite].split()]))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / "parataxis")  # with what is compiled
        target = Path(folder) / "parataxis" / file.relative_to(PACKAGE)
        target.write_text(file.read_text().replace(mutation.line, mutation.becomes))
        by = ""
        for tests in stages:
            by = killer(Path(folder), tests)
            if by:
                break
    return {
        "mutation": mutation.name,
        "file": str(file.relative_to(PACKAGE)),
        "line": mutation.line.strip().split("\n")[0][:80],
        "becomes": mutation.becomes.strip().split("\n")[0][:80],
        "killed": int(bool(by)),
        "by": by.split("[")[0].removeprefix("tests/"),
        "seconds": f"{time.monotonic() - began:.0f}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what is not in the table yet; return how many survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="mutations of one suite, or whose name has this word")
    parser.add_argument("--quick", action="store_true", help="leave survivors of the traced tests for another run")
    parser.add_argument("--check", action="store_true", help="only see that every mutation has its place")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sys.dont_write_bytecode = False
    compileall.compile_dir(PACKAGE, quiet=1)
    chosen = [m for m in MUTATIONS if options.only in m.name or options.only == m.suite]
    for mutation in chosen:
        place(mutation.line)
    if options.check:
        return 0
    known: dict[str, bool] = {}
    if options.out.exists():
        with options.out.open() as file:
            known = {line["mutation"]: line["killed"] == "1" for line in csv.DictReader(file)}
    executed = Executed.of_package()
    with options.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not known:
            table.writeheader()
        for mutation in chosen:
            if mutation.name in known:
                continue
            line = mutate(mutation, executed, quick=options.quick)
            if line["killed"] or not options.quick:
                table.writerow(line)
                file.flush()
                known[mutation.name] = bool(line["killed"])
            verdict = "killed" if line["killed"] else "SURVIVES"
            print(f"{verdict}  {mutation.name}  {line['by']}  {line['seconds']} s", flush=True)
    return sum(not killed for killed in known.values())


if __name__ == "__main__":
    sys.exit(main())
