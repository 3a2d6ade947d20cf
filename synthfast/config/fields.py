"""What the dataclasses of the stages share: fields with help, and checks whose errors name the option."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from synthfast.errors import UsageError


def option(default: Any, text: str, **extra: Any) -> Any:
    """A field with its help text. ``extra``: choices (a tuple), metavar, short (such as "-n")."""
    return field(default=default, metadata={"help": text, **extra})


LOADERS = ("auto", "device", "dali", "torch")


def loader_option() -> Any:
    return option(
        "auto",
        "What brings the images, always the same: device (from memory, on a GPU its own), dali (NVIDIA DALI decodes files, on a "
        "GPU where there is one), torch (a DataLoader); auto is device for images in arrays, dali or torch for files.",
        choices=LOADERS,
    )


def workers_option() -> Any:
    return option(
        None,
        "Processes of the torch loader, threads of dali; if not given one for each CPU, and no process where a thread is enough.",
    )


def require_workers(workers: int | None) -> None:
    require(workers is None or workers >= 0, "--workers", workers, "a whole number of at least 0")


def allow_lossy_option() -> Any:
    return option(
        False,
        "Compare images that were stored as jpg or webp with lossless ones, though scores see the traces of the coding.",
    )


DEFAULT_RADIUS = {"linf": 8 / 255, "l2": 0.5}


def radius(norm: str, eps: float | None) -> float:
    """The radius of the ball: ``eps``, or where it is None 8/255 in linf and 0.5 in l2, the usual ones on CIFAR."""
    return DEFAULT_RADIUS[norm] if eps is None else eps


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UsageError(f"{name} {value}: expected {expected}")


def require_optimizer(lr: float, weight_decay: float) -> None:
    require(0 < lr < math.inf, "--lr", lr, "a positive number")
    require(0 <= weight_decay < math.inf, "--weight-decay", weight_decay, "a number of at least 0")


def require_seed(seed: int) -> None:
    require(-(2**63) <= seed < 2**63, "--seed", seed, "a whole number from -2^63 to 2^63 - 1")
