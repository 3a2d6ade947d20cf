"""Model parameterizations: what a network sees at each noise level, and how its output becomes a denoised image.

A noise level is the ratio ``s = sigma / alpha`` of the state ``x = alpha * x0 + sigma * n``, where x0 is the clean
image in [-1, 1] and n standard normal. A parameterization fixes for each s

- ``scale(s)``: alpha, hence sigma = alpha * s, such that the state itself is the network's input;
- ``level(s).conditioning``: the number passed to the network beside the state;
- ``denoiser(s)``: (kx, km) of the denoised image D = kx * x + km * m, where m is the network's output;
- ``target(s)``: (ty, tn) of the training target ty * x0 + tn * n, the value of m for which D = x0.

``scale``, ``denoiser`` and ``target`` take a float or a tensor of any shape. The last state of every solver has s = 0
and alpha = 1: it is the image itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthfast.diffusion import schedules
from synthfast.errors import SynthfastError, UsageError

Scalar = TypeVar("Scalar", float, Tensor)

PREDICTIONS = ("eps", "v", "x0")
VARIANCES = ("fixed_small", "fixed_large")
_MOST_TIMESTEPS = 1_000_000  # tables are made with a row for each: a hostile file must not choose their size


class Level(NamedTuple):
    """A noise level: the ratio s = sigma / alpha, and the number that tells the network about it."""

    s: float
    conditioning: float


@dataclass(frozen=True)
class EDM:
    """The preconditioning of Karras et al. 2022 (Table 1, "Ours"): D(y; s) = c_skip y + c_out F(c_in y; log(s) / 4).

    The state is kept scaled by c_in = (s^2 + sigma_data^2)^(-1/2), so kx = c_skip / c_in and km = c_out.
    ``sigma_min`` and ``sigma_max`` bound the levels that sampling uses by default. D is not clipped by default.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    kind: ClassVar[str] = "edm"
    clip: ClassVar[float | None] = None
    variance: ClassVar[str] = "fixed_small"
    spacing: ClassVar[str] = "karras"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise SynthfastError(f"EDM sigma_data: expected a positive number, found {self.sigma_data}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise SynthfastError(
                f"EDM noise levels: expected 0 < sigma_min < sigma_max, found {self.sigma_min} and {self.sigma_max}"
            )

    def scale(self, s: Scalar) -> Scalar:
        return (s * s + self.sigma_data**2) ** -0.5

    def denoiser(self, s: Scalar) -> tuple[Scalar, Scalar]:
        scale = self.scale(s)
        return self.sigma_data**2 * scale, self.sigma_data * s * scale

    def target(self, s: Scalar) -> tuple[Scalar, Scalar]:
        scale = self.scale(s)
        return s * scale / self.sigma_data, -self.sigma_data * scale

    def level(self, s: float) -> Level:
        return Level(s, math.log(s) / 4)

    def initial_std(self, s: float) -> float:
        """Standard deviation of the state that sampling starts from: sigma (Karras et al. 2022, Algorithm 2)."""
        return self.scale(s) * s


@dataclass(frozen=True)
class VP:
    """A discrete variance preserving (DDPM) model: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), conditioning t.

    Args:
        timesteps: number T of timesteps that the model was trained with; t is in [0, T - 1].
        schedule, beta_start, beta_end: see :func:`synthfast.diffusion.schedules.betas`.
        betas: the T forward variances themselves, in place of a named schedule.
        prediction: what the network predicts: ``eps``, the noise (Ho et al. 2020); ``v`` = alpha n - sigma x0
            (Salimans & Ho 2022); or ``x0``.
        clip: sampling clips D to [-clip, clip]; None for no clipping.
        variance: ``fixed_small`` or ``fixed_large``, the default of the ddpm solver.
        spacing, steps_offset: the default timesteps, see :func:`synthfast.diffusion.schedules.timestep_grid`.
    """

    timesteps: int = 1000
    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] | None = None
    prediction: str = "eps"
    clip: float | None = 1.0
    variance: str = "fixed_small"
    spacing: str = "trailing"
    steps_offset: int = 0

    kind: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        for name, choices in (
            ("schedule", schedules.SCHEDULES),
            ("prediction", PREDICTIONS),
            ("variance", VARIANCES),
            ("spacing", schedules.SPACINGS),
        ):
            if getattr(self, name) not in choices:
                raise SynthfastError(f"VP {name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")
        if self.clip is not None and not self.clip > 0:
            raise SynthfastError(f"VP clip: expected a positive number or none, found {self.clip}")
        if not 1 <= self.timesteps <= _MOST_TIMESTEPS or self.steps_offset < 0:
            raise SynthfastError(
                f"VP timesteps: expected 1 to {_MOST_TIMESTEPS} and an offset of at least 0, found {self.timesteps} and "
                f"{self.steps_offset}"
            )
        if len(self.ratios) != self.timesteps:
            raise SynthfastError(
                f"VP betas: expected {self.timesteps} of them, one a timestep, found {len(self.ratios)}"
            )

    @cached_property
    def ratios(self) -> NDArray[np.float64]:
        """s_t for t = 0 ... T - 1, float64 [T], increasing."""
        if self.betas is not None:
            return schedules.ratios(schedules.check_betas(self.betas))
        return schedules.ratios(schedules.betas(self.schedule, self.timesteps, self.beta_start, self.beta_end))

    @cached_property
    def _ratio_tensors(self) -> dict[torch.device, Tensor]:
        return {}

    def ratios_on(self, device: torch.device) -> Tensor:
        """:attr:`ratios` as a tensor on ``device``, copied there once."""
        if device not in self._ratio_tensors:
            self._ratio_tensors[device] = torch.from_numpy(self.ratios).to(device)
        return self._ratio_tensors[device]

    @property
    def sigma_min(self) -> float:
        return float(self.ratios[0])

    @property
    def sigma_max(self) -> float:
        return float(self.ratios[-1])

    def scale(self, s: Scalar) -> Scalar:
        return (s * s + 1) ** -0.5

    def denoiser(self, s: Scalar) -> tuple[Scalar, Scalar]:
        alpha = self.scale(s)
        if self.prediction == "eps":
            return 1 / alpha, -s
        if self.prediction == "v":
            return alpha, -s * alpha
        return s * 0, s * 0 + 1

    def target(self, s: Scalar) -> tuple[Scalar, Scalar]:
        alpha = self.scale(s)
        if self.prediction == "eps":
            return s * 0, s * 0 + 1
        if self.prediction == "v":
            return -s * alpha, alpha
        return s * 0 + 1, s * 0

    def level(self, s: float) -> Level:
        """The level with ratio ``s``; its timestep, usually a fraction, interpolates log s_t, within [0, T - 1]."""
        return Level(s, float(np.interp(math.log(s), np.log(self.ratios), np.arange(self.timesteps))))

    def level_at(self, t: float) -> Level:
        """The level of timestep ``t`` in [0, T - 1], or UsageError; s_t is interpolated linearly, as in diffusers."""
        if not 0 <= t <= self.timesteps - 1:
            raise UsageError(f"timestep {t:g}: expected 0 to {self.timesteps - 1}, the timesteps of this model")
        return Level(float(np.interp(t, np.arange(self.timesteps), self.ratios)), float(t))

    def initial_std(self, s: float) -> float:
        """Standard deviation of the state that sampling starts from: 1, as at t = T (Ho et al. 2020, Algorithm 2)."""
        return 1.0


Parameterization = EDM | VP
_KINDS: dict[str, type[EDM] | type[VP]] = {"edm": EDM, "vp": VP}


def to_dict(parameterization: Parameterization) -> dict[str, object]:
    """A plain dict for JSON, with ``kind``; :func:`from_dict` turns it back into an equal object."""
    fields = dataclasses.asdict(parameterization)
    if fields.get("betas") is not None:
        fields["betas"] = list(fields["betas"])
    return {"kind": parameterization.kind, **fields}


def from_dict(values: Mapping[str, object]) -> Parameterization:
    """The parameterization that :func:`to_dict` wrote. Raises SynthfastError for an unknown kind or key."""
    fields = dict(values)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise SynthfastError(f"parameterization kind: expected one of {', '.join(_KINDS)}, found {kind!r}")
    known = [field.name for field in dataclasses.fields(_KINDS[kind])]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise SynthfastError(
            f"{kind} parameterization: expected keys among {', '.join(known)}, found {', '.join(unknown)}"
        )
    if fields.get("betas") is not None:
        fields["betas"] = tuple(fields["betas"])
    try:
        return _KINDS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise SynthfastError(
            f"{kind} parameterization: a value has the wrong type ({error}); correct the checkpoint"
        ) from error


# Defaults that a saved scheduler_config.json may leave out, as diffusers' classes define them; the class names are also
# the list of schedulers whose models are discrete VP models.
_LEADING = {"timestep_spacing": "leading"}
_LINSPACE = {"timestep_spacing": "linspace"}
_STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_SCHEDULER_DEFAULTS: dict[str, dict[str, object]] = {
    "DDPMScheduler": {**_LEADING, "clip_sample": True},
    "DDIMScheduler": {**_LEADING, "clip_sample": True},
    "PNDMScheduler": _LEADING,
    "EulerDiscreteScheduler": _LINSPACE,
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "LMSDiscreteScheduler": _LINSPACE,
    "HeunDiscreteScheduler": {**_LINSPACE, **_STABLE_DIFFUSION_BETAS},
    "KDPM2DiscreteScheduler": {**_LINSPACE, **_STABLE_DIFFUSION_BETAS},
    "KDPM2AncestralDiscreteScheduler": {**_LINSPACE, **_STABLE_DIFFUSION_BETAS},
    "DEISMultistepScheduler": _LINSPACE,
    "DPMSolverMultistepScheduler": _LINSPACE,
    "DPMSolverSinglestepScheduler": _LINSPACE,
    "UniPCMultistepScheduler": _LINSPACE,
}
_PREDICTION_NAMES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SUPPORTED_ONLY: dict[str, tuple[object, ...]] = {
    "thresholding": (False, None),
    "rescale_betas_zero_snr": (False, None),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
    "prediction_type": tuple(_PREDICTION_NAMES),
    "beta_schedule": schedules.SCHEDULES,
    "timestep_type": ("discrete", None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
}


def from_scheduler_config(config: Mapping[str, object]) -> VP:
    """The parameterization of a diffusers model from its ``scheduler_config.json``.

    Read: beta_schedule, beta_start, beta_end, trained_betas, num_train_timesteps, prediction_type, clip_sample,
    clip_sample_range, variance_type, timestep_spacing, steps_offset, use_karras_sigmas; what is absent has the default
    of the scheduler class named by ``_class_name`` (DDPMScheduler if that is absent too). Keys that choose a solver
    (solver_order, set_alpha_to_one, final_sigmas_type and others) are not read: the solver is chosen when sampling, and
    every solver here ends on the clean image.
    Raises SynthfastError where the model or its sampling needs what is not supported.
    """
    class_name = str(config.get("_class_name", "DDPMScheduler"))
    if class_name not in _SCHEDULER_DEFAULTS:
        raise SynthfastError(
            f"scheduler_config.json: expected the scheduler of a discrete DDPM model, found {class_name}; pass a "
            f"model whose scheduler is one of {', '.join(_SCHEDULER_DEFAULTS)}"
        )
    values: dict[str, object] = {
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "variance_type": "fixed_small",
        "steps_offset": 0,
        **_SCHEDULER_DEFAULTS[class_name],
        **config,
    }
    trained = values.get("trained_betas")
    for key, supported in _SUPPORTED_ONLY.items():
        unused = key == "beta_schedule" and trained is not None
        if not unused and key in values and values[key] not in supported:
            choices = ", ".join(str(value) for value in supported if value is not None)
            raise SynthfastError(f"scheduler_config.json, {key}: expected {choices}, found {values[key]}")
    try:
        return VP(
            timesteps=int(values["num_train_timesteps"]),
            schedule="linear" if trained is not None else str(values["beta_schedule"]),
            beta_start=float(values["beta_start"]),
            beta_end=float(values["beta_end"]),
            betas=None if trained is None else tuple(float(beta) for beta in trained),
            prediction=_PREDICTION_NAMES[values["prediction_type"]],
            clip=float(values["clip_sample_range"]) if values["clip_sample"] else None,
            variance="fixed_large" if values["variance_type"] == "fixed_large" else "fixed_small",
            spacing="karras" if values.get("use_karras_sigmas") else str(values["timestep_spacing"]),
            steps_offset=int(values["steps_offset"]),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise SynthfastError(
            f"scheduler_config.json: a value has the wrong type ({error}); correct the file"
        ) from error
