"""What all attacks share: the checks, the ball, the judging of results, and the images that still stand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from synthfast import ops
from synthfast.errors import UsageError

Model = Callable[[Tensor], Tensor]
"""Images, float [N, ...] in [0, 1], to logits [N, K]: a module in evaluation mode or any function."""

NORMS = ("linf", "l2")

_STEP = {"linf": ops.linf_step, "l2": ops.l2_step}
_STEP_IN_PLACE = {"linf": ops.linf_step_, "l2": ops.l2_step_}


@dataclass(frozen=True)
class Result:
    """What an attack found.

    images: like the attacked ones; in the ball around them and in [0, 1]. Where the attack failed, its strongest try; images
        that the model misclassified already are unchanged.
    fooled: bool [N], the model misclassifies ``images``, those that it misclassified already included.
    right: bool [N], the model was right about the images before the attack.
    queries: images put through the model, the judging before and after included.
    gradients: images whose gradient was taken.
    """

    images: Tensor
    fooled: Tensor
    right: Tensor
    queries: int
    gradients: int


@dataclass(frozen=True)
class Attack(ABC):
    """An attack that looks for a misclassified image in the ball of radius ``eps`` around each image.

    norm: "linf" or "l2".
    eps: radius, on pixels in [0, 1].
    seed: key of the attack's randomness, with the ``index`` of each image. Global random state is neither read nor changed.

    A subclass writes ``_attack``. Everything else (what must not be attacked, what counts as success) is settled here, so
    that all attacks judge alike.
    """

    norm: str
    eps: float
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"norm must be linf or l2, found {self.norm!r}")
        if not (isinstance(self.eps, (int, float)) and math.isfinite(self.eps) and self.eps >= 0):
            raise UsageError(f"eps must be a finite number >= 0 on pixels in [0, 1], found {self.eps!r}")

    @property
    def radius(self) -> float:
        """``eps`` as a float32 rounded toward 0: the operations keep to it, so results keep to ``eps`` itself."""
        return float32_below(self.eps)

    def __call__(self, model: Model, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        """Adversarial images like ``x``; see :meth:`run`, which also says which of them fool the model."""
        return self.run(model, x, y, index).images

    def run(self, model: Model, x: Tensor, y: Tensor, index: Tensor | None = None) -> Result:
        """Attack a batch.

        Args:
            model: see :data:`Model`. A module must be in evaluation mode; its parameters receive no gradients.
            x: images, float32, bfloat16 or float16 [N, ...] in [0, 1].
            y: true classes, int64 [N].
            index: int64 [N], what keys the randomness of each image; 0 to N - 1 if not given.

        Raises:
            UsageError: for images, classes or a model that do not fit this.
        """
        _check_inputs(model, x, y, index)
        # An attack may be called under inference_mode or no_grad: gradients are switched on where they are taken.
        with torch.inference_mode(False), torch.no_grad():
            if index is None:
                index = torch.arange(len(x), device=x.device)
            # Random starts fill memory in storage order, so the layout is part of the result: one layout for all.
            origin, y, index = (_ordinary(t) for t in (dense(x), y, index))
            counted = _Counted(model)
            return self._run(counted, x, origin, y, index)

    def _run(self, counted: _Counted, x: Tensor, origin: Tensor, y: Tensor, index: Tensor) -> Result:
        images, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if len(x) == 0:
            return Result(images, fooled, ~fooled, 0, 0)
        logits = counted(origin)
        _check_logits(logits, y)
        if logits.shape[1] < self.classes_needed:
            raise UsageError(
                f"{type(self).__name__} with this loss needs {self.classes_needed} or more classes, "
                f"the model has {logits.shape[1]}; use the loss ce"
            )
        fooled = misclassified(logits, y)
        right = ~fooled
        rows = right.nonzero()[:, 0]
        if len(rows):
            if len(rows) < len(x):
                origin, y, index = take(origin, rows), y[rows], index[rows]
            found = project(self._attack(counted, origin, y, index), origin, self.radius, self.norm)
            fooled = fooled.index_copy(0, rows, misclassified(counted(found), y))
            images[rows] = found
        return Result(images, fooled, right, counted.queries, counted.gradients)

    @property
    def classes_needed(self) -> int:
        """How many classes a model must have for this attack to be defined."""
        return 2

    @abstractmethod
    def _attack(self, model: Model, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Candidates like ``x``, the strongest image found for each.

        ``model`` is right about every image of ``x`` (at least one; channels_last if it has 4 dimensions). Called without
        gradients: :func:`forward_gradient` switches them on. ``x`` must not be changed.
        """


class ActiveSet:
    """The images of a batch that still stand, for the loop of an attack.

    origin, y, index: as handed to ``_attack``, of the images that still stand, n <= N of them.
    rows: int64 [n], where these are in the batch.
    found: like the whole batch: the images that broke, and what :meth:`keep` recorded for the others (at first, the origin).
    score: float32 [N], the score that each image was kept with (at first, -inf).

        active = ActiveSet(x, y, index)
        image = start
        for _ in range(steps):
            logits, loss, gradient = forward_gradient(model, image, ...)
            image, gradient = active.retire(misclassified(logits, active.y), image, image, gradient)
            if not active:
                break
            image = ...
        active.keep(image)
        return active.found
    """

    def __init__(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        self.origin, self.y, self.index = x, y, index
        self.rows = torch.arange(len(x), device=x.device)
        self.found = x.clone()
        self.score = torch.full((len(x),), -math.inf, device=x.device)

    def __len__(self) -> int:
        return len(self.rows)

    def retire(self, broken: Tensor, images: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Record ``images`` [n, ...] where ``broken`` (bool [n]) and take these out of the set.

        ``state``: further tensors [n, ...] of the loop, returned without the broken rows (the same objects if none broke).
        """
        gone = broken.nonzero()[:, 0]
        if len(gone) == 0:
            return state
        self.found[self.rows[gone]] = take(images, gone)
        left = broken.logical_not().nonzero()[:, 0]
        self.origin, self.y, self.index = take(self.origin, left), self.y[left], self.index[left]
        self.rows = self.rows[left]
        return tuple(take(tensor, left) for tensor in state)

    def keep(self, images: Tensor, score: Tensor | None = None) -> None:
        """Record ``images`` [n, ...] of the images that still stand: all, or those whose ``score`` [n] is their highest yet."""
        if score is not None:
            before = self.score[self.rows]
            higher = score > before
            self.score[self.rows] = torch.where(higher, score, before)
            images = select(higher, images, take(self.found, self.rows))
        self.found[self.rows] = images


def input_gradient(loss: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``loss`` (per image [N], or a scalar) for the images ``x`` alone; parameters receive none.

    Raises:
        UsageError: the loss does not depend on ``x`` in a way that autograd knows.
    """
    try:
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    except RuntimeError as error:
        if "does not require grad" in str(error) or "have been used in the graph" in str(error):
            raise UsageError(
                "the model gives no gradient for its input, which this attack needs; remove no_grad and detach from the model"
            ) from None
        raise
    return gradient


def forward_gradient(model: Model, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one backward pass: logits float32 [N, K], losses [N], gradient of their sum like ``x``.

    ``loss``: from logits float32 [N, K] to losses [N]. The logits are those of ``x``: judge it by them.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x).float()
        losses = loss(logits)
        gradient = input_gradient(losses, x)
    return logits.detach(), losses.detach(), gradient


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """bool [N]: the class with the highest logit is not y, or a logit is not a number."""
    # argmax takes a NaN for the highest, so the value it found is NaN exactly where a logit is.
    highest, prediction = logits.max(dim=1)
    return (prediction != y) | highest.isnan()


def project(x: Tensor, origin: Tensor, eps: Tensor | float, norm: str) -> Tensor:
    """``x`` brought into the ball around ``origin`` and into [0, 1], exactly in the stored type."""
    return _STEP[norm](x, origin, origin, eps, 0.0)


def step(
    x: Tensor, gradient: Tensor, origin: Tensor, eps: Tensor | float, step_size: Tensor | float, norm: str
) -> Tensor:
    """One step up the gradient (its sign, or its l2 direction), back into the ball and [0, 1]."""
    return _STEP[norm](x, gradient, origin, eps, step_size)


def step_(
    x: Tensor, gradient: Tensor, origin: Tensor, eps: Tensor | float, step_size: Tensor | float, norm: str
) -> Tensor:
    """:func:`step` in place."""
    return _STEP_IN_PLACE[norm](x, gradient, origin, eps, step_size)


def per_image(value: Tensor | float, like: Tensor) -> Tensor:
    """A radius or step size as float32 [N] on the device of the images ``like``, made without waiting for the device."""
    if isinstance(value, Tensor):
        return value
    return torch.full((len(like),), value, dtype=torch.float32, device=like.device)


def columns(values: Tensor, like: Tensor) -> Tensor:
    """[N] as [N, 1, ..., 1], to go with images ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def select(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Images of ``a`` where the bool [N] says so, else of ``b``, in the layout of ``b``."""
    return torch.where(columns(where, a), a, b)


def take(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor[rows]`` for int64 rows, channels_last if the tensor is (index_select alone gives a contiguous one)."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows)


def dense(x: Tensor) -> Tensor:
    """Images [N, C, H, W] as channels_last, others as contiguous tensors; a copy only where that is needed."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def float32_below(value: float) -> float:
    """The largest float32 that is at most ``value`` >= 0."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(0)))


class _Counted:
    """A model that counts the images which it sees and the gradients taken through it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.queries = self.gradients = 0

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        self.queries += len(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor made under inference_mode cannot take part in a backward pass; its copy can."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check_inputs(model: Model, x: Tensor, y: Tensor, index: Tensor | None) -> None:
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise UsageError(
            "the model is in training mode, where batch norm mixes the images of a batch; call model.eval() before the attack"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dim() < 2:
        raise UsageError(f"x must be images, float32, bfloat16 or float16 [N, ...], found {x.dtype} {list(x.shape)}")
    for name, tensor in (("y", y), ("index", index)):
        if tensor is None:
            continue
        if tensor.dtype != torch.int64 or tensor.shape != x.shape[:1] or tensor.device != x.device:
            raise UsageError(
                f"{name} must be int64 [{len(x)}] on {x.device} like x, "
                f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if x.numel():
        lo, hi = (value.item() for value in x.aminmax())
        if not (lo >= 0 and hi <= 1):  # also where they are NaN
            raise UsageError(f"x must lie in [0, 1], found [{lo:g}, {hi:g}]; put normalisation into the model")


def _check_logits(logits: Tensor, y: Tensor) -> None:
    if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2 or not logits.is_floating_point():
        raise UsageError(
            f"the model must give logits, float [{len(y)}, classes] of 2 or more classes, "
            f"found {logits.dtype} {list(logits.shape)}"
        )
    lo, hi = (value.item() for value in y.aminmax())
    if lo < 0 or hi >= logits.shape[1]:
        raise UsageError(f"y must lie in [0, {logits.shape[1] - 1}], the classes of the model, found [{lo}, {hi}]")
