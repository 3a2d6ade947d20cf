"""Attacks in an l-infinity or l2 ball around images: ``attack(model, x, y) -> adversarial images``."""

from synthfast.attacks.apgd import APGD
from synthfast.attacks.autoattack import AutoAttack, ce_only_reason, gradient_masking_warning, standard
from synthfast.attacks.base import Attack, Model, Result
from synthfast.attacks.fab import FAB
from synthfast.attacks.fgsm import FGSM
from synthfast.attacks.pgd import PGD, pgd_maximize
from synthfast.attacks.square import Square

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Model",
    "Result",
    "Square",
    "ce_only_reason",
    "gradient_masking_warning",
    "pgd_maximize",
    "standard",
]
