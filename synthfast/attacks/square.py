"""Square attack: random search over square windows, by the model's answers alone.

Andriushchenko, Croce, Flammarion and Hein 2020, "Square attack: a query-efficient black-box adversarial attack via random
search" (arXiv:1912.00049).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from synthfast import ops
from synthfast.attacks.base import ActiveSet, Attack, Model, dense, step, take
from synthfast.attacks.losses import cw_margin
from synthfast.errors import UsageError

_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations of 10,000 after which p is halved."""

_BLOCK = 256
"""Queries whose randomness is drawn in one call. Part of what a seed means."""

_PATIENCE = {"cuda": 16}
"""Queries between looks at what broke, 1 if not given. A GPU works ahead of Python until Python asks for a result. What broke
in between does not change any more."""

_MEMORY = 4096
"""Failed proposals are remembered for each image where there are at most this many different ones of a size."""


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Random search: repaint a random square of the perturbation, keep it where the margin of the true class falls.

    queries: images put through the model for each image and restart, the start included. Judging comes on top.
    restarts: independent runs of this many queries.
    p_init: share of the pixels that the first squares cover. It is halved nine times on the way (section 3.2 of the paper,
        rescaled to ``queries`` as the authors do).

    linf (algorithm 2): the start is vertical stripes of +eps and -eps in each channel, a proposal a square of one of these in
    each channel. l2 (algorithm 3): the start is a grid of bumps, and a proposal puts the energy of two windows, and what is
    left of the budget, into a new bump in the first.

    A proposal that would change nothing is turned over (the authors draw again). Where an image has few different proposals,
    small squares on a small image, those that failed since its last success are known to fail: such a query counts, but the
    model is not asked again. So a model must answer for each image as it did before.
    """

    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("queries", "restarts"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if not 0 < self.p_init <= 1:
            raise UsageError(
                f"p_init must be in (0, 1], the share of the pixels in the first squares, found {self.p_init}"
            )

    def share(self, query: int) -> float:
        """p, the share of the pixels in a square, for the query with this number; the start is number 0."""
        at = (query - 1) * 10_000 // self.queries
        return self.p_init / 2 ** sum(at > end for end in _SCHEDULE)

    def _attack(self, model: Model, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if x.dim() != 4:
            raise UsageError(f"Square needs images [N, C, H, W] to draw squares in, found {list(x.shape)}")
        active = ActiveSet(x, y, index)
        search = _Stripes if self.norm == "linf" else _Bumps
        with torch.inference_mode():
            for restart in range(self.restarts):
                self._search(model, active, search(self, active, restart))
                if not active:
                    break
        return active.found

    def _search(self, model: Model, active: ActiveSet, search: _Search) -> None:
        """One run on the images that still stand."""
        patience = _PATIENCE.get(active.origin.device.type, 1)
        # An answer that is not a number counts as a success, here and in the judging: hence "not <=" instead of ">".
        margin = cw_margin(model(search.images()), active.y)
        for query in range(1, self.queries):
            if query % patience == 0:
                (margin,) = search.retire(~(margin <= 0), margin)
                if not active:
                    return
            asked = search.propose(query)
            if asked is None:
                found = cw_margin(model(search.images()), active.y)
                better = ~(found <= margin) & (margin <= 0)
                margin = torch.where(better, found, margin)
            elif len(asked):
                found, before = cw_margin(model(take(search.images(), asked)), active.y[asked]), margin[asked]
                better = ~(found <= before) & (before <= 0)
                margin[asked] = torch.where(better, found, before)
            else:
                continue
            search.settle(better)
        (margin,) = search.retire(~(margin <= 0), margin)
        if active:
            active.keep(search.images(), margin)


class _Search(ABC):
    """The images of a search, pixel by pixel, and the proposals written into them.

    ``pixels`` [n, H W, C] holds the strongest images so far. A proposal is written over them, and what it covered is put back
    where it was no better, so a query costs what its windows cover and not what the images hold.
    """

    numbers: int  # uniform numbers for each query
    per_image: tuple[str, ...]  # attributes [n, ...] that lose the rows of broken images

    def __init__(self, attack: Square, active: ActiveSet, restart: int) -> None:
        self.attack, self.active, self.device = attack, active, active.origin.device
        self.channels, self.height, self.width = active.origin.shape[1:]
        self.area = self.height * self.width
        self.first_step = restart * (1 + -(-attack.queries // _BLOCK))
        self.size = 0
        self._number_pixels()

    def images(self) -> Tensor:
        """[n, C, H, W], channels_last: a view of the pixels."""
        return self.pixels.view(-1, self.height, self.width, self.channels).permute(0, 3, 1, 2)

    def retire(self, broken: Tensor, *state: Tensor) -> list[Tensor]:
        """Take broken images out of the active set and out of the search; ``state`` as in :meth:`ActiveSet.retire`."""
        before = len(self.active)
        left = self.active.retire(broken, self.images(), *state, *(getattr(self, name) for name in self.per_image))
        if len(self.active) < before:
            for name, value in zip(self.per_image, left[len(state) :], strict=True):
                setattr(self, name, value)
            self._number_pixels()
        return left[: len(state)]

    def propose(self, query: int) -> Tensor | None:
        """Write the proposals of this query; the rows (int64) whose answer is wanted, or None for all."""
        side = self.side(query)
        if side != self.size:
            self.size = side
            self.resize()
        position = query % _BLOCK
        if position == 0 or query == 1:
            first = query - position
            count = min(_BLOCK, self.attack.queries - first)
            sides = torch.tensor([self.side(first + i) for i in range(count)], device=self.device)
            uniform = self.uniform(count * self.numbers, 1 + first // _BLOCK)
            self.draw(uniform.view(-1, count, self.numbers), sides)
        return self.write(position)

    @abstractmethod
    def side(self, query: int) -> int:
        """Side of this query's windows, at most the shorter side of the images."""

    def resize(self) -> None:
        """Prepare for windows of ``size``."""
        self.line = torch.arange(self.size, device=self.device)
        self.offsets = (self.line[:, None] * self.width + self.line).flatten()

    @abstractmethod
    def draw(self, uniform: Tensor, sides: Tensor) -> None:
        """Turn uniform numbers [n, queries, numbers] into what :meth:`write` needs; ``sides`` int64 [queries]."""

    @abstractmethod
    def write(self, position: int) -> Tensor | None:
        """Write the proposals of the query at this position of its block; returns as :meth:`propose`."""

    @abstractmethod
    def settle(self, better: Tensor) -> None:
        """Take the proposals back where they were not ``better`` (bool, for the rows that were asked)."""

    def uniform(self, numbers: int, block: int) -> Tensor:
        """Uniform numbers [n, numbers]; block 0 is for the start, block 1 + b for the queries from 256 b on."""
        index = self.active.index
        out = torch.empty(len(index), numbers, device=self.device)
        return ops.philox_uniform_(out, index, self.attack.seed, ops.Stream.SQUARE, self.first_step + block)

    def corners(self, uniform: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of upper left corners, int64 [..., n, queries], from uniform [..., n, queries, 2]."""
        # u <= 1 - 2^-24, and then u * m in float32 is below m.
        return (uniform[..., 0] * (self.height - sides + 1)).long(), (uniform[..., 1] * (self.width - sides + 1)).long()

    def window(self, corner: Tensor) -> Tensor:
        """Rows of the flat pixels [n H W, C] in the windows with these upper left corners [n]: int64 [n, size^2]."""
        return self.first_pixel + corner[:, None] + self.offsets

    def _number_pixels(self) -> None:
        self.first_pixel = torch.arange(len(self.active), device=self.device)[:, None] * self.area


class _Stripes(_Search):
    """Algorithm 2, l-infinity: every pixel is at an end of its range, which is the ball within [0, 1]."""

    per_image = ("pixels", "low", "high", "corner", "up", "tried")

    def __init__(self, attack: Square, active: ActiveSet, restart: int) -> None:
        super().__init__(attack, active, restart)
        self.numbers = 2 + self.channels
        x = active.origin
        one = torch.ones_like(x)
        # step() keeps to the ball exactly, so whatever is put together from these is inside.
        self.low, self.high = (
            _pixels(step(x, end, x, attack.radius, 2 * attack.radius, "linf")) for end in (-one, one)
        )
        up = self.uniform(self.width * self.channels, 0).view(-1, 1, self.width, self.channels) < 0.5
        up = up.expand(-1, self.height, -1, -1).reshape(self.low.shape)
        self.pixels = torch.where(up, self.high, self.low)
        self.bits = 2 ** torch.arange(self.channels, device=self.device)
        self.corner, self.up, self.tried = (torch.empty(len(x), 0, device=self.device) for _ in range(3))

    def side(self, query: int) -> int:
        side = round(math.sqrt(self.attack.share(query) * self.area))
        return min(max(side, 1), self.height, self.width)

    def resize(self) -> None:
        super().resize()
        proposals = self.area * 2**self.channels
        self.remembers = (self.height - self.size + 1) * (self.width - self.size + 1) * 2**self.channels <= _MEMORY
        self.tried = torch.zeros(len(self.active), proposals if self.remembers else 0, dtype=bool, device=self.device)

    def draw(self, uniform: Tensor, sides: Tensor) -> None:
        row, column = self.corners(uniform, sides)
        self.corner = row * self.width + column
        self.up = uniform[..., 2:] < 0.5

    def write(self, position: int) -> Tensor | None:
        rows = self.window(self.corner[:, position])
        low, high, old = (_take(pixels, rows) for pixels in (self.low, self.high, self.pixels))
        up = self.up[:, position]
        idle = (torch.where(up[:, None], high, low) == old).flatten(1).all(1)
        up = up ^ idle[:, None]
        new = torch.where(up[:, None], high, low)
        asked = None
        if self.remembers:
            self.key = self.corner[:, position, None] * 2**self.channels + (up * self.bits).sum(1, keepdim=True)
            known = self.tried.gather(1, self.key)
            self.tried.scatter_(1, self.key, True)
            # Leaving out a few images is not worth a copy of the others.
            if 8 * int(known.sum()) > len(known):
                asked = (~known[:, 0]).nonzero()[:, 0]
                rows, old, new = rows[asked], old[asked], new[asked]
        self.asked, self.rows, self.old, self.new = asked, rows, old, new
        _put(self.pixels, rows, new)
        return asked

    def settle(self, better: Tensor) -> None:
        _put(self.pixels, self.rows, torch.where(better[:, None, None], self.new, self.old))
        if self.remembers:
            changed = better.nonzero()[:, 0]
            self.tried[changed if self.asked is None else self.asked[changed]] = False


class _Bumps(_Search):
    """Algorithm 3, l2: a perturbation made of bumps, whose energy moves from window to window."""

    per_image = ("pixels", "start", "energy", "row", "column", "sign", "turned")

    def __init__(self, attack: Square, active: ActiveSet, restart: int) -> None:
        super().__init__(attack, active, restart)
        self.numbers = 5 + self.channels
        # A little less than the ball, so that the rounding of energies does not leave it.
        self.budget = (attack.radius * (1 - 1e-5)) ** 2
        self.start = _pixels(active.origin)
        n = len(self.start)
        self.pixels = (self.start.float() + self._bumps()).clamp_(0, 1).to(self.start.dtype)
        self.row, self.column, self.sign, self.turned, self.energy = (
            torch.empty(n, 0, device=self.device) for _ in range(5)
        )

    def _bumps(self) -> Tensor:
        """Perturbation of the start, of norm eps: bumps on a grid of about 5 x 5 tiles, [n, H W, C]."""
        side = max(min(self.height, self.width) // 5, 1)
        down, across = self.height // side, self.width // side
        uniform = self.uniform(down * across * (1 + self.channels), 0).view(-1, down, across, 1, 1, 1 + self.channels)
        bump = torch.where(uniform[..., :1] < 0.5, *_bump(side, self.device)[:, :, :, None])
        tiles = torch.where(uniform[..., 1:] < 0.5, bump, -bump)  # [n, down, across, side, side, C]
        tiles = tiles.transpose(2, 3).reshape(-1, down * side, across * side, self.channels)
        top, left = (self.height - down * side) // 2, (self.width - across * side) // 2
        perturbation = torch.zeros(len(tiles), self.height, self.width, self.channels, device=self.device)
        perturbation[:, top : top + down * side, left : left + across * side] = tiles
        perturbation = perturbation.flatten(1)
        perturbation *= math.sqrt(self.budget) / perturbation.norm(dim=1, keepdim=True)
        return perturbation.view(-1, self.area, self.channels)

    def side(self, query: int) -> int:
        side = max(round(math.sqrt(self.attack.share(query) * self.area)), 3)
        side = min(side + 1 - side % 2, self.height, self.width)
        return side - 1 + side % 2

    def resize(self) -> None:
        super().resize()
        self.bump = _bump(self.size, self.device).view(2, 1, -1, 1)

    def draw(self, uniform: Tensor, sides: Tensor) -> None:
        both = uniform[..., :4].unflatten(2, (2, 2)).movedim(2, 0)
        row, column = self.corners(both, sides)
        self.row, self.column = row.movedim(0, 2), column.movedim(0, 2)  # [n, queries, 2]
        self.turned = uniform[..., 4] < 0.5
        self.sign = (uniform[..., 5:] < 0.5).float() * 2 - 1
        # Exact again: what is left of the budget is kept up to date by differences in between.
        self.energy = (self.pixels.double() - self.start.double()).square().sum((1, 2))

    def write(self, position: int) -> Tensor | None:
        row, column = self.row[:, position], self.column[:, position]
        into, out_of = (self.window(row[:, k] * self.width + column[:, k]) for k in (0, 1))
        start, old = _take(self.start, into), _take(self.pixels, into)
        start_2, old_2 = _take(self.start, out_of), _take(self.pixels, out_of)
        v, v_2 = old.float() - start.float(), old_2.float() - start_2.float()

        # Where the windows overlap, the first one counts.
        shift = self.line + (row[:, 1] - row[:, 0])[:, None], self.line + (column[:, 1] - column[:, 0])[:, None]
        within_rows, within_columns = ((s >= 0) & (s < self.size) for s in shift)
        apart = ~(within_rows[:, :, None] & within_columns[:, None]).flatten(1)
        in_first, in_second = v.square().sum(1), (v_2.square() * apart[:, :, None]).sum(1)  # [n, C]

        left = (self.budget - self.energy).clamp_(min=0).float()[:, None]
        room = (in_first + in_second + left / self.channels).sqrt()
        bump = (
            torch.where(self.turned[:, position, None, None], self.bump[1], self.bump[0]) * self.sign[:, position, None]
        )
        mixed = bump + v / (in_first.sqrt() + 1e-12)[:, None]
        norm = mixed.norm(dim=1, keepdim=True)
        # Where the window holds the opposite of the bump, nothing but rounding is left of the two: then the bump alone.
        mixed = torch.where(norm > 0.01, mixed / norm, bump)
        new = (start.float() + mixed * room[:, None]).clamp_(0, 1).to(start.dtype)

        gained = (new.float() - start.float()).square().sum((1, 2)) - (in_first + in_second).sum(1)
        self.new_energy = self.energy + gained
        self.into, self.old, self.new = into, old, new
        self.out_of, self.old_2, self.start_2 = out_of, old_2, start_2
        _put(self.pixels, out_of, start_2)
        _put(self.pixels, into, new)
        return None

    def settle(self, better: Tensor) -> None:
        # A pixel in both windows is written twice: with the same old value, or first with its start and then anew.
        better_ = better[:, None, None]
        _put(self.pixels, self.out_of, torch.where(better_, self.start_2, self.old_2))
        _put(self.pixels, self.into, torch.where(better_, self.new, self.old))
        self.energy = torch.where(better, self.new_energy, self.energy)


def _bump(side: int, device: torch.device) -> Tensor:
    """eta of section 3.4, float32 [2, side, side] of norm 1: an upper half above 0 and a lower one below; and its transpose.

    Each half of h1 x h2 pixels is a pyramid of centred rectangles, the k-th from the inside weighing 1 / k^2.
    """

    def half(height: int) -> Tensor:
        row = (torch.arange(height) - height // 2).abs()
        column = (torch.arange(side) - side // 2).abs()
        ring = torch.maximum(row[:, None], column)  # the innermost rectangle that holds this pixel
        weights = 1.0 / torch.arange(1, max(height, side) // 2 + 2).double() ** 2
        return weights.flip(0).cumsum(0).flip(0)[ring] if height else torch.empty(0, side).double()

    upper, lower = half(side // 2), half(side - side // 2)
    bump = torch.cat([part / part.norm() if len(part) else part for part in (upper, -lower)])
    bump = (bump / bump.norm()).float()
    return torch.stack((bump, bump.T)).to(device)


def _pixels(images: Tensor) -> Tensor:
    """Images [n, C, H, W] as [n, H W, C], in memory of their own."""
    return dense(images).permute(0, 2, 3, 1).flatten(1, 2).clone(memory_format=torch.contiguous_format)


def _take(pixels: Tensor, rows: Tensor) -> Tensor:
    """Pixels [n, H W, C] at rows int64 [n, k] of the flat [n H W, C]: [n, k, C]."""
    return pixels.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


def _put(pixels: Tensor, rows: Tensor, values: Tensor) -> None:
    pixels.view(-1, pixels.shape[2]).index_copy_(0, rows.flatten(), values.flatten(0, 1))
