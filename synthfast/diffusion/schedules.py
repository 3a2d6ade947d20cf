"""Noise schedules of discrete diffusion models, and grids of noise levels for solvers. Everything is float64.

A noise level is named by the ratio ``s = sigma / alpha`` of the state ``x = alpha * x0 + sigma * n``: EDM's sigma.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from synthfast.errors import SynthfastError, UsageError

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace", "karras")
CONVENTIONS = ("ancestral", "sigma", "multistep")


def betas(schedule: str, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NDArray[np.float64]:
    """The forward variances beta_t of a DDPM, float64 [timesteps], each in (0, 1).

    - ``linear``: from ``beta_start`` to ``beta_end`` (Ho et al. 2020).
    - ``scaled_linear``: linear in sqrt(beta) (latent diffusion, Rombach et al. 2022).
    - ``squaredcos_cap_v2``: abar(u) = cos^2(pi / 2 * (u + 0.008) / 1.008),
      beta_t = min(1 - abar((t + 1) / T) / abar(t / T), 0.999) (Nichol & Dhariwal 2021), whatever the ends.

    Raises SynthfastError for another name or for variances outside (0, 1).
    """
    if schedule == "linear":
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
            result = np.linspace(beta_start, beta_end, timesteps)
    elif schedule == "scaled_linear":
        check_betas([beta_start, beta_end])
        result = np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2
    elif schedule == "squaredcos_cap_v2":
        alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        result = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise SynthfastError(
            f"noise schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}; write it as trained_betas"
        )
    return check_betas(result)


def check_betas(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """``values`` as float64 [T], or SynthfastError unless they are T >= 1 numbers strictly between 0 and 1."""
    result = np.asarray(values, dtype=np.float64)
    if result.ndim != 1 or not len(result):
        raise SynthfastError(f"noise schedule: expected a list of variances, found shape {list(result.shape)}")
    wrong = ~((result > 0) & (result < 1))
    if wrong.any():
        t = int(wrong.argmax())
        raise SynthfastError(f"noise schedule: expected betas between 0 and 1, found {result[t]:g} at position {t}")
    return result


def ratios(variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """s_t = sqrt((1 - abar_t) / abar_t), float64 [T], increasing; abar_t is the product of 1 - beta up to t."""
    log_alpha_bar = np.cumsum(np.log1p(-variances))
    return np.sqrt(np.expm1(-log_alpha_bar))


def timestep_grid(
    spacing: str, steps: int, timesteps: int, offset: int = 0, convention: str = "ancestral"
) -> NDArray[np.float64]:
    """``steps`` descending timesteps in [0, timesteps - 1], float64; from the last a solver goes to the clean image.

    The spacings are those of Lin et al. 2023 ("Common diffusion noise schedules and sample steps are flawed", Table 2);
    ``leading`` adds ``offset``. Schedulers in use disagree on details, so ``convention`` picks diffusers' rule for

    - ``ancestral``: DDPM and DDIM (whole timesteps, the last one t = 0 for leading and linspace),
    - ``sigma``: Euler and Heun (linspace gives fractional timesteps),
    - ``multistep``: DPM-Solver++ (leading and linspace divide by steps + 1 and leave the last point out).

    A single step always starts at the highest timestep, where diffusers' leading and linspace would start at 0.
    Raises UsageError where the timesteps would repeat or leave the model's range.
    """
    divisions = steps + 1 if convention == "multistep" else steps
    if steps == 1:
        grid = np.array([timesteps - 1.0])
    elif spacing == "leading":
        grid = (np.arange(divisions) * (timesteps // divisions))[::-1][:steps] + float(offset)
    elif spacing == "trailing":
        grid = np.round(np.arange(timesteps, 0, -timesteps / steps))[:steps] - 1
    elif spacing == "linspace":
        grid = np.linspace(0, timesteps - 1, divisions)[::-1][:steps]
        grid = grid if convention == "sigma" else np.round(grid)
    else:
        raise UsageError(f"--spacing {spacing}: expected one of {', '.join(SPACINGS)}")
    if steps > timesteps or (np.diff(grid) >= 0).any() or grid[0] > timesteps - 1:
        raise UsageError(
            f"--steps {steps}: expected fewer steps with --spacing {spacing}, found {timesteps} timesteps in the model"
        )
    return np.ascontiguousarray(grid)


def karras_grid(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> NDArray[np.float64]:
    """``steps`` descending values of s from ``sigma_max`` to ``sigma_min``, evenly spaced in s^(1 / rho), float64.

    Karras et al. 2022, equation 5, without the final 0. A single step is [sigma_max].
    """
    ramp = np.arange(steps) / max(steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho
