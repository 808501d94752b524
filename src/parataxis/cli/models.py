"""``parataxis models``: list the models that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import flags
from .output import emit, table

__all__ = ["models"]

FOLDER = Path(__file__).resolve().parents[1] / "models"


def models(as_json: flags.Json = False) -> None:
    """List the models that ship with the package."""
    known = {
        path.name: _describe(path) for path in sorted(FOLDER.iterdir()) if (path / "unet" / "config.json").is_file()
    }
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


def _describe(folder: Path) -> dict[str, Any]:
    """Return a model's form, from its configuration alone."""
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    size, classes = config["sample_size"], config.get("num_class_embeds")
    diffusion = "beta_schedule" in scheduler
    return {
        "shape": [config["in_channels"], size, size],
        "prediction": scheduler["prediction_type"] if diffusion else "velocity",
        "schedule": "variance-preserving" if diffusion else "flow matching",
        "classes": None if classes is None else classes - 1,
    }
