"""Noise schedules and grids against diffusers and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from synthfast.diffusion import schedules
from synthfast.errors import SynthfastError, UsageError

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_betas_equal_diffusers(schedule, timesteps):
    theirs = diffusers.DDPMScheduler(num_train_timesteps=timesteps, beta_schedule=schedule)
    ours = schedules.betas(schedule, timesteps)
    np.testing.assert_allclose(ours, theirs.betas.double().numpy(), rtol=2e-4, atol=1e-7)
    alpha_bar = 1 / (1 + schedules.ratios(ours) ** 2)
    np.testing.assert_allclose(alpha_bar, np.cumprod(1 - ours), rtol=1e-12)
    assert (np.diff(schedules.ratios(ours)) > 0).all()


def test_cosine_alpha_bar_is_the_squared_cosine():
    alpha_bar = np.cumprod(1 - schedules.betas("squaredcos_cap_v2", 1000))
    for t in (0, 499, 900):
        angle = ((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2
        start = 0.008 / 1.008 * math.pi / 2
        assert alpha_bar[t] == pytest.approx((math.cos(angle) / math.cos(start)) ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("convention", "scheduler"),
    [
        ("ancestral", diffusers.DDPMScheduler),
        ("ancestral", diffusers.DDIMScheduler),
        ("sigma", diffusers.EulerDiscreteScheduler),
        ("multistep", diffusers.DPMSolverMultistepScheduler),
    ],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_diffusers(convention, scheduler, spacing, offset):
    for timesteps in (1000, 100, 77):
        theirs = scheduler(num_train_timesteps=timesteps, timestep_spacing=spacing, steps_offset=offset)
        for steps in (2, 3, 7, 10, 24, 30, 50):
            theirs.set_timesteps(steps)
            ours = schedules.timestep_grid(spacing, steps, timesteps, offset, convention)
            torch.testing.assert_close(torch.from_numpy(ours), theirs.timesteps.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("convention", schedules.CONVENTIONS)
def test_one_step_starts_at_the_highest_level(spacing, convention):
    assert schedules.timestep_grid(spacing, 1, 1000, 1, convention).tolist() == [999]


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_karras_grid(steps):
    grid = schedules.karras_grid(steps, 0.002, 80.0)
    assert len(grid) == steps and grid[0] == pytest.approx(80)
    if steps > 1:
        assert grid[-1] == pytest.approx(0.002)
        np.testing.assert_allclose(np.diff(grid ** (1 / 7)), (0.002 ** (1 / 7) - 80 ** (1 / 7)) / (steps - 1))


def test_errors():
    with pytest.raises(SynthfastError, match="noise schedule 'sigmoid': expected one of linear"):
        schedules.betas("sigmoid", 10)
    with pytest.raises(SynthfastError, match=r"found 1\.03333 at position 6"):
        schedules.betas("linear", 10, 0.1, 1.5)
    with pytest.raises(SynthfastError, match=r"found -0\.1 at position 0"):
        schedules.betas("scaled_linear", 10, -0.1, 0.5)
    with pytest.raises(SynthfastError, match=r"found shape \[0\]"):
        schedules.check_betas([])
    with pytest.raises(UsageError, match="--steps 11: expected fewer steps"):
        schedules.timestep_grid("linspace", 11, 10, convention="sigma")
    with pytest.raises(UsageError, match="--spacing karras"):
        schedules.timestep_grid("karras", 5, 10)
