"""The operations on a GPU against the CPU: bit for bit, because both compile the same arithmetic without contraction."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from synthfast import ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if ops.cuda_problem is not None:
    pytest.skip(f"no CUDA kernels: {ops.cuda_problem}", allow_module_level=True)

DEVICE = torch.device("cuda")
FILLS = {"normal": ops.philox_normal_, "uniform": ops.philox_uniform_}
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "channel_slice", "expanded")
ENOUGH = 16 << 30


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.fixture
def same_results(same_bits):
    """The results of a call on the GPU and of the same call on the CPU."""

    def compare(ours, expected, what=""):
        for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert a.is_cuda
            same_bits(a.cpu(), b, (what, k))

    return compare


@pytest.mark.parametrize("fill", FILLS)
def test_philox(fill, dtype, sizes, same_bits):
    for elements in (*sizes, 100_003):
        index = torch.tensor([0, 2**40 + 1, -1])
        for where in ((0, 0, 0), (-(2**62), 255, 2**24 - 1)):
            expected = FILLS[fill](torch.empty(3, elements, dtype=dtype), index, *where)
            ours = FILLS[fill](torch.empty(3, elements, dtype=dtype, device=DEVICE), index.to(DEVICE), *where)
            same_bits(ours.cpu(), expected, (elements, where))


def test_philox_many_samples_and_layouts(dtype, same_bits, lay_out):
    """More work items than threads, so that the grid-stride loop turns; and memory that does not start at 16 bytes."""
    index = torch.arange(200_000)
    expected = ops.philox_normal_(torch.empty(len(index), 12, dtype=dtype), index, 3, 0)
    ours = ops.philox_normal_(torch.empty(len(index), 12, dtype=dtype, device=DEVICE), index.to(DEVICE), 3, 0)
    same_bits(ours.cpu(), expected)
    flat = torch.zeros(16 * 64 + 1, dtype=dtype, device=DEVICE)
    shifted = ops.philox_normal_(flat[1:].view(16, 64), index[:16].to(DEVICE), 3, 0)
    same_bits(shifted.cpu(), ops.philox_normal_(torch.empty(16, 64, dtype=dtype), index[:16], 3, 0))
    assert flat[0] == 0
    for layout in LAYOUTS[:-1]:
        base = torch.zeros(2, 3, 5, 7, dtype=dtype)
        expected = ops.philox_normal_(lay_out(base, layout), index[:2], 3, 0)
        ours = ops.philox_normal_(lay_out(base.to(DEVICE), layout), index[:2].to(DEVICE), 3, 0)
        same_bits(ours.cpu(), expected, layout)


def test_solver_step(solver_inputs, same_results, pair, row, sizes):
    for elements in sizes:
        arguments = solver_inputs((3, elements), pair, row)
        expected = ops.solver_step(**arguments)
        arguments = on(DEVICE, arguments)
        same_results(ops.solver_step(**arguments), expected, elements)
        x, history = arguments.pop("x"), arguments.pop("previous")
        ops.solver_step_(x, **arguments, history=history)
        same_results((x,) if history is None else (x, history), expected[: 1 + (history is not None)], elements)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_solver_step_layouts(solver_inputs, same_results, lay_out, pair, rows, layout):
    for other in LAYOUTS:
        arguments = solver_inputs((3, 4, 5, 7), pair, rows["all"])
        for key, wanted in (("x", layout), ("model_output", other), ("previous", other)):
            arguments[key] = lay_out(arguments[key], wanted)
        expected = ops.solver_step(**arguments)
        moved = on(DEVICE, arguments)
        for key, wanted in (("x", layout), ("model_output", other), ("previous", other)):
            moved[key] = lay_out(moved[key], wanted)
        ours = ops.solver_step(**moved)
        same_results(ours, expected, (layout, other))
        assert [t.stride() for t in ours] == [t.stride() for t in expected]


def test_solver_step_large_and_misaligned(solver_inputs, same_results, pair, rows):
    arguments = solver_inputs((700, 3, 32, 33), pair, rows["all"])
    expected = ops.solver_step(**arguments)
    same_results(ops.solver_step(**on(DEVICE, arguments)), expected)
    arguments = solver_inputs((4, 64), pair, rows["all"])
    expected = ops.solver_step(**arguments)
    moved = on(DEVICE, arguments)
    for key in ("x", "model_output", "unconditional", "previous"):
        room = torch.zeros(4 * 64 + 1, dtype=moved[key].dtype, device=DEVICE)
        room[1:] = moved[key].flatten()
        shifted = {**moved, key: room[1:].view(4, 64)}
        same_results(ops.solver_step(**shifted), expected, key)


def test_solver_step_in_place_writes_only_its_batch(solver_inputs, same_results, rows):
    arguments = solver_inputs((3, 61), (torch.float32, torch.float32), rows["all"])
    expected = ops.solver_step(**arguments)
    moved = on(DEVICE, arguments)
    room = torch.full((5, 61), 7.0, device=DEVICE)
    room[1:4] = moved.pop("x")
    history = moved.pop("previous")
    ops.solver_step_(room[1:4], **moved, history=history)
    same_results((room[1:4], history), expected)
    assert (room[[0, 4]] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(conversions, every_16_bit_value, same_results, dtype):
    """On a GPU the conversions are machine instructions; the CPU code does them by integer arithmetic."""
    for what, arguments in conversions(dtype):
        same_results(ops.solver_step(**on(DEVICE, arguments)), ops.solver_step(**arguments), what)
    x = every_16_bit_value(dtype)
    same_results((ops.quantize_uint8(x.to(DEVICE)),), (ops.quantize_uint8(x),))


def test_solver_step_bounds_and_nan(solver_inputs, same_results, pair, rows):
    for lo, hi in ((-1, 1), (-torch.inf, torch.inf), (0, torch.inf)):
        arguments = solver_inputs((2, 40), pair, (*rows["all"][:7], lo, hi))
        for key, value in (("x", torch.nan), ("x", torch.inf), ("model_output", -torch.inf), ("previous", torch.nan)):
            arguments[key][1, 7 * len(key) % 40] = value
        same_results(ops.solver_step(**on(DEVICE, arguments)), ops.solver_step(**arguments), (lo, hi))


def test_solver_step_without_the_history_it_needs(solver_inputs, rows):
    """The coefficients lie in device memory, so the host cannot refuse; the result must not look right."""
    arguments = {**solver_inputs((2, 40), (torch.float32, torch.float32), rows["all"]), "previous": None}
    assert ops.solver_step(**on(DEVICE, arguments))[0].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_uint8(generator, same_bits, lay_out, dtype, layout):
    for channels in (1, 2, 3, 4, 5):
        for n, h, w in ((1, 1, 1), (2, 1, 5), (2, 4, 4), (3, 7, 9), (1, 16, 16), (2, 32, 33), (300, 32, 32)):
            x = lay_out(torch.randn(n, channels, h, w, generator=generator).to(dtype), layout)
            x = x.contiguous() if layout == "expanded" else x
            x[0, 0, 0, 0], x[-1, -1, -1, -1] = torch.nan, torch.inf
            ours = ops.quantize_uint8(lay_out(x.to(DEVICE), layout))
            same_bits(ours.cpu(), ops.quantize_uint8(lay_out(x, layout)), (n, channels, h, w))


def test_quantize_uint8_misaligned(generator, same_bits, dtype):
    x = torch.randn(2 * 3 * 16 * 16 + 1, generator=generator).to(dtype)
    shifted = x.to(DEVICE)[1:].view(2, 3, 16, 16)
    same_bits(ops.quantize_uint8(shifted).cpu(), ops.quantize_uint8(x[1:].view(2, 3, 16, 16)))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(solver_inputs, rows, pair, shape):
    arguments = on(DEVICE, solver_inputs(shape, pair, rows["all"]))
    assert ops.solver_step(**arguments)[0].shape == shape
    assert ops.quantize_uint8(arguments["x"]).shape == (shape[0], *shape[2:], 3)
    ops.philox_normal_(arguments["x"], arguments["index"], 0, 0)
    torch.cuda.synchronize()


@pytest.mark.parametrize("stays", ["x", "model_output", "coefficients", "index", "unconditional", "previous"])
def test_arguments_on_two_devices(solver_inputs, rows, stays):
    arguments = solver_inputs((3, 4), (torch.float32, torch.float32), rows["all"])
    mixed = {**on(DEVICE, arguments), stays: arguments[stays]}
    with pytest.raises(RuntimeError, match=r"solver_step: .*device"):
        ops.solver_step(**mixed)


def test_fill_on_two_devices():
    with pytest.raises(RuntimeError, match="philox_normal_: index must be int64"):
        ops.philox_normal_(torch.zeros(3, 4, device=DEVICE), torch.arange(3), 0, 0)


def test_another_stream(solver_inputs, same_results, rows):
    """Work queued behind a slow kernel on a side stream: a launch on the default stream would read zeros."""
    arguments = solver_inputs((64, 3, 32, 32), (torch.float32, torch.float32), rows["all"])
    expected = ops.solver_step(**arguments)
    moved = on(DEVICE, arguments)
    x = torch.zeros_like(moved["x"])
    history = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(moved.pop("x"))
        history.copy_(moved.pop("previous"))
        ops.solver_step_(x, **moved, history=history)
        filled = ops.philox_normal_(torch.zeros(1000, 100, device=DEVICE), torch.arange(1000, device=DEVICE), 1, 0)
        levels = ops.quantize_uint8(x)
    side.synchronize()
    same_results((x, history), expected)
    same_results((filled,), (ops.philox_normal_(torch.zeros(1000, 100), torch.arange(1000), 1, 0),))
    same_results((levels,), (ops.quantize_uint8(expected[0]),))


def test_graph_capture_and_replay(solver_inputs, same_results, rows):
    """One captured graph serves every batch and step: index and coefficients are read on the device."""
    pair = (torch.float32, torch.bfloat16)
    first = on(DEVICE, solver_inputs((16, 3, 8, 8), pair, rows["all"]))
    x, history = first.pop("x"), first.pop("previous")

    def step():
        ops.solver_step_(x, **first, history=history)
        return ops.quantize_uint8(x), ops.philox_uniform_(torch.empty_like(x), first["index"], 5, 1, 2)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # warms up what must not happen during capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        levels, uniforms = step()
    for name in ("all", "history", "noise", "history, noise"):
        other = solver_inputs((16, 3, 8, 8), pair, (*rows[name][:6], 1.5, *rows[name][7:]))
        if other["previous"] is None:
            other["previous"] = torch.zeros(16, 3, 8, 8)
        expected = ops.solver_step(**other)
        x.copy_(other["x"])
        history.copy_(other["previous"])
        for key in ("model_output", "unconditional", "coefficients", "index"):
            first[key].copy_(other[key])
        graph.replay()
        same_results((x, history, levels), (*expected, ops.quantize_uint8(expected[0])), name)
        same_results((uniforms,), (ops.philox_uniform_(torch.empty(16, 3, 8, 8), other["index"], 5, 1, 2),), name)


def test_under_torch_compile(solver_inputs, same_results, rows):
    def step(x, m, c, index, p):
        result, d = ops.solver_step(x, m, c, index, seed=-5, step=77, previous=p)
        return result, d, ops.quantize_uint8(result)

    arguments = solver_inputs((8, 3, 8, 8), (torch.float32, torch.float32), rows["history, noise"])
    expected = ops.solver_step(**arguments)
    moved = on(DEVICE, arguments)
    ours = torch.compile(step, fullgraph=True)(
        moved["x"], moved["model_output"], moved["coefficients"], moved["index"], moved["previous"]
    )
    same_results(ours, (*expected, ops.quantize_uint8(expected[0])))


def test_opcheck(solver_inputs, lay_out, pair, rows):
    registered = torch.ops.synthfast
    for shape, layout in (((2, 3, 4, 5), "contiguous"), ((2, 3, 4, 5), "channels_last"), ((0, 3, 4, 4), "contiguous")):
        arguments = on(DEVICE, solver_inputs(shape, pair, rows["all"]))
        arguments["x"] = lay_out(arguments["x"], layout)
        opcheck(registered.solver_step.default, tuple(arguments.values()))
        opcheck(registered.solver_step_.default, tuple(arguments.values()))
        opcheck(registered.quantize_uint8.default, (arguments["x"],))
        for op in (registered.philox_normal_.default, registered.philox_uniform_.default):
            opcheck(op, (arguments["x"], arguments["index"], -3, 7, 5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device(solver_inputs, same_results, rows):
    """Launches go to the device of the tensors, whichever is current."""
    arguments = solver_inputs((8, 3, 8, 8), (torch.float32, torch.float32), rows["all"])
    expected = ops.solver_step(**arguments)
    ours = ops.solver_step(**on(torch.device("cuda:1"), arguments))
    same_results(ours, expected)
    assert ours[0].device.index == 1 and torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.get_device_properties(0).total_memory < ENOUGH, reason="needs a GPU of 16 GiB")
def test_more_than_2_to_the_31_elements(same_bits):
    """bfloat16, beyond what 32-bit offsets reach; the last samples are compared with the CPU."""
    n, shape = 70_000, (3, 101, 103)
    index = torch.arange(n, device=DEVICE)
    x = torch.empty(n, *shape, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    ops.philox_normal_(x, index, 1, 0)
    row = torch.tensor([1.0, 0, 0.5, 0.25, 0, 0.125, 1, -1, 1])
    last = slice(n - 3, n)
    start = ops.philox_normal_(torch.empty(3, *shape, dtype=torch.bfloat16), index[last].cpu(), 1, 0)
    same_bits(x[last].cpu(), start)
    ops.solver_step_(x, x, row.to(DEVICE), index, seed=1, step=1)
    expected = ops.solver_step(start, start, row, index[last].cpu(), seed=1, step=1)[0]
    same_bits(x[last].cpu(), expected)
    same_bits(ops.quantize_uint8(x)[last].cpu(), ops.quantize_uint8(expected))
