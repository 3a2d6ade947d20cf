"""AutoAttack standard: four attacks in turn (Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks", arXiv:2003.01690)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from synthfast.attacks.apgd import APGD
from synthfast.attacks.base import ActiveSet, Attack, Model
from synthfast.attacks.fab import FAB
from synthfast.attacks.square import Square
from synthfast.errors import UsageError

TARGETS = 9
"""Targets of APGD-T and FAB-T, where a model has as many other classes."""

MASKING_SHARE = 0.01
"""Share of the images from which :func:`gradient_masking_warning` speaks of more than chance."""


def standard(norm: str, eps: float, classes: int, seed: int = 0) -> list[tuple[str, Attack]]:
    """The attacks of the standard version with their published settings, in order; each is for what the ones before left.

    "apgd-ce": APGD on cross-entropy, 100 steps. "apgd-t": APGD on the targeted DLR loss, 100 steps for each of 9 targets.
    "fab-t": FAB, 100 steps for each of 9 targets. "square": Square, 5,000 queries. All with one restart.

    With fewer than 4 classes the targeted DLR loss does not exist, and "apgd-t" is left out (:func:`ce_only_reason`). FAB-T
    needs a difference of two logits and Square a margin, which two classes have.

    Args:
        norm, eps, seed: as in :class:`Attack`.
        classes: of the model, 2 or more.
    """
    if classes < 2:
        raise UsageError(f"classes of the model must be 2 or more, found {classes}")
    common = {"norm": norm, "eps": eps, "seed": seed}
    targets = min(TARGETS, classes - 1)
    attacks: list[tuple[str, Attack]] = [("apgd-ce", APGD(**common, loss="ce", steps=100))]
    if ce_only_reason(classes) is None:
        attacks.append(("apgd-t", APGD(**common, loss="dlr", targets=targets, steps=100)))
    attacks.append(("fab-t", FAB(**common, targets=targets, steps=100)))
    attacks.append(("square", Square(**common, queries=5000)))
    return attacks


def ce_only_reason(classes: int) -> str | None:
    """One line that says why the only APGD of the set is that on cross-entropy; None if the set is complete."""
    if classes >= 4:
        return None
    return (
        f"with {classes} classes AutoAttack runs APGD-CE, FAB-T and Square, without APGD-T: "
        "its loss, targeted DLR, takes the 4 highest logits"
    )


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """The attacks of :func:`standard` in turn, each on the images that still stand.

    classes: of the model.

    For an image that none of them broke, the strongest try of the last one is returned.
    """

    classes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attacks()

    def attacks(self) -> list[tuple[str, Attack]]:
        """Names and attacks, in order."""
        return standard(self.norm, self.eps, self.classes, self.seed)

    def _attack(self, model: Model, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        active = ActiveSet(x, y, index)
        for _, attack in self.attacks():
            result = attack.run(model, active.origin, active.y, active.index)
            active.keep(result.images)
            active.retire(result.fooled, result.images)
            if not active:
                break
        return active.found


def gradient_masking_warning(broken: Mapping[str, int], images: int) -> str | None:
    """One line if the black-box attack, or FAB with it, found what gradients on the loss should have found; else None.

    Args:
        broken: name of each attack of :func:`standard` to the number of images that it broke, of those left by the ones before.
        images: how many images there were, the misclassified ones included.

    An attack without gradients must not do better than one with them; where it does, gradients mislead ("gradient masking":
    Athalye, Carlini and Wagner 2018; Carlini et al. 2019), and the true robust accuracy may be far lower. The
    authors' AutoAttack warns as soon as Square lowers the robust accuracy at all; here the line is drawn at 1% of the images,
    for a few can fall to chance. It is also drawn where FAB-T and Square together break more images than all APGD before
    them, and more than 1%: the gradients of the loss were the problem then.
    """
    apgd = sum(count for name, count in broken.items() if name.startswith("apgd"))
    square, late = broken.get("square", 0), sum(broken.values()) - apgd
    some = MASKING_SHARE * images
    if square > some:
        found = f"Square, which sees no gradients, broke {square} of {images} images that the attacks with gradients had left"
    elif late > max(apgd, some):
        found = f"FAB-T and Square broke {late} of {images} images, all APGD before them {apgd}"
    else:
        return None
    return f"gradient masking: {found}; the true robust accuracy may be far lower, try an attack made for this model"
