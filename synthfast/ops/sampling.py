"""Random numbers keyed by sample, solver steps and quantization: the operations of ``csrc/sampling``.

Every function runs on CPU and CUDA, takes float32, bfloat16 and float16, contiguous and channels_last tensors, computes in
float32, and works under ``torch.compile(fullgraph=True)`` without recompiling for new seeds, steps or coefficients.

Randomness is Philox4x32-10 with the run's seed as key. Element e of sample i is word e mod 4 of the block with the counter
(e div 4, i low, i high, stream << 24 | step), where e counts in *storage order*. So a sample's numbers depend on the seed and
its index alone, not on batch size, rank or device; and a channels_last tensor holds, pixel by pixel, what a contiguous one
holds plane by plane.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

import synthfast.ops._extension  # noqa: F401  (registers torch.ops.synthfast)
from synthfast.ops.reference import is_dense

_ops = torch.ops.synthfast


class Stream(enum.IntEnum):
    """Separate random streams of one seed, so that no two uses of randomness share numbers."""

    NOISE = 0  # initial noise and solver noise
    LABEL = 1  # labels drawn from a distribution
    LEVEL = 2  # noise levels of the training loss
    LABEL_DROP = 3  # labels dropped for classifier-free guidance
    TRAINING_NOISE = 4  # noise added to training images
    AUGMENT = 5  # crops and flips
    ATTACK = 6  # starts of attacks and their restarts
    SQUARE = 7  # squares of the black-box attack
    CUTMIX = 8  # boxes and partners of CutMix


def philox_normal_(out: Tensor, index: Tensor, seed: int, stream: int, step: int = 0) -> Tensor:
    """Fill ``out`` with standard normals.

    Args:
        out: float [N, ...], filled in storage order.
        index: int64 [N] on the same device: the index of each sample in its run.
        seed: key of the run, in [-2^63, 2^63).
        stream: stream number in [0, 256), see :class:`Stream`.
        step: step within the stream, in [0, 2^24).

    Returns:
        ``out``.

    Box and Muller's transform of Philox words, accurate to a few ulp; the same bits on CPU and CUDA.
    """
    _ops.philox_normal_(out, index, seed, stream, step)
    return out


def philox_uniform_(out: Tensor, index: Tensor, seed: int, stream: int, step: int = 0) -> Tensor:
    """Fill ``out`` with uniforms in [0, 1): multiples of 2^-24 (float32), 2^-11 (float16) or 2^-8 (bfloat16).

    Arguments as in :func:`philox_normal_`. The same bits on CPU and CUDA.
    """
    _ops.philox_uniform_(out, index, seed, stream, step)
    return out


def solver_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    *,
    seed: int,
    step: int,
    unconditional: Tensor | None = None,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One stage of a diffusion solver, with its noise drawn inside the kernel, in one pass over memory.

    With m the model output, mu the unconditional one, P the previous denoised image and z standard normal noise::

        m  = mu + w (m - mu)                  if ``unconditional`` is given (Ho and Salimans 2022, eq. 6 with w - 1)
        D  = clamp(kx x + km m, lo, hi)
        x' = ax x + ad D + ap P + az z        terms whose coefficient is 0 are skipped

    Args:
        x: state, float [N, ...].
        model_output: the shape of ``x``; its type, or any float type where ``x`` is float32.
        coefficients: float32 [9] on the device of ``x``: kx, km, ax, ad, ap, az, w, lo, hi.
        index: int64 [N], sample indices that key the noise (stream ``Stream.NOISE``).
        seed, step: see :func:`philox_normal_`.
        unconditional: like ``model_output``.
        previous: like ``x``; needed where ap is not 0 (on the CPU its absence is an error, on CUDA it gives NaN).

    Returns:
        (x', D), both like ``x``.

    Tensors that are laid out differently from ``x`` are copied to its layout first.
    """
    return _ops.solver_step(x, model_output, coefficients, index, seed, step, unconditional, previous)


def solver_step_(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    *,
    seed: int,
    step: int,
    unconditional: Tensor | None = None,
    history: Tensor | None = None,
) -> None:
    """:func:`solver_step` in place: ``x`` becomes x'; ``history`` (like ``x``), if given, is read as P and becomes D."""
    _ops.solver_step_(x, model_output, coefficients, index, seed, step, unconditional, history)


def quantize_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], float [N, C, H, W], to uint8 [N, H, W, C]: 127.5 x + 127.5, clamped, rounded to nearest even.

    NaN gives 0.
    """
    return _ops.quantize_uint8(x)


@torch.library.register_fake("synthfast::philox_normal_")
def _(out: Tensor, index: Tensor, seed: int, stream: int, step: int) -> None:
    return None


@torch.library.register_fake("synthfast::philox_uniform_")
def _(out: Tensor, index: Tensor, seed: int, stream: int, step: int) -> None:
    return None


@torch.library.register_fake("synthfast::solver_step")
def _(x, model_output, coefficients, index, seed, step, unconditional=None, previous=None) -> tuple[Tensor, Tensor]:
    layout = torch.preserve_format if is_dense(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout), torch.empty_like(x, memory_format=layout)


@torch.library.register_fake("synthfast::solver_step_")
def _(x, model_output, coefficients, index, seed, step, unconditional=None, history=None) -> None:
    return None


@torch.library.register_fake("synthfast::quantize_uint8")
def _(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h, w, c), dtype=torch.uint8)
