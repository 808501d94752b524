"""Small trained models that ship with the package, each a folder in diffusers' format.

Each folder has a model card, ``README.md``. Loading needs diffusers (``pip install 'parataxis[models]'``) and reads
safetensors only: no pickle, no network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import is_finite
from ..denoisers import guided
from ..samplers import SAMPLERS
from ..samplers.sampler import Prediction, Sampler
from ..samplers.schedules import Karras, Schedule, Variance, cosine, flow, karras, vp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Model", "available", "load"]

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_CLASSES = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}  # diffusers' own, by their folders
_EXPLODING = ("euler", "euler_ancestral", "heun")  # samplers in coordinates alpha = 1, with the input scaled
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network with what it was trained for.

    Attributes:
        name: Name of its folder.
        network: The diffusers ``UNet2DModel`` or ``DiTTransformer2DModel``, in float32, frozen.
        schedule: The schedule it was trained on.
        prediction: What it returns.
        shape: Shape of a sample; values are in [-1, 1].
        classes: Number of classes, or None; class ``classes`` stands for none.
        folder: Where it was read from; ``diffusers.DiffusionPipeline.from_pretrained`` opens unconditional ones.
    """

    name: str
    network: torch.nn.Module
    schedule: Schedule
    prediction: Prediction
    shape: tuple[int, ...]
    classes: int | None
    folder: Path

    def denoiser(self, guidance: float = 1.0) -> Callable[..., Tensor]:
        """Return ``denoise(x, t, label)``, guided unless ``guidance`` is 1; unconditional: ``denoise(x, t)``.

        Raises:
            ValueError: If the guidance is not a number, or is not 1 without classes.
        """
        if not is_finite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance!r}.")
        if self.classes is None:
            if guidance != 1:
                raise ValueError(f"{self.name} has no classes, so guidance must be 1, got {guidance!r}.")
            return lambda x, t: self.network(x, t).sample

        def conditional(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            output: Tensor = self.network(x, t, class_labels=label).sample
            return output

        return guided(conditional, guidance, self.classes)

    def sampler(self, name: str, steps: int, **options: Any) -> Sampler:
        """Return a sampler of ``SAMPLERS`` on the model's own schedule and prediction type.

        Raises:
            ValueError: If there is no such sampler, or it does not fit the model's schedule.
        """
        kind = _kind(self.schedule)
        fitting = [other for other in SAMPLERS if other in _EXPLODING] if kind == "variance-exploding" else []
        fitting = fitting or [other for other in SAMPLERS if (other == "flow_euler") == (kind == "flow-matching")]
        if name not in SAMPLERS:
            raise ValueError(f"there is no sampler {name!r}: choose one of {', '.join(fitting)}.")
        if name not in fitting:
            raise ValueError(
                f"{self.name} was trained on a {kind} schedule, which {name} is not for: choose one of "
                f"{', '.join(fitting)}."
            )
        return SAMPLERS[name](self.schedule, steps, prediction=self.prediction, **options)


def available() -> list[str]:
    """Return the names of the models in the package."""
    return sorted(path.name for path in FOLDER.iterdir() if _network_folder(path) is not None)


def _network_folder(folder: Path) -> Path | None:
    """Return where a model has its network, or None."""
    return next((folder / name for name in _CLASSES if (folder / name / "config.json").is_file()), None)


def _kind(schedule: Schedule) -> str:
    if isinstance(schedule, Karras):
        return "variance-exploding"
    return "variance-preserving" if isinstance(schedule, Variance) else "flow-matching"


def load(name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load a model of the package, or of a folder with the same layout.

    Args:
        name: One of :func:`available`, or the path of a folder with ``unet/`` or ``transformer/``, and ``scheduler/``.
        device: Where to put the network.
        dtype: Of the weights; they are stored in float16.

    Raises:
        ModuleNotFoundError: If diffusers is not installed, with the command that installs it.
        ValueError: If there is no such model, or its weights cannot be read.
    """
    folder = FOLDER / name if str(name) in available() else Path(name)
    config_path = folder / "scheduler" / "scheduler_config.json"
    network_folder = _network_folder(folder)
    if not config_path.is_file() or network_folder is None:
        raise ValueError(
            f"there is no model {str(name)!r}: choose one of {', '.join(available())}, or give the path of a "
            "folder with unet/ or transformer/, and scheduler/."
        )
    try:
        import diffusers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the shipped models need diffusers: install it with  pip install 'parataxis[models]'"
        ) from error
    config = _read_config(config_path)
    network = _load_network(network_folder)
    network = network.to(device).eval().requires_grad_(False)
    if dtype != torch.float32:
        network = network.to(dtype)
    schedule, prediction = _schedule(config, config_path)
    size = network.config.sample_size
    # A U-Net counts the class that stands for none, the transformer does not.
    classes = network.config.get("num_embeds_ada_norm")
    if network.config.get("num_class_embeds") is not None:
        classes = network.config.num_class_embeds - 1
    return Model(
        name=folder.name,
        network=network,
        schedule=schedule,
        prediction=prediction,
        shape=(network.config.in_channels, size, size),
        classes=classes,
        folder=folder,
    )


def _read_config(path: Path) -> dict[str, Any]:
    """Return a configuration, or raise a ValueError with its path."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): it must be a JSON file.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    return config


def _load_network(folder: Path) -> Any:
    """Return the network of a folder; nothing is allocated before its form is known to be that of its weights."""
    import diffusers
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    config, weights = _read_config(folder / "config.json"), folder / "diffusion_pytorch_model.safetensors"
    try:
        with safe_open(weights, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{weights} cannot be read ({type(error).__name__}: {error}): the file is damaged or not there; install "
            "the package or copy the model again."
        ) from error
    # Building layers one by one takes long even where they hold no memory, and each has tensors of its own.
    network_class = getattr(diffusers, _CLASSES[folder.name])
    count = "num_layers" if folder.name == "transformer" else "layers_per_block"
    layers = config.get(count, 2)
    if not isinstance(layers, int) or layers > len(shapes):
        raise ValueError(f"{folder / 'config.json'} does not fit its weights: {count} is {layers!r}.")
    try:
        with torch.device("meta"):
            expected = {
                name: tuple(value.shape) for name, value in network_class.from_config(config).state_dict().items()
            }
    except Exception as error:  # whatever diffusers says of a wrong configuration
        raise ValueError(f"{folder / 'config.json'} is not of a {network_class.__name__} ({error}).") from error
    different = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{folder / 'config.json'} does not fit its weights: {name} is {expected.get(name, 'missing')} by the one "
            f"and {shapes.get(name, 'missing')} by the other."
        )
    network = network_class.from_config(config)
    network.load_state_dict(load_file(weights))
    return network


def _schedule(config: dict[str, Any], path: Path) -> tuple[Schedule, Prediction]:
    """Return the noise schedule of a scheduler's configuration, and what the network predicts."""
    try:
        steps = config["num_train_timesteps"]
        if "sigma_data" in config:
            return karras(config["sigma_min"], config["sigma_max"], config["rho"]), "edm"
        if "beta_schedule" not in config:
            return flow(config.get("shift", 1.0), steps), "flow"
        prediction = _PREDICTIONS[config["prediction_type"]]
        if config["beta_schedule"] == "squaredcos_cap_v2":
            return cosine(steps), prediction
        return vp(steps, config["beta_start"], config["beta_end"], config["beta_schedule"]), prediction
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has no noise schedule that can be read ({type(error).__name__}: {error}).") from error
