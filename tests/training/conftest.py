"""A tiny network in place of the one that is trained for real."""

from __future__ import annotations

import pytest

from synthfast.models.unet_config import UNet2DConfig


def tiny_unet(image_size: int, channels: int, num_classes: int | None, dropout: float = 0.0) -> UNet2DConfig:
    return UNet2DConfig(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=dropout,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


@pytest.fixture
def tiny(monkeypatch):
    """Training in a blink: a network of a few thousand parameters. ``tiny(dropout=0.5)`` replaces it by one with dropout."""

    def use(dropout: float = 0.0) -> None:
        def config(image_size, channels, num_classes):
            return tiny_unet(image_size, channels, num_classes, dropout)

        monkeypatch.setattr("synthfast.training.generator.small_unet_config", config)

    use()
    return use
