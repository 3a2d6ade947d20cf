"""The fast gradient sign method, and its l2 form (Goodfellow et al. 2015, arXiv:1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from synthfast.attacks.base import Attack, Model, forward_gradient, step
from synthfast.attacks.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of size ``eps`` from the image itself up the gradient of the cross-entropy (l2: along its direction)."""

    def _attack(self, model: Model, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        _, _, gradient = forward_gradient(model, x, lambda logits: cross_entropy(logits, y))
        return step(x, gradient, x, self.radius, self.radius, self.norm)
