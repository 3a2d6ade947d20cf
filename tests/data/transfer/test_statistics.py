from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from synthfast.config import ExportConfig, StatsConfig
from synthfast.data import ShardFolder
from synthfast.data.transfer import copying as copying_module
from synthfast.data.transfer.exporting import export_images
from synthfast.data.transfer.statistics import statistics

COLOURS = 3


def write(folder: Path, pixels: np.ndarray, labels: np.ndarray | None, classes: int | None, shard_size: int) -> None:
    request = {"n": len(pixels), "shape": list(pixels.shape[1:]), "classes": classes, "shard_size": shard_size}
    with ShardFolder.create_or_resume(folder, request) as shards:
        for span in list(shards.pending()):
            rows = slice(span.first, span.first + span.count)
            with shards.writer(span.index) as writer:
                writer.append(pixels[rows], None if labels is None else labels[rows])
                writer.commit()
        shards.finish()


@pytest.fixture
def pixels() -> np.ndarray:
    """20 images, of which 3 and 7 equal 1, 19 equals 4; 5 and 6 are of one colour; no other pair is equal."""
    random = np.random.default_rng(0)
    images = random.integers(10, 240, (20, 4, 5, COLOURS), np.uint8)
    images[[3, 7]], images[19] = images[1], images[4]
    images[5] = (1, 2, 3)
    images[6] = (1, 2, 250)
    images[8, -1, -1] = images[8, 0, 0]  # begins and ends alike
    return images


@pytest.mark.parametrize("chunk", [60, 7 * 60, 1 << 20])
def test_against_numpy(tmp_path, monkeypatch, pixels, chunk):
    monkeypatch.setattr(copying_module, "CHUNK_BYTES", chunk)
    labels = np.arange(20) % 3
    write(tmp_path / "a", pixels, labels, 5, 8)
    facts = statistics(StatsConfig(source=(str(tmp_path / "a"),)))
    scaled = pixels.reshape(-1, COLOURS) / 255
    np.testing.assert_allclose(facts["mean"], scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(facts["std"], scaled.std(0), rtol=1e-12)
    assert facts["min"] == pixels.min((0, 1, 2)).tolist() and facts["max"] == pixels.max((0, 1, 2)).tolist()
    assert (facts["n"], facts["shape"], facts["classes"]) == (20, [4, 5, 3], 5)
    assert facts["images_per_class"] == [7, 7, 6, 0, 0]
    assert (facts["duplicate_images"], facts["duplicates"], facts["constant_images"]) == (3, 0.15, 2)
    stored = sum(file.stat().st_size for file in (tmp_path / "a").glob("*.npy"))
    assert (facts["bytes"], facts["bytes_per_image"]) == (stored, stored / 20)


def test_extremes_do_not_overflow(tmp_path):
    write(tmp_path / "a", np.full((300, 64, 64, 1), 255, np.uint8), None, None, 300)
    facts = statistics(StatsConfig(source=(str(tmp_path / "a"),)))
    assert (facts["mean"], facts["std"], facts["min"], facts["max"]) == ([1.0], [0.0], [255], [255])
    assert facts["images_per_class"] is None and facts["classes"] is None
    assert (facts["duplicate_images"], facts["constant_images"]) == (299, 300)


def test_tars_have_the_same_statistics_but_for_their_size(tmp_path, pixels):
    write(tmp_path / "a", pixels, np.arange(20) % 3, 3, 8)
    export_images(ExportConfig(source=(str(tmp_path / "a"),), to="wds", out=str(tmp_path / "b"), shard_size=8))
    first, second = (statistics(StatsConfig(source=(str(tmp_path / name),))) for name in "ab")
    different = {"path", "bytes", "bytes_per_image"}
    assert {key for key in first if first[key] != second[key]} == different


def test_progress(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(copying_module, "CHUNK_BYTES", 8 * 60)
    write(tmp_path / "a", pixels, None, None, 20)
    seen = []
    statistics(StatsConfig(source=(str(tmp_path / "a"),)), lambda done, total: seen.append((done, total)))
    assert seen == [(0, 20), (8, 20), (16, 20), (20, 20)]
