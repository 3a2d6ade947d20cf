"""The radii of an ARC: what an option means, and where an automatic grid looks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr

from synthfast.errors import UsageError
from synthfast.scoring.arc_curve import area, isotonic
from synthfast.scoring.arc_grid import EXTRA, ROUND, Point, chance_radius, meeting_radius, next_radii, parse_radii


@pytest.mark.parametrize(
    ("text", "norm", "expected"),
    [
        ("auto", "l2", None),
        ("0.1,0.2", "l2", [0, 0.1, 0.2]),
        ("0,0.5, 0.25", "l2", [0, 0.25, 0.5]),
        ("0:1:5", "l2", [0, 0.25, 0.5, 0.75, 1]),
        ("0.2:0.4:2", "l2", [0, 0.2, 0.4]),
        ("2,8", "linf", [0, 2 / 255, 8 / 255]),
        ("0.5,2", "linf", [0, 0.5 / 255, 2 / 255]),
        ("8/255", "linf", [0, 8 / 255]),
        ("0:8:3", "linf", [0, 4 / 255, 8 / 255]),
        ("0.5/255,0.25/255", "linf", [0, 0.25 / 255, 0.5 / 255]),
    ],
)
def test_a_grid_from_text(text, norm, expected):
    found = parse_radii(text, norm)
    assert found == expected if expected is None else np.allclose(found, expected, rtol=1e-15)


@pytest.mark.parametrize(
    "text", ["", "a", "1,,2", "1:2", "1:2:1", "2:1:3", "0:1:x", "-1,2", "nan", "inf", "1;2", "1:2:3:4"]
)
def test_what_is_no_grid_is_refused(text):
    with pytest.raises(UsageError, match=r"^--eps .*: expected auto, radii such as 0,2,4,8, or START:STOP:COUNT"):
        parse_radii(text, "l2")


def test_a_grid_of_zero_alone_is_refused():
    with pytest.raises(UsageError, match="--eps 0: expected at least one radius above 0"):
        parse_radii("0", "l2")


def test_l_infinity_radii_on_pixels_get_a_hint():
    with pytest.raises(UsageError, match=r"l-infinity radii are in units of 1/255, .*; write 8 or 8/255 for 8/255"):
        parse_radii("0.01,0.03", "linf")


def test_all_balls_meet_in_the_grey_image():
    assert meeting_radius("linf", (8, 8, 1)) == 0.5
    corner, grey = np.ones((8, 8, 3)), np.full((8, 8, 3), 0.5)
    assert meeting_radius("l2", (8, 8, 3)) == pytest.approx(np.linalg.norm(corner - grey))


def gaussians(distance, dimensions, sigma):
    """Success of the best discriminator between Gaussians, each pixel shifted alike: at a radius of half the distance, 1/2."""

    def success(eps):
        half = distance / 2
        return ndtr(math.sqrt(dimensions) * (half - eps) / sigma)

    return success


def walk(success, norm="l2", end=4.0, most=8, radii=None):
    """Every round of a grid over a curve that is known, and what is measured in the end."""
    measured, rounds = {}, []
    while chosen := next_radii(measured, radii, most=most, norm=norm, end=end):
        assert len(chosen) <= ROUND and len(set(chosen)) == len(chosen) and not set(chosen) & set(measured)
        assert all(0 <= eps < end for eps in chosen)
        rounds.append(chosen)
        for eps in chosen:
            measured[eps] = Point(success(eps), at_chance=success(eps) <= 0.51)
    return rounds, measured


CURVES = [
    (norm, end, gaussians(2 * height * sigma / math.sqrt(d), d, sigma), height * sigma / math.sqrt(d))
    for norm, end, dimensions in (("l2", 4.0, (1,)), ("linf", 0.5, (1, 16, 192)))
    for d in dimensions
    for height in (0.5, 1.0, 2.0, 4.0)
    for sigma in (0.02, 0.06, 0.15)
    if height * sigma / math.sqrt(d) < end
]


@pytest.mark.parametrize(("most", "mean", "worst"), [(8, 0.02, 0.08), (12, 0.005, 0.02)])
def test_an_automatic_grid_finds_the_area_of_any_curve(most, mean, worst):
    errors = []
    for norm, end, success, last in CURVES:
        rounds, measured = walk(success, norm, end, most)
        assert rounds[0] == [0.0] and sum(map(len, rounds)) == len(measured) and most <= len(measured) <= most + 1
        eps = np.array(sorted(measured))
        heights = isotonic(success(eps))
        fine = np.linspace(0, last, 4001)
        truth = np.trapezoid(success(fine) - 0.5, fine)
        errors.append(area(eps, heights) / truth - 1)
    assert np.abs(errors).mean() < mean and np.abs(errors).max() < worst


def test_at_chance_without_a_ball_nothing_more_is_looked_at():
    rounds, _ = walk(lambda eps: 0.5)
    assert rounds == [[0.0]]


def test_separable_at_every_radius_goes_to_where_all_balls_meet():
    _, measured = walk(lambda eps: 1.0, most=6)
    assert max(measured) > 2 and len(measured) == 6


def test_given_radii_are_measured_up_to_the_first_at_chance():
    radii = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    rounds, measured = walk(lambda eps: 0.9 - eps, radii=radii)
    assert rounds == [[0.0], [0.1, 0.2], [0.3, 0.4]] and 0.5 not in measured
    rounds, _ = walk(lambda eps: 0.9, radii=radii, end=0.35)
    assert rounds == [[0.0], [0.1, 0.2], [0.3]]


@pytest.mark.parametrize("most", [2, 3, 4, 5])
def test_few_radii(most):
    """The grid goes on to chance, and a steep fall to chance is confirmed."""
    _, measured = walk(gaussians(0.4, 1, 0.1), most=most)
    assert most <= len(measured) <= most + EXTRA and chance_radius(measured) is not None


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_one_failed_training_does_not_end_the_grid(failing):
    """Radii with number ``failing`` above 0.2 look like chance once; success is 1/2 at 1 in truth."""
    tries = []

    def success(eps):
        truth = max(0.95 - 0.45 * eps, 0.5)
        if eps > 0.2 and eps not in tries:
            tries.append(eps)
        return 0.5 if eps > 0.2 and tries.index(eps) + 1 == failing else truth

    _, measured = walk(success)
    eps = sorted(measured)
    assert chance_radius(measured) >= 0.9
    heights = isotonic(np.array([measured[radius].success for radius in eps]))
    assert area(np.array(eps), heights) > 0.75 * 0.225


def test_the_chance_radius():
    def points(*chances):
        return {float(k): Point(0.5 if at_chance else 0.8, at_chance) for k, at_chance in enumerate(chances)}

    assert chance_radius(points(False, True, True)) == 1
    assert chance_radius(points(False, True, False, True)) == 3  # what lies below a radius above chance was a failure
    assert chance_radius(points(False, True, False)) is None
    assert chance_radius(points(True)) == 0
