"""Attacks in an l-infinity or l2 ball around images: ``attack(model, x, y) -> adversarial images``."""

from synthfast.attacks.apgd import APGD
from synthfast.attacks.base import Attack, Model, Result
from synthfast.attacks.fgsm import FGSM
from synthfast.attacks.pgd import PGD, pgd_maximize

__all__ = ["APGD", "FGSM", "PGD", "Attack", "Model", "Result", "pgd_maximize"]
