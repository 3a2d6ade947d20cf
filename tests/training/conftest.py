"""Training runs of a tiny network in this process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from synthfast.config import GeneratorConfig
from synthfast.distributed import Ranks
from synthfast.models.unet_config import UNet2DConfig
from synthfast.training import generator, train_generator


def tiny_unet_config(image_size: int, channels: int, classes: int | None) -> UNet2DConfig:
    """Stands in for ``small_unet_config``: about 20,000 weights."""
    return UNet2DConfig(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=None if classes is None else classes + 1,
    )


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on generators of tiny networks are trained; ``tiny_network(dropout=0.2)`` changes their configuration."""

    def use(**changes: object) -> None:
        def config(*shape: int | None) -> UNet2DConfig:
            return dataclasses.replace(tiny_unet_config(*shape), **changes)

        monkeypatch.setattr(generator, "small_unet_config", config)

    use()
    return use


@pytest.fixture
def train(tmp_path: Path, tiny_network: Callable[..., None]) -> Callable[..., Path]:
    """``train(steps=..., ...)``: train on the CPU into a new folder (or ``out``), which is returned."""
    numbers = itertools.count()

    def run(report: Callable[[generator.Progress], None] | None = None, **options: object) -> Path:
        values = {
            "steps": 2,
            "batch_size": 8,
            "device": "cpu",
            "out": str(tmp_path / f"run-{next(numbers)}"),
            **options,
        }
        with Ranks("cpu") as ranks:
            train_generator(GeneratorConfig(**values), ranks, report)
        return Path(values["out"])

    return run
