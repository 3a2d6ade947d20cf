"""Training runs small enough for a test: a tiny network in place of the real one, and folders to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from synthfast.artifacts import load_tensors
from synthfast.config import ClassifierConfig, GeneratorConfig
from synthfast.data import ShardFolder, open_images
from synthfast.distributed import Ranks
from synthfast.models.unet_config import UNet2DConfig
from synthfast.training import Progress, Trained, train_classifier, train_generator
from synthfast.training.state import STATE_FILE


def train_small(out: Path, report: Callable[[Progress], None] | None = None, **options: object) -> Trained:
    """``synthfast train generator`` with 2 steps of 8 images."""
    config = GeneratorConfig(**{"out": str(out), "device": "cpu", "batch_size": 8, "steps": 2, **options})
    with Ranks("cpu") as ranks:
        return train_generator(config, ranks, report)


def fit_small(out: Path, report: Callable[[Progress], None] | None = None, **options: object) -> Trained:
    """``synthfast train classifier`` on digits with 3 steps of 32 images; attacks of 2 steps."""
    quick = {"out": str(out), "device": "cpu", "batch_size": 32, "steps": 3, "attack_steps": 2}
    with Ranks("cpu") as ranks:
        return train_classifier(ClassifierConfig(**{**quick, **options}), ranks, report)


def write_arrays(path: Path, shape: tuple[int, ...] = (8, 8), labels: bool = True, seed: int = 0) -> str:
    """An npz file of 12 random images, and its name as an image source."""
    random = np.random.default_rng(seed)
    arrays = {"image": random.integers(0, 256, (12, *shape), np.uint8)}
    if labels:
        arrays["label"] = np.arange(12) % 3
    np.savez(path, **arrays)
    return f"npz:{path}"


def write_shard_folder(path: Path, images: np.ndarray, labels: np.ndarray | None, classes: int | None = 10) -> str:
    """A complete shard folder of one shard, and its name as an image source."""
    request = {"n": len(images), "shape": list(images.shape[1:]), "classes": classes, "shard_size": len(images)}
    with ShardFolder.create_or_resume(path, request) as folder:
        with folder.writer(0) as writer:
            writer.append(np.ascontiguousarray(images), labels)
            writer.commit()
        folder.finish()
    return str(path)


def equal_runs(first: Path, second: Path) -> bool:
    """Bit for bit: the averaged weights, and every tensor of the state (weights, average, optimizer)."""
    states = [load_tensors(folder / STATE_FILE) for folder in (first, second)]
    kinds = {key.partition(".")[0] for key in states[0]}
    assert {"model", "optimizer"} <= kinds <= {"model", "ema", "optimizer"} and states[0].keys() == states[1].keys()
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.fixture
def train() -> Callable[..., Trained]:
    return train_small


@pytest.fixture
def fit() -> Callable[..., Trained]:
    return fit_small


@pytest.fixture
def copies(tmp_path: Path) -> str:
    """A shard folder with the 500 training digits in it."""
    digits = open_images("digits")
    return write_shard_folder(tmp_path / "copies", digits.read(np.arange(len(digits))), digits.labels)


@pytest.fixture
def write_npz() -> Callable[..., str]:
    return write_arrays


@pytest.fixture
def write_shards() -> Callable[..., str]:
    return write_shard_folder


@pytest.fixture
def same_results() -> Callable[[Path, Path], bool]:
    return equal_runs


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A network of a few thousand parameters, and one row of samples. ``tiny(dropout=0.5)`` gives it dropout."""

    def use(**options: object) -> None:
        def config(image_size: int, channels: int, num_classes: int | None) -> UNet2DConfig:
            return UNet2DConfig(
                sample_size=image_size,
                in_channels=channels,
                out_channels=channels,
                num_class_embeds=None if num_classes is None else num_classes + 1,
                **{
                    "down_block_types": ("DownBlock2D",),
                    "up_block_types": ("UpBlock2D",),
                    "block_out_channels": (8,),
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                    "attention_head_dim": 8,
                    **options,
                },
            )

        monkeypatch.setattr("synthfast.training.generator.small_unet_config", config)
        monkeypatch.setattr("synthfast.training.generator._GRID_ROWS", 1)

    use()
    return use
