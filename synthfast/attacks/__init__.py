"""Attacks in an l-infinity or l2 ball around images: ``attack(model, x, y) -> adversarial images``."""

from synthfast.attacks.base import Attack, Model, Result

__all__ = ["Attack", "Model", "Result"]
