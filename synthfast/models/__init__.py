"""Generators and classifiers, and readers of published weights."""

from __future__ import annotations

from synthfast.models.classifiers import (
    build_classifier,
    default_classifier,
    describe_classifier,
    load_classifier,
    make_classifier,
)
from synthfast.models.diffusers_format import load_diffusers_unet, read_scheduler_config, resolve_model_folder
from synthfast.models.frozen import freeze
from synthfast.models.unet import UNet2D, UNet2DConfig, small_unet_config

__all__ = [
    "UNet2D",
    "UNet2DConfig",
    "build_classifier",
    "default_classifier",
    "describe_classifier",
    "freeze",
    "load_classifier",
    "load_diffusers_unet",
    "make_classifier",
    "read_scheduler_config",
    "resolve_model_folder",
    "small_unet_config",
]
