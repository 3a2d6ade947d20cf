"""Convolutions whose weights are divided by their largest singular value (spectral normalisation, Miyato et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# https://arxiv.org/abs/1802.05957

_EPS = 1e-12


class SpectralConv2d(nn.Conv2d):
    """A convolution with a spectrally normalised weight W, as a matrix [outputs, inputs x kernel area].

    u and v are estimates of the first singular vectors. A forward call computes W / (u' W v), with a gradient through W alone. It
    changes nothing: u and v move by :func:`power_iteration`, which a training loop calls once a step. So a network gives the same
    output as often as it is asked, compiled or not, on every rank.
    """

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.register_buffer("u", torch.zeros(outputs))
        self.register_buffer("v", torch.zeros(self.weight[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalized(), self.bias, padding=self.padding)

    def normalized(self) -> Tensor:
        """The weight divided by its largest singular value, in float32 also under autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight / torch.dot(self.u, torch.mv(self._matrix(), self.v))

    @torch.no_grad()
    def iterate(self, times: int = 1) -> None:
        """Steps of the power iteration."""
        matrix = self._matrix()
        for _ in range(times):
            self.v.copy_(F.normalize(torch.mv(matrix.t(), self.u), dim=0, eps=_EPS))
            self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0, eps=_EPS))

    def _matrix(self) -> Tensor:
        """The weight as a matrix; columns in storage order of channels_last, so that nothing is copied."""
        return self.weight.permute(0, 2, 3, 1).reshape(len(self.weight), -1)


def power_iteration(network: nn.Module) -> None:
    """One step of the power iteration in every layer of ``network`` (Miyato et al. 2018, Algorithm 1)."""
    for module in network.modules():
        if isinstance(module, SpectralConv2d):
            module.iterate()


def start_iteration(network: nn.Module, random: torch.Generator) -> None:
    """u and v of every layer of ``network``, which has new weights: drawn from ``random``, then iterated until they fit."""
    for module in network.modules():
        if isinstance(module, SpectralConv2d):
            module.u.copy_(torch.randn(module.u.shape, generator=random))
            module.iterate(20)
