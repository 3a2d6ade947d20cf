"""ball_start: uniform in the ball, inside it exactly, and keyed by sample alone."""

from __future__ import annotations

import math

import pytest
import torch

from synthfast import ops
from synthfast.errors import UsageError
from synthfast.ops import reference_attacks as reference

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "channel_slice", "expanded")


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


def radii(a, norm):
    return a["eps"] * (math.sqrt(a["origin"][0].numel()) if norm == "l2" else 1)


def agrees(ours, expected, same_bits, norm, what=""):
    if norm == "linf":
        return same_bits(ours, expected, what)
    difference = (ours.double() - expected.double()).abs()
    assert (difference <= torch.finfo(ours.dtype).eps * expected.abs() + 2.0**-20).all(), f"{what}: {difference.max()}"


def test_equals_reference_at_every_size(attack_inputs, assert_inside, same_bits, dtype, norm, sizes):
    index = torch.tensor([0, 5, -1, 2**40 + 3, 7, 2**62])
    for elements in (*sizes, 509, 510, 4094, 4095, 4096, 9000):
        a = attack_inputs((6, elements), dtype)
        eps = radii(a, norm)
        ours = ops.ball_start(a["origin"], index, eps, norm, -3, 12)
        agrees(ours, reference.ball_start(a["origin"], index, eps, norm, -3, 12), same_bits, norm, elements)
        assert_inside(ours, a["origin"], eps, norm, what=elements)


def kolmogorov(values):
    """Distance of an empirical distribution from the uniform one on [0, 1], times sqrt(n): above 2 with probability 7e-4."""
    values = values.double().flatten().sort().values
    n = len(values)
    grid = torch.arange(n, dtype=torch.float64)
    return max((values - grid / n).abs().max(), (values - (grid + 1) / n).abs().max()).item() * math.sqrt(n)


@pytest.mark.parametrize("elements", [1, 2, 3, 12, 510])
def test_uniform_in_the_l2_ball(elements):
    """radius^D is uniform in [0, 1], and no direction is preferred."""
    n = 20_000 if elements < 100 else 2_000
    origin = torch.full((n, elements), 0.5)
    t = (ops.ball_start(origin, torch.arange(n), 0.25, "l2", 1, lo=-1, hi=2) - origin).double() / 0.25
    radius = t.norm(dim=1)
    assert kolmogorov(radius**elements) < 2
    direction = t / radius[:, None]
    bound = 4.5 / math.sqrt(n)
    assert direction.mean(0).abs().max() < bound
    assert (direction.square().mean(0) * elements - 1).abs().max() < 1.5 * bound
    if elements > 1:
        assert (direction[:, 0] * direction[:, 1]).mean().abs() * elements < bound
        # A coordinate of a uniform point on the sphere of three dimensions is uniform (Archimedes).
    if elements == 3:
        assert kolmogorov(direction[:, 2] / 2 + 0.5) < 2


def test_uniform_in_the_linf_ball():
    origin = torch.full((50, 400), 0.5)
    t = (ops.ball_start(origin, torch.arange(50), 0.25, "linf", 1, lo=-1, hi=2) - origin) / 0.25
    assert kolmogorov(t / 2 + 0.5) < 2
    assert t.min() < -0.999 and t.max() > 0.999


def test_keyed_by_seed_step_and_index_alone(same_bits, dtype, norm):
    index = torch.tensor([9, 2**40, -5, 0])
    origin = torch.full((4, 3, 9, 19), 0.5, dtype=dtype)
    eps = 0.25 if norm == "linf" else 5.0
    whole = ops.ball_start(origin, index, eps, norm, 3, 4)
    for k in range(4):
        same_bits(ops.ball_start(origin[k : k + 1], index[k : k + 1], eps, norm, 3, 4)[0], whole[k], k)
    for changed in ((index + 1, 3, 4), (index, 2, 4), (index, 3, 5), (index, 3 + 2**40, 4)):
        other = ops.ball_start(origin, changed[0], eps, norm, *changed[1:])
        assert ((other != whole).float().mean(dim=(1, 2, 3)) > 0.5).all()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = origin[:1].expand(200, 3, 9, 19)
        keys = torch.arange(200)
        first = ops.ball_start(many, keys, eps, norm, 3, 4)
        torch.set_num_threads(1)
        same_bits(ops.ball_start(many, keys, eps, norm, 3, 4), first)
    finally:
        torch.set_num_threads(before)


def test_uses_the_stream_of_attacks(same_bits):
    origin, index = torch.zeros(2, 40), torch.tensor([4, 5])
    u = ops.philox_uniform_(torch.empty(2, 40), index, 7, ops.Stream.ATTACK, 3)
    same_bits(ops.ball_start(origin, index, 1.0, "linf", 7, 3, -1, 1), 2 * u - 1)
    z = ops.philox_normal_(torch.empty(2, 42), index, 7, ops.Stream.ATTACK, 3)
    expected = (z / z.norm(dim=1, keepdim=True))[:, :40]
    torch.testing.assert_close(ops.ball_start(origin, index, 1.0, "l2", 7, 3, -1, 1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_follow_storage_order(attack_inputs, same_bits, lay_out, dtype, norm, layout):
    a = attack_inputs((3, 3, 4, 5), dtype)
    origin, index = lay_out(a["origin"], layout), torch.arange(3)
    ours = ops.ball_start(origin, index, radii(a, norm), norm, 1)
    agrees(ours, reference.ball_start(origin, index, radii(a, norm), norm, 1), same_bits, norm)
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert ours.is_contiguous(memory_format=wanted)
    if layout == "channels_last":
        flat = origin.permute(0, 2, 3, 1).reshape(3, -1)
        same_bits(
            ours.permute(0, 2, 3, 1).reshape(3, -1), ops.ball_start(flat.contiguous(), index, radii(a, norm), norm, 1)
        )


def test_box_and_zero_radius(attack_inputs, assert_inside, same_bits, dtype, norm):
    a = attack_inputs((5, 300), dtype)
    origin, index = a["origin"].clamp(0.25, 0.75), torch.arange(5)
    v = ops.ball_start(origin, index, 20.0, norm, 1, 0, 0.2, 0.8)
    assert_inside(v, origin, torch.full((5,), 20.0), norm, 0.2, 0.8)
    for eps in (0.0, -1.0, torch.nan, 1e-45):
        if eps == 1e-45:
            assert_inside(ops.ball_start(origin, index, eps, norm, 1), origin, torch.full((5,), eps), norm)
        else:
            same_bits(ops.ball_start(origin, index, eps, norm, 1), origin, eps)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (3, 0)])
def test_empty(dtype, norm, shape):
    assert ops.ball_start(torch.zeros(shape, dtype=dtype), torch.arange(shape[0]), 0.1, norm, 1).shape == shape


WRONG = [
    ({"origin": torch.zeros(3, 4).double()}, "origin must be float32, bfloat16 or float16"),
    ({"origin": torch.zeros(())}, "origin must have a batch dimension"),
    ({"index": torch.arange(4)}, r"index must be int64 \[3\]"),
    ({"index": torch.arange(3).int()}, r"index must be int64 \[3\]"),
    ({"eps": torch.zeros(4)}, r"eps must be float32 \[3\]"),
    ({"step": 2**24}, r"step must lie in \[0, 2\^24\); got 16777216"),
    ({"step": -1}, r"step must lie in \[0, 2\^24\); got -1"),
    ({"lo": 2.0}, "lo must not exceed hi"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[w[1][:30] for w in WRONG])
def test_wrong_arguments(changes, message, norm):
    a = {"origin": torch.zeros(3, 4), "index": torch.arange(3), "eps": torch.zeros(3), "seed": 1, "step": 0, **changes}
    with pytest.raises(RuntimeError, match=f"ball_start: {message}"):
        ops.ball_start(**a, norm=norm)


def test_unknown_norm():
    with pytest.raises(UsageError, match='ball_start: norm must be "linf" or "l2"; got 2'):
        ops.ball_start(torch.zeros(3, 4), torch.arange(3), 0.1, 2, 1)
