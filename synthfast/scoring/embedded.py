"""Synthetic images where none are named: digits of the embedded generator."""

from __future__ import annotations

import numpy as np
import torch

from synthfast import ops
from synthfast.config import SampleConfig
from synthfast.data import ArrayImages, ImageSet
from synthfast.errors import UsageError
from synthfast.parallel import in_order
from synthfast.sampling import load_generator

_BATCH = 128
_WITHOUT_REAL = 2000  # images where no number of real ones says how many


def embedded_images(real: ImageSet | None, seed: int, device: torch.device) -> ArrayImages:
    """As many images of the embedded generator as there are real ones, classes in turn; image i depends on (seed, i) alone.

    Raises UsageError where the real images are of another size.
    """
    generator = load_generator(SampleConfig(), device)
    if real is not None and real.shape != generator.shape:
        raise UsageError(
            f"--synthetic: expected a source of synthetic images to compare with {real.name}, found none; make one with "
            "synthfast sample"
        )
    assert generator.classes is not None
    count = _WITHOUT_REAL if real is None else len(real)

    def make(first: int) -> np.ndarray:
        index = torch.arange(first, min(first + _BATCH, count), device=device)
        return ops.quantize_uint8(generator.sample(index, index % generator.classes, seed)).cpu().numpy()

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    images = np.concatenate(list(in_order(make, range(0, count, _BATCH), threads)))
    return ArrayImages("embedded generator", [images], np.arange(count) % generator.classes, generator.classes)
