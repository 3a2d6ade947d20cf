"""The solver tables: the published EDM algorithm, orders of convergence, exact variances, and what must raise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from synthfast import ops
from synthfast.diffusion import EDM, SOLVERS, VP, SolverConfig, make_table, sample
from synthfast.errors import UsageError

SEED = 3


def draw(model, table, count, shape, seed=SEED):
    """Final images and the list of states y = x / alpha after each stage, float64."""
    states = []
    images = sample(
        model,
        table,
        torch.arange(count),
        shape=shape,
        seed=seed,
        callback=lambda k, x: states.append(x.double() / table.scales[k + 1]),
    )
    return images, states


def normal(count, shape, step, seed=SEED):
    out = torch.empty((count, *shape), memory_format=torch.channels_last)
    return ops.philox_normal_(out, torch.arange(count), seed, ops.Stream.NOISE, step).double()


def toy_network(x, t, labels=None):
    return 0.7 * torch.tanh(2 * x + t)


def toy_denoiser(y, s):
    """EDM's D(y; s) around the toy network, in float64 (Karras et al. 2022, equation 7)."""
    data = 0.5
    c_skip, c_out = data**2 / (s**2 + data**2), s * data / math.sqrt(s**2 + data**2)
    c_in, c_noise = 1 / math.sqrt(s**2 + data**2), math.log(s) / 4
    return c_skip * y + c_out * toy_network(c_in * y, c_noise)


def algorithm_2(steps, churn, s_tmin, s_tmax, s_noise, noises, second_order):
    """The stochastic sampler of Karras et al. 2022, Algorithm 2, line by line in float64; states after each evaluation.

    ``noises[0]`` is the initial noise, ``noises[i + 1]`` that of step i.
    """
    ramp = np.arange(steps) / (steps - 1)
    t = [*((80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7), 0.0]
    x = t[0] * noises[0]
    states = []
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noises[i + 1]
        d = (x_hat - toy_denoiser(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        states.append((x, t[i + 1]))
        if second_order and t[i + 1] != 0:
            d_next = (x - toy_denoiser(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
            states.append((x, t[i + 1]))
    return states


@pytest.mark.parametrize(
    ("churn", "s_tmin", "s_tmax", "s_noise"),
    [(0, 0, math.inf, 1), (40, 0.05, 50, 1.003), (7, 0, math.inf, 0.9), (1000, 0, math.inf, 1)],
)
@pytest.mark.parametrize("steps", [5, 18, 40])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_published_edm_algorithm(solver, steps, churn, s_tmin, s_tmax, s_noise):
    config = SolverConfig(solver, steps, churn=churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    table = make_table(EDM(), config)
    shape = (3, 4, 4)
    images, states = draw(toy_network, table, 4, shape)
    stages_a_step = 2 if solver == "heun" else 1
    # stage k draws step k + 1; the noise of step i comes with the last stage of step i - 1, that of step 0 after all
    # others
    noise_steps = [0, table.evaluations + 1] + [stages_a_step * i for i in range(1, steps)]
    noises = [normal(4, shape, step) for step in noise_steps]
    expected = algorithm_2(steps, churn, s_tmin, s_tmax, s_noise, noises, solver == "heun")
    assert table.evaluations == len(states) == len(expected) == (2 * steps - 1 if solver == "heun" else steps)
    raised = table.levels[1:]
    for k, (y, (x, t)) in enumerate(zip(states, expected, strict=True)):
        if raised[k] > t:  # the noise of the next step is folded into this stage
            i = (k + 1) // stages_a_step
            x = x + math.sqrt(raised[k] ** 2 - t**2) * s_noise * noises[i + 1]
        scale = math.sqrt(1 + raised[k] ** 2)
        torch.testing.assert_close(y / scale, x / scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(images.double(), expected[-1][0], rtol=0, atol=1e-4)


MEAN, STD = 0.3, 0.4  # images whose pixels are independent N(MEAN, STD^2)


def gaussian_network(parameterization):
    """The network whose denoised image is the exact E[x0 | x] for the Gaussian images: m = (D - kx x) / km."""

    def network(x, t, labels=None):
        s = math.exp(4 * t) if parameterization.kind == "edm" else parameterization.level_at(float(t)).s
        kx, km = parameterization.denoiser(s)
        y = x.double() / parameterization.scale(s)
        denoised = (STD**2 * y + s**2 * MEAN) / (STD**2 + s**2)
        return ((denoised - kx * x.double()) / km).float()

    return network


def global_error(solver, steps, sigma_min, sigma_max):
    """Greatest distance from the exact solution y(s) = MEAN + (y(S) - MEAN) sqrt((STD^2 + s^2) / (STD^2 + S^2)) at s =
    0."""
    model = EDM()
    table = make_table(model, SolverConfig(solver, steps, sigma_min=sigma_min, sigma_max=sigma_max))
    images, _ = draw(gaussian_network(model), table, 4, (1, 8, 8))
    start = normal(4, (1, 8, 8), 0) * sigma_max
    # the last step, from sigma_min to 0, is an Euler step of every solver: leave its error out by going back along the
    # flow
    final = MEAN + (images.double() - MEAN) * math.sqrt(STD**2 + sigma_min**2) / STD
    exact = MEAN + (start - MEAN) * math.sqrt((STD**2 + sigma_min**2) / (STD**2 + sigma_max**2))
    return float((final - exact).abs().max())


@pytest.mark.parametrize(
    ("solver", "low", "high"), [("euler", 0.8, 1.2), ("ddim", 0.8, 1.2), ("heun", 1.7, 2.6), ("dpmpp-2m", 1.7, 2.6)]
)
def test_order_of_convergence(solver, low, high):
    errors = [global_error(solver, steps, sigma_min=0.002, sigma_max=10.0) for steps in (16, 32, 64)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(low < order < high for order in orders), (errors, orders)


def predicted_moments(parameterization, table):
    """Mean and variance of the result of a table for the exact Gaussian denoiser, by linear recursion in float64.

    The pair (x, P) is linear in Gaussian noise, so its mean and 2 x 2 covariance follow from the rows.
    """
    mean = np.zeros(2)
    covariance = np.diag([table.initial_std**2 + table.initial_churn**2, 0.0])
    for row, s in zip(table.coefficients, table.levels[:-1], strict=True):
        _, _, ax, ad, ap, az, *_ = row
        scale = parameterization.scale(s)
        slope, offset = STD**2 / (STD**2 + s**2) / scale, s**2 * MEAN / (STD**2 + s**2)
        move = np.array([[ax + ad * slope, ap], [slope, 0.0]])
        mean = move @ mean + np.array([ad * offset, offset])
        covariance = move @ covariance @ move.T + np.diag([az**2, 0.0])
    return mean[0], covariance[0, 0]


@pytest.mark.parametrize(
    ("config", "parameterization"),
    [
        (SolverConfig("ddpm", 400, variance="fixed_small"), VP(clip=None)),
        (SolverConfig("ddpm", 1000, variance="fixed_large"), VP(clip=None)),
        (SolverConfig("ddim", 200, eta=1.0), VP(clip=None, prediction="v", schedule="squaredcos_cap_v2")),
        (SolverConfig("dpmpp-2m-sde", 80), VP(clip=None, prediction="v")),
        (SolverConfig("ddpm", 300), EDM()),
        (SolverConfig("dpmpp-2m-sde", 60), EDM()),
        (SolverConfig("euler", 400, churn=20), EDM()),
        (SolverConfig("heun", 80, churn=20), EDM()),
    ],
)
def test_stochastic_solvers_keep_the_variance(config, parameterization):
    """On average the tables give Gaussian images their own mean and variance; the loop gives what the table
    predicts."""
    table = make_table(parameterization, config)
    mean, variance = predicted_moments(parameterization, table)
    assert abs(mean - MEAN) < 0.01
    assert abs(math.sqrt(variance) / STD - 1) < 0.03
    short = make_table(parameterization, SolverConfig(**{**vars(config), "steps": 12}))
    mean, variance = predicted_moments(parameterization, short)
    images, _ = draw(gaussian_network(parameterization), short, 32, (1, 32, 32))
    assert abs(float(images.double().mean()) - mean) < 5 * math.sqrt(variance / images.numel())
    assert abs(float(images.double().var()) / variance - 1) < 5 * math.sqrt(2 / images.numel())


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("parameterization", [EDM(), VP(), VP(prediction="x0", clip=None)])
def test_every_run_ends_on_the_denoised_image(solver, parameterization):
    for steps in (1, 2, 25):
        table = make_table(parameterization, SolverConfig(solver, steps))
        ax, ad, ap, az, w, lo, hi = table.coefficients[-1][2:]
        assert (ax, ad, ap, az, w) == (0, 1, 0, 0, 1)
        assert table.scales[-1] == 1 and table.levels[-1] == 0
        assert np.isfinite(table.coefficients[:, :7]).all() and len(table.conditioning) == table.evaluations
        limit = math.inf if parameterization.clip is None else parameterization.clip
        assert (lo, hi) == (-limit, limit)
        rows = table.rows("cpu", guidance=2.5)
        assert rows.dtype == torch.float32 and rows.shape == (table.evaluations, 9)
        assert (rows[:, 6] == 2.5).all()


def test_clip_overrides_the_models_own():
    assert (make_table(EDM(), SolverConfig(clip=0.5)).coefficients[:, 8] == 0.5).all()
    assert (make_table(VP(clip=2.0), SolverConfig()).coefficients[:, 7] == -2).all()
    assert (make_table(VP(), SolverConfig(clip=math.inf)).coefficients[:, 8] == math.inf).all()


def test_only_multistep_solvers_and_heun_use_history():
    uses = {name: make_table(EDM(), SolverConfig(name, 5)).uses_history for name in SOLVERS}
    assert [name for name, used in uses.items() if used] == ["heun", "dpmpp-2m", "dpmpp-2m-sde"]


def test_explicit_levels():
    model = VP()
    table = make_table(model, SolverConfig("ddim", 50), [model.level_at(t) for t in (999, 400, 20)])
    assert table.conditioning.tolist() == [999, 400, 20] and table.config.steps == 3
    grid = make_table(EDM(), SolverConfig("euler"), [EDM().level(s) for s in (5.0, 1.0)])
    assert grid.levels.tolist() == [5.0, 1.0, 0.0]
    with pytest.raises(UsageError, match="descending"):
        make_table(EDM(), SolverConfig("euler"), [EDM().level(s) for s in (1.0, 1.0)])
    with pytest.raises(UsageError, match="descending"):
        make_table(EDM(), SolverConfig("euler"), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "plms"}, "--solver plms: expected one of ddpm, ddim, euler, heun, dpmpp-2m, dpmpp-2m-sde"),
        ({"steps": 0}, "--steps 0: expected a whole number from 1 to 100000"),
        ({"steps": 2**31}, "--steps 2147483648: expected a whole number from 1 to 100000"),
        ({"steps": True}, "--steps True: expected a whole number from 1 to 100000"),
        ({"steps": 1.5}, "--steps 1.5: expected"),
        ({"name": "ddim", "eta": 1.5}, "--eta 1.5: expected a number from 0 to 1"),
        ({"name": "ddim", "eta": math.nan}, "--eta nan: expected"),
        ({"name": "heun", "eta": 0.5}, "--eta 0.5: expected --solver ddim with it, found heun"),
        ({"churn": -1.0}, "--churn -1.0: expected"),
        ({"name": "ddpm", "churn": 5}, "--churn 5: expected --solver euler or heun with it, found ddpm"),
        ({"s_tmin": -0.1}, "--s-tmin -0.1: expected"),
        ({"s_tmin": 2.0, "s_tmax": 1.0}, "--s-tmax 1.0: expected"),
        ({"s_noise": math.inf}, "--s-noise inf: expected"),
        ({"spacing": "even"}, "--spacing even: expected one of leading"),
        ({"rho": 0}, "--rho 0: expected a positive number"),
        ({"sigma_min": 0.0}, "--sigma-min 0.0: expected a positive number"),
        ({"sigma_max": math.inf}, "--sigma-max inf: expected a positive number"),
        ({"clip": 0.0}, "--clip 0.0: expected a positive number"),
        ({"name": "ddpm", "variance": "learned"}, "--variance learned: expected one of fixed_small, fixed_large"),
        ({"variance": "fixed_large"}, "--variance fixed_large: expected --solver ddpm with it, found heun"),
    ],
)
def test_bad_option_values(options, message):
    with pytest.raises(UsageError) as caught:
        SolverConfig(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameterization", "options", "message"),
    [
        (EDM(), {"spacing": "trailing"}, "--spacing trailing: expected karras"),
        (EDM(), {"sigma_min": 90.0}, "--sigma-min 90: expected less than --sigma-max 80"),
        (VP(), {"sigma_min": 0.1}, "--sigma-min 0.1: expected --spacing karras with it, found trailing"),
        (
            VP(),
            {"spacing": "karras", "sigma_max": 1e4},
            "--sigma-min 0.0100005 --sigma-max 10000: expected levels within",
        ),
        (VP(timesteps=50), {"steps": 51}, "--steps 51: expected fewer steps"),
        (VP(spacing="leading", steps_offset=1), {"steps": 1000}, "--steps 1000: expected fewer steps"),
        (VP(spacing="leading"), {"name": "dpmpp-2m", "steps": 1000}, "--steps 1000: expected fewer steps"),
        (VP(spacing="linspace"), {"name": "dpmpp-2m", "steps": 1000}, "--steps 1000: expected fewer steps"),
    ],
)
def test_options_that_do_not_fit_the_model(parameterization, options, message):
    with pytest.raises(UsageError) as caught:
        make_table(parameterization, SolverConfig(**options))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
