"""Layers whose weights are divided by their largest singular value (spectral normalisation, Miyato et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# https://arxiv.org/abs/1802.05957

_EPS = 1e-12


class _Spectral(nn.Module):
    """What the layers share: estimates u and v of the first singular vectors of the weight as a matrix [outputs, rest].

    A forward call computes W / (u' W v), with a gradient through W alone. It changes nothing: u and v move by
    :func:`power_iteration`, which a training loop calls once a step. So a network gives the same output as often as it is asked,
    compiled or not, on every rank.
    """

    weight: Tensor
    u: Tensor
    v: Tensor

    def _make_vectors(self) -> None:
        self.register_buffer("u", torch.zeros(self.weight.shape[0]))
        self.register_buffer("v", torch.zeros(self.weight[0].numel()))

    def _matrix(self) -> Tensor:
        """The weight as a matrix; columns in storage order of channels_last, so that nothing is copied."""
        weight = self.weight.permute(0, 2, 3, 1) if self.weight.dim() == 4 else self.weight
        return weight.reshape(weight.shape[0], -1)

    @torch.no_grad()
    def iterate(self, times: int = 1) -> None:
        matrix = self._matrix()
        for _ in range(times):
            self.v.copy_(F.normalize(torch.mv(matrix.t(), self.u), dim=0, eps=_EPS))
            self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0, eps=_EPS))

    def normalized(self) -> Tensor:
        """The weight divided by its largest singular value, in float32 also under autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight / torch.dot(self.u, torch.mv(self._matrix(), self.v))


class SpectralConv2d(_Spectral, nn.Conv2d):
    """A convolution with a spectrally normalised weight."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self._make_vectors()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalized(), self.bias, padding=self.padding)


class SpectralLinear(_Spectral, nn.Linear):
    """A linear layer with a spectrally normalised weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self._make_vectors()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized(), self.bias)


class SpectralEmbedding(_Spectral, nn.Embedding):
    """A table of vectors that is spectrally normalised as a matrix."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__(count, size)
        self._make_vectors()

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.normalized())


def power_iteration(network: nn.Module) -> None:
    """One step of the power iteration in every layer of ``network`` (Miyato et al. 2018, Algorithm 1)."""
    for module in network.modules():
        if isinstance(module, _Spectral):
            module.iterate()


def start_iteration(network: nn.Module, random: torch.Generator) -> None:
    """u and v of every layer of ``network``, which has new weights: drawn from ``random``, then iterated until they fit."""
    for module in network.modules():
        if isinstance(module, _Spectral):
            module.u.copy_(torch.randn(module.u.shape, generator=random))
            module.iterate(20)
