"""Shard folders with scores that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthfast.data import ShardFolder, ShardSet
from synthfast.distributed import Ranks
from synthfast.selection.score_files import ScoreFolder, columns


def write_folder(path: Path, labels: np.ndarray | None, count: int = 60, seed: int = 0) -> ShardSet:
    """A shard folder of random images 4x4x1 in three shards."""
    classes = None if labels is None else 5
    request = {"n": count, "shape": [4, 4, 1], "classes": classes, "shard_size": -(-count // 3)}
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), np.uint8)
    with ShardFolder.create_or_resume(path, request) as folder:
        for span in folder.pending():
            with folder.writer(span.index) as writer:
                rows = slice(span.first, span.first + span.count)
                writer.append(images[rows], None if labels is None else labels[rows])
                writer.commit()
        folder.finish()
    return ShardSet(path)


def write_scores(
    images: ShardSet, score: str, notes: dict[str, Any] | None = None, path: Path | None = None, **given: Any
) -> None:
    """One score of a folder; columns that are not given are 0, and have no facts but their score's name."""
    folder = ScoreFolder(images, path)
    folder.prepare()
    names = [column.name for column in columns(score, images.labels is not None)]
    with Ranks("cpu") as ranks, folder.writer(score, {"score": score}, ranks) as writer:
        writer.write(0, {name: np.asarray(given.get(name, np.zeros(len(images)))) for name in names})
        writer.commit(notes or {})


@pytest.fixture
def images(tmp_path: Path) -> ShardSet:
    """60 images, 12 of each of 5 classes."""
    return write_folder(tmp_path / "images", np.arange(60) % 5)


@pytest.fixture
def make() -> Callable[..., ShardSet]:
    return write_folder


@pytest.fixture
def give() -> Callable[..., None]:
    return write_scores
