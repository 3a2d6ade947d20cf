"""Spearman's rank correlation of two scores over a few generators, with what can be said about its certainty."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthfast.evaluation.interval import t_quantile

_EXACT = 8  # up to so many generators all orders are counted (8! = 40,320)
_ORDERS = 50_000  # beyond that so many are drawn
_Z = 1.959964


@dataclass(frozen=True)
class Measured:
    """A score of each generator: values float64 [n] and their standard errors float64 [n], 0 where none is known."""

    values: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, entries: list[Mapping[str, Any]], freedom: int | None = None) -> Measured:
        """From values of the result format, {"value", "ci"}, whose 95% intervals stand for 2 x 1.96 standard errors.

        ``freedom``: degrees of freedom of intervals by Student's t, which are wider than that.
        """
        quantile = _Z if freedom is None else t_quantile(freedom)
        values = [float(entry["value"]) for entry in entries]
        errors = [
            0.0 if entry["ci"] is None else (entry["ci"][1] - entry["ci"][0]) / (2 * quantile) for entry in entries
        ]
        return cls(np.array(values), np.array(errors))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho of the rows of ``a`` and ``b`` [..., n], ties sharing the mean of their ranks; 0 where one is constant."""
    a, b = _centred_ranks(a), _centred_ranks(b)
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros(np.shape(scale)), where=scale > 0)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    ranks = _ranks(values)
    return ranks - ranks.mean(-1, keepdims=True)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis: how many are smaller, plus half of how many are equal."""
    values = np.asarray(values, np.float64)
    smaller = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return smaller + 0.5 * equal


def rank_correlations(
    scores: Mapping[str, Measured], target: Measured, draws: int = 4000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Spearman's rho of each score with ``target`` over the generators.

    The interval holds the middle 95% of ``draws``, in each of which the generators are drawn with replacement (at least 3
    different ones) and every value is moved by a normal draw of its own standard error: so it covers the choice of the
    generators and the errors of the measurements. (The measured values have moved by their errors once already, so that the
    draws are somewhat nearer to 0.) All scores see the same draws of generators, which makes their difference
    (``magnitude_minus``) a paired one. ``p`` is the share of all orders of the generators (of 50,000 drawn ones for more than 8)
    with a rho as far from 0: two-sided, under independence.

    Returns:
        score to {"value", "ci", "p", "count", "magnitude_minus": {other score: {"value", "ci"}}}: |rho| minus the other's.
    """
    n = len(target.values)
    random = np.random.default_rng([seed % 2**64, n])
    chosen = _draws(n, draws, random)
    drawn_target = _moved(target, chosen, random)
    drawn = {name: spearman(_moved(score, chosen, random), drawn_target) for name, score in scores.items()}
    orders = _orders(n, random)
    values = {name: float(spearman(score.values, target.values)) for name, score in scores.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, score in scores.items():
        # The lengths of the rank vectors are the same in every order, so the products alone are compared.
        ours, theirs = _centred_ranks(score.values), _centred_ranks(target.values)
        shuffled = np.abs(ours[orders] @ theirs)
        found[name] = {
            "value": values[name],
            "ci": _middle(drawn[name]),
            "p": _share(shuffled >= abs(ours @ theirs) - 1e-9, exact=n <= _EXACT),
            "count": n,
            "magnitude_minus": {
                other: {
                    "value": abs(values[name]) - abs(values[other]),
                    "ci": _middle(np.abs(drawn[name]) - np.abs(drawn[other])),
                }
                for other in scores
                if other != name
            },
        }
    return found


def _draws(n: int, count: int, random: np.random.Generator) -> np.ndarray:
    """int64 [count, n]: generators with replacement, at least 3 different ones (2 if there are no more)."""
    rows: list[np.ndarray] = []
    while len(rows) < count:
        batch = random.integers(0, n, (count, n))
        rows += [row for row in batch if len(np.unique(row)) >= min(3, n)]
    return np.stack(rows[:count])


def _moved(score: Measured, chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    # One draw of the error for a generator, however often it was chosen: its copies must stay tied.
    errors = random.standard_normal((len(chosen), len(score.values))) * score.errors
    return np.take_along_axis(score.values + errors, chosen, axis=1)


def _orders(n: int, random: np.random.Generator) -> np.ndarray:
    if n <= _EXACT:
        return np.array(list(itertools.permutations(range(n))))
    return random.permuted(np.tile(np.arange(n), (_ORDERS, 1)), axis=1)


def _share(at_least: np.ndarray, exact: bool) -> float:
    """Of all orders; drawn ones count the given order too, so that p is never 0."""
    return float(at_least.mean() if exact else (at_least.sum() + 1) / (len(at_least) + 1))


def _middle(values: np.ndarray) -> list[float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]
