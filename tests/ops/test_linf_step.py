"""linf_step and linf_step_: equal to the reference bit for bit, and inside the ball and the box exactly."""

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
BOXES = ((0.0, 1.0), (-1.0, 1.0), (0.1, 0.9), (1e-45, 0.3), (-math.inf, math.inf), (-1e300, 1e300))


def chosen(arguments):
    return {name: arguments[name] for name in NAMES}


def test_equals_reference_at_every_size(attack_inputs, assert_inside, same_bits, dtype, sizes):
    for elements in sizes:
        a = chosen(attack_inputs((6, elements), dtype))
        before = {k: v.clone() for k, v in a.items()}
        ours = ops.linf_step(**a)
        same_bits(ours, reference.linf_step(**a), elements)
        assert_inside(ours, a["origin"], a["eps"], "linf", what=elements)
        for name, tensor in before.items():
            same_bits(a[name], tensor, f"{name} was changed")
        x = a.pop("x")
        assert ops.linf_step_(x, **a) is x
        same_bits(x, ours, ("in place", elements))


def test_known_values():
    x = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.98, 0.02, 0.5]])
    g = torch.tensor([[3.0, -1e-30, 0.0, torch.nan, 1.0, -1.0, torch.inf]])
    v = ops.linf_step(x, g, torch.full_like(x, 0.5), 0.25, 0.125)
    torch.testing.assert_close(v, torch.tensor([[0.625, 0.375, 0.5, 0.5, 0.75, 0.25, 0.625]]), rtol=0, atol=0)
    down = ops.linf_step(x, g, torch.full_like(x, 0.5), 0.25, -0.125)
    assert down[0, :2].tolist() == [0.375, 0.625]
    assert ops.linf_step(torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1, 2), 9.0, 5.0, -0.5, 0.5).tolist() == [
        [-0.5, -0.5]
    ]


def floats(dtype):
    """Finite values of a type: any bits, pixels, and multiples of 1/255."""
    info = torch.finfo(dtype)
    every = st.floats(-float(info.max), float(info.max), width=32)
    return st.one_of(st.floats(0, 1, width=32), every, st.integers(-255, 510).map(lambda k: k / 255))


@st.composite
def batches(draw, dtype):
    """Arguments of linf_step with a radius that may be anything: tiny, huge, larger or smaller than the pixels by far."""
    n = draw(st.integers(1, 20))
    x, origin = (torch.tensor([draw(st.lists(floats(dtype), min_size=n, max_size=n))]).to(dtype) for _ in range(2))
    gradients = st.sampled_from([0.0, -0.0, 1.0, -2.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3e38])
    gradient = torch.tensor([draw(st.lists(gradients, min_size=n, max_size=n))]).to(dtype)
    radii = st.one_of(st.sampled_from([0.0, 1e-45, 1e-38, 8 / 255, 1.0, 3.4e38]), st.floats(0, 2.0**127, width=32))
    eps = torch.tensor([draw(radii)])
    step = torch.tensor([draw(st.one_of(st.just(2 / 255), st.floats(-(2.0**126), 2.0**126, width=32)))])
    lo, hi = draw(st.sampled_from(BOXES))
    origin = torch.where((origin.double() >= lo) & (origin.double() <= hi), origin, torch.tensor(0.25, dtype=dtype))
    return {"x": x, "gradient": gradient, "origin": origin, "eps": eps, "step_size": step, "lo": lo, "hi": hi}


@hypothesis.settings(max_examples=250, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_inside_for_any_numbers(assert_inside, same_bits, dtype, data):
    a = data.draw(batches(dtype))
    ours = ops.linf_step(**a)
    assert_inside(ours, a["origin"], a["eps"], "linf", a["lo"], a["hi"], what=a)
    same_bits(ours, reference.linf_step(**a), a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(every_16_bit_value, assert_inside, same_bits, dtype):
    """As origin, as x and as gradient; radii that are and are not values of the type."""
    every = every_16_bit_value(dtype).reshape(1, -1)
    finite = every[every.isfinite()][None]
    for eps in (0.0, 1e-40, 2.0**-24, 8 / 255, 1 / 3, 1.0, 1000.1):
        for sign in (1, -1):
            box = {"lo": -math.inf, "hi": math.inf}
            g = torch.full_like(finite, sign)
            ours = ops.linf_step(finite, g, finite, eps, 7.0, **box)
            assert_inside(ours, finite, torch.tensor([eps]), "linf", **box, what=(eps, sign))
            same_bits(ours, reference.linf_step(finite, g, finite, eps, 7.0, **box), (eps, sign))
            x, middle = every * sign, torch.full_like(every, 0.3)
            ours = ops.linf_step(x, every, middle, eps, 0.01, 0.1, 0.9)
            same_bits(ours, reference.linf_step(x, every, middle, eps, 0.01, 0.1, 0.9), (eps, sign))


def test_as_far_as_the_ball_allows(generator):
    """The bounds are the closest values inside, not something smaller: one value further is outside."""
    origin = torch.rand(1, 5000, generator=generator) ** 1.5  # with all digits
    eps = torch.tensor([8 / 255])
    up = ops.linf_step(origin, torch.ones_like(origin), origin, eps, 1.0, -9, 9)
    further = torch.nextafter(up, torch.tensor(torch.inf)).double() - origin.double()
    assert (further > eps.double()).all()
    bounds = (origin + eps).double() - origin.double()
    assert (bounds > eps.double()).float().mean() > 0.1  # rounding to nearest leaves the ball often


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(attack_inputs, same_bits, lay_out, dtype, layout):
    for other in LAYOUTS:
        a = chosen(attack_inputs((3, 3, 4, 5), dtype))
        for k, name in enumerate(("x", "gradient", "origin")):
            a[name] = lay_out(a[name], (layout, other, LAYOUTS[k])[k])
        ours = ops.linf_step(**a)
        same_bits(ours, reference.linf_step(**a), (layout, other))
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert ours.is_contiguous(memory_format=wanted)
        if layout == "expanded":
            continue
        x = a.pop("x")
        place = (x.data_ptr(), x.stride())
        ops.linf_step_(x, **a)
        assert place == (x.data_ptr(), x.stride())
        same_bits(x, ours, (layout, other))


def test_in_place_changes_nothing_else(attack_inputs, same_bits, dtype):
    a = chosen(attack_inputs((3, 61), dtype))
    expected = ops.linf_step(**a)
    room = torch.full((5, 61), 7.0, dtype=dtype)
    room[1:4] = a.pop("x")
    ops.linf_step_(room[1:4], **a)
    same_bits(room[1:4], expected)
    assert (room[[0, 4]] == 7).all()


def test_tensors_may_be_the_same(attack_inputs, same_bits, dtype):
    """The first step of an attack starts at the origin; x and origin may even share memory in place."""
    a = chosen(attack_inputs((3, 100), dtype))
    a["x"] = a["origin"]
    expected = reference.linf_step(**a)
    same_bits(ops.linf_step(**a), expected)
    same_bits(ops.linf_step_(**a), expected)


def test_numbers_and_strided_scalars(attack_inputs, same_bits):
    a = chosen(attack_inputs((4, 50), torch.float32))
    a["eps"], a["step_size"] = torch.full((4,), 0.1), torch.full((4,), -0.03)
    expected = ops.linf_step(**a)
    same_bits(ops.linf_step(**{**a, "eps": 0.1, "step_size": -0.03}), expected)
    same_bits(ops.linf_step(**{**a, "eps": torch.tensor(0.1)}), expected)
    strided = torch.stack((a["eps"], a["eps"] + 1), 1)[:, 0]
    same_bits(ops.linf_step(**{**a, "eps": strided}), expected)


def test_useless_radii_count_as_zero(attack_inputs, same_bits, dtype):
    a = chosen(attack_inputs((2, 30), dtype))
    for eps in (-1.0, torch.nan, -torch.inf, 0.0):
        same_bits(ops.linf_step(**{**a, "eps": eps}), a["origin"], eps)
    free = ops.linf_step(**{**a, "eps": torch.inf})
    same_bits(free, ops.linf_step(**{**a, "eps": 100.0}))


def test_infinite_steps_and_nan(attack_inputs, dtype):
    a = chosen(attack_inputs((2, 30), dtype))
    a["gradient"] = torch.ones_like(a["x"])
    a["gradient"][:, ::3] = 0
    far = ops.linf_step(**{**a, "eps": 9.0, "step_size": torch.inf})
    assert torch.equal(far[:, ::3], a["x"][:, ::3]) and (far[:, 1::3] == 1).all()
    a["x"][1, 4] = torch.nan
    assert torch.equal(ops.linf_step(**a).isnan(), a["x"].isnan())


def test_sample_does_not_depend_on_the_batch_or_on_threads(attack_inputs, same_bits, dtype):
    a = chosen(attack_inputs((40, 3, 17, 11), dtype))
    whole = ops.linf_step(**a)
    for k in (0, 7, 39):
        same_bits(ops.linf_step(**{n: v[k : k + 1] for n, v in a.items()})[0], whole[k], k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same_bits(ops.linf_step(**a), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (3, 0)])
def test_empty(attack_inputs, dtype, shape):
    a = chosen(attack_inputs(shape, dtype))
    assert ops.linf_step(**a).shape == shape
    assert ops.linf_step_(**a).shape == shape


WRONG = [
    ("x", lambda a: a["x"].double(), "x must be float32, bfloat16 or float16; got .* Double"),
    ("x", lambda a: torch.zeros(()), "x must have a batch dimension"),
    ("gradient", lambda a: a["x"][:, :3], r"gradient must have the shape and device of x, \[3, 4\]"),
    ("gradient", lambda a: a["x"].half(), "gradient must have the type of x"),
    ("origin", lambda a: a["x"][None], "origin must have the shape"),
    ("origin", lambda a: a["x"].bfloat16(), "origin must have the type of x"),
    ("eps", lambda a: torch.zeros(2), r"eps must be float32 \[3\] .*; got \[2\] Float"),
    ("eps", lambda a: torch.zeros(3).double(), r"eps must be float32 \[3\] .*; got \[3\] Double"),
    ("eps", lambda a: torch.zeros(3, 1), r"eps must be float32 \[3\]"),
    ("step_size", lambda a: torch.zeros(3).half(), r"step_size must be float32 \[3\]"),
    ("lo", lambda a: 1.5, "lo must not exceed hi; got lo 1.5 and hi 1"),
    ("hi", lambda a: math.nan, "lo must not exceed hi"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[f"{w[0]}: {w[2][:30]}" for w in WRONG])
@pytest.mark.parametrize("op", ["linf_step", "l2_step"])
def test_wrong_arguments(attack_inputs, op, name, change, message):
    a = chosen(attack_inputs((3, 4), torch.float32))
    a[name] = change(a)
    if name == "x" and a["x"].dim() == 0:
        a["eps"] = a["step_size"] = torch.zeros(3)
    before = a["x"].clone()
    for function in (getattr(ops, op), getattr(ops, f"{op}_")):
        with pytest.raises(RuntimeError, match=f"{op}: {message}") as caught:
            function(**a)
        assert torch.equal(a["x"], before), "changed before the check"
        assert f"{op}: " in str(caught.value).splitlines()[0]
