"""The attack operations inside PyTorch (opcheck, torch.compile), and on every instruction set of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from synthfast import ops

OPS = torch.ops.synthfast
SHAPES = [(2, 3, 4, 5), (3, 7), (1,), (0, 3, 4, 4)]
IMAGE_LAYOUTS = ("channels_last", "sliced", "transposed", "channel_slice")
STEP = ("x", "gradient", "origin", "eps", "step_size")
APGD = ("gradient", "origin", "eps", "step_size", "momentum")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def calls(a):
    """Every operation with its arguments."""
    step = tuple(a[name] for name in STEP)
    rest = tuple(a[name] for name in APGD)
    for name in ("linf_step", "linf_step_", "l2_step", "l2_step_"):
        yield getattr(OPS, name).default, (*step, 0.0, 0.9)
    for norm in (0, 1):
        yield OPS.apgd_step.default, (a["x"], a["previous"], *rest, norm)
        yield OPS.apgd_step_.default, (a["previous"], a["x"], *rest, norm)
        yield OPS.ball_start.default, (a["origin"], torch.arange(len(a["x"])), a["eps"], norm, -3, 7, 0.1, 0.9)


@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(attack_inputs, dtype, shape):
    for op, arguments in calls(attack_inputs(shape, dtype)):
        opcheck(op, arguments)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_opcheck_layouts(attack_inputs, lay_out, layout):
    """The fake kernel must predict the strides of the results: a wrong guess is wrong code from torch.compile."""
    for changed in (("x", "origin"), ("gradient", "previous")):
        a = attack_inputs((2, 3, 4, 5), torch.float32)
        mixed = {k: lay_out(v, layout) if k in changed else v for k, v in a.items()}
        for op, arguments in calls(mixed):
            opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def attack(x, gradient, origin, eps, step_size, momentum, index, seed, norm):
    """Every operation of one norm in one graph, in place and not."""
    start = ops.ball_start(origin, index, eps, norm, seed, 3)
    if norm == "linf":
        first = ops.linf_step(start, gradient, origin, eps, step_size)
        second = ops.linf_step_(first * 1, gradient.cos(), origin, eps, step_size)
    else:
        first = ops.l2_step(start, gradient, origin, eps, step_size)
        second = ops.l2_step_(first * 1, gradient.cos(), origin, eps, step_size)
    third = ops.apgd_step(second, first, gradient.sin(), origin, eps, step_size, momentum, norm)
    return third, ops.apgd_step_(second, third, gradient, origin, eps, step_size, 0.75, norm)


@pytest.mark.parametrize(("norm", "backend"), [("linf", "aot_eager"), ("l2", "aot_eager"), ("l2", "inductor")])
def test_compiles_whole_and_does_not_recompile(attack_inputs, norm, backend):
    compiled = torch.compile(attack, fullgraph=True, backend=backend, dynamic=True)
    for k in range(4):
        a = attack_inputs((3, 3, 8, 8), torch.float32)
        scalars = [a[name] * (k + 1) for name in ("eps", "step_size")]
        images = [a[name] for name in ("x", "gradient", "origin")]
        arguments = (*images, *scalars, a["momentum"], torch.tensor([k, 2**40 * k, -k]), 3 + 2 * k, norm)
        for ours, expected in zip(compiled(*arguments), attack(*arguments), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        torch.compiler.set_stance("fail_on_recompile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


HASHES = """
import hashlib, math, torch
from synthfast import ops
digest, draw = hashlib.sha256(), torch.Generator().manual_seed(0)
def add(tensor):
    tensor = tensor.masked_fill(tensor.isnan(), 0).contiguous()
    digest.update(tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy().tobytes())
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).reshape(64, -1).to(dtype)
    every = every.nan_to_num(0.5, 1e30 if dtype == torch.float32 else 7.0, -7.0)
    for elements in (1, 7, 15, 16, 17, 33, 511, 513, 1024, 5000):
        n = 12
        x, previous, gradient, origin = (
            torch.randn(n, elements, generator=draw).mul(0.3).add(0.5).to(dtype) for _ in range(4)
        )
        gradient[:, ::3], gradient[-1, ::5] = 0, math.nan
        origin = origin.clamp(0, 1)
        scalars = [torch.rand(n, generator=draw) * scale for scale in (0.2, 0.2, 1)]
        scalars[0][:3] = torch.tensor([0.0, 1e-9, 1e-40])
        index = torch.arange(n) * 2**40
        for lo, hi in ((0.0, 1.0), (-math.inf, math.inf), (0.1, 0.3)):
            add(ops.linf_step(x, gradient, origin, *scalars[:2], lo, hi))
            add(ops.l2_step(x, gradient, origin, scalars[0] * 9, scalars[1] * 9, lo, hi))
            for norm in ("linf", "l2"):
                add(ops.apgd_step(x, previous, gradient, origin, *scalars, norm, lo, hi))
                add(ops.ball_start(origin, index, scalars[0], norm, 5, 6, lo, hi))
    for eps in (0.0, 1e-40, 2.0**-24, 8 / 255, 1.0, 1e30, math.inf):
        for box in ((-math.inf, math.inf), (-1.0, 1.0), (0.1, 0.9)):
            for sign in (-1.0, 1.0):
                add(ops.linf_step(every, every.flip(0), every, eps, sign * 0.3, *box))
                add(ops.linf_step(every.flip(1), every.flip(0), every, eps, sign * 1e-9, *box))
                add(ops.apgd_step(every, every.flip(1), every.flip(0), every, eps, sign, 0.75, "linf", *box))
                add(ops.l2_step(every, every.flip(0), every, eps, sign, *box))
print(ops.cpu_capability(), digest.hexdigest())
"""


def test_cpu_variants_give_the_same_bits(capsys):
    """This process runs the best variant of the machine; the slower ones run in processes of their own."""
    wanted = ("default", "avx2", "avx512")
    best = wanted.index(ops.cpu_capability())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HASHES],
            env={**os.environ, "SYNTHFAST_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in wanted[:best]
    ]
    exec(HASHES, {})
    lines = [process.communicate(timeout=120)[0].split() for process in running]
    lines.append(capsys.readouterr().out.split())
    assert [capability for capability, _ in lines] == list(wanted[: best + 1])
    assert len({digest for _, digest in lines}) == 1, lines
