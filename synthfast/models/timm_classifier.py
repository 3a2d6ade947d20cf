"""Classifiers of the package timm, for images larger than those of the other networks."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from synthfast.errors import UsageError
from synthfast.models.classifier_parts import Normalize

TIMM_PREFIX = "timm:"


class TimmClassifier(nn.Module):
    """A network of timm behind the normalisation of its pixels.

    Input: images float [N, C, H, W] in [0, 1]. Output: logits float [N, classes]. Weights are random, and those of
    torch's global generator; nothing is downloaded. Not every network of timm can be traced by torch.fx.

    Args:
        name: as in ``timm.list_models()``.
        shape: (H, W, C) of the images; networks of a fixed image size are made for H x W.
        classes: number of outputs.
        mean, std: of the pixels, one number per channel.
    """

    def __init__(
        self, name: str, shape: tuple[int, int, int], classes: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        timm, config = _import_timm(name), timm_config(name)
        height, width, channels = shape
        options: dict[str, Any] = {"img_size": (height, width)} if config["fixed_input_size"] else {}
        self.normalize = Normalize(mean, std)
        try:
            with torch.device("cpu"):  # timm keeps tables in buffers, which a meta device would lose
                self.network = timm.create_model(
                    name, pretrained=False, num_classes=classes, in_chans=channels, drop_rate=0.0, **options
                )
        except Exception as error:  # whatever a network raises about sizes that it cannot have
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{TIMM_PREFIX}{name}: cannot be made for images {list(shape)} in {classes} classes ({reason}); "
                "choose another network"
            ) from error
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalize(x))


def timm_config(name: str) -> dict[str, Any]:
    """timm's own facts about a network: mean, std, first_conv, classifier, fixed_input_size and more.

    Raises UsageError in one line if timm is not installed or has no such network.
    """
    timm = _import_timm(name)
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # a tag of weights ("resnet18.a1_in1k") that does not exist
        config = None
    if config is None:
        base = name.partition(".")[0]
        close = difflib.get_close_matches(base, timm.list_models(), 3) or timm.list_models(f"*{base}*")[:3]
        hint = f", the nearest are {', '.join(close)}" if close else ""
        raise UsageError(f"{TIMM_PREFIX}{name}: timm {timm.__version__} has no network of this name{hint}")
    return config.to_dict()


def timm_pixels(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels as timm has them for a network; their averages where there are not 3 channels."""
    config = timm_config(name)
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    if channels == len(mean):
        return mean, std
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"{TIMM_PREFIX}{name}: needs the package timm, which is not installed; pip install 'synthfast[timm]'"
        ) from error
    return timm
