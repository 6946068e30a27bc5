"""Contact sheets: labelled grids of pictures, saved as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] to PIL."""
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


def save_sheet(path: Path, columns: Sequence[tuple[str, Sequence[Image.Image]]], rows: Sequence[str] = ()) -> None:
    """A grid with one titled column for each (title, pictures) and an optional caption under each row of it."""
    width, height = columns[0][1][0].size
    font = ImageFont.load_default(size=max(11, height // 12))
    head, foot = int(font.size * 1.6), int(font.size * 1.6) if rows else 0
    count = len(columns[0][1])
    sheet = Image.new("RGB", (len(columns) * (width + 4) + 4, head + count * (height + foot + 4) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns):
        left = 4 + column * (width + 4)
        draw.text((left + width / 2, head / 2), title, "black", font, anchor="mm")
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, head + row * (height + foot + 4)))
    for row, caption in enumerate(rows):
        draw.text((6, head + row * (height + foot + 4) + height + foot / 2), caption, "black", font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] to uint8, on the CPU: scores see what a file holds."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
