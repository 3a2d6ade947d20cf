"""The operations inside PyTorch: opcheck (schema, fake kernels, dispatch), torch.compile without graph breaks or recompiling."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from synthfast import ops

OPS = torch.ops.synthfast
SHAPES = [(2, 3, 4, 5), (3, 7), (1,), (0, 3, 4, 4)]
IMAGE_LAYOUTS = ("channels_last", "sliced", "transposed", "channel_slice")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [OPS.philox_normal_.default, OPS.philox_uniform_.default], ids=str)
def test_opcheck_philox(op, shape, dtype):
    opcheck(op, (torch.empty(shape, dtype=dtype), torch.arange(shape[0]), -3, 7, 5))


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_opcheck_philox_layouts(layout, lay_out):
    opcheck(OPS.philox_normal_.default, (lay_out(torch.zeros(2, 3, 4, 5), layout), torch.arange(2), 0, 0, 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_solver_step(shape, pair, rows, solver_inputs):
    for name in ("plain", "all") if shape == SHAPES[0] else ("all",):
        arguments = tuple(solver_inputs(shape, pair, rows[name]).values())
        opcheck(OPS.solver_step.default, arguments)
        opcheck(OPS.solver_step_.default, arguments)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_opcheck_solver_step_layouts(layout, lay_out, rows, solver_inputs):
    """The fake kernel must predict the strides of the results: a wrong guess is wrong code from torch.compile."""
    arguments = solver_inputs((2, 3, 4, 5), (torch.float32, torch.float32), rows["all"])
    for changed in (("x",), ("model_output", "previous"), ("x", "unconditional")):
        mixed = tuple(lay_out(v, layout) if k in changed else v for k, v in arguments.items())
        opcheck(OPS.solver_step.default, mixed)
        opcheck(OPS.solver_step_.default, mixed)


@pytest.mark.parametrize("layout", ["contiguous", *IMAGE_LAYOUTS, "expanded"])
def test_opcheck_quantize(layout, lay_out, dtype):
    for shape in ((2, 3, 4, 5), (1, 1, 1, 1), (0, 3, 4, 4)):
        opcheck(OPS.quantize_uint8.default, (lay_out(torch.zeros(shape, dtype=dtype), layout),))


def fill(x, coefficients, index, seed, step):
    normal = ops.philox_normal_(torch.empty_like(x), index, seed, ops.Stream.NOISE, step)
    return normal, ops.philox_uniform_(torch.empty_like(x), index, seed, ops.Stream.LABEL, step)


def functional(x, coefficients, index, seed, step):
    return ops.solver_step(x, x.sin(), coefficients, index, seed=seed, step=step, unconditional=x.cos(), previous=x)


def in_place(x, coefficients, index, seed, step):
    state, history = x * 2, x.sin()
    ops.solver_step_(state, x.cos(), coefficients, index, seed=seed, step=step, history=history)
    return state, history


def quantize(x, coefficients, index, seed, step):
    return (ops.quantize_uint8(x * 2),)


def whole(x, coefficients, index, seed, step):
    """Every operation in one graph."""
    normal, uniform = fill(x, coefficients, index, seed, step)
    first, denoised = functional(normal + uniform, coefficients, index, seed, step)
    state, history = in_place(first, coefficients, index, seed, step)
    return state, history, denoised, *quantize(state, coefficients, index, seed, step)


CALLS = [(0, 0), (3, 1), (12, 7), (-5, 0), (2**62, 1), (-(2**63), 2**24 - 1), (1, 3)]  # seed, step


def run_all(function, compiled, x, coefficients):
    for k, (seed, step) in enumerate(CALLS):
        row, index = coefficients * (k + 1) / 7, torch.tensor([k, 2**40 * k])
        for ours, expected in zip(
            compiled(x, row, index, seed, step), function(x, row, index, seed, step), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
            assert ours.stride() == expected.stride()
        yield k


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [fill, functional, in_place, quantize])
def test_compiles_whole_and_does_not_recompile(function, layout, lay_out, rows):
    """New coefficients and indices never recompile. A new seed or step does once at most, when torch.compile learns that an
    integer argument varies; with ``dynamic=True`` it knows from the start."""
    x = lay_out(torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5), layout)
    coefficients = torch.tensor(rows["all"])
    for dynamic in (True, None):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for _ in run_all(function, compiled, x, coefficients):
            assert compilations() <= (1 if dynamic else 2)


def test_inductor(rows, generator):
    x = torch.randn(2, 3, 8, 8, generator=generator)
    compiled = torch.compile(whole, fullgraph=True, dynamic=True)
    coefficients = torch.tensor(rows["all"])
    for _ in run_all(whole, compiled, x, coefficients):
        torch.compiler.set_stance("fail_on_recompile")
    assert compilations() == 1
