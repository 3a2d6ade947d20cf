"""Steps and starts of eps-ball attacks: the operations of ``csrc/attacks``."""

from __future__ import annotations

import torch
from torch import Tensor

from synthfast.ops.sampling import Stream, philox_normal_, philox_uniform_


def _column(value: Tensor | float, x: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=x.device).expand(len(x))
    return value.reshape(-1, *[1] * (x.dim() - 1))


def _norm(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1).reshape(-1, *[1] * (t.dim() - 1))


def _project(v: Tensor, origin: Tensor, eps: Tensor, norm: str, lo: float, hi: float) -> Tensor:
    t = v - origin
    t = torch.minimum(torch.maximum(t, -eps), eps) if norm == "linf" else t * (eps / _norm(t)).clamp(max=1)
    return (origin + t).clamp(lo, hi)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    return gradient.sign() if norm == "linf" else gradient / _norm(gradient).clamp(min=1e-30)


def linf_step(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0):
    v = x + _column(step_size, x) * gradient.sign()
    return _project(v, origin, _column(eps, x), "linf", lo, hi).to(x.dtype)


def linf_step_(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0):
    return x.copy_(linf_step(x, gradient, origin, eps, step_size, lo, hi))


def l2_step(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0):
    v = x + _column(step_size, x) * _direction(gradient, "l2")
    return _project(v, origin, _column(eps, x), "l2", lo, hi).to(x.dtype)


def l2_step_(x, gradient, origin, eps, step_size, lo=0.0, hi=1.0):
    return x.copy_(l2_step(x, gradient, origin, eps, step_size, lo, hi))


def apgd_step(x, previous, gradient, origin, eps, step_size, momentum, norm, lo=0.0, hi=1.0):
    eps, a = _column(eps, x), _column(momentum, x)
    z = _project(x + _column(step_size, x) * _direction(gradient, norm), origin, eps, norm, lo, hi)
    return _project(x + a * (z - x) + (1 - a) * (x - previous), origin, eps, norm, lo, hi).to(x.dtype)


def apgd_step_(previous, x, gradient, origin, eps, step_size, momentum, norm, lo=0.0, hi=1.0):
    return previous.copy_(apgd_step(x, previous, gradient, origin, eps, step_size, momentum, norm, lo, hi))


def ball_start(origin, index, eps, norm, seed, step=0, lo=0.0, hi=1.0):
    d = origin[0].numel()
    if norm == "linf":
        u = philox_uniform_(torch.empty(len(origin), d, device=origin.device), index, seed, Stream.ATTACK, step)
        t = (2 * u - 1).reshape(origin.shape) * _column(eps, origin)
    else:
        z = philox_normal_(torch.empty(len(origin), d + 2, device=origin.device), index, seed, Stream.ATTACK, step)
        t = (z / _norm(z))[:, :d].reshape(origin.shape) * _column(eps, origin)
    return (origin + t).clamp(lo, hi).to(origin.dtype)
