"""The attack operations on a GPU against the CPU: bit for bit, norms included, because both add squares in one order."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from synthfast import ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if ops.cuda_problem is not None:
    pytest.skip(f"no CUDA kernels: {ops.cuda_problem}", allow_module_level=True)

DEVICE = torch.device("cuda")
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "channel_slice", "expanded")
STEP = ("x", "gradient", "origin", "eps", "step_size")
IMAGES = ("x", "previous", "gradient", "origin")
ENOUGH = 24 << 30


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


def on(device, a):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in a.items()}


def sized(a, norm):
    size = math.sqrt(a["x"][0].numel()) if norm == "l2" and a["x"].numel() else 1.0
    return {**a, "eps": a["eps"] * size, "step_size": a["step_size"] * size}


def every_result(a, norm, lo=0.0, hi=1.0):
    """Name to result of every operation, in place ones on copies."""
    step = [a[name] for name in STEP]
    index = torch.arange(len(a["x"]), device=a["x"].device) * 2**40
    plain, in_place = (ops.linf_step, ops.linf_step_) if norm == "linf" else (ops.l2_step, ops.l2_step_)
    yield "step", plain(*step, lo, hi)
    yield "step_", in_place(step[0].clone(), *step[1:], lo, hi)
    rest = [a[name] for name in ("gradient", "origin", "eps", "step_size", "momentum")]
    yield "apgd_step", ops.apgd_step(a["x"], a["previous"], *rest, norm, lo, hi)
    yield "apgd_step_", ops.apgd_step_(a["previous"].clone(), a["x"], *rest, norm, lo, hi)
    yield "ball_start", ops.ball_start(a["origin"], index, a["eps"], norm, -5, 77, lo, hi)


@pytest.fixture
def same_on_both(same_bits):
    """Every operation on the GPU gives what it gives on the CPU; `moved` overrides the arguments that are moved there."""

    def compare(a, norm, what="", lo=0.0, hi=1.0, moved=None):
        moved = on(DEVICE, a) if moved is None else moved
        for (name, expected), (_, ours) in zip(
            every_result(a, norm, lo, hi), every_result(moved, norm, lo, hi), strict=True
        ):
            assert ours.is_cuda
            same_bits(ours.cpu(), expected, (name, what))
            if name in ("step", "apgd_step", "ball_start"):
                assert ours.stride() == expected.stride(), (name, what)

    return compare


def test_every_size(attack_inputs, same_on_both, dtype, norm, sizes):
    for elements in (*sizes, 509, 510, 4094, 4095, 4097, 9000, 150_528):
        same_on_both(sized(attack_inputs((7, elements), dtype), norm), norm, elements)


def test_more_samples_than_blocks(attack_inputs, same_on_both, dtype, norm):
    for shape in ((9000, 65), (3000, 3, 32, 32)):
        same_on_both(sized(attack_inputs(shape, dtype), norm), norm, shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(attack_inputs, same_on_both, lay_out, dtype, norm, layout):
    for other in LAYOUTS:
        a = sized(attack_inputs((3, 4, 5, 7), dtype), norm)
        wanted = dict(zip(IMAGES, (layout, other, other, layout), strict=True))
        mixed = {k: lay_out(v, wanted[k]) if k in wanted else v for k, v in a.items()}
        moved = {k: lay_out(v, wanted[k]) if k in wanted else v for k, v in on(DEVICE, a).items()}
        same_on_both(mixed, norm, (layout, other), moved=moved)


def test_misaligned(attack_inputs, same_on_both, dtype, norm):
    a = sized(attack_inputs((4, 640), dtype), norm)
    for name in IMAGES:
        moved = on(DEVICE, a)
        room = torch.zeros(4 * 640 + 1, dtype=dtype, device=DEVICE)
        room[1:] = moved[name].flatten()
        same_on_both(a, norm, name, moved={**moved, name: room[1:].view(4, 640)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(every_16_bit_value, same_on_both, dtype, norm):
    every = every_16_bit_value(dtype).reshape(16, -1)
    a = {"x": every, "previous": every.flip(1), "gradient": every.flip(0), "origin": every.nan_to_num(0.25, 0.5, 0.75)}
    a |= {"step_size": torch.full((16,), 0.1), "momentum": torch.full((16,), 0.75)}
    for eps in (1e-40, 8 / 255, 1000.1):
        same_on_both({**a, "eps": torch.full((16,), eps)}, norm, eps, -math.inf, math.inf)


def test_inside(attack_inputs, assert_inside, dtype, norm):
    a = sized(attack_inputs((60, 3, 17, 19), dtype), norm)
    for name, v in every_result(on(DEVICE, a), norm):
        assert_inside(v.cpu(), a["origin"], a["eps"], norm, what=name)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(attack_inputs, dtype, norm, shape):
    for _, v in every_result(on(DEVICE, attack_inputs(shape, dtype)), norm):
        assert v.shape == shape
    torch.cuda.synchronize()


@pytest.mark.parametrize("stays", [*IMAGES, "eps", "step_size", "momentum"])
def test_arguments_on_two_devices(attack_inputs, norm, stays):
    a = attack_inputs((3, 4), torch.float32)
    mixed = {**on(DEVICE, a), stays: a[stays]}
    with pytest.raises(RuntimeError, match=r"apgd_step: .*device"):
        ops.apgd_step(**mixed, norm=norm)
    with pytest.raises(RuntimeError, match="ball_start: index must be int64"):
        ops.ball_start(a["origin"].to(DEVICE), torch.arange(3), 0.1, norm, 1)


def test_graph_capture_and_replay(attack_inputs, same_bits, norm):
    """One captured attack serves every batch: radii, steps and keys are read on the device."""
    shape = (16, 3, 8, 8)
    buffers = on(DEVICE, sized(attack_inputs(shape, torch.float32), norm))
    index = torch.arange(16, device=DEVICE)

    def attack(b, index):
        x = ops.ball_start(b["origin"], index, b["eps"], norm, 5)
        step = ops.linf_step_ if norm == "linf" else ops.l2_step_
        step(x, b["gradient"], b["origin"], b["eps"], b["step_size"])
        rest = (b["gradient"], b["origin"], b["eps"], b["step_size"], b["momentum"])
        return ops.apgd_step(x, b["previous"], *rest, norm)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attack(buffers, index)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attack(buffers, index)
    for k in range(3):
        fresh = sized(attack_inputs(shape, torch.float32), norm)
        for name, buffer in buffers.items():
            buffer.copy_(fresh[name])
        index.copy_(torch.arange(16) + 100 * k)
        graph.replay()
        same_bits(result.cpu(), attack(fresh, torch.arange(16) + 100 * k), k)


def test_another_stream(attack_inputs, same_bits, norm):
    """Work queued behind a slow kernel on a side stream: a launch on the default stream would read zeros."""
    a = sized(attack_inputs((64, 3, 32, 32), torch.float32), norm)
    expected = dict(every_result(a, norm))
    moved = on(DEVICE, a)
    late = {name: torch.zeros_like(moved[name]) for name in IMAGES}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for name in IMAGES:
            late[name].copy_(moved[name])
        ours = dict(every_result({**moved, **late}, norm))
    side.synchronize()
    for name, v in ours.items():
        same_bits(v.cpu(), expected[name], name)


def test_opcheck(attack_inputs, lay_out):
    registered = torch.ops.synthfast
    for layout in ("contiguous", "channels_last"):
        a = on(DEVICE, attack_inputs((2, 3, 4, 5), torch.float32))
        a = {k: lay_out(v, layout) if k in IMAGES else v for k, v in a.items()}
        step = tuple(a[name] for name in STEP)
        rest = tuple(a[name] for name in ("gradient", "origin", "eps", "step_size", "momentum"))
        for name in ("linf_step", "linf_step_", "l2_step", "l2_step_"):
            opcheck(getattr(registered, name).default, step)
        for number in (0, 1):
            opcheck(registered.apgd_step.default, (a["x"], a["previous"], *rest, number))
            opcheck(registered.apgd_step_.default, (a["previous"], a["x"], *rest, number))
            index = torch.arange(2, device=DEVICE)
            opcheck(registered.ball_start.default, (a["origin"], index, a["eps"], number, -3, 7))


@pytest.mark.skipif(torch.cuda.get_device_properties(0).total_memory < ENOUGH, reason="needs a GPU of 24 GiB")
def test_more_than_2_to_the_31_elements(same_bits, norm):
    """bfloat16, beyond what 32-bit offsets reach; the last samples are compared with the CPU."""
    n, shape = 70_000, (3, 101, 103)
    index, last = torch.arange(n, device=DEVICE), slice(n - 3, n)
    origin = torch.full((n, *shape), 0.5, dtype=torch.bfloat16, device=DEVICE)
    assert origin.numel() > 2**31
    x = ops.ball_start(origin, index, 9.0, norm, 1)
    few = origin[last].cpu()
    expected = ops.ball_start(few, index[last].cpu(), 9.0, norm, 1)
    same_bits(x[last].cpu(), expected)
    step = ops.linf_step_ if norm == "linf" else ops.l2_step_
    step(x, x, origin, 0.25, 0.1)
    same_bits(x[last].cpu(), step(expected, expected, few, 0.25, 0.1))
