"""Image grids, figures, and results in notebooks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import parataxis as px
from parataxis import html, plots
from parataxis.denoisers import mixture


def test_grids_refuse_what_is_no_picture():
    with pytest.raises(ValueError, match=r"images must be \(B, 1 or 3, height, width\), got \(2, 5\)"):
        plots.image_grid(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="no round to show"):
        plots.trace_grid([])
    assert plots.image_grid(torch.zeros(5, 3, 4, 6), columns=3, zoom=1).size == (3 * 7 - 1, 2 * 5 - 1)


def solved(**options):
    network = mixture(dim=8).network(px.vp())
    noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    return px.sample(network, noise, px.samplers.ddim(steps=12), px.Secant(window=4), **options)


def texts(figure):
    """Return all text of a figure: titles, labels and legends."""
    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_result_is_plotted_in_one_call():
    result = solved()
    for figure in (result.plot(), result.plot(1), result[0].plot(), plots.rounds(result)):
        said = texts(figure)
        for part in ("Secant, window 4", "rounds for 12 steps", "accepted", "tolerance", "measured by parataxis"):
            assert part in said
    assert plots.figure_image(result.plot()).size == (700, 400)


def test_raster_shows_what_was_evaluated():
    solution = solved()[0]
    [image] = solution.plot().axes[0].get_images()
    raster = image.get_array().T
    assert raster.shape == (solution.rounds, 12)
    assert (raster == 1).sum() == solution.evaluations


def test_residuals_are_those_of_the_recurrence():
    """The first round starts from scaled noise: its residuals follow from one call of the network at each step."""
    network, sampler = mixture(dim=8).network(px.vp()), px.samplers.ddim(steps=6)
    noise = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = px.sample(network, noise, sampler, px.Secant(), keep_residuals=True)[0]
    local = sampler.coefficients
    states = noise * torch.from_numpy(local.rms / local.rms[0])[:, None]
    outputs = network(states[:-1], sampler.network_times(torch.float64))
    weight, gain = (torch.from_numpy(part).reshape(6, 1) for part in (local.state_weight, local.output_weight))
    residuals = weight * states[:-1] + gain * outputs - states[1:]
    expected = residuals.norm(dim=1) / (torch.from_numpy(local.rms[1:]) * 8**0.5)
    assert solution.residuals.shape == (solution.rounds, 6)
    torch.testing.assert_close(torch.from_numpy(solution.residuals[0]), expected)


def test_residuals_of_a_window_fall_where_they_are_evaluated():
    solution = solved(keep_residuals=True)[1]
    known = ~np.isnan(solution.residuals)
    for row, entry in zip(known, solution.history, strict=True):
        assert np.flatnonzero(row).tolist() == list(range(entry.accepted, entry.accepted + entry.width))
    assert solved()[1].residuals is None
    plain = px.sample(
        mixture(dim=8).network(px.vp()), torch.randn(1, 8), px.samplers.ddim(steps=4), "sequential", keep_residuals=True
    )
    assert plain[0].residuals is None  # nothing to correct


def test_map_of_residuals_has_its_unit():
    figure = solved(keep_residuals=True).plot()
    assert "residual / state" in texts(figure)
    assert len(figure.axes[0].get_images()) == 2


def test_run_without_rounds_cannot_be_plotted():
    with pytest.raises(ValueError, match="there is no round to show"):
        plots.rounds(replace(solved()[0], history=()))


def test_latency_and_work_precision_have_units():
    curve = px.Latency((1, 2, 4), (1e-3, 1.1e-3, 2e-3))
    assert "milliseconds" in texts(plots.latency(curve))
    figure = plots.work_precision({"a": [(3, 1e-2), (4, 1e-3)], "b": [(2, 0.0)]}, "rounds")
    assert "rounds" in texts(figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a"]
    with pytest.raises(ValueError, match="no curve to show"):
        plots.work_precision({})


def test_results_read_well_in_a_notebook():
    result = solved()
    assert "rounds" in result._repr_html_()
    assert "estimated error" in result[0]._repr_html_()
    assert "not run yet" in px.Report()._repr_html_()
    assert "<b>" not in html.figures("<b>x</b>", [("<i>", "<u>")]).replace("<b>&lt;b&gt;x&lt;/b&gt;</b>", "")
