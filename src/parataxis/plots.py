"""Image grids and figures; needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["image_grid", "trace_grid"]


def image_grid(x: Tensor, columns: int = 10, zoom: int = 2) -> Image:
    """Lay images out in rows.

    Args:
        x: (B, 1 or 3, height, width) in [-1, 1]; values outside are clipped.
        columns: Images in a row.
        zoom: Pixels on a side for each of the image's.

    Raises:
        ValueError: If ``x`` is not a batch of grey or colour images.
        ModuleNotFoundError: If Pillow is not installed.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1 or 3, height, width), got {tuple(x.shape)}.")
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need Pillow: install it with  pip install 'parataxis[plots]'") from error
    columns = min(columns, len(x))
    rows = -(-len(x) // columns)
    batch, channels, height, width = x.shape
    levels = ((x.detach().float().cpu().nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte()
    canvas = torch.full((rows * columns, channels, height + 1, width + 1), 128, dtype=torch.uint8, device="cpu")
    canvas[:batch, :, :height, :width] = levels
    grid = canvas.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    grid = grid.reshape(channels, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]
    array = grid.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    picture = Image.fromarray(array)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def trace_grid(rounds: Sequence[Tensor], columns: int = 10, zoom: int = 2) -> Image:
    """Show the estimates after every round: one row of images a round, the first round on top.

    Args:
        rounds: One (B, 1 or 3, height, width) tensor a round.
        columns: How many samples to show.
        zoom: Pixels on a side for each of the image's.
    """
    if not rounds:
        raise ValueError("there is no round to show: pass at least one estimate.")
    shown = [estimate[:columns] for estimate in rounds]
    return image_grid(torch.cat(shown), len(shown[0]), zoom)
