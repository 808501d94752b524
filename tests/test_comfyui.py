"""The ComfyUI nodes, on what ComfyUI documents."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ksamplers import (
    SAMPLERS,
    SHAPE,
    SIGMAS_20,
    both,
    dpmpp_2m,
    dpmpp_sde,
    euler,
    model,
    noise,
    relative,
)
from parataxis import kdiffusion


class Base(torch.nn.Module):
    """The model itself, which stays while guiders come and go."""

    model_sampling = SimpleNamespace(noise_scaling=lambda sigma, x: sigma * x)


BASE = Base()


class Guider:
    """Chooses the conditionings of a call by the sigma of its first row, as ComfyUI does."""

    def __init__(self, cfg=2.0, **conds):
        self.conds, self.cfg = conds, cfg
        self.inner_model = BASE
        self.sigmas = []  # of the rows of every call

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.sigmas.append(sigma.tolist())
        positive, negative = (self.predict(self.conds[name], x, sigma) for name in ("positive", "negative"))
        denoised = negative + self.cfg * (positive - negative)
        for hear in (model_options or {}).get("sampler_post_cfg_function", ()):
            denoised = hear({"denoised": denoised, "sigma": sigma, "input": x})
        return denoised

    def predict(self, conds, x, sigma):
        total, count = torch.zeros_like(x), 0
        for cond in conds:
            if sigma[0] > cond.get("timestep_start", float("inf")) or sigma[0] < cond.get("timestep_end", 0.0):
                continue
            shift = cond["shift"].repeat(-(-len(x) // len(cond["shift"])))[: len(x)]
            denoised = model(x, sigma, shift)
            if "control" in cond:
                denoised = denoised + cond["control"].get_control(sigma)
            total, count = total + denoised, count + 1
        return total / count


class Control:
    """Adds something within a range of sigmas, on top of another."""

    def __init__(self, first, last, previous=None):
        self.timestep_range, self.previous_controlnet = (first, last), previous

    def get_control(self, sigma):
        before = self.previous_controlnet.get_control(sigma) if self.previous_controlnet else 0.0
        return before + (0.3 if self.timestep_range[1] <= sigma[0] <= self.timestep_range[0] else 0.0)


class Inpaint:
    """Keeps what a mask keeps, with one image and one noise a sample."""

    def __init__(self, guider, sigmas):
        self.inner_model, self.sigmas = guider, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        if denoise_mask is not None:
            kept = self.latent_image + self.noise * sigma.view(-1, *[1] * (x.ndim - 1))
            x = x * denoise_mask + kept * (1 - denoise_mask)
        denoised = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if denoise_mask is not None:
            denoised = denoised * denoise_mask + self.latent_image * (1 - denoise_mask)
        return denoised


class KSampler:
    """A SAMPLER."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function = sampler_function
        self.extra_options, self.inpaint_options = extra_options or {}, inpaint_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None):
        seen = Inpaint(guider, sigmas)
        seen.latent_image, seen.noise = latent_image, noise
        extra_args = {**extra_args, "denoise_mask": denoise_mask}
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise)
        steps = len(sigmas) - 1

        def tell(told):
            if callback is not None:
                callback(told["i"], told["denoised"], told["x"], steps)

        return self.sampler_function(
            seen, x, sigmas, extra_args=extra_args, callback=tell, disable=True, **self.extra_options
        )


def guider(**more):
    """Two prompts that take turns, one over all steps, and a negative one."""
    here = float(SIGMAS_20[9]) + 0.01
    return Guider(
        positive=[
            {"shift": torch.tensor([1.0]), "timestep_start": 999999999.9, "timestep_end": here},
            {"shift": torch.tensor([-1.0]), "timestep_start": here, "timestep_end": 0.0, **more},
            {"shift": torch.tensor([0.3])},
        ],
        negative=[{"shift": torch.tensor([0.0]), "timestep_end": float(SIGMAS_20[13]), "timestep_start": 999999999.9}]
        + [{"shift": torch.tensor([0.1]), "timestep_start": float(SIGMAS_20[13])}],
    )


def sides(sigmas, boundaries):
    return {tuple((sigma > b) - (sigma < b) for b in boundaries) for sigma in sigmas}


def test_steps_on_different_sides_of_a_boundary_never_share_a_call():
    loud = guider()
    boundaries = [float(SIGMAS_20[9]) + 0.01, float(SIGMAS_20[13])]
    for loop in (euler, dpmpp_2m, dpmpp_sde):
        expected, x, run = both(loop, loud, tolerance=0, boundaries=lambda model, extra_args: boundaries)
        assert relative(x, expected) <= 1e-5
        assert run.report.peak_rows > 3
        for sigmas in loud.sigmas:
            assert len(sides(sigmas, boundaries)) == 1


def test_model_that_looks_at_its_first_row():
    """A model that looks at its first row and names no boundary runs sequentially and says so."""
    loud = guider()
    run = kdiffusion.parallel(euler)
    expected = euler(loud, noise(), SIGMAS_20)
    for most in (40, 20):
        loud.sigmas.clear()
        with pytest.warns(RuntimeWarning, match=r"runs sequentially: .*read only the first timestep"):
            x = run(loud, noise(), SIGMAS_20, disable=True)
        assert torch.equal(x, expected)
        assert len(loud.sigmas) <= most


@pytest.fixture
def package(monkeypatch):
    """The nodes, with the parts of ComfyUI that they use."""
    comfy = types.ModuleType("comfy")
    comfy.model_management = types.ModuleType("comfy.model_management")
    comfy.utils = types.ModuleType("comfy.utils")
    comfy.model_management.throw_exception_if_processing_interrupted = lambda: None
    comfy.shown, comfy.previews = [], []

    class ProgressBar:
        def __init__(self, total, node_id=None):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            comfy.shown.append((value, total))
            comfy.previews.append(preview)

    comfy.utils.ProgressBar = ProgressBar
    preview = types.ModuleType("latent_preview")
    previewer = SimpleNamespace(decode_latent_to_preview_image=lambda kind, x0: (kind, x0.clone()))
    preview.get_previewer = lambda device, latent_format: previewer if latent_format == "tiny" else None
    latest = types.ModuleType("comfy_api.latest")
    latest.ComfyExtension = type("ComfyExtension", (), {})
    latest.io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **fields: SimpleNamespace(**fields),
        NodeOutput=lambda *values, ui=None: SimpleNamespace(result=values, ui=ui),
        **{name: kind(name) for name in ("Sampler", "Int", "Float", "Combo", "Latent", "String")},
    )
    modules = {
        "comfy": comfy,
        "comfy.model_management": comfy.model_management,
        "comfy.utils": comfy.utils,
        "latent_preview": preview,
        "comfy_api": types.ModuleType("comfy_api"),
        "comfy_api.latest": latest,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == "custom_node"]:
        del sys.modules[name]


def kind(name):
    """An input and output type of the V3 API."""

    def given(id, **options):  # its name
        return SimpleNamespace(kind=name, id=id, **options)

    return SimpleNamespace(Input=given, Output=lambda **options: SimpleNamespace(kind=name, **options))


def load():
    folder = Path(__file__).parents[1] / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom_node", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_node"] = module
    spec.loader.exec_module(module)
    return module


def test_both_apis_have_the_same_node(package):
    nodes = package()
    assert set(nodes.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes.NODE_CLASS_MAPPINGS)
    listed = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    for (name, old), new in zip(nodes.NODE_CLASS_MAPPINGS.items(), listed, strict=True):
        schema, inputs = new.define_schema(), old.INPUT_TYPES()["required"]
        assert schema.node_id == name
        assert schema.display_name == nodes.NODE_DISPLAY_NAME_MAPPINGS[name]
        assert [given.id for given in schema.inputs] == list(inputs)
        assert [given.tooltip for given in schema.inputs] == [options["tooltip"] for _, options in inputs.values()]
        assert [given.kind.upper() for given in schema.outputs] == list(old.RETURN_TYPES)
    old, new = nodes.NODE_CLASS_MAPPINGS["ParataxisParallelSampler"], listed[0]
    sampler = KSampler(euler, {"s_churn": 1.0}, {"random": True})
    given = {"sampler": sampler, "window": 4, "tolerance": 0.01, "solver": "secant"}
    for result in (getattr(old(), old.FUNCTION)(**given)[0], new.execute(**given).result[0]):
        assert isinstance(result, KSampler)
        assert result.extra_options == {"s_churn": 1.0}
        assert result.inpaint_options == {"random": True}
        assert result.sampler_function.__name__ == "euler"
        assert result.sampler_function is not euler
    assert sampler.sampler_function is euler


def test_without_the_new_api_the_old_one_is_there(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    nodes = package()
    assert nodes.NODE_CLASS_MAPPINGS
    assert not hasattr(nodes, "comfy_entrypoint")


def test_defaults_of_the_inputs_are_what_the_node_takes(package):
    """The defaults of the inputs are what the node takes."""
    nodes = package()
    old = nodes.NODE_CLASS_MAPPINGS["ParataxisParallelSampler"]
    inputs = old.INPUT_TYPES()["required"]
    given = {name: options["default"] for name, (_, options) in inputs.items() if name in ("window", "tolerance")}
    for solver in inputs["solver"][0]:
        (sampler,) = old().execute(KSampler(euler), solver=solver, **given)
        expected, x = (drawn(one, guider()) for one in (KSampler(euler), sampler))
        assert relative(x, expected) <= 1e-2


def test_report_says_what_the_run_took(package):
    nodes = package()
    old = nodes.NODE_CLASS_MAPPINGS["ParataxisReport"]
    _, new = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    sampler = wrapped(nodes, KSampler(euler), tolerance=0.01)
    drawn(sampler, guider())
    latent = {"samples": torch.zeros(1)}
    shown = old().execute(sampler, latent)
    assert shown["result"] == new.execute(sampler, latent).result == (latent, shown["ui"]["text"][0])
    for part in ("rounds", "error estimate"):
        assert part in shown["result"][1]
    assert "not one of Parallel Sampler" in old().execute(KSampler(euler), latent)["result"][1]


def test_workflow_uses_the_nodes_as_they_are(package):
    """The graph to load names the nodes, their inputs and the types that are connected."""
    nodes = package().NODE_CLASS_MAPPINGS
    folder = Path(__file__).parents[1] / "integrations" / "comfyui"
    graph = json.loads((folder / "workflow.json").read_text())
    by_id = {node["id"]: node for node in graph["nodes"]}
    for _, source, output, target, place, form in graph["links"]:
        assert by_id[source]["outputs"][output]["type"] == by_id[target]["inputs"][place]["type"] == form
    ours = [node for node in graph["nodes"] if node["type"] in nodes]
    assert {node["type"] for node in ours} == set(nodes)
    for node in ours:
        required = nodes[node["type"]].INPUT_TYPES()["required"]
        linked = [entry["name"] for entry in node["inputs"]]
        assert linked + list(required)[len(linked) :] == list(required)
        assert len(node.get("widgets_values", [])) == len(required) - len(linked)


def drawn(sampler, guide, callback=None, mask=None, options=None):
    extra_args = {"model_options": options or {}, "seed": 3}
    clean = torch.linspace(-1, 1, 48).view(3, *SHAPE)
    torch.manual_seed(3)
    return sampler.sample(guide, SIGMAS_20, extra_args, callback, noise() / 14, clean, mask)


def wrapped(nodes, sampler, window=8, tolerance=0.0):
    node = nodes.NODE_CLASS_MAPPINGS["ParataxisParallelSampler"]
    return node().execute(sampler, window=window, tolerance=tolerance, solver="secant")[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_wrapped_sampler_with_ranges_and_a_mask_samples_what_the_sampler_does(package, name, caplog):
    """A wrapped sampler with ranges and a mask samples what the sampler does."""
    control = Control(float(SIGMAS_20[2]), float(SIGMAS_20[5]), Control(float(SIGMAS_20[11]), float(SIGMAS_20[16])))

    def skipping(sigma_start, sigma_end):
        def change(args):
            inside = sigma_end <= args["sigma"][0].item() <= sigma_start
            return 1.1 * args["denoised"] if inside else args["denoised"]

        return change

    options = {"sampler_post_cfg_function": [skipping(float(SIGMAS_20[6]), float(SIGMAS_20[7]) - 0.01)]}
    mask = torch.ones(3, *SHAPE)
    mask[0, :2], mask[2, :, 1] = 0, 0.5
    sampler = KSampler(SAMPLERS[name])
    told, expected_told, guide = [], [], guider(control=control)
    expected = drawn(sampler, guider(control=control), lambda *one: expected_told.append(one), mask, options)
    parallel = wrapped(package(), sampler, tolerance=1e-4)
    with caplog.at_level(logging.INFO, "parataxis"):
        x = drawn(parallel, guide, lambda *one: told.append(one), mask, options)
    assert relative(x, expected) <= 1e-4
    assert [(i, steps) for i, _, _, steps in told] == [(i, 20) for i in range(20)]
    assert all(relative(one[1], two[1]) <= 1e-3 for one, two in zip(told, expected_told, strict=True))
    assert re.search(f"{name}: .*; recurrence: ", caplog.text)
    assert parallel.sampler_function.report.peak_rows > 3


def test_ranged_sampler_takes_fewer_rounds(package):
    """A ranged sampler takes fewer rounds."""
    sampler = wrapped(package(), KSampler(dpmpp_2m), tolerance=1e-2)
    expected = drawn(KSampler(dpmpp_2m), guider())
    assert relative(drawn(sampler, guider()), expected) <= 1e-2
    report = sampler.sampler_function.report
    assert report.rounds < 0.7 * report.steps
    drawn(sampler, guider())
    assert report.passes <= 4


def test_conditionings_of_several_samples_follow_them(package):
    def guide(rows):
        return Guider(positive=[{"shift": torch.linspace(-1, 1, rows)}], negative=[{"shift": torch.zeros(1)}])

    sampler = wrapped(package(), KSampler(euler), tolerance=1e-3)
    for rows in (1, 3, 1):
        assert relative(drawn(sampler, guide(rows)), drawn(KSampler(euler), guide(rows))) <= 1e-3
        assert sampler.sampler_function.report.peak_rows > 3


def test_hooks_that_count_their_steps_run_sequentially(package, caplog):
    group = SimpleNamespace(hooks=[SimpleNamespace(hook_keyframe=SimpleNamespace(keyframes=[0, 1]))])
    guide = guider(hooks=group)
    with caplog.at_level(logging.INFO, "parataxis"):
        x = drawn(wrapped(package(), KSampler(euler)), guide)
    assert len(guide.sigmas) == 20
    assert "euler: sequential: hooks with several keyframes" in caplog.text
    assert torch.equal(x, drawn(KSampler(euler), guider()))


def test_progress_is_shown_and_an_interrupt_ends_the_rounds(package):
    sampler = wrapped(package(), KSampler(euler))
    drawn(sampler, guider())
    comfy = sys.modules["comfy"]
    assert comfy.shown[-1] == (20, 20)

    def interrupt():
        raise InterruptedError

    comfy.model_management.throw_exception_if_processing_interrupted = interrupt
    with pytest.raises(InterruptedError):
        drawn(sampler, guide := guider())
    assert len(guide.sigmas) <= 4


def test_every_round_has_a_preview_where_comfyui_shows_them(package):
    """The preview of a round is what the model has denoised at the lowest noise level: of the images that are there."""
    sampler, guide = wrapped(package(), KSampler(euler), tolerance=1e-2), guider()
    patcher = SimpleNamespace(load_device="cpu", model=SimpleNamespace(latent_format="tiny"))
    guide.model_patcher = patcher
    x = drawn(sampler, guide)
    comfy = sys.modules["comfy"]
    previews = [preview for preview in comfy.previews if preview is not None]
    assert len(previews) == sampler.sampler_function.report.rounds
    assert {(kind, image.shape[1:]) for kind, image in previews} == {("JPEG", x.shape[1:])}
    first, last = (min(relative(image[:1], row[None]) for row in x) for _, image in (previews[0], previews[-1]))
    assert last < min(first, 0.05)
    patcher.model.latent_format = "none"
    comfy.previews.clear()
    drawn(sampler, guide)
    assert set(comfy.previews) == {None}


def test_wrapped_sampler_is_not_wrapped_twice_and_others_raise(package):
    """A wrapped sampler is not wrapped twice and others are refused."""
    nodes = package()
    twice = wrapped(nodes, wrapped(nodes, KSampler(euler)))
    assert twice.sampler_function.sequential is euler
    with pytest.raises(TypeError, match=r"must have a sampler_function.*got a object"):
        wrapped(nodes, object())
