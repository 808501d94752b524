"""The table: its two forms agree, and the response is the answer to its question."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from parataxis.arrays import Read, packed, unpacked, uploads
from parataxis.engine import solve
from parataxis.samplers.coefficients import Coefficients
from parataxis.samplers.recurrence import Part, Recurrence, Response

NAMES = list(px.SAMPLERS)


def affine(table, states, outputs, slopes):
    """Roll the loop forward with each output f_q + d_q (u - u_q): the response, the slow way."""
    local = table.coefficients
    new = [states[0]]
    models = []
    for i in range(local.steps):
        models.append(outputs[i] + slopes[i] * (new[i] - states[i]))
        row = local.state_weight[i] * new[i]
        for lag in range(min(local.lags, i) + 1):
            row = row + local.output_weight[i, lag] * models[i - lag]
        new.append(row if table.noise is None else row + table.noise[0, i])
    return torch.stack(new), torch.stack(models)


def made(name, points=12):
    sampler = problems.sampler(name, points)
    table = sampler.recurrence(problems.noise(1), problems.generators(1))
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(sampler.steps + 1, problems.DIM, generator=generator, dtype=torch.float64)
    outputs = torch.randn(sampler.steps, problems.DIM, generator=generator, dtype=torch.float64)
    slopes = torch.rand(sampler.steps, generator=generator, dtype=torch.float64).numpy()
    states[0] = table.start[0]
    return sampler, table, states, outputs, slopes


@pytest.mark.parametrize("name", NAMES)
def test_dense_and_local_forms_are_the_same_loop(name):
    sampler, table, _, outputs, _ = made(name)
    _, weight = sampler.coefficients.dense()
    dense = table.base()[0] + torch.from_numpy(weight) @ outputs
    local, _ = affine(table, dense, outputs, np.zeros(sampler.steps))
    assert torch.allclose(dense, local, rtol=1e-10)
    assert table.residual(dense[None], outputs[None]).abs().max() <= 1e-10 * dense.abs().max()
    assert np.allclose(np.triu(weight), 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_table_has_the_local_form_it_came_from(name):
    sampler, table, _, outputs, _ = made(name)
    _, weight = sampler.coefficients.dense()
    again = Recurrence.from_dense(weight, table.base())
    # A_i is found where earlier outputs enter; the first steps and Heun's alternation need not have a single lag.
    assert again.coefficients.lags >= sampler.coefficients.lags or sampler.coefficients.lags == 1
    restored = again.base()[0] + torch.from_numpy(again.coefficients.dense()[1]) @ outputs
    expected = table.base()[0] + torch.from_numpy(weight) @ outputs
    assert torch.allclose(restored, expected, rtol=1e-8, atol=1e-10)
    if sampler.coefficients.lags == 0:
        assert again.coefficients.lags == 0
        assert np.allclose(again.coefficients.state_weight[1:], sampler.coefficients.state_weight[1:], rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_gain_is_the_effect_of_each_output_on_the_sample(name):
    sampler, table, states, outputs, slopes = made(name)
    gain = sampler.coefficients.gain(slopes)
    new, _ = affine(table, states, outputs, slopes)
    for point in (0, 5, sampler.steps - 1):
        pushed = outputs.clone()
        pushed[point] += 1.0
        moved, _ = affine(table, states, pushed, slopes)
        assert torch.allclose(moved[-1] - new[-1], torch.full_like(new[-1], gain[point]), rtol=1e-8, atol=1e-10)


def done(work, like):
    """Return the result of a table's work, which is given what it needs on the device."""
    return solve._finish(work, uploads(next(work), like), like)


def answered(work, like):
    """Return the answers of a table, read from the device where they are still there."""
    response = done(work, like)
    return response.answers(response.numbers.numpy()) if isinstance(response, Read) else response


@pytest.mark.parametrize(("first", "stop", "last"), [(0, 11, 11), (3, 8, 8), (3, 6, 9), (2, 3, 11), (4, 5, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_the_response_is_the_trajectory_of_the_affine_outputs(name, first, stop, last):
    _, table, states, outputs, slopes = made(name)
    lags = table.coefficients.lags
    # Points before the first are settled: their outputs are final, and the first state follows from them.
    flat = slopes.copy()
    flat[:first] = 0.0
    settled, _ = affine(table, states, outputs, np.zeros_like(slopes))
    states[: first + 1] = settled[: first + 1]
    # Points behind the last one evaluated answer with its affine model.
    for point in range(stop, table.coefficients.steps):
        states[point], outputs[point], flat[point] = states[stop - 1], outputs[stop - 1], flat[stop - 1]
    expected, models = affine(table, states, outputs, flat)
    rows = torch.cat([states, outputs, torch.zeros(40, problems.DIM, dtype=torch.float64)])
    count, points = len(states), np.arange(first, stop)
    measure = last == stop
    into = len(states) + len(outputs) + np.arange(last - first)
    finals = len(states) + len(outputs) + 20 + np.arange(len(points))
    response = Response(
        start=first,
        states=np.arange(first, stop + measure),
        outputs=count + points,
        slopes=slopes[first:stop],
        first=first + 1,
        into=into,
        history=count + np.maximum(np.arange(first - lags, first), 0),
        finals=finals if lags else None,
        measure=measure,
    )
    [norms] = answered(table.respond(rows, [Part(0, 0, response)]), rows)
    assert torch.allclose(rows[into], expected[first + 1 : last + 1], rtol=1e-9, atol=1e-10)
    if lags:
        assert torch.allclose(rows[finals], models[first:stop], rtol=1e-9, atol=1e-10)
    if measure:
        old = states[first + 1 : last + 1]
        assert np.allclose(norms[:, 0], (rows[into] - old).square().sum(1).numpy())


def responses():
    """Return a table, a memory and Responses of different lengths."""
    sampler = problems.sampler("ddpm", 20)
    table = sampler.recurrence(problems.noise(3), problems.generators(3))
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3 * 60 + 1, problems.DIM, generator=generator, dtype=torch.float64)
    parts = []
    for b, (first, stop) in enumerate([(0, 8), (5, 20), (19, 20)]):
        states, outputs = np.arange(stop - first + 1), 20 + np.arange(stop - first)
        slopes = np.full(stop - first, 0.3)
        into = 40 + np.arange(stop - first)
        none = np.zeros(0, np.int64)
        parts.append(Part(b, 60 * b, Response(first, states, outputs, slopes, first + 1, into, none)))
    return table, memory, parts


def test_responses_of_different_lengths_are_answered_together_as_alone():
    table, memory, parts = responses()
    together, alone = memory.clone(), memory.clone()
    answers = answered(table.respond(together, parts), together)
    for part, answer in zip(parts, answers, strict=True):
        [single] = answered(table.respond(alone, [part]), alone)
        assert np.allclose(single, answer, rtol=1e-12)
    assert torch.allclose(together[:-1], alone[:-1], rtol=1e-12)


@pytest.mark.parametrize("kept", [True, False])
def test_a_response_may_be_measured_before_its_slopes_are_known(kept):
    table, memory, parts = responses()
    whole, halved = memory.clone(), memory.clone()
    expected = answered(table.respond(whole, parts), whole)
    asked = [part._replace(response=part.response._replace(slopes=None)) for part in parts]
    steps = done(table.steps(halved, asked), halved)
    assert torch.equal(halved, memory)
    measured = steps.measured()
    grams = measured.answers(measured.numbers.numpy())
    assert [gram.shape for gram in grams] == [(9, 9), (16, 16), (2, 2)]
    known = [part._replace(response=part.response._replace(gram=gram)) for part, gram in zip(parts, grams, strict=True)]
    norms = done(table.respond(halved, known, steps if kept else None), halved)
    assert isinstance(norms, list)  # nothing is left to be read
    for one, other in zip(norms, expected, strict=True):
        assert np.allclose(one, other, rtol=1e-12)
    assert torch.equal(halved[:-1], whole[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_response_is_answered_chunk_by_chunk_as_at_once(monkeypatch, name):
    sampler = problems.sampler(name, 40)
    table = sampler.recurrence(problems.noise(2), problems.generators(2))
    memory = torch.randn(2 * 130 + 1, problems.DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = []
    for b, (first, stop) in enumerate([(0, sampler.steps), (11, 36)]):
        points, states = np.arange(stop - first), np.arange(stop - first + 1)
        slopes = -0.4 + 0.8 * np.random.default_rng(b).random(stop - first)
        history = 120 + np.arange(sampler.coefficients.lags)
        ask = Response(first, states, 42 + points, slopes, first + 1, 84 + points, history, origin=125)
        parts.append(Part(b, 130 * b, ask))
    whole, chunked = memory.clone(), memory.clone()
    expected = answered(table.respond(whole, parts), whole)
    monkeypatch.setattr("parataxis.samplers.recurrence.CHUNK", 7)
    found = answered(table.respond(chunked, parts), chunked)
    assert torch.allclose(chunked[:-1], whole[:-1], rtol=1e-9, atol=1e-10)
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(one, other, rtol=1e-9)


def test_what_goes_to_a_device_in_one_copy_comes_out_as_it_was():
    arrays = [np.arange(5), np.zeros((0, 3)), np.linspace(0, 1, 6).reshape(2, 3), np.zeros(0, np.int64), np.ones(3)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = unpacked(torch.from_numpy(packed(arrays)), arrays, dtype)
        for tensor, plain in zip(found, uploads(arrays, torch.zeros(1, dtype=dtype)), strict=True):
            assert tensor.dtype == plain.dtype
            assert torch.equal(tensor, plain)
    assert unpacked(torch.from_numpy(packed([])), [], torch.float32) == []


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "flow_euler"])
def test_a_hop_of_one_step_is_the_step_and_a_perfect_hop_is_many(name):
    sampler, table, states, outputs, _ = made(name)
    stepped = table.step(states[None], outputs[None])[0]
    for i in (0, 4, sampler.steps - 1):
        hop = table.coarse_step(i, i + 1, states[None, i], outputs[None, i])
        assert torch.allclose(hop[0], stepped[i], rtol=1e-9, atol=1e-12)
    # A network whose data prediction is constant: one hop is the whole way.
    local = sampler.coefficients
    data = torch.randn(problems.DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = table.start[0]
    for i in range(sampler.steps):
        f = (data - local.x0_from_input[i] * x) / local.x0_from_output[i]
        x = table.step(x.expand(1, sampler.steps + 1, -1), f.expand(1, sampler.steps, -1))[0, i]
    f = (data - local.x0_from_input[0] * table.start[0]) / local.x0_from_output[0]
    assert torch.allclose(table.coarse_step(0, sampler.steps, table.start, f[None])[0], x, rtol=1e-8)


def test_hops_of_multistep_tables_or_backwards_are_refused():
    _, table, states, outputs, _ = made("dpmpp_2m")
    with pytest.raises(ValueError, match="multistep"):
        table.coarse_step(0, 3, states[None, 0], outputs[None, 0])
    _, table, states, outputs, _ = made("ddim")
    with pytest.raises(ValueError, match="forward"):
        table.coarse_step(3, 3, states[None, 0], outputs[None, 0])


def test_what_is_not_a_table_is_named():
    with pytest.raises(ValueError, match="strictly lower triangular"):
        Coefficients.from_dense(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"\(N, L\)"):
        Coefficients(np.ones(3), np.ones((2, 1)), np.zeros(3))
    with pytest.raises(ValueError, match="weight of step 1 is not finite"):
        Coefficients(np.ones(2), np.array([[1.0], [np.inf]]), np.zeros(2))
    local = Coefficients(np.ones(3), np.ones((3, 1)), np.zeros(3))
    with pytest.raises(ValueError, match=r"noise must have the shape .*\(2, 3, 5\)"):
        Recurrence(local, torch.zeros(2, 5), torch.zeros(2, 4, 5))
