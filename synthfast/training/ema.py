"""Exponential moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """A copy of a module that follows it: after step k, average = d * average + (1 - d) * weights.

    d = min(decay, (1 + k) / (10 + k)), so that the first, random weights are soon forgotten. Buffers are copied: batch norm's
    statistics are moving averages already, and copies are what adversarial training with averaged weights has published (Gowal
    et al. 2020, Wang et al. 2023). On digits in mid-training (PGD, decay 0.995, two seeds) averaged or recomputed ones were
    not better.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
