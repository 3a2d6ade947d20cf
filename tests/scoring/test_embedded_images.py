"""Digits of the embedded generator, where no synthetic images are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages
from synthfast.errors import UsageError
from synthfast.scoring.embedded import embedded_images

CPU = torch.device("cpu")


def blank(count, side=8):
    return ArrayImages("blank", [np.zeros((count, side, side, 1), np.uint8)])


def test_as_many_as_real_ones_each_by_its_number():
    few, more = (embedded_images(blank(count), 3, CPU) for count in (20, 131))
    assert (len(few), len(more)) == (20, 131) and more.classes == 10
    assert (more.labels == np.arange(131) % 10).all()
    close = np.abs(few.read(np.arange(20)).astype(int) - more.read(np.arange(20)))
    assert close.max() <= 1  # batches of other sizes round differently
    assert (embedded_images(blank(20), 4, CPU).read(np.arange(20)) != few.read(np.arange(20))).any()
    assert len(np.unique(few.read(np.arange(20)), axis=0)) == 20


def test_other_images_need_a_source_of_their_own():
    with pytest.raises(
        UsageError, match="--synthetic: expected a source of synthetic images to compare with blank, found none"
    ):
        embedded_images(blank(5, 16), 0, CPU)
