"""l2_step and l2_step_: against float64, and inside the ball and the box exactly."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from synthfast import ops
from synthfast.ops import reference_attacks as reference

NAMES = ("x", "gradient", "origin", "eps", "step_size")
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "channel_slice", "expanded")


def chosen(arguments):
    """Arguments of l2_step with l2-sized radii and steps."""
    a = {name: arguments[name] for name in NAMES}
    size = math.sqrt(a["x"][0].numel()) if a["x"].numel() else 1.0
    return {**a, "eps": a["eps"] * size, "step_size": a["step_size"] * size}


def close_to_reference(ours, a, what=""):
    """The reference rounds once, the kernels several times: within one value of the type where it rounds down instead of up,
    and a few units of float32 relative to the sizes that occur."""
    expected = reference.l2_step(**a).double()
    unit = torch.finfo(a["x"].dtype).eps
    size = 1 + a["step_size"].abs().double().reshape(-1, *[1] * (a["x"].dim() - 1))
    difference = (ours.double() - expected).abs()
    assert (difference <= unit * expected.abs() + 2.0**-21 * size).all(), f"{what}: {difference.max()}"
    if a["x"].dtype != torch.float32:  # where the two sides of such a rounding are far apart, but rarely meet
        assert (difference > 0).sum() <= 2 + 0.01 * difference.numel(), f"{what}: differs too often"


@pytest.mark.parametrize("batch", [1, 6])
def test_equals_reference_at_every_size(attack_inputs, assert_inside, same_bits, dtype, sizes, batch):
    for elements in (*sizes, 4095, 4096, 4097, 5000, 9000):
        a = chosen(attack_inputs((batch, elements), dtype))
        before = {k: v.clone() for k, v in a.items()}
        ours = ops.l2_step(**a)
        close_to_reference(ours, a, elements)
        assert_inside(ours, a["origin"], a["eps"], "l2", what=elements)
        for name, tensor in before.items():
            same_bits(a[name], tensor, f"{name} was changed")
        x = a.pop("x")
        assert ops.l2_step_(x, **a) is x
        same_bits(x, ours, ("in place", elements))


def test_known_values():
    origin, x = torch.full((1, 2), 0.5), torch.tensor([[0.5, 0.625]])
    v = ops.l2_step(x, torch.tensor([[3e-30, 4e-30]]), origin, 10.0, 0.125)  # a step of 0.125 (3/5, 4/5), inside
    torch.testing.assert_close(v, torch.tensor([[0.575, 0.725]]))
    v = ops.l2_step(x, torch.tensor([[0.0, -1e30]]), origin, 0.25, 5.0, -9, 9)
    assert v[0, 0] == 0.5 and 0.25 <= v[0, 1].item() < 0.25 + 1e-6
    v = ops.l2_step(x, torch.tensor([[0.0, 2.0]]), origin, 0.25, -0.5, -9, 9)  # descends
    assert 0.25 <= v[0, 1].item() < 0.25 + 1e-6
    v = ops.l2_step(x, torch.tensor([[1.0, 1.0]]), origin, 9.0, 9.0, 0.0, 0.75)  # the box comes last
    assert v.tolist() == [[0.75, 0.75]]


def test_error_against_float64(attack_inputs):
    """No shrinking and no rounding towards the origin in what is compared with: how much do they cost?"""
    a = chosen(attack_inputs((4, 3000), torch.float32))
    a["gradient"] = a["gradient"].nan_to_num(0, 0, 0)
    x, g, o = (a[name].double() for name in ("x", "gradient", "origin"))
    eps, step = a["eps"].double()[:, None], a["step_size"].double()[:, None]
    t = x + step * g / g.norm(dim=1, keepdim=True) - o
    t *= torch.minimum(torch.ones(()), eps / t.norm(dim=1, keepdim=True).clamp(min=1e-300))
    error = (ops.l2_step(**a).double() - (o + t).clamp(0, 1)).abs()
    assert (error <= 2.0**-20 * t.abs() + 2.0**-23).all()


@pytest.mark.parametrize("useless", [0.0, torch.nan, torch.inf])
def test_no_step_without_a_gradient(attack_inputs, same_bits, dtype, useless):
    """A point inside the ball stays as it is, again and again, also where x - origin is not a float."""
    a = chosen(attack_inputs((3, 700), dtype))
    a["gradient"] = torch.randn(3, 700).to(dtype)
    a["gradient"][0] = 0
    a["gradient"][0, 5] = useless
    a["eps"] = torch.full((3,), 100.0)
    ours = ops.l2_step(**a)
    same_bits(ours[0], a["x"][0])
    assert not torch.equal(ours[1], a["x"][1])
    a["eps"] = torch.full((3,), 0.3)
    x = ops.l2_step(**a)
    for _ in range(3):
        same_bits(ops.l2_step(**{**a, "x": x})[0], x[0])


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e30, 3e38])
def test_gradients_of_any_size(attack_inputs, same_bits, size):
    a = chosen(attack_inputs((2, 100), torch.float32))
    a["gradient"] = torch.randint(-1, 2, (2, 100)).float()
    expected = ops.l2_step(**a)
    torch.testing.assert_close(ops.l2_step(**{**a, "gradient": a["gradient"] * size}), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_step_along_a_gradient_below_the_normal_floats(sign):
    """The step per unit of gradient does not fit a float."""
    zero = torch.zeros(1, 2)
    v = ops.l2_step(zero, torch.tensor([[0.0, 2.0**-149]]), zero, 0.5, sign * 2.0**120, -1.0, 1.0)
    assert v[0, 0] == 0 and 0.5 - 1e-6 < sign * v[0, 1] <= 0.5


def floats(dtype):
    info = torch.finfo(dtype)
    largest = min(float(info.max), 2.0**120)
    return st.one_of(st.floats(0, 1, width=32), st.floats(-largest, largest, width=32), st.floats(-1e-37, 1e-37))


@st.composite
def batches(draw, dtype):
    n = draw(st.integers(1, 20))
    rows = [torch.tensor([draw(st.lists(floats(dtype), min_size=n, max_size=n))]).to(dtype) for _ in range(2)]
    gradients = st.sampled_from([0.0, 1.0, -2.0, 1e-45, 3e38, 1e-20]) if draw(st.integers(0, 9)) else st.just(math.nan)
    gradient = torch.tensor([draw(st.lists(gradients, min_size=n, max_size=n))]).to(dtype)
    radii = st.sampled_from([0.0, 1e-45, 1e-38, 8 / 255, 1.0, 3.4e38])
    eps = torch.tensor([draw(st.one_of(radii, st.floats(0, 2.0**120, width=32)))])
    step = torch.tensor([draw(st.one_of(st.just(0.5), st.floats(-(2.0**120), 2.0**120, width=32)))])
    lo, hi = draw(st.sampled_from([(0.0, 1.0), (0.1, 0.9), (-math.inf, math.inf)]))
    origin = torch.where((rows[1].double() >= lo) & (rows[1].double() <= hi), rows[1], torch.tensor(0.25, dtype=dtype))
    return {"x": rows[0], "gradient": gradient, "origin": origin, "eps": eps, "step_size": step, "lo": lo, "hi": hi}


@hypothesis.settings(max_examples=250, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_inside_for_any_numbers(assert_inside, same_bits, dtype, data):
    a = data.draw(batches(dtype))
    ours = ops.l2_step(**a)
    assert_inside(ours, a["origin"], a["eps"], "l2", a["lo"], a["hi"], what=a)
    x = a.pop("x")
    same_bits(ops.l2_step_(x, **a), ours)


def test_inside_after_many_steps(attack_inputs, assert_inside, dtype):
    """Images on the boundary of the ball, where every rounding error shows."""
    a = chosen(attack_inputs((12, 3, 32, 32), dtype))
    for k in range(20):
        a["gradient"] = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(k)).to(dtype)
        a["x"] = ops.l2_step(**a, lo=-9, hi=9)
        assert_inside(a["x"], a["origin"], a["eps"], "l2", -9, 9, what=k)
    if dtype == torch.float32:  # and not further inside than the roundings need
        distance = (a["x"][0].double() - a["origin"][0].double()).norm() / a["eps"][0]
        assert distance.item() > 1 - 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(every_16_bit_value, assert_inside, dtype):
    """Each value is the origin of a sample of one pixel, whose l2 ball is an interval."""
    every = every_16_bit_value(dtype).reshape(-1, 1)
    finite = every[every.isfinite().flatten() & (every.abs().float() < 2.0**120).flatten()]
    for eps in (0.0, 1e-40, 2.0**-24, 8 / 255, 1 / 3, 1000.1):
        for sign in (1, -1):
            v = ops.l2_step(finite, torch.full_like(finite, sign), finite, eps, 2000.0, -math.inf, math.inf)
            assert_inside(v, finite, torch.full((len(v),), eps), "l2", -math.inf, math.inf, what=(eps, sign))
            assert_inside(v, finite, torch.full((len(v),), eps), "linf", -math.inf, math.inf, what=(eps, sign))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(attack_inputs, assert_inside, same_bits, lay_out, dtype, layout):
    for other in LAYOUTS:
        a = chosen(attack_inputs((3, 3, 4, 5), dtype))
        for k, name in enumerate(("x", "gradient", "origin")):
            a[name] = lay_out(a[name], (layout, other, LAYOUTS[k])[k])
        ours = ops.l2_step(**a)
        close_to_reference(ours, a, (layout, other))
        assert_inside(ours, a["origin"], a["eps"], "l2")
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert ours.is_contiguous(memory_format=wanted)
        if layout == "expanded":
            continue
        x = a.pop("x")
        place = (x.data_ptr(), x.stride())
        ops.l2_step_(x, **a)
        assert place == (x.data_ptr(), x.stride())
        same_bits(x, ours, (layout, other))


def test_tensors_may_be_the_same(attack_inputs, same_bits, dtype):
    a = chosen(attack_inputs((3, 1000), dtype))
    a["x"] = a["origin"]
    expected = ops.l2_step(**{**a, "x": a["x"].clone()})
    same_bits(ops.l2_step(**a), expected)
    same_bits(ops.l2_step_(**a), expected)


def test_nan_shows(attack_inputs, dtype):
    """A sample with a NaN has no norm: where it has to be projected all of it is NaN, and the others are not touched."""
    a = chosen(attack_inputs((3, 40), dtype))
    a["x"][1, 4] = torch.nan
    a["gradient"][2] = 1
    v = ops.l2_step(**a)
    assert v[1].isnan().all() and not v[[0, 2]].isnan().any()


def test_useless_radii_count_as_zero(attack_inputs, same_bits, dtype):
    a = chosen(attack_inputs((2, 30), dtype))
    for eps in (-1.0, torch.nan, -torch.inf, 0.0):
        same_bits(ops.l2_step(**{**a, "eps": eps}), a["origin"], eps)
    same_bits(ops.l2_step(**{**a, "eps": torch.inf}), ops.l2_step(**{**a, "eps": 1000.0}))


def test_sample_does_not_depend_on_the_batch_or_on_threads(attack_inputs, same_bits, dtype):
    a = chosen(attack_inputs((40, 3, 17, 31), dtype))
    whole = ops.l2_step(**a)
    for k in (0, 7, 39):
        same_bits(ops.l2_step(**{n: v[k : k + 1] for n, v in a.items()})[0], whole[k], k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same_bits(ops.l2_step(**a), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (3, 0)])
def test_empty(attack_inputs, dtype, shape):
    a = chosen(attack_inputs(shape, dtype))
    assert ops.l2_step(**a).shape == shape
    assert ops.l2_step_(**a).shape == shape
