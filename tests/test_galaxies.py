"""The networks of galaxies: a file is read as its network writes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import galaxies


def arrays(size, generator):
    """Yield arrays of the shapes that a file for images of this size holds."""
    patches = (size // 4) ** 2
    block = [(8, patches), (8,), (patches, 8), (patches,), (8, 6), (8,), (6, 8), (6,)]
    block += [(6, patches), (6, patches), (patches, 6), (patches, 6)]
    shapes = [(6, 2, 4, 4), (6, 1, 1), (1, 6, 4, 4), (1, 1, 1), *block * 4, (6, patches), (6, patches)]
    yield from (torch.from_numpy(generator.standard_normal(shape).astype(np.float32) / 4) for shape in shapes)
    yield torch.tensor(10.0, dtype=torch.float64)


def test_a_file_gives_the_network_whose_arrays_it_holds(tmp_path):
    """Arrays written one after another are read in order, all of them, and every patch is its own."""
    written = list(arrays(12, np.random.default_rng(0)))
    with (tmp_path / "net.eqx").open("wb") as file:
        for array in written:
            np.save(file, array.numpy())
    read = galaxies.arrays_of(tmp_path / "net.eqx")
    network = galaxies.ScoreNet(read)
    assert next(read, None) is None
    x = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    score = network(x, torch.tensor([0.1, 1.0, 9.0]))
    assert score.shape == x.shape
    assert network.longest == 10
    assert torch.allclose(network(x[1:2], torch.tensor([1.0])), score[1:2], atol=1e-5)  # rows do not mix
    # Without mixing, a patch of the output is the transposed kernel, the right way round, times the patch's channels.
    with torch.no_grad():
        for parameter in network.blocks.parameters():
            parameter.zero_()
        patch = written[0].flatten(1) @ torch.cat([x, torch.full_like(x, 0.1)], 1)[0, :, :4, :4].flatten()
        y = torch.nn.functional.conv2d(torch.cat([x, torch.full_like(x, 0.1)], 1), written[0], written[1].flatten(), 4)
        assert torch.allclose(patch + written[1].flatten(), y[0, :, 0, 0], atol=1e-4)
        y = torch.nn.functional.layer_norm(y.flatten(2), y.flatten(2).shape[1:], written[-3], written[-2])
        flipped = torch.einsum("c,chw->hw", y[0, :, 0], written[2][0]).flip(0, 1) + written[3].item()
        assert torch.allclose(network(x, torch.ones(3))[0, 0, :4, :4], flipped, atol=1e-5)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(galaxies, "available", list)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps galaxygrad==0\.1\.9"):
        galaxies.load("hsc-32")
