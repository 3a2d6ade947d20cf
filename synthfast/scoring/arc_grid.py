"""The radii of an ARC: given ones, or a grid that finds where success falls to chance and refines where the curve bends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from synthfast.config import number
from synthfast.errors import UsageError
from synthfast.scoring.arc_curve import CHANCE, isotonic

AUTO = "auto"
_MOST = 1000  # radii of START:STOP:COUNT
ROUND = 2  # radii that are trained at once, each started from the nearest smaller one of an earlier round
_FIRST = {"l2": 0.1, "linf": 1 / 255}
EXTRA = 4  # radii beyond those asked for, where the grid has not come to chance or a radius at chance is doubtful
_CONFIRM = 1.005  # times a doubtful radius
_STEEP = 0.08  # fall to chance from one radius to the next that is doubted
_FALL = 0.05  # a curve that has fallen by less is flat so far
_LEAST_GROWTH, _MOST_GROWTH = 1.25, 4.0  # of the radius, from one to the next
_BEYOND = 1.2  # how far beyond the expected crossing the next radius lies, in distances to it


def meeting_radius(norm: str, shape: Sequence[int]) -> float:
    """The radius at which all balls meet, in the grey image 1/2, so that no discriminator beats chance: on pixels in [0, 1]."""
    return 0.5 if norm == "linf" else 0.5 * math.sqrt(math.prod(shape))


def first_radius(norm: str) -> float:
    """The radius that an automatic grid begins with after 0."""
    return _FIRST[norm]


def parse_radii(text: str, norm: str) -> list[float] | None:
    """Radii on pixels in [0, 1], ascending, with 0 in front; None for "auto".

    Args:
        text: "auto", numbers with commas between, or START:STOP:COUNT (evenly spaced, both ends included). For l-infinity in
            units of 1/255, or as fractions such as 8/255.
    """
    if text == AUTO:
        return None
    try:
        if ":" in text:
            start, stop, count = text.split(":")
            first, last = _radius(start, norm), _radius(stop, norm)
            if not 2 <= int(count) <= _MOST or last <= first:
                raise ValueError
            radii = np.linspace(first, last, int(count)).tolist()
        else:
            radii = [_radius(part, norm) for part in text.split(",")]
    except (ValueError, OverflowError):
        raise UsageError(
            f"--eps {text}: expected auto, radii such as 0,2,4,8, or START:STOP:COUNT such as 0:16:9, all at least 0 and at most "
            f"{_MOST:,} of them"
        ) from None
    radii = sorted({0.0, *radii})
    if len(radii) < 2:
        raise UsageError(f"--eps {text}: expected at least one radius above 0, the area needs it; give more")
    if norm == "linf" and 255 * radii[-1] < 1 and "/" not in text:
        raise UsageError(
            f"--eps {text}: l-infinity radii are in units of 1/255, all of these are below 1; write 8 or 8/255 for 8/255"
        )
    return radii


def _radius(text: str, norm: str) -> float:
    value = number(text.strip())
    if norm == "linf" and "/" not in text:
        value /= 255
    if not 0 <= value < math.inf:
        raise ValueError
    return value


@dataclass(frozen=True)
class Point:
    """What is known of a radius: success on held-out images, and whether that is chance."""

    success: float
    at_chance: bool


def next_radii(
    measured: Mapping[float, Point], radii: Sequence[float] | None, *, most: int, norm: str, end: float
) -> list[float]:
    """The radii to train next, at most ``ROUND``; none when the grid is done. A function of what is measured alone.

    Given ``radii`` are measured in ascending order until one is at chance. Otherwise 0 comes first; then the radius grows by 4
    while success hardly falls, and then towards where a straight line through the last two would reach chance, until it does or
    ``end`` is near, where it must; then the intervals in which the trapezoid rule may be most wrong are cut in the middle,
    until ``most`` radii are measured. For a monotone curve that error is at most half of the fall times the width.

    A training that failed looks like chance. So where success falls steeply to the radius at chance, one just above it is trained
    too, from the nearest state found since; if it is not at chance the grid goes on. For that, and for a grid that has not come
    to chance yet, up to ``EXTRA`` more radii are measured.

    Args:
        measured: by radius on pixels in [0, 1].
        radii: ascending, or None.
        end: the radius at which all balls meet.
    """
    if not measured:
        return [0.0]
    known = sorted(measured)
    chance = chance_radius(measured)
    if radii is not None:
        if chance is not None:
            return []
        return [eps for eps in radii if eps not in measured and eps < end][:ROUND]
    left = most - len(known)
    if chance == 0.0 or left <= -EXTRA:
        return []
    if left <= 0:
        if chance is None:
            larger = larger_radius(measured, norm)
            return [larger] if larger < end else []
        return [_CONFIRM * chance] if _doubtful(measured, chance) and _CONFIRM * chance < end else []
    if chance is None and (larger := larger_radius(measured, norm)) < end:
        last = known[-1]
        # Past a flat part of the curve nothing between is worth a radius, and one must be left to go on.
        fallen = measured[0.0].success - measured[last].success > _FALL
        return [(last + larger) / 2, larger] if fallen and left > ROUND else [larger]
    return _middles(measured, known, chance, end)[: min(left, ROUND)]


def chance_radius(measured: Mapping[float, Point]) -> float | None:
    """The radius from which on success is chance: the smallest one at chance that no larger one above chance contradicts."""
    found = None
    for eps in sorted(measured, reverse=True):
        if not measured[eps].at_chance:
            break
        found = eps
    return found


def _doubtful(measured: Mapping[float, Point], chance: float) -> bool:
    """Whether success falls steeply to ``chance`` and no radius just above confirms it."""
    below = max((eps for eps in measured if eps < chance), default=None)
    confirmed = any(chance < eps <= 1.01 * chance for eps in measured) or any(
        chance / 1.01 <= eps < chance for eps in measured
    )
    return below is not None and not confirmed and measured[below].success > CHANCE + _STEEP


def larger_radius(measured: Mapping[float, Point], norm: str) -> float:
    """The radius to go on with above the largest one measured."""
    known = sorted(measured)
    last = known[-1]
    if last == 0:
        return _FIRST[norm]
    high, low = measured[known[-2]].success, measured[last].success
    if measured[0.0].success - low <= _FALL or high <= low:
        return _MOST_GROWTH * last
    crossing = (last - known[-2]) * (low - CHANCE) / (high - low)  # beyond the last one
    return min(_MOST_GROWTH * last, max(_LEAST_GROWTH * last, last + _BEYOND * crossing))


def _middles(measured: Mapping[float, Point], known: Sequence[float], chance: float | None, end: float) -> list[float]:
    """The middles of the intervals with the largest possible error of the trapezoid rule, up to the radius at chance: the worst
    one first, then the worst that is left when that one is cut."""
    eps = [radius for radius in known if chance is None or radius <= chance]
    heights = np.maximum(isotonic(np.array([measured[radius].success for radius in eps])), CHANCE)
    if chance is None:
        eps, heights = [*eps, end], np.append(heights, CHANCE)
    if len(eps) == 2:  # the curve may be anywhere in this interval
        return [eps[1] / 4, eps[1] / 2]
    intervals = [(float(heights[k] - heights[k + 1]), eps[k], eps[k + 1]) for k in range(len(eps) - 1)]
    middles: list[float] = []
    for _ in range(ROUND):
        worst = max(range(len(intervals)), key=lambda k: intervals[k][0] * (intervals[k][2] - intervals[k][1]))
        fall, low, high = intervals.pop(worst)
        middle = (low + high) / 2
        middles.append(middle)
        intervals += [(fall / 2, low, middle), (fall / 2, middle, high)]  # as if the curve were straight there
    return middles
