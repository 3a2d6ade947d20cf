"""Classifier-free guidance (Ho & Salimans 2022): labels dropped in training, two predictions mixed in sampling.

A conditional network knows one label more than the data has classes, the null label, which stands for "no class". With
weight w sampling follows mu + w (m - mu), m being the output for the class and mu that for the null label: w = 0 is
unconditional, w = 1 conditional, larger w trades variety for typical images. (The paper's weight is w - 1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from synthfast import ops
from synthfast.errors import SynthfastError, UsageError

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``model(x, t, labels) -> m``: x float32 [N, C, H, W] channels_last, t float32 [] or [N], labels int64 [N] or None; m
like x, of any float type. Sampling passes t as [], the losses pass [N]."""


def drop_labels(labels: Tensor, null_label: int, probability: float, index: Tensor, seed: int) -> Tensor:
    """``labels`` int64 [N] with each replaced by ``null_label`` with ``probability``, decided by (seed, index) alone.

    ``index`` int64 [N] is the position of each sample in the training run; stream ``LABEL_DROP``.
    """
    uniform = torch.empty(len(labels), 1, device=labels.device)
    ops.philox_uniform_(uniform, index, seed, ops.Stream.LABEL_DROP)
    return labels.masked_fill(uniform[:, 0] < probability, null_label)


class GuidedModel:
    """A network with its input buffer; one call evaluates it once for a whole batch.

    With a guidance weight the buffer holds every state twice, for the class labels and for the null label, and both
    predictions come from the same network call. Without one, or with weight 1, each state is there once.

    Args:
        model: see :data:`Model`.
        shape: (N, C, H, W) of the batch.
        labels: int64 [N] on ``device``, or None for an unconditional network.
        null_label: the label that stands for no class; None if the network has none.
        guidance: the weight w, or None.

    Attributes:
        state: float32 [N, C, H, W], channels_last, uninitialised: the state, to be written by the caller.
    """

    def __init__(
        self,
        model: Model,
        shape: tuple[int, int, int, int],
        labels: Tensor | None,
        null_label: int | None,
        guidance: float | None,
        device: torch.device,
    ) -> None:
        self.model, self.labels = model, labels
        self.guided = guidance is not None and guidance != 1
        if guidance is not None and not math.isfinite(guidance):
            raise UsageError(f"--guidance {guidance}: expected a finite number")
        if self.guided and (labels is None or null_label is None):
            lacking = "no labels" if labels is None else "no null label"
            raise UsageError(
                f"--guidance {guidance:g}: expected a class-conditional model trained with label dropout, found "
                f"{lacking}; leave --guidance out"
            )
        if self.guided:
            self.labels = torch.cat((labels, torch.full_like(labels, null_label)))
        count = 2 * shape[0] if self.guided else shape[0]
        self._batch = torch.empty((count, *shape[1:]), device=device, memory_format=torch.channels_last)
        self.state = self._batch[: shape[0]]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs (m, mu) at the current ``state``, each [N, C, H, W]; mu is None without guidance. t is float32 []."""
        if self.guided:
            self._batch[len(self.state) :].copy_(self.state)
        output = self.model(self._batch, t, self.labels)
        if not isinstance(output, Tensor) or output.shape != self._batch.shape:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise SynthfastError(
                f"generator output: expected a tensor of shape {list(self._batch.shape)}, found {found}; "
                "correct the model"
            )
        if self.guided:
            return output[: len(self.state)], output[len(self.state) :]
        return output, None
