"""FAB: the closest misclassified image, by steps onto the linearised decision boundary.

Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (arXiv:1907.02044), in
the targeted version of AutoAttack (Croce and Hein 2020, arXiv:2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synthfast import ops
from synthfast.attacks.base import ActiveSet, Model, forward_gradient, misclassified, select
from synthfast.attacks.losses import pick
from synthfast.attacks.restarts import RestartedAttack
from synthfast.errors import UsageError

_FAR = 1e30


@dataclass(frozen=True, kw_only=True)
class FAB(RestartedAttack):
    """FAB-T: toward each of the most likely wrong classes, walk along the decision boundary and keep the closest image found.

    targets: wrong classes attacked in turn, from the highest logit down; with fewer other classes, all of them.
    steps: iterations of a run. Each takes the gradient of one difference of logits.
    restarts: runs toward each target; the first starts at the image, the others in the ball of radius eps / 2.
    alpha_max: largest weight of the step from the original image, which draws the walk back to it.
    eta: how far a step goes; 1 is onto the boundary, more crosses it.
    beta: what is left of the perturbation after the step back, taken wherever the image is misclassified.

    An image is out as soon as a misclassified one within eps of it is found. The others go through all runs, and what is
    kept for them is the closest misclassified image, brought into the ball.
    """

    targets: int = 9
    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("targets", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta < 1):
            raise UsageError(
                "FAB needs alpha_max in [0, 1], eta of 1 or more and beta in (0, 1), "
                f"found alpha_max {self.alpha_max}, eta {self.eta}, beta {self.beta}"
            )

    @property
    def _target_count(self) -> int:
        return self.targets

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        return pick(logits, target) - pick(logits, y)

    def _start(self, active: ActiveSet, run: int) -> Tensor:
        if run % self.restarts == 0:
            return active.origin
        return ops.ball_start(active.origin, active.index, self.radius / 2, self.norm, self.seed, run)

    def _one_run(
        self, model: Model, active: ActiveSet, loss: Callable[[Tensor], Tensor], start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`RestartedAttack._one_run`; the score is how close the image is, the distance with a minus."""
        image, closest = start, active.origin
        distance = torch.full((len(active),), _FAR, device=start.device)
        for _ in range(self.steps):
            _, difference, gradient = forward_gradient(model, image, loss)
            image = self._step(image, active.origin, difference, gradient)
            crossed = misclassified(model(image).float(), active.y)

            perturbation = image.float() - active.origin.float()
            length = _length(perturbation.flatten(1), self.norm)
            closer = crossed & (length < distance)
            distance, closest = torch.where(closer, length, distance), select(closer, image, closest)
            back = (active.origin.float() + self.beta * perturbation).to(image.dtype)
            image = select(crossed, back, image)

            image, closest, distance = active.retire(distance <= self.radius, closest, image, closest, distance)
            if not active:
                break
        return closest, -distance

    def _step(self, image: Tensor, origin: Tensor, difference: Tensor, gradient: Tensor) -> Tensor:
        """The biased step (eq. 9 of the paper).

        The boundary is taken for the plane difference + <gradient, z - image> = 0. Image and original are both projected
        onto it, overshooting by eta, and the step goes to a mean of the two, weighted by their distances to the plane.
        """
        x, x0, w = (_rows(t).float() for t in (image, origin, gradient))
        points = torch.stack((x, x0))
        missing = torch.stack((-difference, torch.linalg.vecdot(w, x - x0) - difference))
        moves = move_onto_plane(points, w, missing, self.norm)
        lengths = _length(moves, self.norm).clamp(min=1e-8)
        alpha = (lengths[0] / (lengths[0] + lengths[1])).clamp(max=self.alpha_max)
        points.add_(moves, alpha=self.eta)
        return _like(torch.lerp(points[0], points[1], alpha[:, None]).clamp_(0, 1), image)


def move_onto_plane(x: Tensor, w: Tensor, c: Tensor, norm: str) -> Tensor:
    """The smallest d, in the norm, with <w, d> = c and x + d in [0, 1]; where there is none, the d that comes closest to c.

    Args:
        x: points in [0, 1], float32 [..., N, D].
        w: normals of the planes, float32 [N, D].
        c: float32 [..., N].
        norm: "linf" or "l2".

    Coordinate i moves by min(t p_i, room_i) in the direction that helps, p_i = 1 (linf) or |w_i| (l2), and t is the root of
    sum_i |w_i| min(t p_i, room_i) = |c|. The left side is concave and piecewise linear in t, so Newton's method from t = 0
    rises to the root and is there, exactly, as soon as no further coordinate runs out of room: after 2 to 6 rounds as a
    rule, each cheaper than sorting the coordinates as the paper does.
    """
    up = (w > 0) == (c > 0)[..., None]
    weight = w.abs()
    scale = weight.amax(-1).clamp(min=1e-30)  # squares of tiny gradients would vanish
    weight = weight / scale[:, None]
    room = torch.where(up, 1 - x, x)
    pace = (weight > 0).float() if norm == "linf" else weight
    gain, rest = weight * pace, weight * room
    c = c.abs() / scale
    full = room <= 0
    while True:
        slope = torch.where(full, 0, gain).sum(-1)
        t = (c - torch.where(full, rest, 0).sum(-1)) / slope
        t = torch.where(slope > 0, t, _FAR).clamp(max=_FAR)[..., None]
        further = full | (t * pace >= room)
        if torch.equal(further, full):
            break
        full = further
    move = torch.minimum(t * pace, room)
    return torch.where(up, move, -move)


def _length(rows: Tensor, norm: str) -> Tensor:
    """Norms of the rows: [..., D] to [...]."""
    return rows.abs().amax(-1) if norm == "linf" else rows.norm(dim=-1)


def _rows(image: Tensor) -> Tensor:
    """Images as [N, D], in the order of channels_last memory."""
    return (image.permute(0, 2, 3, 1) if image.dim() == 4 else image).flatten(1)


def _like(rows: Tensor, image: Tensor) -> Tensor:
    """Rows [N, D] as images like ``image``: the inverse of :func:`_rows`."""
    if image.dim() != 4:
        return rows.view(image.shape).to(image.dtype)
    n, c, h, w = image.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2).to(image.dtype)
