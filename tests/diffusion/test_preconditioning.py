"""Parameterizations: the algebra of their coefficients, and their forms on disk."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from synthfast.diffusion import EDM, VP, from_dict, from_scheduler_config, to_dict
from synthfast.errors import SynthfastError, UsageError

ALL = [EDM(), EDM(sigma_data=0.3), *(VP(prediction=prediction) for prediction in ("eps", "v", "x0"))]


@pytest.mark.parametrize("parameterization", ALL)
@pytest.mark.parametrize("s", [0.002, 0.7, 80.0])
def test_the_target_denoises_exactly(parameterization, s):
    """kx x + km (ty x0 + tn n) = x0 for every x0 and n, with x = alpha (x0 + s n)."""
    alpha = parameterization.scale(s)
    (kx, km), (ty, tn) = parameterization.denoiser(s), parameterization.target(s)
    assert kx * alpha + km * ty == pytest.approx(1, rel=1e-12)
    assert kx * alpha * s + km * tn == pytest.approx(0, abs=1e-12 * max(1, s))


@pytest.mark.parametrize("parameterization", ALL)
def test_tensors_and_numbers_agree(parameterization):
    s = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)

    def values(s):
        return parameterization.scale(s), *parameterization.denoiser(s), *parameterization.target(s)

    each = torch.tensor([values(float(value)) for value in s], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(values(s), 1), each, rtol=1e-14, atol=0)


def test_edm_coefficients_are_those_of_the_paper():
    edm, s = EDM(sigma_data=0.4), 1.7
    c_in, c_skip = 1 / math.sqrt(s**2 + 0.16), 0.16 / (s**2 + 0.16)
    c_out = s * 0.4 / math.sqrt(s**2 + 0.16)
    assert edm.scale(s) == pytest.approx(c_in)
    assert edm.denoiser(s) == pytest.approx((c_skip / c_in, c_out))
    assert edm.level(s).conditioning == pytest.approx(math.log(s) / 4)
    assert edm.initial_std(80.0) == pytest.approx(80 * edm.scale(80.0))


def test_vp_levels():
    vp = VP()
    for t in (0, 500, 999):
        alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
        level = vp.level_at(t)
        assert vp.scale(level.s) == pytest.approx(math.sqrt(alpha_bar), rel=1e-10)
        assert vp.scale(level.s) * level.s == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-9)
        assert vp.level(level.s).conditioning == pytest.approx(t, abs=1e-6)
    between = math.sqrt(vp.level_at(300).s * vp.level_at(301).s)
    assert vp.level(between).conditioning == pytest.approx(300.5, abs=1e-6)
    assert vp.level(1e6).conditioning == 999 and vp.level(1e-6).conditioning == 0
    assert vp.level_at(300.25).s == pytest.approx(0.75 * vp.level_at(300).s + 0.25 * vp.level_at(301).s)
    with pytest.raises(UsageError, match="timestep 1000: expected 0 to 999"):
        vp.level_at(1000)


@pytest.mark.parametrize(
    "parameterization",
    [
        *ALL,
        VP(timesteps=3, betas=(0.1, 0.2, 0.3), clip=None, variance="fixed_large", spacing="leading", steps_offset=1),
    ],
)
def test_dict_round_trip_through_json(parameterization):
    written = json.loads(json.dumps(to_dict(parameterization)))
    restored = from_dict(written)
    assert restored == parameterization and type(restored) is type(parameterization)
    assert set(written) == {"kind"} | {field.name for field in dataclasses.fields(parameterization)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "flow"}, "parameterization kind: expected one of edm, vp, found 'flow'"),
        ({}, "parameterization kind"),
        (
            {"kind": "edm", "sigma": 1},
            "edm parameterization: expected keys among sigma_data, sigma_min, sigma_max, found sigma",
        ),
        ({"kind": "edm", "sigma_data": "large"}, "edm parameterization: a value has the wrong type"),
        ({"kind": "vp", "betas": "linear"}, "vp parameterization: a value has the wrong type"),
        ({"kind": "edm", "sigma_data": 0.0}, "EDM sigma_data: expected a positive number, found 0.0"),
        (
            {"kind": "edm", "sigma_min": 90.0},
            "EDM noise levels: expected 0 < sigma_min < sigma_max, found 90.0 and 80.0",
        ),
        ({"kind": "vp", "prediction": "score"}, "VP prediction: expected one of eps, v, x0, found 'score'"),
        ({"kind": "vp", "betas": [0.1, 0.2]}, "VP betas: expected 1000 of them, one a timestep, found 2"),
        ({"kind": "vp", "clip": 0.0}, "VP clip: expected a positive number or none, found 0.0"),
        ({"kind": "vp", "timesteps": 0}, "VP timesteps: expected 1 to 1000000"),
        ({"kind": "vp", "timesteps": 2**40}, "VP timesteps: expected 1 to 1000000"),
    ],
)
def test_bad_dicts(values, message):
    with pytest.raises(SynthfastError) as caught:
        from_dict(values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_published_cifar10_scheduler():
    """scheduler_config.json of google/ddpm-cifar10-32, which leaves most keys out."""
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    assert from_scheduler_config(config) == VP(variance="fixed_large", spacing="leading")


def test_every_key_of_a_scheduler_config_counts():
    config = {
        "_class_name": "DDIMScheduler",
        "trained_betas": [0.1, 0.2, 0.4],
        "beta_schedule": "sigmoid",
        "num_train_timesteps": 3,
        "prediction_type": "v_prediction",
        "clip_sample_range": 2.0,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    expected = VP(
        timesteps=3,
        betas=(0.1, 0.2, 0.4),
        prediction="v",
        clip=2.0,
        spacing="trailing",
        steps_offset=1,
        variance="fixed_small",
    )
    assert from_scheduler_config(config) == expected
    euler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "use_karras_sigmas": True}
    assert from_scheduler_config(euler) == VP(schedule="scaled_linear", clip=None, spacing="karras")
    heun = from_scheduler_config({"_class_name": "HeunDiscreteScheduler", "prediction_type": "sample"})
    assert heun == VP(beta_start=0.00085, beta_end=0.012, prediction="x0", clip=None, spacing="linspace")
    assert from_scheduler_config({}) == VP(spacing="leading")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "expected the scheduler of a discrete DDPM model, found FlowMatch",
        ),
        (
            {"beta_schedule": "laplace"},
            "beta_schedule: expected linear, scaled_linear, squaredcos_cap_v2, found laplace",
        ),
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type: expected epsilon, v_prediction, sample, found flow_prediction",
        ),
        (
            {"variance_type": "learned_range"},
            "variance_type: expected fixed_small, fixed_small_log, fixed_large, found learned_range",
        ),
        ({"thresholding": True}, "thresholding: expected False, found True"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: expected False, found True"),
        (
            {"timestep_spacing": "cubic"},
            "VP spacing: expected one of leading, trailing, linspace, karras, found 'cubic'",
        ),
        ({"beta_end": "big"}, "a value has the wrong type"),
    ],
)
def test_unsupported_scheduler_configs(change, message):
    with pytest.raises(SynthfastError) as caught:
        from_scheduler_config({"_class_name": "DDPMScheduler", **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)
