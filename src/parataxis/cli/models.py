"""``parataxis models``: list the models that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import flags
from .output import emit, table

__all__ = ["models"]

FOLDER = Path(__file__).resolve().parents[1] / "models"
PREDICTIONS = {"v_prediction": "v"}  # others are called as diffusers calls them


def models(as_json: flags.Json = False) -> None:
    """List the models that ship with the package."""
    # As parataxis.models does, but without torch, which takes seconds to import.
    configs = {path.parents[1].name: path for path in sorted(FOLDER.glob("*/*/config.json"))}
    known = {name: _describe(path) for name, path in configs.items()}
    if as_json:
        emit(json.dumps(known, indent=2))
        return
    rows = [
        (
            name,
            "x".join(map(str, entry["shape"])),
            f"{entry['prediction']}, {entry['schedule']}",
            "unconditional" if entry["classes"] is None else f"{entry['classes']} classes",
        )
        for name, entry in known.items()
    ]
    emit(table("", ["model", "shape", "prediction and schedule", "condition"], rows))


def _describe(path: Path) -> dict[str, Any]:
    """Return a model's form, from its configurations alone."""
    config = json.loads(path.read_text(encoding="utf-8"))
    scheduler = json.loads((path.parents[1] / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    size, classes = config["sample_size"], config.get("num_embeds_ada_norm")
    if config.get("num_class_embeds") is not None:
        classes = config["num_class_embeds"] - 1  # a U-Net counts the class that stands for none
    prediction = scheduler.get("prediction_type", "velocity")
    if scheduler["_class_name"].startswith("EDM"):
        prediction, schedule = "preconditioned (EDM)", "variance-exploding"
    else:
        schedule = "variance-preserving" if "beta_schedule" in scheduler else "flow matching"
    return {
        "shape": [config["in_channels"], size, size],
        "prediction": PREDICTIONS.get(prediction, prediction),
        "schedule": schedule,
        "classes": classes,
    }
