"""Steps and starts of attacks within an eps-ball: the operations of ``csrc/attacks``.

Every function runs on CPU and CUDA, takes float32, bfloat16 and float16, contiguous and channels_last tensors, computes in
float32 (norms in float64), and works under ``torch.compile(fullgraph=True)`` without recompiling for new values of its tensors.

What is stored is inside the ball and inside [lo, hi] exactly, in every type, given finite x and an origin in [lo, hi]:
|v - origin| <= eps (l-infinity) or ||v - origin||_2 <= eps (l2), and lo <= v <= hi. For this, bounds are rounded inwards, and in
the l2 ball every coordinate of a projected point is rounded towards the origin. In 16-bit types that is a large part of a small
displacement: l2 attacks should keep their images in float32.

Radius, step size and momentum are float32 [N], one value a sample, so one batch may hold attacks of many radii; a number stands
for N equal values. A negative or NaN radius counts as 0. A sample's result depends on that sample alone, and is the same bit for
bit on all processors and for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

import synthfast.ops._extension  # noqa: F401  (registers torch.ops.synthfast)
from synthfast.errors import UsageError
from synthfast.ops.reference import is_dense

_ops = torch.ops.synthfast
_NORMS = {"linf": 0, "l2": 1}


def _per_sample(value: Tensor | float, batch: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.expand(batch.shape[0]) if value.dim() == 0 else value
    return torch.full(batch.shape[:1], value, dtype=torch.float32, device=batch.device)


def _norm_number(op: str, norm: str) -> int:
    if norm not in _NORMS:
        raise UsageError(f'{op}: norm must be "linf" or "l2"; got {norm!r}')
    return _NORMS[norm]


def linf_step(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: Tensor | float,
    step_size: Tensor | float,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """One step of projected sign-gradient ascent (Madry et al. 2018, section 2.1) in one pass over memory::

        v = clamp(clamp(x + step_size sign(gradient), origin - eps, origin + eps), lo, hi)        sign(NaN) = 0

    Args:
        x: images, float [N, ...].
        gradient: like ``x``; its sign alone counts.
        origin: like ``x``; centers of the balls.
        eps: radius >= 0, float32 [N] on the device of ``x``, or a number.
        step_size: float32 [N] or a number; a negative one descends, as targeted attacks do.
        lo, hi: range of the pixels, lo <= hi.

    Returns:
        v, like ``x``. Tensors that are laid out differently from ``x`` are copied to its layout first.

    Raises:
        RuntimeError: shapes, types or devices that do not fit, lo > hi.
    """
    return _ops.linf_step(x, gradient, origin, _per_sample(eps, x), _per_sample(step_size, x), lo, hi)


def linf_step_(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: Tensor | float,
    step_size: Tensor | float,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """:func:`linf_step` in place: ``x`` becomes v and is returned."""
    _ops.linf_step_(x, gradient, origin, _per_sample(eps, x), _per_sample(step_size, x), lo, hi)
    return x


def l2_step(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: Tensor | float,
    step_size: Tensor | float,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """One step of projected gradient ascent in the l2 norm (Madry et al. 2018, section 2.1)::

        t = x + step_size gradient / ||gradient|| - origin        no step where the norm is 0 or not finite
        v = clamp(origin + t min(1, eps / ||t||), lo, hi)

    Arguments and errors as in :func:`linf_step`; norms are over each sample. A point that needs no projection is stored as it is
    (in 16-bit types rounded towards the origin); a projected one lies about 4e-7 eps further in, and a radius below 2^-100 counts
    as 0 for it.
    """
    return _ops.l2_step(x, gradient, origin, _per_sample(eps, x), _per_sample(step_size, x), lo, hi)


def l2_step_(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: Tensor | float,
    step_size: Tensor | float,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """:func:`l2_step` in place: ``x`` becomes v and is returned."""
    _ops.l2_step_(x, gradient, origin, _per_sample(eps, x), _per_sample(step_size, x), lo, hi)
    return x


def apgd_step(
    x: Tensor,
    previous: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: Tensor | float,
    step_size: Tensor | float,
    momentum: Tensor | float,
    norm: str,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """One step of Auto-PGD (Croce and Hein 2020, algorithm 1, lines 7 and 8)::

        z = P(x + step_size d(gradient))                          d: the sign, or gradient / ||gradient|| (0 where not finite)
        v = P(x + momentum (z - x) + (1 - momentum) (x - previous))

    where P projects to the ball and then to [lo, hi].

    Args:
        x, gradient, origin, eps, step_size, lo, hi: see :func:`linf_step`.
        previous: like ``x``; the images of the step before. In the first step momentum is 1, and ``x`` will do.
        momentum: float32 [N] or a number (0.75 in the paper).
        norm: "linf" or "l2".

    Returns:
        v, like ``x``.

    Raises:
        UsageError: another norm.
        RuntimeError: shapes, types or devices that do not fit, lo > hi.
    """
    number = _norm_number("apgd_step", norm)
    scalars = _per_sample(eps, x), _per_sample(step_size, x), _per_sample(momentum, x)
    return _ops.apgd_step(x, previous, gradient, origin, *scalars, number, lo, hi)


def apgd_step_(
    previous: Tensor,
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: Tensor | float,
    step_size: Tensor | float,
    momentum: Tensor | float,
    norm: str,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """:func:`apgd_step` whose result is written over ``previous``, which the next step no longer needs, and returned."""
    number = _norm_number("apgd_step", norm)
    scalars = _per_sample(eps, x), _per_sample(step_size, x), _per_sample(momentum, x)
    _ops.apgd_step_(previous, x, gradient, origin, *scalars, number, lo, hi)
    return previous


def ball_start(
    origin: Tensor,
    index: Tensor,
    eps: Tensor | float,
    norm: str,
    seed: int,
    step: int = 0,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Points drawn uniformly from the eps-balls around ``origin``, then clamped to [lo, hi]: starts of an attack.

    Random numbers are those of stream ``Stream.ATTACK`` in storage order, see :mod:`synthfast.ops.sampling`. l-infinity: eps
    (2 u - 1) with a uniform u a coordinate. l2, in D dimensions: D + 2 normals z, and eps z[:D] / ||z||, because the first D
    coordinates of a uniform point on the sphere in D + 2 dimensions are uniform in the ball (Voelker, Gosmann, Stewart 2017).

    Args:
        origin: float [N, ...].
        index: int64 [N] on the same device: the keys of the samples' random numbers.
        eps: radius >= 0, float32 [N] or a number.
        norm: "linf" or "l2".
        seed: key of the run, in [-2^63, 2^63).
        step: number of the draw, such as the restart, in [0, 2^24).
        lo, hi: range of the pixels, lo <= hi.

    Returns:
        The points, like ``origin``.

    Raises:
        UsageError: another norm.
        RuntimeError: shapes, types or devices that do not fit, a step out of range, lo > hi.
    """
    number = _norm_number("ball_start", norm)
    return _ops.ball_start(origin, index, _per_sample(eps, origin), number, seed, step, lo, hi)


def _like(tensor: Tensor) -> Tensor:
    layout = torch.preserve_format if is_dense(tensor) else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=layout)


@torch.library.register_fake("synthfast::linf_step")
def _(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0) -> Tensor:
    return _like(x)


@torch.library.register_fake("synthfast::linf_step_")
def _(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0) -> None:
    return None


@torch.library.register_fake("synthfast::l2_step")
def _(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0) -> Tensor:
    return _like(x)


@torch.library.register_fake("synthfast::l2_step_")
def _(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0) -> None:
    return None


@torch.library.register_fake("synthfast::apgd_step")
def _(x, previous, gradient, origin, eps, step_size, momentum, norm, lo=0.0, hi=1.0) -> Tensor:
    return _like(x)


@torch.library.register_fake("synthfast::apgd_step_")
def _(previous, x, gradient, origin, eps, step_size, momentum, norm, lo=0.0, hi=1.0) -> None:
    return None


@torch.library.register_fake("synthfast::ball_start")
def _(origin, index, eps, norm, seed, step=0, lo=0.0, hi=1.0) -> Tensor:
    return _like(origin)
