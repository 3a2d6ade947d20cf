"""What all tests share: random tensors that depend on the test alone."""

from __future__ import annotations

import zlib

import pytest
import torch


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator seeded by the test's name: the same numbers in any order of tests."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))
