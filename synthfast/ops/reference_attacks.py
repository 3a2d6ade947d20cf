"""Plain PyTorch versions of the attack operations, written for reading; see :mod:`synthfast.ops.reference`.

l-infinity results are equal to the kernels' bit for bit. l2 results are computed in float64 and may differ in the last place: the
kernels round in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from synthfast.ops.reference import is_dense, philox_normal_, philox_uniform_

_ATTACK = 6  # synthfast.ops.Stream.ATTACK; this module imports nothing that loads the extension
_SHRINK = 1 - 3 * 2.0**-23  # what the kernels allow for their roundings


def _column(value: Tensor | float, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=like.device).expand(len(like)).to(dtype)
    return value.reshape(-1, *[1] * (like.dim() - 1))


def _radius(eps: Tensor | float, like: Tensor) -> Tensor:
    return _column(eps, like).nan_to_num(nan=0.0).clamp(0, torch.finfo(torch.float32).max)


def next_value(values: Tensor, upwards: Tensor) -> Tensor:
    """The next value of the same type, above where ``upwards`` and below elsewhere."""
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)
    least = bits.new_tensor(1).expand_as(bits)
    sign = torch.where(upwards, 0, torch.iinfo(bits.dtype).min).to(bits.dtype)
    away = torch.where(values > 0, upwards, ~upwards)  # from zero
    stepped = torch.where(values == 0, least | sign, torch.where(away, bits + 1, bits - 1))
    return stepped.view(values.dtype)


def round_inwards(values: Tensor, error: Tensor | float, dtype: torch.dtype, upwards: Tensor) -> Tensor:
    """The value of ``dtype`` next to values + error (float64, |error| below half a unit in the last place of values), not
    below it where ``upwards``, not above it elsewhere."""
    nearest = values.to(dtype)
    rest = values - nearest.double()
    rest = torch.where(rest == 0, torch.as_tensor(error, dtype=torch.float64, device=values.device), rest)
    wrong = torch.where(upwards, rest > 0, rest < 0)
    return torch.where(wrong, next_value(nearest, upwards), nearest)


def _box(lo: float, hi: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest value of ``dtype`` that is not below lo, and the largest not above hi."""
    ends = torch.tensor([lo, hi], dtype=torch.float64, device=device)
    return round_inwards(ends, 0.0, dtype, torch.tensor([True, False], device=device)).float().unbind()


def _ball(origin: Tensor, eps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """origin -+ eps as values of ``dtype``, rounded inwards from the exact sums (Knuth's two-sum in float64)."""
    bounds = []
    for radius, up in ((-eps.double(), True), (eps.double(), False)):
        center = origin.double()
        total = center + radius
        part = total - center
        error = (center - (total - part)) + (radius - part)
        bounds.append(round_inwards(total, error, dtype, torch.full_like(total, up, dtype=torch.bool)))
    return bounds[0].float(), bounds[1].float()


def _clamp(v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(v, low), high)


def _linf_project(v: Tensor, origin: Tensor, eps: Tensor, lo: float, hi: float, dtype: torch.dtype) -> Tensor:
    v = _clamp(v, *_ball(origin, eps, dtype))
    return _clamp(v, *_box(lo, hi, dtype, v.device)).to(dtype) + 0  # 0 and not -0


def _sign_step(x: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
    step = _column(step_size, x)
    return x.float() + torch.where(gradient > 0, step, torch.where(gradient < 0, -step, 0.0))


def linf_step(x: Tensor, gradient: Tensor, origin: Tensor, eps, step_size, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """See :func:`synthfast.ops.linf_step`."""
    return _linf_project(_sign_step(x, gradient, step_size), origin, _radius(eps, x), lo, hi, x.dtype)


def linf_step_(x: Tensor, *arguments, **named) -> Tensor:
    """See :func:`synthfast.ops.linf_step_`."""
    return x.copy_(linf_step(x, *arguments, **named))


def _norm(t: Tensor) -> Tensor:
    """Of each sample, in float64, as [N, 1, ...]."""
    squares = t.double().square().flatten(1).sum(1)
    return squares.sqrt().reshape(-1, *[1] * (t.dim() - 1))


def _gradient_step(x: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
    norm = _norm(gradient)
    moves = (norm > 0) & norm.isfinite()
    step = _column(step_size, x, torch.float64) / torch.where(moves, norm, 1.0) * gradient.double()
    return x.double() + torch.where(moves, step, 0.0)


def _l2_project(v: Tensor, origin: Tensor, eps: Tensor, lo: float, hi: float, dtype: torch.dtype) -> Tensor:
    """float64 images, before they are rounded to ``dtype``."""
    t = v - origin.double()
    norm = _norm(t)
    v = torch.where(norm <= eps, v, origin.double() + t * (eps * _SHRINK / norm))
    return _clamp(v, *(end.double() for end in _box(lo, hi, dtype, v.device)))


def _towards(v: Tensor, origin: Tensor, dtype: torch.dtype) -> Tensor:
    return round_inwards(v, 0.0, dtype, v < origin.double()) + 0


def l2_step(x: Tensor, gradient: Tensor, origin: Tensor, eps, step_size, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """See :func:`synthfast.ops.l2_step`."""
    v = _gradient_step(x, gradient, step_size)
    return _towards(_l2_project(v, origin, _radius(eps, x), lo, hi, x.dtype), origin, x.dtype)


def l2_step_(x: Tensor, *arguments, **named) -> Tensor:
    """See :func:`synthfast.ops.l2_step_`."""
    return x.copy_(l2_step(x, *arguments, **named))


def apgd_step(
    x: Tensor,
    previous: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps,
    step_size,
    momentum,
    norm: str,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """See :func:`synthfast.ops.apgd_step`."""
    radius, a = _radius(eps, x), _column(momentum, x)
    if norm == "linf":
        state, before = x.float(), previous.float()
        z = _linf_project(_sign_step(x, gradient, step_size), origin, radius, lo, hi, torch.float32)
        # In 16-bit types z keeps the digits of float32, but not lo and hi that are rounded to float32 instead of to the type.
        z = _clamp(z, *_box(lo, hi, x.dtype, x.device))
        return _linf_project(state + a * (z - state) + (1 - a) * (state - before), origin, radius, lo, hi, x.dtype)
    state, before, a = x.double(), previous.double(), a.double()
    z = _l2_project(_gradient_step(x, gradient, step_size), origin, radius, lo, hi, x.dtype)
    v = state + a * (z - state) + (1 - a) * (state - before)
    return _towards(_l2_project(v, origin, radius, lo, hi, x.dtype), origin, x.dtype)


def apgd_step_(previous: Tensor, x: Tensor, *arguments, **named) -> Tensor:
    """See :func:`synthfast.ops.apgd_step_`."""
    return previous.copy_(apgd_step(x, previous, *arguments, **named))


def _in_storage_order(values: Tensor, like: Tensor) -> Tensor:
    """``values`` [N, D] in the shape of ``like``."""
    if like.dim() == 4 and is_dense(like) and not like.is_contiguous():
        n, c, h, w = like.shape
        return values.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return values.reshape(like.shape)


def ball_start(
    origin: Tensor, index: Tensor, eps, norm: str, seed: int, step: int = 0, lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """See :func:`synthfast.ops.ball_start`."""
    if not origin.numel():
        return torch.empty_like(origin)
    n, elements = len(origin), origin[0].numel()
    radius = _radius(eps, origin)
    if norm == "linf":
        u = philox_uniform_(torch.empty(n, elements, device=origin.device), index, seed, _ATTACK, step)
        v = origin.float() + radius * (2 * _in_storage_order(u, origin) - 1)
        return _linf_project(v, origin, radius, lo, hi, origin.dtype)
    z = philox_normal_(torch.empty(n, elements + 2, device=origin.device), index, seed, _ATTACK, step).double()
    t = _in_storage_order((z / _norm(z))[:, :elements], origin) * radius * _SHRINK
    v = _clamp(origin.double() + t, *(end.double() for end in _box(lo, hi, origin.dtype, origin.device)))
    return _towards(v, origin, origin.dtype)
