"""Every solver follows the trajectory of diffusers' scheduler of the same name, given the same network and the same
noise.

Trajectories are compared after every network evaluation, in the variance preserving scaling (y / sqrt(1 + s^2)).
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from synthfast import ops
from synthfast.diffusion import EDM, SolverConfig, from_scheduler_config, make_table, sample

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 5)
SEED = 11
INDEX = torch.tensor([0, 7, 2**33])
TOLERANCE = 1e-4


def toy_epsilon(x, t, labels=None):
    certain = torch.sigmoid((torch.as_tensor(t, dtype=torch.float32) - 250) / 60)
    return certain * x + 0.3 * (1 - certain) * torch.sin(3 * x + t / 100)


def toy_velocity(x, t, labels=None):
    return 0.6 * torch.tanh(1.5 * x + torch.as_tensor(t, dtype=torch.float32) / 300)


def toy_image(x, t, labels=None):
    return torch.tanh(2 * x + torch.sin(torch.as_tensor(t, dtype=torch.float32) / 100))


TOYS = {"epsilon": toy_epsilon, "v_prediction": toy_velocity, "sample": toy_image}


def trajectory(model, table):
    """States after each stage, in the variance preserving scaling."""
    states = []

    def record(stage, x):
        scale = table.scales[stage + 1] * math.sqrt(1 + table.levels[stage + 1] ** 2)
        states.append(x.double() / scale)

    result = sample(model, table, INDEX, shape=SHAPE, seed=SEED, callback=record)
    assert torch.equal(result, states[-1].float())
    return states


def normal(step):
    """The noise of a step, laid out as the sampler lays it out."""
    out = torch.empty((len(INDEX), *SHAPE), memory_format=torch.channels_last)
    return ops.philox_normal_(out, INDEX, SEED, ops.Stream.NOISE, step)


def start(table):
    """The initial state in units of the clean image."""
    return normal(0) * (table.initial_std / table.scales[0])


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for stage, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b.double(), rtol=0, atol=TOLERANCE, msg=lambda m, k=stage: f"stage {k}: {m}")


def prepare(scheduler, config):
    """The table for the model that ``scheduler`` is configured for, and its timesteps set to the same number of
    steps."""
    parameterization = from_scheduler_config(json.loads(scheduler.to_json_string()))
    scheduler.set_timesteps(config.steps)
    table = make_table(parameterization, config)
    # the float32 products in diffusers move the fractional timesteps of a karras grid a little
    tolerance = 0.02 if parameterization.spacing == "karras" else 1e-4
    torch.testing.assert_close(
        torch.from_numpy(table.conditioning), scheduler.timesteps.double(), rtol=0, atol=tolerance
    )
    return table


@pytest.mark.parametrize("steps", [2, 7, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("prediction", "schedule", "variance", "clip"),
    [
        ("epsilon", "linear", "fixed_small", True),
        ("epsilon", "scaled_linear", "fixed_small", False),
        ("v_prediction", "squaredcos_cap_v2", "fixed_small_log", False),
        ("sample", "squaredcos_cap_v2", "fixed_small", True),
        ("v_prediction", "linear", "fixed_large", True),
    ],
)
def test_ddpm(monkeypatch, steps, spacing, prediction, schedule, variance, clip):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=schedule,
        prediction_type=prediction,
        variance_type=variance,
        clip_sample=clip,
        timestep_spacing=spacing,
    )
    table = prepare(scheduler, SolverConfig("ddpm", steps))
    noise = iter(range(1, steps + 1))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: normal(next(noise)).contiguous()
    )
    x, theirs = normal(0), []
    for t in scheduler.timesteps:
        x = scheduler.step(TOYS[prediction](x, t), t, x).prev_sample
        theirs.append(x)
    ours = trajectory(TOYS[prediction], table)
    if variance == "fixed_large" and spacing == "trailing":
        # diffusers adds the noise of fixed_large even to the result, where t > 0; the result here is the clean image
        ours, theirs = ours[:-1], theirs[:-1]
    assert_same(ours, theirs)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("steps", "spacing", "offset"), [(2, "leading", 0), (10, "leading", 1), (25, "trailing", 0)])
@pytest.mark.parametrize(
    ("prediction", "schedule", "clip"),
    [
        ("epsilon", "linear", True),
        ("epsilon", "scaled_linear", False),
        ("v_prediction", "linear", True),
        ("sample", "squaredcos_cap_v2", False),
    ],
)
def test_ddim(eta, steps, spacing, offset, prediction, schedule, clip):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=schedule,
        prediction_type=prediction,
        clip_sample=clip,
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    # with eta = 1, 1 - abar' - std^2 cancels; in float32 its square root would be off by more than the tolerance
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    table = prepare(scheduler, SolverConfig("ddim", steps, eta=eta))
    x, theirs = normal(0), []
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(
            TOYS[prediction](x, t), t, x, eta=eta, use_clipped_model_output=True, variance_noise=normal(k + 1)
        ).prev_sample
        theirs.append(x)
    assert_same(trajectory(TOYS[prediction], table), theirs)


SIGMA_CASES = [
    ("epsilon", "linear", {"timestep_spacing": "linspace"}),
    ("epsilon", "scaled_linear", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("v_prediction", "linear", {"timestep_spacing": "trailing"}),
    ("v_prediction", "scaled_linear", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
]


def sigma_space_trajectory(scheduler, table, model):
    """A run of a scheduler whose state is y = x0 + s n and whose network sees y / sqrt(1 + s^2)."""
    y, theirs = start(table), []
    for t in scheduler.timesteps:
        y = scheduler.step(model(scheduler.scale_model_input(y, t), t), t, y).prev_sample
        theirs.append(y / (1 + scheduler.sigmas[scheduler.step_index] ** 2) ** 0.5)
    return theirs


@pytest.mark.parametrize("steps", [2, 9, 28])
@pytest.mark.parametrize(("prediction", "schedule", "options"), SIGMA_CASES)
def test_euler(steps, prediction, schedule, options):
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule=schedule, prediction_type=prediction, **options)
    table = prepare(scheduler, SolverConfig("euler", steps))
    theirs = sigma_space_trajectory(scheduler, table, TOYS[prediction])
    assert_same(trajectory(TOYS[prediction], table), theirs)


@pytest.mark.parametrize(
    "steps", [6, 9, 28]
)  # over fewer steps the correction multiplies float32 rounding by thousands
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("prediction", "schedule", "options"), [*SIGMA_CASES, ("sample", "linear", {"timestep_spacing": "trailing"})]
)
def test_heun(steps, clip, prediction, schedule, options):
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule=schedule,
        beta_start=0.0001,
        beta_end=0.02,
        prediction_type=prediction,
        clip_sample=clip,
        clip_sample_range=0.8,
        **options,
    )
    table = prepare(scheduler, SolverConfig("heun", steps))
    theirs = sigma_space_trajectory(scheduler, table, TOYS[prediction])
    assert table.evaluations == 2 * steps - 1
    assert_same(trajectory(TOYS[prediction], table), theirs)


@pytest.mark.parametrize("steps", [2, 9, 30])
@pytest.mark.parametrize("solver", ["dpmpp-2m", "dpmpp-2m-sde"])
@pytest.mark.parametrize(
    ("prediction", "schedule", "options"),
    [
        ("epsilon", "linear", {"timestep_spacing": "linspace"}),
        ("epsilon", "scaled_linear", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("v_prediction", "linear", {"timestep_spacing": "trailing"}),
        ("sample", "squaredcos_cap_v2", {"timestep_spacing": "linspace"}),
        ("v_prediction", "scaled_linear", {"use_karras_sigmas": True}),
    ],
)
def test_dpm_solver(steps, solver, prediction, schedule, options):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=schedule,
        prediction_type=prediction,
        algorithm_type="dpmsolver++" if solver == "dpmpp-2m" else "sde-dpmsolver++",
        **options,
    )
    table = prepare(scheduler, SolverConfig(solver, steps))
    x, theirs = normal(0), []
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(TOYS[prediction](x, t), t, x, variance_noise=normal(k + 1)).prev_sample
        theirs.append(x)
    assert_same(trajectory(TOYS[prediction], table), theirs)


def toy_edm(x, t, labels=None):
    return 0.7 * torch.tanh(2 * x + t)


@pytest.mark.parametrize("steps", [2, 18])
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "dpmpp-2m-sde"])
def test_edm_schedulers(monkeypatch, steps, solver):
    if solver == "euler":
        scheduler = diffusers.EDMEulerScheduler()
    else:
        algorithm = "dpmsolver++" if solver == "dpmpp-2m" else "sde-dpmsolver++"
        scheduler = diffusers.EDMDPMSolverMultistepScheduler(algorithm_type=algorithm)
    scheduler.set_timesteps(steps)
    table = make_table(EDM(), SolverConfig(solver, steps))
    torch.testing.assert_close(torch.from_numpy(table.conditioning), scheduler.timesteps.double(), rtol=0, atol=1e-5)
    noise = iter(range(1, steps + 1))
    module = "scheduling_edm_euler" if solver == "euler" else "scheduling_edm_dpmsolver_multistep"
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: normal(next(noise)).contiguous())
    y, theirs = start(table), []
    for t in scheduler.timesteps:
        m = toy_edm(scheduler.scale_model_input(y, t), t)
        y = scheduler.step(m, t, y).prev_sample
        theirs.append(y / (1 + scheduler.sigmas[scheduler.step_index] ** 2) ** 0.5)
    assert_same(trajectory(toy_edm, table), theirs)
