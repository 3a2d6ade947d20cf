"""Plain PyTorch versions of the operations of :mod:`synthfast.ops.nn`, written for reading. Any float type.

The matrices of F(4x4, 3x3) for the points 0, a, -a, b, -b and infinity; Lavin and Gray, "Fast algorithms for convolutional
neural networks", CVPR 2016, with the points 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 32
A, B = 5 / 8, 3 / 2


def matrices(a: float = A, b: float = B) -> tuple[Tensor, Tensor, Tensor]:
    """float64 A^T [4, 6], G [6, 3] and B^T [6, 6]: y = A^T ((G g) * (B^T d)) are the four sums of six inputs d with three
    weights g."""
    points = (a, -a, b, -b)
    output = [[1.0, *(p**i for p in points), float(i == 3)] for i in range(4)]
    output[1:] = [[0.0, *row[1:]] for row in output[1:]]
    weights = [[1 / (a**2 * b**2), 0, 0]]
    inputs = [[a**2 * b**2, 0, -(a**2) - b**2, 0, 1, 0]]
    for p, q in ((a, b), (-a, b), (b, a), (-b, a)):  # q is the point of the other pair
        factor = 1 / (2 * p**2 * (p**2 - q**2))
        weights.append([factor, factor * p, factor * p**2])
        inputs.append([0, -p * q**2, -(q**2), p, 1, 0])
    weights.append([0, 0, 1])
    inputs.append([0, a**2 * b**2, 0, -(a**2) - b**2, 0, 1])
    return tuple(torch.tensor(rows, dtype=torch.float64) for rows in (output, weights, inputs))


def winograd_weights(weight: Tensor, rotated: bool = False) -> Tensor:
    """See :func:`synthfast.ops.winograd_weights`."""
    if rotated:
        weight = weight.flip(2, 3).transpose(0, 1)
    g = matrices()[1].to(weight.dtype)
    values = torch.einsum("ai,bj,kcij->abck", g, g, weight)
    outputs = weight.shape[0]
    values = F.pad(values, (0, -outputs % PANEL)).flatten(0, 1)
    return values.unflatten(2, (-1, PANEL)).transpose(1, 2).contiguous()


def _convolve(x: Tensor, transformed: Tensor, channels: int) -> Tensor:
    h, w = x.shape[2:]
    output, _, inputs = (m.to(x.dtype) for m in matrices())
    tiles = F.pad(x, (1, 1 + -w % 4, 1, 1 + -h % 4)).unfold(2, 6, 4).unfold(3, 6, 4)  # [N, C, rows, columns, 6, 6]
    values = torch.einsum("ai,bj,nctuij->abntuc", inputs, inputs, tiles)
    weights = transformed.transpose(1, 2).flatten(2)[..., :channels].unflatten(0, (6, 6))
    sums = torch.einsum("abntuc,abck->abntuk", values, weights)
    result = torch.einsum("ia,jb,abntuk->nktiuj", output, output, sums)
    return result.flatten(2, 3).flatten(3, 4)[:, :, :h, :w]


def _activate(x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    if scale is not None:
        x = x * scale[:, None, None] + shift[:, None, None]
    return x.relu() if relu else x


def winograd_conv3x3(
    x: Tensor,
    transformed: Tensor,
    channels: int,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """See :func:`synthfast.ops.winograd_conv3x3`."""
    y = _convolve(_activate(x, scale, shift, relu), transformed, channels)
    if bias is not None:
        y = y + bias[:, None, None]
    return (y if residual is None else y + residual).contiguous(memory_format=torch.channels_last)


def winograd_conv3x3_gradient(
    gradient: Tensor,
    transformed: Tensor,
    channels: int,
    x: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """See :func:`synthfast.ops.winograd_conv3x3_gradient`."""
    result = _convolve(gradient, transformed, channels)
    if relu:
        result = torch.where(_activate(x, scale, shift, False) <= 0, 0, result)
    if scale is not None:
        result = result * scale[:, None, None]
    return result.contiguous(memory_format=torch.channels_last)
