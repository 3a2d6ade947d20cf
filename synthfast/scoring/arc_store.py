"""What is measured at a radius, and where it is kept, so that an interrupted ``synthfast score arc`` goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from synthfast.artifacts import atomic_write_json, load_kept, read_json, save_tensors
from synthfast.errors import SynthfastError
from synthfast.evaluation.progress import open_progress
from synthfast.scoring.arc_measure import Outcomes


@dataclass(frozen=True)
class Measured:
    """A radius with its discriminator.

    eps: on pixels in [0, 1].
    outcomes: on the held-out images.
    validation_accuracy, training_accuracy, steps, best_step: see :class:`synthfast.scoring.discriminator.Discriminator`.
    validation_images: how many there were.
    state: the discriminator's state dict, which larger radii start from.
    seconds: for training and measuring.
    """

    eps: float
    outcomes: Outcomes
    validation_accuracy: float
    validation_images: int
    training_accuracy: float
    steps: int
    best_step: int
    state: Mapping[str, Tensor]
    seconds: float


_NUMBERS = ("validation_accuracy", "validation_images", "training_accuracy", "steps", "best_step", "seconds")


class Store:
    """Finished radii in a folder: a file of tensors and one of numbers for each, beside the facts they were made under.

    With folder None nothing is kept. A context manager, in which no other process writes the folder.

    Raises:
        UsageError: the folder holds something else, or radii made under other facts.
        SynthfastError: another process is writing it.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self._folder = folder
        self._lock = None if folder is None else open_progress(folder, facts, "an ARC")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()

    def _path(self, eps: float, ending: str) -> Path:
        assert self._folder is not None
        return self._folder / f"radius-{float(eps)!r}.{ending}"

    def read(self, eps: float) -> Measured | None:
        """A finished radius; None if it is not there, or is damaged and must be made again."""
        if self._folder is None or not self._path(eps, "json").exists():
            return None
        try:
            numbers = read_json(self._path(eps, "json"), "radius")
            tensors, metadata = load_kept(self._path(eps, "safetensors"))
        except SynthfastError:
            return None
        if metadata != {"numbers": json.dumps(numbers)}:
            return None
        real, synthetic = (tensors.pop(f"outcomes.{kind}").numpy() for kind in ("real", "synthetic"))
        state = {name.removeprefix("state."): tensor for name, tensor in tensors.items()}
        outcomes = Outcomes(real, synthetic, numbers["runs"])
        return Measured(eps, outcomes, state=state, **{name: numbers[name] for name in _NUMBERS})

    def write(self, radius: Measured) -> None:
        """Keep a radius; its numbers come last, so that a kill in between leaves it not done."""
        if self._folder is None:
            return
        outcomes = radius.outcomes
        tensors = {f"state.{name}": tensor for name, tensor in radius.state.items()}
        tensors["outcomes.real"] = torch.from_numpy(outcomes.real)
        tensors["outcomes.synthetic"] = torch.from_numpy(outcomes.synthetic)
        numbers = {"runs": outcomes.runs, **{name: getattr(radius, name) for name in _NUMBERS}}
        save_tensors(self._path(radius.eps, "safetensors"), tensors, {"numbers": json.dumps(numbers)})
        atomic_write_json(self._path(radius.eps, "json"), numbers)
