"""Nearest neighbours and balls around points, exactly, in blocks of bounded memory.

The distance of two float32 points is defined as the ``prdc`` package (Naeem et al. 2020) and scikit-learn have it: the squared
distance in float64, rounded to float32, and its square root in float32. Computing all of them so would be slow. A float32
matrix product gives a lower bound of each squared distance instead, with a rigorous bound of its rounding on top, and only the
pairs whose comparison the bound leaves open are computed in float64, from the differences. The answers are the same.

A pair costs one multiply-add a dimension in float32, on the CPU or a GPU; a set against itself half of that. Memory: a float32
copy of the points, a block of distances, and the pairs that may count.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synthfast.errors import SynthfastError, UsageError
from synthfast.parallel import in_order

_UNIT = 2.0**-24  # unit roundoff of float32
_BLOCK = {"cpu": (512, 2048), "cuda": (4096, 16384)}  # rows and columns of a block of distances
_SAMPLE = 12  # one in so many points gives the first limits of a neighbour search
_LEAST_SAMPLE = 512
_PAIRS = 1 << 18  # candidates that are kept before they are looked at
_PART = 256  # points that are turned into factors together
_CHUNK = 1 << 18  # numbers that are worked on together elsewhere


def k_nearest(queries: Tensor, base: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest points of ``base`` for each query, nearest first; equal distances in order of the index.

    Args:
        queries: float32 [m, d], finite.
        base: float32 [n, d] on the same device, n >= k; or None for the queries themselves, where no point is its own neighbour
            (m > k then).
        k: at least 1.

    Returns:
        (distances float32 [m, k], indices int64 [m, k]) on the device of the queries.
    """
    _check(queries, "queries")
    if base is not None:
        _check(base, "base", queries)
    available = len(queries) - 1 if base is None else len(base)
    if not 1 <= k <= available:
        raise UsageError(f"k = {k}: expected 1 to {available}, the number of neighbours that a point has; lower it")
    order = _order(len(queries if base is None else base), queries.device)
    with _full_float32(queries.device):
        if base is None:
            cloud, _ = _clouds(queries, queries, order, order)
            return _Search(queries, queries, cloud, cloud, k, order, order, symmetric=True).run()
        rows, columns = _clouds(queries, base, None, order)
        return _Search(queries, base, rows, columns, k, None, order, symmetric=False).run()


def kth_distances(x: Tensor, k: int) -> Tensor:
    """The distance of each point of ``x`` (float32 [n, d]) to its ``k``-th nearest other one: float32 [n]."""
    return k_nearest(x, None, k)[0][:, -1].clone()


def nearest(queries: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest point of ``base`` (float32 [n, d]) for each query (float32 [m, d]): (distance float32 [m], index int64 [m]).

    Of several at the same distance it is the first.
    """
    distances, indices = k_nearest(queries, base, 1)
    return distances[:, 0], indices[:, 0]


def within_counts(queries: Tensor, base: Tensor, radii: Tensor) -> Tensor:
    """How many of the open balls around ``base`` (float32 [n, d], ``radii`` float32 [n]) hold each query: int64 [m]."""
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for found in balls(base, queries, radii, None):
        counts += torch.bincount(found.columns[found.in_row_ball], minlength=len(queries))
    return counts


@dataclass(frozen=True)
class Inside:
    """Pairs of which at least one lies in the ball around the other.

    Attributes:
        rows, columns: int64 [p], indices of the two points.
        in_row_ball: bool [p], the point of the columns lies in the ball around that of the rows.
        in_column_ball: bool [p], the other way round.
    """

    rows: Tensor
    columns: Tensor
    in_row_ball: Tensor
    in_column_ball: Tensor


def balls(a: Tensor, b: Tensor, a_radii: Tensor | None, b_radii: Tensor | None) -> Iterator[Inside]:
    """All pairs of a point of ``a`` and one of ``b`` with a distance below the radius of one of them, each once.

    Args:
        a: float32 [n, d], the rows of the pairs.
        b: float32 [m, d] on the same device, the columns.
        a_radii: float32 [n], not negative; None for no balls around ``a``.
        b_radii: float32 [m] or None.
    """
    _check(a, "a")
    _check(b, "b", a)
    rows, columns = _clouds(a, b, None, None)
    low_a, high_a = rows.limits(a_radii, len(a))
    low_b, high_b = columns.limits(b_radii, len(b))
    with _full_float32(a.device):
        for i, j, lower in _pairs_below(rows, columns, high_a, high_b, symmetric=False):
            upper = lower + rows.slack(columns, i, j)
            in_a, in_b = upper < low_a[i], upper < low_b[j]
            unsure = ((lower <= high_a[i]) & ~in_a) | ((lower <= high_b[j]) & ~in_b)
            unsure = unsure.nonzero()[:, 0]
            if len(unsure):
                distance = _distances(a, b, i[unsure], j[unsure])
                if a_radii is not None:
                    in_a[unsure] = distance < a_radii[i[unsure]]
                if b_radii is not None:
                    in_b[unsure] = distance < b_radii[j[unsure]]
            inside = (in_a | in_b).nonzero()[:, 0]
            yield Inside(i[inside], j[inside], in_a[inside], in_b[inside])


class _Cloud:
    """Points as factors of a matrix product that gives lower bounds of their squared distances.

    Points are moved to the common mean and scaled by a power of two, which makes norms small and distances no different, and
    rounded to float32. A row of ``factors`` is (a, h, l, 1, 1), h + l being (1 - c) |a|^2 in two parts; the product of the left
    form (-2 a, 1, 1, h, l) of one point with it is (1 - c)(|a|^2 + |b|^2) - 2 a.b and a sum of d + 4 terms. In any order of
    summation its rounding error is at most (d + 4) u / (1 - (d + 4) u) times the sum of the terms' sizes (Higham 2002, section
    3.1), which is at most 2 (|a|^2 + |b|^2). Rounding the coordinates moves the squared distance by 4 u (|a|^2 + |b|^2) at most.
    So with c the sum of both, the product is a lower bound, and 2 c (|a|^2 + |b|^2) above it lies an upper one.
    """

    def __init__(self, points: Tensor, shift: Tensor, scale: float, order: Tensor | None) -> None:
        n, d = points.shape
        self.bound = 1.05 * (2 * (d + 4) + 4) * _UNIT
        self.scale = scale
        self.factors = torch.empty(n, d + 4, device=points.device)
        self.squares = torch.empty(n, device=points.device)
        for first in range(0, n, _PART):
            part = points[first : first + _PART] if order is None else points[order[first : first + _PART]]
            rows = self.factors[first : first + _PART]
            rows[:, :d] = (part.double() - shift) * scale
            squares = rows[:, :d].double().square().sum(1)
            lowered = (1 - self.bound) * squares
            rows[:, d] = lowered
            rows[:, d + 1] = lowered - rows[:, d].double()
            rows[:, d + 2 :] = 1
            self.squares[first : first + _PART] = squares

    def __len__(self) -> int:
        return len(self.factors)

    def left(self, rows: slice, into: Tensor | None = None) -> Tensor:
        """The left form of some points: float32 [rows, d + 4], in the first rows of ``into`` if given."""
        d = self.factors.shape[1] - 4
        right = self.factors[rows]
        form = torch.empty_like(right) if into is None else into[: len(right)]
        torch.mul(right[:, :d], -2, out=form[:, :d])
        form[:, d : d + 2] = 1
        form[:, d + 2 :] = right[:, d : d + 2]
        return form

    def slack(self, other: _Cloud, i: Tensor, j: Tensor) -> Tensor:
        """What lies between the lower and the upper bound of the squared distances of pairs: float32 [p]."""
        return (self.squares[i] + other.squares[j]) * (2.1 * self.bound)

    def limits(self, radii: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Squared scaled radii (low, high): a squared distance below low is surely inside, one above high surely outside."""
        if radii is None:  # below every lower bound
            nothing = torch.full((count,), -torch.inf, device=self.factors.device)
            return nothing, nothing
        squared = (radii.double() * self.scale).square()
        return (squared * (1 - 1e-6)).float(), (squared * (1 + 1e-6)).float()


def _clouds(a: Tensor, b: Tensor, a_order: Tensor | None, b_order: Tensor | None) -> tuple[_Cloud, _Cloud]:
    """Two sets about the mean of the second, scaled alike; one cloud for both where they are the same set."""
    shift = torch.zeros(b.shape[1], dtype=torch.float64, device=b.device)
    for part in b.split(_PART):
        shift += part.double().sum(0)
    shift /= len(b)
    largest = 0.0
    for points in (a,) if a is b else (a, b):
        for part in points.split(_PART):
            largest = max(largest, float((part.double() - shift).square().sum(1).max()))
    scale = 2.0 ** -np.frexp(np.sqrt(largest))[1] if largest > 0 else 1.0
    columns = _Cloud(b, shift, float(scale), b_order)
    return (columns, columns) if a is b else (_Cloud(a, shift, float(scale), a_order), columns)


def _pairs_below(
    rows: _Cloud, columns: _Cloud, row_limit: Tensor, column_limit: Tensor | None, symmetric: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs (i, j, lower bound) whose lower bound is at most the limit of the row or of the column; with ``symmetric`` i < j."""
    device = rows.factors.device
    height, width = _block(device)
    # A thread's own blocks: allocated anew each time they cost page faults, and the allocator keeps several.
    scratch = threading.local()

    def block(corner: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        top, start = corner
        if not hasattr(scratch, "lower"):
            scratch.left = torch.empty(height, rows.factors.shape[1], device=device)
            scratch.lower = torch.empty(height * width, device=device)
            scratch.masks = torch.empty(2, height * width, dtype=torch.bool, device=device)
        right = columns.factors[start : start + width]
        left = rows.left(slice(top, top + height), scratch.left)
        shape, size = (len(left), len(right)), len(left) * len(right)
        lower = torch.mm(left, right.T, out=scratch.lower[:size].view(shape))
        below, more = (mask[:size].view(shape) for mask in scratch.masks)
        torch.le(lower, row_limit[top : top + height, None], out=below)
        if column_limit is not None:
            below |= torch.le(lower, column_limit[start : start + width], out=more)
        i, j = below.nonzero().unbind(1)
        value = lower[i, j]
        i, j = i + top, j + start
        if symmetric and start < top + height:
            above = (j > i).nonzero()[:, 0]
            i, j, value = i[above], j[above], value[above]
        return i, j, value

    corners = [
        (top, start)
        for top in range(0, len(rows), height)
        for start in range(top if symmetric else 0, len(columns), width)
    ]
    # A thread takes a block: threads that share one wait for each other at every step of it.
    return in_order(block, corners, _threads(device))


class _Search:
    """The k nearest of each row: limits from a random sample of the columns, then every pair below them.

    ``row_order`` and ``column_order`` say which point each row of a cloud is; the columns are in random order, so that the first
    ones are the sample. With ``symmetric`` both are the same set, and a product serves both of its points.
    """

    def __init__(
        self,
        queries: Tensor,
        base: Tensor,
        rows: _Cloud,
        columns: _Cloud,
        k: int,
        row_order: Tensor | None,
        column_order: Tensor,
        symmetric: bool,
    ) -> None:
        self.queries, self.base, self.rows, self.columns, self.k = queries, base, rows, columns, k
        device = queries.device
        self.row_order = torch.arange(len(queries), device=device) if row_order is None else row_order
        self.column_order, self.symmetric = column_order, symmetric
        self.distance = torch.full((len(queries), k), torch.inf, device=device)
        self.index = torch.full((len(queries), k), len(base), dtype=torch.int64, device=device)

    def run(self) -> tuple[Tensor, Tensor]:
        limits = self._first_limits()
        waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        count = 0
        for i, j, lower in _pairs_below(
            self.rows, self.columns, limits, limits if self.symmetric else None, self.symmetric
        ):
            sides = [(i, j)] if not self.symmetric else [(i, j), (j, i)]
            for one, other in sides:
                chosen = (lower <= limits[one]).nonzero()[:, 0] if self.symmetric else slice(None)
                waiting.append((one[chosen].int(), other[chosen].int(), lower[chosen]))
                count += len(waiting[-1][0])
            if count > _PAIRS:
                self._take(waiting)
                count = 0
        if waiting:
            self._take(waiting)
        distance, index = torch.empty_like(self.distance), torch.empty_like(self.index)
        distance[self.row_order], index[self.row_order] = self.distance, self.index
        return distance, index

    def _first_limits(self) -> Tensor:
        """Upper bounds, float32 [m], of each row's squared k-th distance: those of the sample."""
        wanted = self.k + self.symmetric  # a point may meet itself
        size = min(len(self.columns), max(_LEAST_SAMPLE, len(self.columns) // _SAMPLE, wanted))
        device = self.queries.device
        right = self.columns.factors[:size]
        height, width = _block(device)
        height = max(1, height * width // max(size, width))

        def limits(top: int) -> Tensor:
            lower, at = (self.rows.left(slice(top, top + height)) @ right.T).topk(wanted, 1, largest=False)
            i = torch.arange(top, top + len(lower), device=device)[:, None].expand_as(at)
            return (lower + self.rows.slack(self.columns, i, at)).amax(1) * (1 + 1e-6)

        return torch.cat(list(in_order(limits, range(0, len(self.rows), height), _threads(device))))

    def _take(self, waiting: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Merge candidates into the best: of each row those that may be among its k nearest, by their exact distance. Empties
        ``waiting``, so that they are not held twice."""
        i, j, lower = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        waiting.clear()
        order = torch.argsort(i, stable=True)
        i, j, lower = i[order], j[order], lower[order]
        del order
        counts = torch.bincount(i, minlength=len(self.rows))
        ends = counts.cumsum(0)
        height = max(1, _CHUNK // max(int(counts.max()), 1))
        bounds = [*range(0, len(self.rows), height), len(self.rows)]
        cuts = [0, *ends[torch.tensor(bounds[1:], device=ends.device) - 1].tolist()]
        for top, stop, first, last in zip(bounds[:-1], bounds[1:], cuts[:-1], cuts[1:], strict=True):
            if last > first:
                part = slice(first, last)
                place = torch.arange(first, last, device=i.device) - (ends - counts)[i[part]]
                self._merge(slice(top, stop), i[part].long(), place, j[part].long(), lower[part])

    def _merge(self, rows: slice, i: Tensor, place: Tensor, j: Tensor, lower: Tensor) -> None:
        height, width = rows.stop - rows.start, int(place.max()) + 1
        upper = torch.full((height, width + self.k), torch.inf, device=lower.device)
        upper[i - rows.start, place] = lower + self.rows.slack(self.columns, i, j)
        best = (self.distance[rows].double() * self.rows.scale).square() * (1 + 1e-6)
        upper[:, width:] = best
        limit = upper.kthvalue(self.k, 1).values * (1 + 1e-6)
        near = (lower <= limit[i - rows.start]).nonzero()[:, 0]
        i, j, place = i[near], j[near], place[near]
        row, column = self.row_order[i], self.column_order[j]
        distance = torch.full((height, width + self.k), torch.inf, device=lower.device)
        index = torch.full(distance.shape, len(self.base), dtype=torch.int64, device=lower.device)
        distance[i - rows.start, place] = _distances(self.queries, self.base, row, column)
        index[i - rows.start, place] = column
        distance[:, width:], index[:, width:] = self.distance[rows], self.index[rows]
        # By index, then stably by distance.
        index, by_index = index.sort(1)
        distance, by_distance = distance.gather(1, by_index).sort(dim=1, stable=True)
        self.distance[rows] = distance[:, : self.k]
        self.index[rows] = index.gather(1, by_distance[:, : self.k])


def _distances(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Distances of pairs by their definition: float32 [p]."""
    found = torch.empty(len(i), device=a.device)
    step = max(1, _CHUNK // max(a.shape[1], 1))
    for first in range(0, len(i), step):
        difference = a[i[first : first + step]].double() - b[j[first : first + step]]
        found[first : first + step] = difference.square_().sum(1)
    return found.sqrt_()


def _block(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block of distances."""
    return _BLOCK["cpu" if device.type == "cpu" else "cuda"]


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _order(count: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).permutation(count)).to(device)


def _check(points: Tensor, name: str, other: Tensor | None = None) -> None:
    if points.ndim != 2 or points.dtype != torch.float32 or not len(points):
        raise UsageError(f"{name}: expected points float32 [n, d], found {points.dtype} {list(points.shape)}")
    if other is not None and (points.shape[1] != other.shape[1] or points.device != other.device):
        raise UsageError(
            f"{name}: expected points of {other.shape[1]} dimensions on {other.device}, found {points.shape[1]} on "
            f"{points.device}"
        )
    if points.numel() and not all(bool(end.isfinite()) for end in points.aminmax()):  # NaN goes through aminmax
        raise SynthfastError(f"{name}: expected finite numbers, found NaN or infinity; check the features")


@contextlib.contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in float32 proper, which the bounds are for: no TF32, no bfloat16."""
    backend = torch.backends.mkldnn.matmul if device.type == "cpu" else torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
