"""Contact sheets: many small images in one PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from synthfast.artifacts import atomic_write_bytes


def grid(images: np.ndarray, columns: int, *, scale: int | None = None, gap: int = 1) -> np.ndarray:
    """Images uint8 [n, H, W, C] in rows of ``columns``, on white, each pixel ``scale`` wide: uint8 [height, width, C].

    ``scale`` None enlarges so that an image is about 48 pixels wide, never by less than 1.
    """
    n, height, width, channels = images.shape
    scale = scale or max(1, round(48 / width))
    gap = gap * scale
    rows = -(-n // columns)
    height, width = height * scale, width * scale
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for k, image in enumerate(images):
        top, left = gap + k // columns * (height + gap), gap + k % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet


def write_grid(path: str | Path, images: np.ndarray, columns: int) -> None:
    """Write :func:`grid` of grey or RGB images as a PNG, atomically. Of other channel counts the first is shown, grey."""
    atomic_write_bytes(path, grid_png(images, columns))


def grid_png(images: np.ndarray, columns: int) -> bytes:
    """The PNG that :func:`write_grid` writes."""
    from PIL import Image

    sheet = grid(images, columns)
    picture = Image.fromarray(sheet if sheet.shape[2] == 3 else sheet[:, :, 0])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
