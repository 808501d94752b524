"""Every block of Python in the documentation runs, and every link to a file leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ksamplers
import parataxis as px
from parataxis.denoisers import mixture

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# A block is left out by a comment before it that gives the reason: <!-- not run: needs two GPUs -->
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)


class Policy(torch.nn.Module):
    """A small network of trajectories."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x, t, observation=None):
        return 0.5 * x + 0.1 * torch.tanh(self.layer(x))


def k_diffusion() -> dict:
    """Return a sampler in k-diffusion's signature and what it is called with."""

    def model(x, sigma, cond=None):
        return x / (1 + sigma[:, None] ** 2)

    sigmas = torch.cat([torch.linspace(10, 0.1, 10), torch.zeros(1)])
    x = 10 * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    names = {"model": model, "x": x, "sigmas": sigmas, "cond": None, "preview": lambda state: None}
    return {**names, "sample_dpmpp_sde": ksamplers.dpmpp_sde}


def prepared(page: str) -> dict:
    """Return what the blocks of a page take for given: "your" network, noise, pipeline."""
    generator = torch.Generator().manual_seed(0)
    if page == "robots":
        from diffusers import DDPMScheduler

        network = Policy().requires_grad_(False)
        scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
        scheduler.set_timesteps(10)

        class Robot:
            model = network

            def predict_action(self, observation):
                x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
                for t in scheduler.timesteps:
                    x = scheduler.step(self.model(x, t), t, x).prev_sample
                return x

        known, mask = torch.zeros(1, 8, 4), torch.zeros(1, 8, 4, dtype=torch.bool)
        names = {"network": network, "horizon": 8, "dim": 4, "observation": torch.zeros(1, 2)}
        return {
            **names,
            "known": known,
            "mask": mask,
            "policy": Robot(),
            "scheduler": scheduler,
            "generator": generator,
        }
    network, sampler = mixture(dim=16).network(px.vp()), px.samplers.ddim(steps=12)

    class Network(torch.nn.Module):
        def forward(self, x, t):
            return network(x, t.expand(len(x)) if t.ndim == 0 else t)

    module = Network()

    def draw(batch, steps):
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(steps)
        x = torch.randn(batch, 16, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(module(x, t.repeat(batch)), t, x).prev_sample
        return x

    noise = torch.randn(2, 16, generator=generator)
    return {
        "network": module if page == "pipelines" else network,
        "noise": noise,
        "sampler": sampler,
        "draw": draw,
        "batch": 2,
        "steps": 12,
        "jobs": [px.Job(noise[0])],
        "prompts": None,
        "save": lambda number, x: None,
        **k_diffusion(),
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_of_a_page_runs(path, monkeypatch, tmp_path, capsys):
    """The blocks of a page run in its order, one after another in the same module."""
    blocks = [(bool(skipped), code) for skipped, code in BLOCK.findall(path.read_text())]
    if not blocks:
        pytest.skip("this page has no Python")
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "px": px, "__name__": path.stem}
    for skipped, code in blocks:
        if not skipped:
            names |= prepared(path.stem)
            exec(compile(code, path.name, "exec"), names)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_of_a_page_lead_to_files(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"https?:|mailto:", target):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path, capsys):
    """The cells of a notebook run in their order."""
    import json

    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text())["cells"]
    names = {"__name__": path.stem}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "notebooks are kept without outputs"
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
