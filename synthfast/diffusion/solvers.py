"""Solvers as tables: a sampling algorithm is a list of stages, each one network evaluation and one row of coefficients.

The state is ``x = alpha * x0 + sigma * n`` with the alpha that the network wants (see ``preconditioning``). Divided by
alpha it is ``y = x0 + s * n``, and in y the algorithms do not depend on the model. A stage evaluates the network at a
level s, forms the denoised image D, and moves the state to the level s' of the next stage:

    y' = by y + bd D + bp P + bz z        P: the D of the stage before, z: standard normal noise

Each solver below is one function that lists (by, bd, bp, bz); :func:`make_table` turns them into rows for
``synthfast.ops.solver_step_``, in float64. The last stage ends at s' = 0 and draws no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthfast.diffusion import schedules
from synthfast.diffusion.preconditioning import EDM, VARIANCES, Level, Parameterization
from synthfast.errors import UsageError

_MOST_STEPS = 100_000  # each has its row in a table: a hostile checkpoint must not choose its size


@dataclass(frozen=True)
class SolverConfig:
    """How to sample. Bad values raise UsageError, one line that names the command-line option.

    Args:
        name: a key of :data:`SOLVERS`.
        steps: solver steps, at least 1; heun evaluates the network 2 * steps - 1 times, every other solver ``steps``
            times.
        eta: ddim only, in [0, 1]: 0 is deterministic, 1 has the noise of ddpm (Song et al. 2021, equation 16).
        churn, s_tmin, s_tmax, s_noise: euler and heun only: S_churn, S_tmin, S_tmax and S_noise of Karras et al. 2022.
        spacing: ``karras`` or, for discrete models, ``leading``, ``trailing`` or ``linspace``; None for the model's
            own.
        rho, sigma_min, sigma_max: the karras spacing; None for the model's own range.
        clip: D is clipped to [-clip, clip]; None for the model's own (EDM: no clipping; DDPM: 1 unless its
            configuration says otherwise), infinity for no clipping.
        variance: ddpm only, ``fixed_small`` or ``fixed_large`` (Ho et al. 2020, section 3.2); None for the model's own.
    """

    name: str = "heun"
    steps: int = 18
    eta: float = 0.0
    churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    spacing: str | None = None
    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    clip: float | None = None
    variance: str | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, option: str, value: object, expected: str) -> None:
            if not condition:
                raise UsageError(f"{option} {value}: expected {expected}")

        require(self.name in SOLVERS, "--solver", self.name, f"one of {', '.join(SOLVERS)}")
        expected = f"a whole number from 1 to {_MOST_STEPS}"
        require(type(self.steps) is int and 1 <= self.steps <= _MOST_STEPS, "--steps", self.steps, expected)
        require(0 <= self.eta <= 1, "--eta", self.eta, "a number from 0 to 1")
        require(0 <= self.churn < math.inf, "--churn", self.churn, "a number of at least 0")
        require(self.s_tmin >= 0, "--s-tmin", self.s_tmin, "a number of at least 0")
        require(self.s_tmax >= self.s_tmin, "--s-tmax", self.s_tmax, f"a number of at least --s-tmin {self.s_tmin}")
        require(0 <= self.s_noise < math.inf, "--s-noise", self.s_noise, "a number of at least 0")
        spacings = schedules.SPACINGS
        require(
            self.spacing is None or self.spacing in spacings, "--spacing", self.spacing, f"one of {', '.join(spacings)}"
        )
        require(0 < self.rho < math.inf, "--rho", self.rho, "a positive number")
        for option, value in (("--sigma-min", self.sigma_min), ("--sigma-max", self.sigma_max)):
            require(value is None or 0 < value < math.inf, option, value, "a positive number")
        require(self.clip is None or self.clip > 0, "--clip", self.clip, "a positive number, or inf for no clipping")
        require(
            self.variance is None or self.variance in VARIANCES,
            "--variance",
            self.variance,
            f"one of {', '.join(VARIANCES)}",
        )
        for option, value, neutral, names in (
            ("--eta", self.eta, 0, ("ddim",)),
            ("--churn", self.churn, 0, ("euler", "heun")),
            ("--variance", self.variance, None, ("ddpm",)),
        ):
            if value != neutral:
                require(self.name in names, option, value, f"--solver {' or '.join(names)} with it, found {self.name}")


@dataclass(frozen=True)
class Stage:
    """One network evaluation at ``level`` and the move to the next stage's level; see the module's docstring.

    ``noise`` is the standard deviation in y of the noise that is added (bz).
    """

    level: Level
    state: float
    denoised: float
    previous: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class SolverTable:
    """A sampling run, ready for :func:`synthfast.diffusion.sample`.

    Attributes:
        config: what it was made from.
        conditioning: float64 [stages], what the network is told.
        coefficients: float64 [stages, 9], rows (kx, km, ax, ad, ap, az, w, lo, hi) for ``ops.solver_step_``, w = 1.
        scales: float64 [stages + 1], alpha of the state before each stage and of the result; ``scales[-1]`` is 1.
        levels: float64 [stages + 1], s of the state before each stage and of the result; ``levels[-1]`` is 0.
        initial_std: the run starts from initial_std * n + initial_churn * n' with independent normal n and n'.
        initial_churn: not 0 only where the first step has churn.
    """

    config: SolverConfig
    conditioning: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    scales: NDArray[np.float64]
    levels: NDArray[np.float64]
    initial_std: float
    initial_churn: float = 0.0

    @property
    def evaluations(self) -> int:
        """How often the network runs (with guidance each time on a doubled batch)."""
        return len(self.coefficients)

    @property
    def uses_history(self) -> bool:
        """Whether a stage reads the denoised image of the stage before."""
        return bool(self.coefficients[:, 4].any())

    def rows(self, device: torch.device | str, guidance: float = 1.0) -> Tensor:
        """The coefficients as float32 [stages, 9] on ``device``, with the guidance weight in its column."""
        table = self.coefficients.copy()
        table[:, 6] = guidance
        return torch.from_numpy(table).to(device, torch.float32)


def _ddpm(levels: Sequence[Level], config: SolverConfig, parameterization: Parameterization) -> list[Stage]:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2 and equation 7) between any two levels s > s'.

    y' = (s'/s)^2 y + (1 - (s'/s)^2) D + std z. ``fixed_small`` is the posterior variance s'^2 (1 - (s'/s)^2),
    ``fixed_large`` the forward variance beta = (s^2 - s'^2) / (1 + s^2) of the variance preserving state, divided by
    alpha'^2 = 1 / (1 + s'^2).
    """
    variance = config.variance or parameterization.variance
    stages = []
    for level, next_s in _steps(levels):
        keep = (next_s / level.s) ** 2
        if variance == "fixed_small" or next_s == 0:
            std = next_s * math.sqrt(1 - keep)
        else:
            std = math.sqrt((level.s**2 - next_s**2) * (1 + next_s**2) / (1 + level.s**2))
        stages.append(Stage(level, keep, 1 - keep, noise=std))
    return stages


def _ddim(levels: Sequence[Level], config: SolverConfig, parameterization: Parameterization) -> list[Stage]:
    """Song et al. 2021, equations 12 and 16: y' = D + sqrt(s'^2 - std^2) n + std z with n = (y - D) / s.

    std = eta s' sqrt(1 - (s'/s)^2). n is that of the clipped D (diffusers: ``use_clipped_model_output=True``).
    """
    stages = []
    for level, next_s in _steps(levels):
        std = config.eta * next_s * math.sqrt(1 - (next_s / level.s) ** 2)
        keep = math.sqrt(next_s**2 - std**2) / level.s
        stages.append(Stage(level, keep, 1 - keep, noise=std))
    return stages


def _euler(levels: Sequence[Level], config: SolverConfig, parameterization: Parameterization) -> list[Stage]:
    """Euler steps of dy/ds = (y - D) / s (Karras et al. 2022, equation 3): y' = D + (s'/s) (y - D), with churn."""
    raised = [_churn(level, config, parameterization) for level in levels]
    stages = []
    for i, (_, next_s) in enumerate(_steps(levels)):
        keep = next_s / raised[i].s
        stages.append(Stage(raised[i], keep, 1 - keep, noise=_churn_std(levels, raised, i + 1, config)))
    return stages


def _heun(levels: Sequence[Level], config: SolverConfig, parameterization: Parameterization) -> list[Stage]:
    """Heun steps with churn (Karras et al. 2022, Algorithm 2), two stages each but one for the last step.

    With d1 and d2 the slopes at the raised level s and at s', the first stage moves by (s' - s) d1, the second replaces
    that by (s' - s) (d1 + d2) / 2. The first moved along a line, so d1 = (y1 - D1) / s' as well, which leaves
    y2 = y1 + (s' - s) (D1 - D2) / (2 s').
    """
    raised = [_churn(level, config, parameterization) for level in levels]
    stages = []
    for i, (_, next_s) in enumerate(_steps(levels)):
        keep = next_s / raised[i].s
        stages.append(Stage(raised[i], keep, 1 - keep))
        if next_s > 0:
            half = (next_s - raised[i].s) / (2 * next_s)
            stages.append(Stage(levels[i + 1], 1.0, -half, half, _churn_std(levels, raised, i + 1, config)))
    return stages


def _dpmpp_2m(levels: Sequence[Level], config: SolverConfig, parameterization: Parameterization) -> list[Stage]:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, Algorithm 2): y' = (s'/s) y + (1 - s'/s) (D + r (D - P)).

    r = h / (2 h_0), with h = log(s / s') and h_0 that of the step before; r = 0 in the first and in the last step.
    """
    stages = []
    for i, (level, next_s) in enumerate(_steps(levels)):
        keep, r = next_s / level.s, _extrapolation(levels, i)
        stages.append(Stage(level, keep, (1 - keep) * (1 + r), -(1 - keep) * r))
    return stages


def _dpmpp_2m_sde(levels: Sequence[Level], config: SolverConfig, parameterization: Parameterization) -> list[Stage]:
    """SDE-DPM-Solver++(2M), midpoint (Lu et al. 2022, section 5).

    The move of :func:`_dpmpp_2m` with (s'/s)^2 in place of s'/s, and the noise s' sqrt(1 - (s'/s)^2) z.
    """
    stages = []
    for i, (level, next_s) in enumerate(_steps(levels)):
        keep, r = (next_s / level.s) ** 2, _extrapolation(levels, i)
        stages.append(Stage(level, keep, (1 - keep) * (1 + r), -(1 - keep) * r, next_s * math.sqrt(1 - keep)))
    return stages


Solver = Callable[[Sequence[Level], SolverConfig, Parameterization], list[Stage]]

SOLVERS: dict[str, Solver] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "euler": _euler,
    "heun": _heun,
    "dpmpp-2m": _dpmpp_2m,
    "dpmpp-2m-sde": _dpmpp_2m_sde,
}
_CONVENTION = {"euler": "sigma", "heun": "sigma", "dpmpp-2m": "multistep", "dpmpp-2m-sde": "multistep"}


def _steps(levels: Sequence[Level]) -> list[tuple[Level, float]]:
    """Pairs (level, s of the next level), the last next level being 0."""
    return list(zip(levels, [*(level.s for level in levels[1:]), 0.0], strict=True))


def _churn(level: Level, config: SolverConfig, parameterization: Parameterization) -> Level:
    """The level raised to s (1 + gamma), gamma = min(S_churn / N, sqrt(2) - 1) for s in [S_tmin, S_tmax], else 0."""
    if config.churn == 0 or not config.s_tmin <= level.s <= config.s_tmax:
        return level
    return parameterization.level(level.s * (1 + min(config.churn / config.steps, math.sqrt(2) - 1)))


def _churn_std(levels: Sequence[Level], raised: Sequence[Level], i: int, config: SolverConfig) -> float:
    """Standard deviation in y of the noise that raises level i; 0 for the end of the run."""
    if i == len(levels):
        return 0.0
    return config.s_noise * math.sqrt(raised[i].s ** 2 - levels[i].s ** 2)


def _extrapolation(levels: Sequence[Level], i: int) -> float:
    if i == 0 or i == len(levels) - 1:
        return 0.0
    return math.log(levels[i].s / levels[i + 1].s) / (2 * math.log(levels[i - 1].s / levels[i].s))


def noise_levels(parameterization: Parameterization, config: SolverConfig) -> list[Level]:
    """The ``config.steps`` levels of a run in descending order, without the final 0.

    Raises UsageError for what does not fit the model: a timestep spacing for an EDM model, more steps than timesteps, a
    level outside the model's range.
    """
    spacing = config.spacing or parameterization.spacing
    if spacing != "karras":
        if isinstance(parameterization, EDM):
            raise UsageError(f"--spacing {spacing}: expected karras, because an EDM model has no timesteps")
        for option, value in (("--sigma-min", config.sigma_min), ("--sigma-max", config.sigma_max)):
            if value is not None:
                raise UsageError(f"{option} {value}: expected --spacing karras with it, found {spacing}")
        convention = _CONVENTION.get(config.name, "ancestral")
        grid = schedules.timestep_grid(
            spacing, config.steps, parameterization.timesteps, parameterization.steps_offset, convention
        )
        return [parameterization.level_at(t) for t in grid]
    low = config.sigma_min or parameterization.sigma_min
    high = config.sigma_max or parameterization.sigma_max
    if not low < high:
        raise UsageError(f"--sigma-min {low:g}: expected less than --sigma-max {high:g}")
    levels = [parameterization.level(s) for s in schedules.karras_grid(config.steps, low, high, config.rho).tolist()]
    if isinstance(parameterization, EDM):
        return levels
    if high > parameterization.sigma_max * (1 + 1e-9) or low < parameterization.sigma_min * (1 - 1e-9):
        raise UsageError(
            f"--sigma-min {low:g} --sigma-max {high:g}: expected levels within those of the model, "
            f"{parameterization.sigma_min:g} to {parameterization.sigma_max:g}"
        )
    # diffusers' DPMSolverMultistepScheduler tells the network the nearest whole timestep
    rounded = _CONVENTION.get(config.name) == "multistep"
    return [Level(level.s, float(np.round(level.conditioning))) for level in levels] if rounded else levels


def make_table(
    parameterization: Parameterization, config: SolverConfig, levels: Sequence[Level] | None = None
) -> SolverTable:
    """The table of ``config`` for a model.

    ``levels``, if given, replace the grid and the number of steps: strictly descending positive levels from
    ``parameterization.level(s)`` or ``level_at(t)``; the run always ends at s = 0. Raises UsageError for what does not
    fit.
    """
    if levels is None:
        levels = noise_levels(parameterization, config)
    else:
        ratios = [level.s for level in levels]
        if not ratios or not all(a > b for a, b in pairwise([*ratios, 0.0])):
            raise UsageError(f"noise levels: expected at least one, positive and strictly descending, found {ratios}")
        config = replace(config, steps=len(levels))
    stages = SOLVERS[config.name](levels, config, parameterization)
    clip = config.clip if config.clip is not None else parameterization.clip
    limit = math.inf if clip is None else clip
    scales = [parameterization.scale(stage.level.s) for stage in stages] + [1.0]
    rows = []
    for stage, (scale, next_scale) in zip(stages, pairwise(scales), strict=True):
        kx, km = parameterization.denoiser(stage.level.s)
        moved = (stage.state / scale, stage.denoised, stage.previous, stage.noise)
        rows.append((kx, km, *(next_scale * b for b in moved), 1.0, -limit, limit))
    first, start = levels[0], stages[0].level
    churn = config.s_noise * math.sqrt(start.s**2 - first.s**2)
    return SolverTable(
        config=config,
        conditioning=np.array([stage.level.conditioning for stage in stages]),
        coefficients=np.array(rows),
        scales=np.array(scales),
        levels=np.array([stage.level.s for stage in stages] + [0.0]),
        initial_std=scales[0] * parameterization.initial_std(first.s) / parameterization.scale(first.s),
        initial_churn=scales[0] * churn,
    )
