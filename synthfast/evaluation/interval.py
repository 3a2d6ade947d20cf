"""Intervals of what is measured: shares of images, and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def wilson_interval(successes: int, count: int, z: float = 1.959964) -> list[float]:
    """The 95% interval of a share by Wilson's score (1927): [low, high] within [0, 1]."""
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Rounding must not push the share itself out of its interval.
    return [max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))]


def share(right: np.ndarray) -> dict[str, Any]:
    """A share of images as a value of the result format, from bool [n]."""
    return {"value": float(right.mean()), "ci": wilson_interval(int(right.sum()), len(right)), "count": len(right)}


# Two-sided 95% quantiles of Student's t, by degrees of freedom 1 to 30; beyond these see t_quantile.
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t with ``freedom`` degrees of freedom (at least 1), within 0.001."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964  # the expansion of Hill (1970) in 1 / freedom
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean of independent values with its 95% interval by Student's t; no interval (None) from a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"value": mean, "ci": None, "count": count}
    half = t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return {"value": mean, "ci": [mean - half, mean + half], "count": count}


def within_unit(value: dict[str, Any]) -> dict[str, Any]:
    """An accuracy whose interval is cut to [0, 1]: Student's t knows no bounds."""
    if value["ci"] is not None:
        value["ci"] = [max(0.0, value["ci"][0]), min(1.0, value["ci"][1])]
    return value
