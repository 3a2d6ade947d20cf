"""Square: its schedule, its proposals against the paper written out, known answers on linear models, torchattacks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from synthfast.attacks import Square, square
from synthfast.attacks.base import ActiveSet
from synthfast.errors import UsageError


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


class Holds:
    """Always right about class 0, by a margin that falls with every call if ``falling``; keeps what it is shown."""

    def __init__(self, falling=False):
        self.shown, self.falling = [], falling

    def __call__(self, x):
        assert not x.requires_grad and not torch.is_grad_enabled()
        self.shown.append(x.clone())
        first = torch.full((len(x),), 1 / len(self.shown) if self.falling else 1.0)
        return torch.stack([first, torch.zeros(len(x))], 1)

    def of(self, attack, x):
        """What the search shows, without the judging before and after."""
        result = attack.run(self, x, torch.zeros(len(x), dtype=torch.int64))
        assert result.gradients == 0 and result.queries == sum(len(images) for images in self.shown)
        return self.shown[1:-1]


def length(moves, norm):
    return moves.flatten(1).abs().amax(1) if norm == "linf" else moves.flatten(1).norm(dim=1)


def test_published_schedule():
    """p is halved after iterations 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000, counted from 0."""
    attack = Square("linf", 0.1, queries=10_000)
    p = [attack.share(query) for query in range(1, 10_001)]
    assert p[0] == 0.8 and p[-1] == 0.8 / 512
    changes = [k for k in range(1, 10_000) if p[k] != p[k - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert all(p[k] == p[k - 1] / 2 for k in changes)
    half = Square("linf", 0.1, queries=5000, p_init=0.4)
    assert [half.share(query) for query in range(1, 5001)] == [value / 2 for value in p[::2]]


def test_starts_with_stripes(generator):
    x = 0.3 + 0.4 * torch.rand(5, 3, 6, 9, generator=generator)
    (start,) = Holds().of(Square("linf", 0.1, queries=1), x)
    moves = start - x
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, 0.1))
    stripes = (moves > 0)[:, :, :1]
    assert torch.equal(moves > 0, stripes.expand(-1, -1, 6, -1))
    assert 0.3 < stripes.float().mean() < 0.7 and not torch.equal(stripes[0], stripes[1])
    assert not torch.equal(stripes[:, 0], stripes[:, 1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (3, 21, 6), (1, 1, 1), (3, 1, 9), (2, 2, 2)])
def test_proposals_repaint_one_square(shape, generator):
    """Nothing is ever taken, so that each proposal differs from the start in a square of the scheduled side alone."""
    attack = Square("linf", 0.1, queries=400)
    x = 0.3 + 0.4 * torch.rand(1, *shape, generator=generator)
    x[0].flatten()[::3] = 0.0
    start, *proposals = Holds().of(attack, x)
    low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
    assert len(proposals) >= 1
    sides = []
    for images in proposals:
        assert ((images - low).abs().minimum((images - high).abs()) < 1e-6).all()
        changed = (images != start)[0]
        assert changed.any()  # a proposal that changes nothing is turned over
        up = (images - x > 0.05)[0]
        for channel in range(shape[0]):
            rows, columns = (changed[channel].any(d).nonzero()[:, 0] for d in (1, 0))
            if len(rows):
                box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
                assert up[channel][box].unique().numel() == 1 or x[0, channel][box].min() == 0
        rows, columns = (changed.any(0).any(d).nonzero()[:, 0] for d in (1, 0))
        sides.append(max(rows[-1] - rows[0], columns[-1] - columns[0]).item() + 1)
    area, limit = shape[1] * shape[2], min(shape[1:])
    first = min(max(round(math.sqrt(0.8 * area)), 1), limit)
    assert max(sides) <= first and sides[-1] <= max(1, min(limit, round(math.sqrt(0.8 / 512 * area))))


def test_every_position_is_drawn_about_equally(monkeypatch):
    """Squares of 1 pixel on 16 x 8: the last row and column like the others."""
    monkeypatch.setattr(square, "_MEMORY", 0)
    attack = Square("linf", 0.1, queries=300, p_init=1e-4)
    x = torch.full((200, 3, 16, 8), 0.5)
    start, *proposals = Holds().of(attack, x)
    count = sum((images != start).any(1).sum(0) for images in proposals)
    mean = count.float().mean().item()
    assert len(proposals) == 299 and mean > 300
    assert (count - mean).abs().max() < 5 * math.sqrt(mean)


def test_failed_proposals_are_not_tried_again():
    """One image of 4 x 4: 2 + 8 + 18 + 32 different squares at most, of which the last 16 are each pixel turned once."""
    x = torch.full((1, 1, 4, 4), 0.5)
    start, *proposals = Holds().of(Square("linf", 0.1, queries=5000), x)
    assert 16 < len(proposals) <= 60
    assert len({tuple(images.flatten().tolist()) for images in proposals[-16:]}) == 16
    assert all((images != start).sum() == 1 for images in proposals[-16:])


def test_a_success_wipes_the_memory():
    """A margin that falls each time: every proposal is taken, so none is known."""
    x = torch.full((1, 1, 4, 4), 0.5)
    shown = Holds(falling=True).of(Square("linf", 0.1, queries=500), x)
    assert len(shown) == 500
    assert all(not torch.equal(after, before) for before, after in pairwise(shown))


@pytest.mark.parametrize("known", [0, 10**9])
def test_memory_changes_no_result(known, norm, draw_linear, monkeypatch):
    model, images = draw_linear(30, shape=(1, 5, 4))
    attack = Square(norm, 0.9 * model.distance(images.x, images.y, norm).median().item(), queries=600)
    expected = attack.run(model, images.x, images.y)
    monkeypatch.setattr(square, "_MEMORY", known)
    result = attack.run(model, images.x, images.y)
    assert torch.equal(result.images, expected.images)
    assert known or norm == "l2" or result.queries > 1.5 * expected.queries


def test_looking_less_often_changes_no_result(norm, draw_linear, monkeypatch):
    """As on a GPU: broken images stay for some queries more and are left as they are."""
    model, images = draw_linear(40)
    eps = 1.3 * model.distance(images.x, images.y, norm).median().item()
    attack = Square(norm, eps, queries=300)
    expected = attack.run(model, images.x, images.y)
    assert 5 < expected.fooled.sum() < 40
    monkeypatch.setattr(square, "_PATIENCE", {"cpu": 16})
    result = attack.run(model, images.x, images.y)
    assert torch.equal(result.images, expected.images) and torch.equal(result.fooled, expected.fooled)
    assert result.queries > expected.queries


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 3)])
def test_reaches_the_best_corner_of_the_box(shape, draw_linear):
    """For two linear classes, the weakest image in the l-infinity ball is the corner that the weights point to."""
    model, images = draw_linear(20, classes=2, shape=shape, spread=1.0)
    distance = model.distance(images.x, images.y, "linf")
    eps = 0.9 * distance.min().item()
    result = Square("linf", eps, queries=3000).run(model, images.x, images.y)
    up = (model.weight[1 - images.y] - model.weight[images.y] > 0).view_as(images.x)
    best = torch.where(up, images.x + eps, images.x - eps).clamp(0, 1)
    assert not result.fooled.any()
    torch.testing.assert_close(result.images, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("classes", "shape"), [(2, (1, 4, 4)), (3, (3, 3, 5)), (5, (1, 6, 2)), (2, (3, 1, 1))])
def test_breaks_what_can_be_broken_and_nothing_else(norm, classes, shape, draw_linear, assert_inside):
    model, images = draw_linear(60, classes=classes, shape=shape)
    distance = model.distance(images.x, images.y, norm)
    eps = distance.median().item()
    result = Square(norm, eps, queries=1500).run(model, images.x, images.y)
    assert_inside(result.images, images.x, norm, eps)
    assert not result.fooled[distance > eps].any()
    easy = distance < eps * (0.99 if norm == "linf" else 0.5)
    assert easy.sum() >= 8 and result.fooled[easy].float().mean() > 0.9
    assert torch.equal(result.fooled, model(result.images).argmax(1) != images.y)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 11])
def test_bump_of_the_paper(side):
    """Section 3.4 pixel by pixel: the k-th centred rectangle from the inside adds 1 / k^2; two halves, one turned over."""

    def half(height, width):
        values = torch.zeros(height, width, dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                ring = max(abs(row - height // 2), abs(column - width // 2))
                values[row, column] = sum(1 / (k + 1) ** 2 for k in range(ring, max(height, width) // 2 + 1))
        return values / values.norm().clamp(min=1e-300)

    expected = torch.cat([half(side // 2, side), -half(side - side // 2, side)])
    expected /= expected.norm()
    upright, turned = square._bump(side, torch.device("cpu"))
    torch.testing.assert_close(upright.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(turned, upright.T) and upright.norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (3, 21, 6), (1, 1, 1), (3, 1, 9), (2, 4, 3)])
def test_l2_proposals_spend_the_whole_budget(shape, generator):
    """Where nothing is clipped every image shown is at the distance eps; next to the box none is further."""
    for x, falling in (
        (0.5 + 0.01 * torch.randn(4, *shape, generator=generator), True),
        (torch.zeros(4, *shape), False),
    ):
        x[2:] = x[2:].clamp(0, 1)
        eps = 0.4
        for images in Holds(falling).of(Square("l2", eps, queries=600), x):
            moved = (images.double() - x.double()).flatten(1).norm(dim=1)
            assert moved.max() <= eps
            assert not falling or moved.min() >= eps * (1 - 2e-5)


def test_l2_start_covers_the_image(generator):
    x = torch.full((6, 3, 11, 10), 0.5)
    (start,) = Holds().of(Square("l2", 0.3, queries=1), x)
    moves = start - x
    # 5 x 5 tiles of 2 x 2 pixels, all of the same norm: a bump or its transpose, with either sign.
    assert (moves[:, :, :10] != 0).all() and (moves[:, :, 10] == 0).all()
    tiles = moves[:, :, :10].unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 2, 2)
    tiles = tiles * math.sqrt(3 * 25) / 0.3
    upright, turned = square._bump(2, torch.device("cpu"))
    kinds = torch.stack((upright, -upright, turned, -turned))
    match = (tiles[:, None] - kinds).abs().amax((2, 3)) < 1e-5
    assert (match.sum(1) == 1).all()
    assert (match.float().mean(0) - 0.25).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14)])
def test_l2_proposal_of_the_paper(shape, generator):
    """Algorithm 3 written out in float64 for one image after the other, with the drawn windows and signs."""
    channels, height, width = shape
    attack = Square("l2", 0.8, queries=200, p_init=0.3)
    x = (1.4 * torch.rand(40, *shape, generator=generator) - 0.2).clamp(0, 1)
    active = ActiveSet(x.contiguous(memory_format=torch.channels_last), torch.zeros(40).long(), torch.arange(40))
    search = square._Bumps(attack, active, 0)
    overlapping = 0
    for query in range(1, 60):
        before = search.images().double().clone()
        search.propose(query)
        proposed = search.images().double().clone()
        side = search.size
        for k in range(40):
            nu = before[k] - x[k].double()
            (r1, r2), (s1, s2) = search.row[k, query].tolist(), search.column[k, query].tolist()
            first, second = torch.zeros(2, height, width, dtype=torch.bool)
            first[r1 : r1 + side, s1 : s1 + side] = second[r2 : r2 + side, s2 : s2 + side] = True
            assert first.sum() == second.sum() == side**2
            overlapping += (first & second).any().item()
            unused = max((0.8 * (1 - 1e-5)) ** 2 - nu.square().sum().item(), 0)
            bump = search.bump[int(search.turned[k, query])].double().view(side, side)
            expected = nu.clone()
            for i in range(channels):
                window = nu[i, r1 : r1 + side, s1 : s1 + side]
                temporary = search.sign[k, query, i] * bump + window / (window.norm() + 1e-12)
                available = math.sqrt(nu[i, first | second].square().sum().item() + unused / channels)
                expected[i, second] = 0
                if temporary.norm() < 0.01:  # the two cancel: the bump alone (the paper has no rule)
                    temporary = search.sign[k, query, i] * bump
                expected[i, r1 : r1 + side, s1 : s1 + side] = temporary / temporary.norm() * available
            expected = (x[k].double() + expected).clamp(0, 1)
            # The root of an energy near 0 makes more of its rounding.
            torch.testing.assert_close(proposed[k], expected, rtol=0, atol=5e-4)
        better = torch.rand(40, generator=generator) < 0.5
        search.settle(better)
        after = search.images().double()
        assert torch.equal(after[better], proposed[better]) and torch.equal(after[~better], before[~better])
    assert overlapping > 50


def test_keeps_only_what_lowers_the_margin(norm, network, digits):
    """The margins shown, in order: what comes back has the lowest of them."""
    x = digits.x[:1]
    y = network(x).argmax(1)
    margins = []

    def record(images):
        z = network(images)
        others = z.scatter(1, y[:, None], -math.inf).amax(1)
        margins.append((z[:, y[0]] - others).item())
        return z

    eps = {"linf": 0.02, "l2": 0.1}[norm]
    result = Square(norm, eps, queries=300).run(record, x, y)
    assert not result.fooled.any()
    assert margins[-1] == pytest.approx(min(margins), abs=1e-4) and margins[-1] < margins[1] - 0.1


def test_restarts_keep_the_strongest(norm, draw_linear):
    model, images = draw_linear(20, classes=2)
    eps = 0.8 * model.distance(images.x, images.y, norm).min().item()
    attack = Square(norm, eps, queries=20)

    def margins(attack):
        found = attack.run(model, images.x, images.y)
        return model.distance(found.images, images.y, norm)

    once, thrice = margins(attack), margins(replace(attack, restarts=3))
    assert (thrice <= once).all() and (thrice < once).float().mean() > 0.3


def test_does_not_depend_on_the_other_images_nor_on_global_randomness(norm, draw_linear):
    model, images = draw_linear(40)
    images.y[::5] = (images.y[::5] + 1) % 5
    eps = 1.3 * model.distance(images.x, images.y, norm)[images.y == model(images.x).argmax(1)].median().item()
    attack = Square(norm, eps, queries=300, restarts=2)
    index = torch.arange(40) + 1000
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = attack.run(model, images.x, images.y, index)
    assert torch.equal(torch.get_rng_state(), state)
    assert 3 <= (whole.fooled & whole.right).sum() < whole.right.sum()
    torch.manual_seed(2)
    for rows in (torch.arange(40), torch.arange(0, 40, 3), torch.tensor([7]), torch.arange(40).flip(0)):
        part = attack.run(model, images.x[rows], images.y[rows], index[rows])
        assert torch.equal(part.images, whole.images[rows]) and torch.equal(part.fooled, whole.fooled[rows])


def test_seed_and_index_key_the_randomness(norm):
    x = torch.full((6, 1, 5, 30), 0.5)

    def images(seed=0, index=None):
        attack = Square(norm, 0.2, queries=2, seed=seed)
        return attack(Holds(), x, torch.zeros(6, dtype=torch.int64), index)

    first = images()
    assert len({tuple(image.flatten().tolist()) for image in first}) == 6
    assert (images(seed=1) != first).flatten(1).any(1).all()
    assert torch.equal(images(index=torch.tensor([5, 4, 3, 2, 1, 0])), first.flip(0))


def test_one_query_is_one_image(norm, network, digits):
    x = digits.x[:6]
    y = network(x).argmax(1)
    result = Square(norm, 1e-4, queries=9, restarts=2, p_init=1.0).run(network, x, y)
    assert not result.fooled.any() and result.gradients == 0
    assert result.queries <= 6 * (9 * 2 + 1 + 1)  # before, judging
    assert norm == "linf" or result.queries == 6 * (9 * 2 + 1 + 1)


def test_broken_images_leave_at_once(norm):
    """A model that gives in when it is shown an image for the third time: clean, start, first proposal."""
    calls = []

    def model(x):
        calls.append(len(x))
        weak = torch.arange(len(x)) % 2 == 0 if len(calls) == 3 else torch.zeros(len(x), dtype=torch.bool)
        return torch.stack([(~weak).float(), torch.full((len(x),), 0.5)], 1)

    Square(norm, 0.1, queries=5).run(model, torch.full((7, 3, 9, 9), 0.5), torch.zeros(7, dtype=torch.int64))
    assert calls == [7, 7, 7, 3, 3, 3, 7]


def test_an_answer_that_is_not_a_number_is_a_success(norm):
    calls = []

    def model(x):
        calls.append(len(x))
        return torch.full((len(x), 3), math.nan) if len(calls) == 4 else torch.eye(3)[:1].expand(len(x), 3)

    Square(norm, 0.1, queries=50).run(model, torch.full((2, 3, 9, 9), 0.5), torch.zeros(2, dtype=torch.int64))
    assert calls == [2, 2, 2, 2, 2]  # clean, start, two proposals, judging


def test_empty_and_all_wrong(norm, draw_linear):
    model, images = draw_linear(6)
    attack = Square(norm, 0.1, queries=5)
    empty = attack.run(model, images.x[:0], images.y[:0])
    assert empty.images.shape == (0, 3, 4, 4) and empty.queries == 0
    wrong = attack.run(model, images.x, (images.y + 1) % 5)
    assert torch.equal(wrong.images, images.x) and wrong.fooled.all() and wrong.queries == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(norm, dtype, draw_linear, assert_inside):
    model, images = draw_linear(30, spread=1.0)
    x = images.x.to(dtype)
    y = model(x).argmax(1)
    eps = 2 * model.distance(x, y, norm).median().item()
    result = Square(norm, eps, queries=300).run(model, x, y)
    assert_inside(result.images, x, norm, eps)
    assert 5 <= result.fooled.sum() < 30


def test_as_strong_as_torchattacks(network, digits, norm):
    """Robust accuracy within a point of torchattacks, or lower.

    torchattacks never draws the last row and column of positions (it rounds down from a range without its end), and so never
    touches the last pixels of small images alone: that costs it 5 to 7 points on 500 digits at 5,000 queries. Mended here.
    """
    torchattacks = pytest.importorskip("torchattacks")

    class Mended(torchattacks.Square):
        def random_int(self, low=0, high=1, shape=(1,)):
            return super().random_int(low, high + 1, shape)

    x, y = digits.x[:100], digits.y[:100]
    eps = {"linf": 0.12, "l2": 0.65}[norm]
    found = Mended(network, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, n_queries=600, seed=0)(x, y)
    theirs = (network(found).argmax(1) == y).sum().item()
    ours = (~Square(norm, eps, queries=600).run(network, x, y).fooled).sum().item()
    assert ours <= theirs + 1
    assert 20 < ours < 95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be 1 or more, found 0"),
        ({"restarts": 0}, "restarts must be 1 or more, found 0"),
        ({"p_init": 0.0}, r"p_init must be in \(0, 1\], .* found 0.0"),
        ({"p_init": 1.5}, r"p_init must be in \(0, 1\], .* found 1.5"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        Square("linf", 0.1, **options)


def test_images_without_height_and_width(norm, draw_linear):
    model, images = draw_linear(2, shape=(12,))
    with pytest.raises(UsageError, match=r"Square needs images \[N, C, H, W\] .* found \[2, 12\]"):
        Square(norm, 0.1)(model, images.x, images.y)
