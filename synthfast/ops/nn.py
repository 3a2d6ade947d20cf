"""3x3 convolutions with weights that stay the same for many calls, by Winograd's algorithm: the operations of ``csrc/nn``.

CPU and float32 only: on GPUs cuDNN chooses such algorithms by itself. F(4x4, 3x3) of Lavin and Gray (2016) makes 4x4 outputs with
36 multiplications for each pair of channels, where the ordinary convolution takes 144. The weights are transformed once; the
results differ from those of an ordinary convolution by rounding (at most about 6e-6 of the largest output for 64 to 512
channels, about 3 times as much as two ordinary convolutions in different orders differ), and in the last bits between
instruction sets. They do not depend on the number of threads or the size of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

import synthfast.ops._extension  # noqa: F401  (registers torch.ops.synthfast)

_ops = torch.ops.synthfast
PANEL = 32  # output channels side by side in transformed weights


def transformed_shape(weight: Tensor, rotated: bool = False) -> tuple[int, int, int, int]:
    """Of the transformed ``weight`` [K, C, 3, 3]: (36, ceil(K / 32), C, 32), with K and C exchanged if ``rotated``."""
    outputs, inputs = weight.shape[:2]
    if rotated:
        outputs, inputs = inputs, outputs
    return 36, (outputs + PANEL - 1) // PANEL, inputs, PANEL


def winograd_weights(weight: Tensor, rotated: bool = False) -> Tensor:
    """The weights of a 3x3 convolution as :func:`winograd_conv3x3` takes them.

    Args:
        weight: float32 [K, C, 3, 3] on the CPU, in any layout.
        rotated: for the gradient for the input: rotated by 180 degrees, with K and C exchanged.

    Returns:
        float32 :func:`transformed_shape`: G g G^T at 36 positions, in panels of 32 output channels, missing ones 0.
    """
    out = torch.empty(transformed_shape(weight, rotated) if weight.dim() == 4 else 0, dtype=torch.float32)
    return winograd_weights_(out, weight, rotated)


def winograd_weights_(out: Tensor, weight: Tensor, rotated: bool = False) -> Tensor:
    """:func:`winograd_weights` into ``out``, which is returned."""
    _ops.winograd_weights_(out, weight, rotated)
    return out


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
    """A 3x3 convolution of stride 1 and padding 1, with what surrounds it in residual networks, in one pass::

        y = conv(a(x)) + bias + residual        a(x) = x, relu(x) or relu(scale x + shift)

    Args:
        x: float32 [N, C, H, W] on the CPU; taken as it is where it is channels_last, else copied.
        transformed: of :func:`winograd_weights` for weights [K, C, 3, 3].
        channels: K.
        bias: float32 [K].
        scale, shift: float32 [C], both or none, and only with ``relu``: a batch norm before the activation.
        relu: whether there is an activation.
        residual: float32 [N, K, H, W].

    Returns:
        float32 [N, K, H, W], channels_last. There is no autograd formula; see :func:`winograd_conv3x3_gradient`.
    """
    return _ops.winograd_conv3x3(x, transformed, channels, bias, scale, shift, relu, residual)


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
    """The gradient of :func:`winograd_conv3x3` for ``x``.

    Args:
        gradient: for y, float32 [N, K, H, W] on the CPU; taken as it is where it is channels_last, else copied.
        transformed: of ``winograd_weights(weight, rotated=True)``.
        channels: C.
        x: the input of the convolution [N, C, H, W], given with ``relu`` and only then.
        scale, shift, relu: as there.

    Returns:
        float32 [N, C, H, W], channels_last.
    """
    return _ops.winograd_conv3x3_gradient(gradient, transformed, channels, x, scale, shift, relu)


@torch.library.register_fake("synthfast::winograd_weights_")
def _(out: Tensor, weight: Tensor, rotated: bool = False) -> None:
    return None


@torch.library.register_fake("synthfast::winograd_conv3x3")
def _(x, transformed, channels, bias=None, scale=None, shift=None, relu=False, residual=None) -> Tensor:
    n, _, h, w = x.shape
    return torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("synthfast::winograd_conv3x3_gradient")
def _(gradient, transformed, channels, x=None, scale=None, shift=None, relu=False) -> Tensor:
    n, _, h, w = gradient.shape
    return torch.empty(
        (n, channels, h, w), dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
    )
