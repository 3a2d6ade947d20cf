"""Training losses.

Noise, noise level and dropped labels of a sample depend on (seed, position in the run) alone, so a step computes the
same however its batch is split over devices.

Both losses are a weighted ||m - target||^2, averaged over the pixels of an image: with D = kx x + km m (see
``preconditioning``), ||D - x0||^2 is km^2 times that, whatever the network predicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from synthfast import ops
from synthfast.diffusion.guidance import Model, drop_labels
from synthfast.diffusion.preconditioning import EDM, VP, Parameterization
from synthfast.errors import UsageError


@dataclass(frozen=True)
class LabelDrop:
    """Label dropout for classifier-free guidance (Ho & Salimans 2022, Algorithm 1).

    With ``probability``, in [0, 1), a sample's label becomes ``null_label``.
    """

    probability: float
    null_label: int

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise UsageError(f"--label-dropout {self.probability}: expected a number from 0 to below 1")


@dataclass(frozen=True)
class EDMLoss:
    """The loss of Karras et al. 2022 (Table 1, "Ours"): E[lambda(s) ||D(x0 + s n; s) - x0||^2].

    log s ~ N(p_mean, p_std^2), and lambda(s) = (s^2 + sigma_data^2) / (s sigma_data)^2 = 1 / km^2.
    """

    parameterization: EDM = field(default_factory=EDM)
    p_mean: float = -1.2
    p_std: float = 1.2
    label_drop: LabelDrop | None = None

    def __post_init__(self) -> None:
        if not self.p_std > 0:
            raise UsageError(f"--p-std {self.p_std}: expected a positive number")

    def __call__(self, model: Model, images: Tensor, labels: Tensor | None, index: Tensor, seed: int) -> Tensor:
        """Losses float32 [N], with gradients, one a sample.

        Args:
            model: see :data:`synthfast.diffusion.guidance.Model`; t is float32 [N].
            images: float32 [N, C, H, W] in [-1, 1].
            labels: int64 [N], or None for an unconditional model.
            index: int64 [N] on the device of ``images``: the position of each sample in the training run, never used
                twice with one seed.
            seed: key of the run.
        """
        normal = torch.empty(len(images), 1, device=images.device)
        ops.philox_normal_(normal, index, seed, ops.Stream.LEVEL)
        s = torch.exp(self.p_mean + self.p_std * normal[:, 0].double())
        t = s.log() / 4
        return _squared_errors(model, self.parameterization, images, labels, s, t, index, seed, self.label_drop)


@dataclass(frozen=True)
class VPLoss:
    """The simple loss of Ho et al. 2020 (equation 14) for the network's own prediction (eps, v or x0), t uniform.

    ``min_snr_gamma`` weights ||D - x0||^2 by min(SNR, gamma), SNR = 1 / s^2 (Hang et al. 2023): the squared error of
    eps by min(SNR, gamma) / SNR, of v by min(SNR, gamma) / (SNR + 1), of x0 by min(SNR, gamma). Their gamma is 5.
    """

    parameterization: VP = field(default_factory=VP)
    min_snr_gamma: float | None = None
    label_drop: LabelDrop | None = None

    def __post_init__(self) -> None:
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise UsageError(f"--min-snr-gamma {self.min_snr_gamma}: expected a positive number")

    def __call__(self, model: Model, images: Tensor, labels: Tensor | None, index: Tensor, seed: int) -> Tensor:
        """Losses float32 [N], with gradients, one a sample; arguments as in :meth:`EDMLoss.__call__`."""
        uniform = torch.empty(len(images), 1, device=images.device)
        ops.philox_uniform_(uniform, index, seed, ops.Stream.LEVEL)
        t = (uniform[:, 0].double() * self.parameterization.timesteps).long()
        s = self.parameterization.ratios_on(images.device)[t]
        errors = _squared_errors(model, self.parameterization, images, labels, s, t, index, seed, self.label_drop)
        if self.min_snr_gamma is None:
            return errors
        _, km = self.parameterization.denoiser(s)
        return (errors * (km * km * (s**-2).clamp(max=self.min_snr_gamma))).float()


def _squared_errors(
    model: Model,
    parameterization: Parameterization,
    images: Tensor,
    labels: Tensor | None,
    s: Tensor,
    conditioning: Tensor,
    index: Tensor,
    seed: int,
    label_drop: LabelDrop | None,
) -> Tensor:
    """||m - target||^2 / pixels, float32 [N], at the levels ``s`` float64 [N]."""
    if label_drop is not None and labels is not None:
        labels = drop_labels(labels, label_drop.null_label, label_drop.probability, index, seed)
    images = images.contiguous(memory_format=torch.channels_last)
    noise = ops.philox_normal_(torch.empty_like(images), index, seed, ops.Stream.TRAINING_NOISE)

    def per_image(values: Tensor) -> Tensor:
        return values.float().view(-1, 1, 1, 1)

    alpha = parameterization.scale(s)
    ty, tn = parameterization.target(s)
    output = model(per_image(alpha) * images + per_image(alpha * s) * noise, conditioning.float(), labels)
    target = per_image(ty) * images + per_image(tn) * noise
    return (output.float() - target).square().flatten(1).mean(1)
