"""Neighbours and balls against all distances in float64, where rounding is easy and where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.errors import SynthfastError, UsageError
from synthfast.scoring import neighbours
from synthfast.scoring.neighbours import balls, k_nearest, kth_distances, nearest, within_counts


def all_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By the definition."""
    return (a.double()[:, None] - b.double()[None]).square().sum(2).float().sqrt()


def sets(kind: str, n: int, m: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (torch.randn(count, dim, generator=generator) for count in (n, m))
    if kind == "far":  # the mean is much larger than the distances
        return a * 0.01 + 300, b * 0.01 + 300
    if kind == "tiny":
        return a * 1e-18, b * 1e-18
    if kind == "huge":
        return a * 1e17, b * 1e17
    if kind == "outlier":
        a[0], b[-1] = 1e6, -3e5
        return a, b
    if kind == "grid":  # many equal distances, and points that come several times
        return a.round(), b.round()
    if kind == "clusters":
        return a * 1e-3 + torch.arange(n)[:, None] % 5, b * 1e-3 + torch.arange(m)[:, None] % 5
    if kind == "shell":  # all at nearly the same distance from each other: whole rows are close calls
        a, b = (torch.nn.functional.normalize(torch.eye(max(n, m), dim)[:c] + 1e-4 * x) for c, x in ((n, a), (m, b)))
        return a, b
    return a, b * 1.2 + 0.1


KINDS = ("plain", "far", "tiny", "huge", "outlier", "grid", "clusters", "shell")


@pytest.fixture(params=[None, (8, 16)], ids=["blocks", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes as they are, and small ones, where every edge of a block comes up."""
    if request.param is not None:
        monkeypatch.setattr(neighbours, "_BLOCK", {"cpu": request.param})
        monkeypatch.setattr(neighbours, "_LEAST_SAMPLE", 7)
        monkeypatch.setattr(neighbours, "_PAIRS", 50)
        monkeypatch.setattr(neighbours, "_CHUNK", 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim", "k"), [(2, 3, 1), (17, 1, 3), (65, 40, 5), (130, 6, 129)])
def test_neighbours_within_a_set(blocks, generator, kind, n, dim, k):
    points, _ = sets(kind, n, n, dim, generator)
    distances = all_distances(points, points).fill_diagonal_(torch.inf)
    expected, order = distances.sort(dim=1, stable=True)
    found, index = k_nearest(points, None, k)
    assert found.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(found, expected[:, :k]) and torch.equal(index, order[:, :k])
    assert torch.equal(kth_distances(points, k), expected[:, k - 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "dim", "k"), [(1, 1, 4, 1), (33, 70, 2, 4), (70, 33, 40, 33)])
def test_neighbours_in_another_set(blocks, generator, kind, n, m, dim, k):
    queries, base = sets(kind, n, m, dim, generator)
    distances, order = all_distances(queries, base).sort(dim=1, stable=True)
    found, index = k_nearest(queries, base, k)
    assert torch.equal(found, distances[:, :k]) and torch.equal(index, order[:, :k])
    found, index = nearest(queries, base)
    assert torch.equal(found, distances[:, 0]) and torch.equal(index, order[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_balls_of_both_sets(blocks, generator, kind):
    """Radii that are distances of the set itself, so that many comparisons are between nearly or exactly equal numbers."""
    a, b = sets(kind, 50, 70, 5, generator)
    distances = all_distances(a, b)
    a_radii, b_radii = distances.sort(dim=1).values[:, 9].clone(), distances.sort(dim=0).values[20].clone()
    a_radii[3], b_radii[4] = 0, torch.inf
    in_a, in_b = (torch.zeros(50, 70, dtype=torch.int64) for _ in range(2))
    for found in balls(a, b, a_radii, b_radii):
        assert (found.in_row_ball | found.in_column_ball).all()
        in_a[found.rows, found.columns] += found.in_row_ball.long()
        in_b[found.rows, found.columns] += found.in_column_ball.long()
    assert torch.equal(in_a, (distances < a_radii[:, None]).long())
    assert torch.equal(in_b, (distances < b_radii[None]).long())
    assert torch.equal(within_counts(b, a, a_radii), in_a.sum(0))
    only = sum(int(found.in_column_ball.sum()) for found in balls(a, b, None, b_radii))
    assert only == in_b.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 30, 500])
def test_bounds_hold(generator, kind, dim):
    """The product is a lower bound of the scaled squared distances, and with its slack an upper one."""
    a, b = sets(kind, 40, 50, dim, generator)
    rows, columns = neighbours._clouds(a, b, None, None)
    lower = (rows.left(slice(None)) @ columns.factors.T).double()
    slack = neighbours._Cloud.slack(rows, columns, *torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij"))
    true = (a.double()[:, None] - b.double()[None]).square().sum(2) * rows.scale**2
    assert (lower <= true).all() and (true <= lower + slack.double()).all()
    assert 0.2 < rows.squares.max().clamp(min=columns.squares.max()) <= 1
    # And no wider than it must be: a few times the dimension times the unit roundoff.
    assert (slack <= 6 * (dim + 6) * 2**-23).all()


def test_close_calls_alone_are_computed_in_float64(monkeypatch, generator):
    a, b = sets("plain", 600, 600, 64, generator)
    pairs = []
    distances = neighbours._distances
    monkeypatch.setattr(neighbours, "_distances", lambda *args: pairs.append(len(args[2])) or distances(*args))
    radii = kth_distances(a, 5)
    assert 600 * 5 <= sum(pairs) <= 600 * 7
    pairs.clear()
    within_counts(b, a, radii)
    assert sum(pairs) < 100


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("by", ["the old switch", "the new switch"])
def test_threads_and_low_precision_change_nothing(generator, threads, by):
    points, _ = sets("far", 300, 1, 20, generator)
    expected = all_distances(points, points).fill_diagonal_(torch.inf).sort(dim=1).values[:, 4]
    torch.set_num_threads(threads)
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    seen = []
    try:
        if by == "the old switch":
            torch.set_float32_matmul_precision("medium")
        else:
            backend.fp32_precision = "bf16"
        assert torch.equal(kth_distances(points, 5), expected)
        for _ in balls(points, points, expected, None):
            seen.append(backend.fp32_precision)
        assert set(seen) == {"ieee"} and backend.fp32_precision == "bf16"
    finally:
        torch.set_num_threads(1)
        if by == "the old switch":
            torch.set_float32_matmul_precision("highest")
        backend.fp32_precision = before


def test_strided_points(generator):
    points = torch.randn(40, 20, generator=generator)[::2, ::3]
    assert torch.equal(kth_distances(points, 3), kth_distances(points.contiguous(), 3))
    assert torch.equal(points, points.clone())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: kth_distances(x, 0), UsageError, "k = 0: expected 1 to 9, the number of neighbours"),
        (lambda x: kth_distances(x, 10), UsageError, "k = 10: expected 1 to 9, the number of neighbours"),
        (lambda x: k_nearest(x, x[:4], 5), UsageError, "k = 5: expected 1 to 4, the number of neighbours"),
        (lambda x: kth_distances(x.double(), 1), UsageError, r"queries: expected points float32 \[n, d\], found"),
        (lambda x: kth_distances(x[0], 1), UsageError, r"queries: expected points float32 \[n, d\], found"),
        (lambda x: nearest(x, x[:, :2]), UsageError, "base: expected points of 3 dimensions on cpu, found 2 on cpu"),
        (lambda x: nearest(x[:0], x), UsageError, r"queries: expected points float32 \[n, d\], found"),
        (lambda x: kth_distances(x * torch.inf, 1), SynthfastError, "queries: expected finite numbers, found NaN or"),
    ],
)
def test_what_cannot_be_searched_is_one_line(make, error, message):
    points = torch.from_numpy(np.arange(30, dtype=np.float32).reshape(10, 3) + 1)
    with pytest.raises(error, match=f"^{message}") as caught:
        make(points)
    assert "\n" not in str(caught.value)
