"""What all tests share: one thread, and random tensors that depend on the test alone."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The same examples in every run, so that a run fails for what was changed. HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


# Where the tests are started in the background SIGINT is ignored, which every command that they interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator seeded by the test's name: the same numbers in any order of tests."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The small work of the tests gains little from threads, and on a busy machine loses much; tests of threads set theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
