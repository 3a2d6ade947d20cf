"""apgd_step and apgd_step_: l-infinity bit for bit as the reference, l2 against float64, inside the ball and the box exactly."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from synthfast import ops
from synthfast.errors import UsageError
from synthfast.ops import reference_attacks as reference

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "channel_slice", "expanded")


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


def sized(a, norm):
    if norm == "linf" or not a["x"].numel():
        return {**a, "norm": norm}
    size = math.sqrt(a["x"][0].numel())
    return {**a, "eps": a["eps"] * size, "step_size": a["step_size"] * size, "norm": norm}


def in_place(a):
    a = {**a, "previous": a["previous"].clone()}
    previous = a.pop("previous")
    assert ops.apgd_step_(previous, **a) is previous
    return previous


def agrees(ours, a, same_bits, what=""):
    expected = reference.apgd_step(**a)
    if a["norm"] == "linf":
        return same_bits(ours, expected, what)
    unit = torch.finfo(a["x"].dtype).eps
    size = 1 + a["step_size"].abs().double().reshape(-1, *[1] * (a["x"].dim() - 1))
    difference = (ours.double() - expected.double()).abs()
    assert (difference <= unit * expected.abs() + 2.0**-20 * size).all(), f"{what}: {difference.max()}"


def test_equals_reference_at_every_size(attack_inputs, assert_inside, same_bits, dtype, norm, sizes):
    for elements in (*sizes, 4097, 9000):
        a = sized(attack_inputs((7, elements), dtype), norm)
        before = {k: v.clone() for k, v in a.items() if isinstance(v, torch.Tensor)}
        ours = ops.apgd_step(**a)
        agrees(ours, a, same_bits, elements)
        assert_inside(ours, a["origin"], a["eps"], norm, what=elements)
        for name, tensor in before.items():
            same_bits(a[name], tensor, f"{name} was changed")
        same_bits(in_place(a), ours, elements)


def test_with_full_momentum_it_is_the_plain_step(attack_inputs, dtype, norm):
    """momentum 1: v = P(x + (z - x)), up to the rounding of this sum."""
    a = sized(attack_inputs((6, 500), dtype), norm)
    ours = ops.apgd_step(**{**a, "momentum": 1.0})
    plain = ops.linf_step if norm == "linf" else ops.l2_step
    expected = plain(*(a[name] for name in ("x", "gradient", "origin", "eps", "step_size")))
    torch.testing.assert_close(ours, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_known_values(norm):
    """One pixel, where both norms are the same: z = 0.5 + 0.25, v = 0.5 + 0.75 * 0.25 + 0.25 * (0.5 - 0.25)."""
    x, previous, g = torch.tensor([[0.5]]), torch.tensor([[0.25]]), torch.tensor([[7.0]])
    v = ops.apgd_step(x, previous, g, x, 0.5, 0.25, 0.75, norm)
    assert v.item() == 0.5 + 0.1875 + 0.0625
    v = ops.apgd_step(x, previous, g, x, 0.125, 0.25, 0.75, norm)  # z and v are projected
    assert 0.625 - 1e-6 < v.item() <= 0.625
    v = ops.apgd_step(x, x, g, x, 0.5, 0.5, 0.5, norm, 0.0, 0.75)  # z is clamped to the box before the momentum
    assert v.item() == 0.625
    v = ops.apgd_step(x, previous, -g, x, 0.5, -0.25, 0.75, norm)
    assert v.item() == 0.75


@hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_inside_for_any_numbers(assert_inside, same_bits, dtype, norm, data):
    n = data.draw(st.integers(1, 20))
    largest = min(torch.finfo(dtype).max, 2.0**100)
    numbers = st.one_of(st.floats(0, 1, width=32), st.floats(-largest, largest, width=32))
    x, previous, origin = (
        torch.tensor([data.draw(st.lists(numbers, min_size=n, max_size=n))]).to(dtype) for _ in range(3)
    )
    gradients = st.sampled_from([0.0, 1.0, -2.0, 1e-45, 3e38]) if norm == "l2" else st.floats(width=32)
    lo, hi = data.draw(st.sampled_from([(0.0, 1.0), (0.1, 0.9), (-math.inf, math.inf)]))
    inside = (origin.double() >= lo) & (origin.double() <= hi)
    a = {
        "x": x,
        "previous": previous,
        "gradient": torch.tensor([data.draw(st.lists(gradients, min_size=n, max_size=n))]).to(dtype),
        "origin": torch.where(inside, origin, torch.tensor(0.25, dtype=dtype)),
        "eps": torch.tensor([data.draw(st.sampled_from([0.0, 1e-45, 1e-38, 8 / 255, 1.0, 2.0**100]))]),
        "step_size": torch.tensor([data.draw(st.sampled_from([0.5, -0.1, 1e-30, 1e30]))]),
        "momentum": torch.tensor([data.draw(st.sampled_from([0.75, 1.0, 0.0, 2.5]))]),
        "norm": norm,
        "lo": lo,
        "hi": hi,
    }
    ours = ops.apgd_step(**a)
    assert_inside(ours, a["origin"], a["eps"], norm, lo, hi, what=a)
    if norm == "linf":
        same_bits(ours, reference.apgd_step(**a), a)
    same_bits(in_place(a), ours, a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(attack_inputs, same_bits, lay_out, dtype, norm, layout):
    for other in LAYOUTS:
        a = sized(attack_inputs((3, 3, 4, 5), dtype), norm)
        for k, name in enumerate(("x", "previous", "gradient", "origin")):
            a[name] = lay_out(a[name], (layout, other, LAYOUTS[k], layout)[k])
        ours = ops.apgd_step(**a)
        agrees(ours, a, same_bits, (layout, other))
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert ours.is_contiguous(memory_format=wanted)
        if other == "expanded":
            continue
        previous = a.pop("previous")
        place = (previous.data_ptr(), previous.stride())
        ops.apgd_step_(previous, **a)
        assert place == (previous.data_ptr(), previous.stride())
        same_bits(previous, ours, (layout, other))


def test_tensors_may_be_the_same(attack_inputs, same_bits, dtype, norm):
    """In the first step x is also the previous image, and perhaps the origin."""
    a = sized(attack_inputs((3, 1000), dtype), norm)
    for name in ("previous", "origin"):
        a[name] = a["x"]
    expected = ops.apgd_step(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in a.items()})
    same_bits(ops.apgd_step(**a), expected)
    same_bits(ops.apgd_step_(**a), expected)


def test_sample_does_not_depend_on_the_batch_or_on_threads(attack_inputs, same_bits, dtype, norm):
    a = sized(attack_inputs((40, 3, 17, 31), dtype), norm)
    whole = ops.apgd_step(**a)
    for k in (0, 7, 39):
        one = {n: v[k : k + 1] if isinstance(v, torch.Tensor) else v for n, v in a.items()}
        same_bits(ops.apgd_step(**one)[0], whole[k], k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same_bits(ops.apgd_step(**a), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (3, 0)])
def test_empty(attack_inputs, dtype, norm, shape):
    a = sized(attack_inputs(shape, dtype), norm)
    assert ops.apgd_step(**a).shape == shape
    assert ops.apgd_step_(**a).shape == shape


WRONG = [
    ("previous", lambda a: a["x"][:, :3], r"previous must have the shape and device of x, \[3, 4\]"),
    ("previous", lambda a: a["x"].half(), "previous must have the type of x"),
    ("gradient", lambda a: a["x"][:2], "gradient must have the shape"),
    ("momentum", lambda a: torch.zeros(4), r"momentum must be float32 \[3\] .*; got \[4\]"),
    ("lo", lambda a: 2.0, "lo must not exceed hi; got lo 2 and hi 1"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[f"{w[0]}: {w[2][:30]}" for w in WRONG])
def test_wrong_arguments(attack_inputs, name, change, message):
    a = {**attack_inputs((3, 4), torch.float32), "norm": "l2"}
    a[name] = change(a)
    before = a["previous"].clone()
    for function in (ops.apgd_step, ops.apgd_step_):
        with pytest.raises(RuntimeError, match=f"apgd_step: {message}"):
            function(**a)
    assert torch.equal(a["previous"], before), "changed before the check"


def test_unknown_norm(attack_inputs):
    a = {**attack_inputs((3, 4), torch.float32), "norm": "L2"}
    for function in (ops.apgd_step, ops.apgd_step_):
        with pytest.raises(UsageError, match='apgd_step: norm must be "linf" or "l2"; got \'L2\''):
            function(**a)
    scalars = (a["eps"], a["step_size"], a["momentum"])
    with pytest.raises(RuntimeError, match=r"apgd_step: norm must be 0 \(linf\) or 1 \(l2\); got 2"):
        torch.ops.synthfast.apgd_step(a["x"], a["x"], a["x"], a["x"], *scalars, 2)
