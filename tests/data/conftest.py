"""Small shard folders for the tests of synthfast.data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthfast.data import ShardFolder

REQUEST = {
    "n": 23,
    "shape": [4, 5, 3],
    "classes": 7,
    "seed": 0,
    "solver": {"name": "heun", "steps": 18, "rho": 7.0},
    "generator": {"name": "toy", "sha256": "0" * 64},
    "shard_size": 10,
}


def toy_images(request: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a request; they depend on it alone."""
    n = request["n"]
    random = np.random.default_rng(request["seed"])
    labels = np.arange(n) % (request["classes"] or 1)
    return random.integers(0, 256, (n, *request["shape"]), np.uint8), labels.astype(np.int64)


def toy_write(path: Path, request: dict[str, Any], batch: int = 4, only: range | None = None) -> None:
    """What the sampler does: make or resume the folder, write the pending shards in batches, finish."""
    images, labels = toy_images(request)
    with ShardFolder.create_or_resume(path, request, options={"seed": "--seed"}) as folder:
        for span in folder.pending():
            if only is not None and span.index not in only:
                continue
            with folder.writer(span.index) as writer:
                for first in range(span.first, span.first + span.count, batch):
                    rows = slice(first, min(first + batch, span.first + span.count))
                    writer.append(images[rows], None if request["classes"] is None else labels[rows])
                writer.commit()
        if only is None:
            folder.finish()


@pytest.fixture
def request_values() -> dict[str, Any]:
    return dict(REQUEST)


@pytest.fixture
def write() -> Callable[..., None]:
    return toy_write


@pytest.fixture(scope="module")
def write_module() -> Callable[[Path, dict[str, Any]], None]:
    """Write the usual request with some keys changed, for fixtures that a whole module shares."""
    return lambda path, change: toy_write(path, {**REQUEST, **change})


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder by name."""
    return lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def toy() -> Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]]:
    return toy_images


@pytest.fixture
def shards(tmp_path: Path, request_values: dict[str, Any]) -> Path:
    """A complete folder of three shards: 10, 10 and 3 images."""
    toy_write(tmp_path / "shards", request_values)
    return tmp_path / "shards"
