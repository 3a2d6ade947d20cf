"""Winograd convolutions: the matrices, float64 convolutions, activations and residuals, layouts, threads, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from synthfast import ops
from synthfast.ops import reference_nn

# N, C, K, H, W: around the panels (32), vectors (4, 8, 16), tiles (4) and row blocks (4, 6, 12) of the kernels.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 4, 4),
    (1, 16, 32, 8, 8),
    (3, 40, 70, 7, 9),
    (1, 17, 33, 3, 5),
    (5, 31, 31, 2, 13),
    (13, 64, 64, 4, 4),
    (2, 64, 96, 32, 31),
    (30, 129, 65, 6, 4),
]
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "channel_slice")


def draw(shape, generator):
    """Input, weight, bias, scale, shift, residual and a gradient for the output, all float32."""
    n, c, k, h, w = shape
    sizes = ((n, c, h, w), (k, c, 3, 3), (k,), (c,), (c,), (n, k, h, w), (n, k, h, w))
    x, weight, *rest = (torch.randn(size, generator=generator) for size in sizes)
    return x, weight * (2 / (9 * c)) ** 0.5, *rest


def exact(x, weight, bias, scale, shift, relu, residual, gradient):
    """The output and the gradient for x, in float64 with PyTorch's convolution."""
    double = [t if t is None else t.double() for t in (x, weight, bias, scale, shift, residual, gradient)]
    x, weight, bias, scale, shift, residual, gradient = double
    x.requires_grad_()
    before = x if scale is None else x * scale[:, None, None] + shift[:, None, None]
    y = F.conv2d(before.relu() if relu else before, weight, bias, padding=1)
    y = y if residual is None else y + residual
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


def close(ours, expected, tolerance=1e-5):
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def test_matrices_multiply_polynomials(generator):
    """F(4, 3) in one dimension, exactly: four sums of six inputs with three weights."""
    output, weights, inputs = reference_nn.matrices()
    d, g = torch.randn(6, generator=generator).double(), torch.randn(3, generator=generator).double()
    expected = F.conv1d(d[None, None], g[None, None]).flatten()
    torch.testing.assert_close(output @ ((weights @ g) * (inputs @ d)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_reference_is_the_convolution(generator, shape):
    _, c, k, _, _ = shape
    x, weight, bias, scale, shift, residual, gradient = (t.double() for t in draw(shape, generator))
    expected = exact(x, weight, bias, scale, shift, True, residual, gradient)
    forward, backward = (reference_nn.winograd_weights(weight, rotated) for rotated in (False, True))
    keywords = {"scale": scale, "shift": shift, "relu": True}
    y = reference_nn.winograd_conv3x3(x.detach(), forward, k, bias, residual=residual, **keywords)
    torch.testing.assert_close(y, expected[0], rtol=0, atol=1e-12)
    dx = reference_nn.winograd_conv3x3_gradient(gradient, backward, c, x.detach(), **keywords)
    torch.testing.assert_close(dx, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights(generator, lay_out, layout, rotated):
    for k, c in ((1, 1), (5, 40), (32, 16), (70, 33)):
        weight = torch.randn(k, c, 3, 3, generator=generator)
        expected = reference_nn.winograd_weights(weight.double(), rotated).float()
        ours = ops.winograd_weights(lay_out(weight, layout), rotated)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
        out = torch.full_like(expected, torch.nan)
        assert ops.winograd_weights_(out, weight, rotated) is out
        assert torch.equal(out, ours)


@pytest.mark.parametrize("parts", ["", "bias", "relu", "affine", "residual", "bias affine residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(generator, shape, parts):
    x, weight, bias, scale, shift, residual, gradient = draw(shape, generator)
    bias, residual = bias if "bias" in parts else None, residual if "residual" in parts else None
    scale, shift = (scale, shift) if "affine" in parts else (None, None)
    relu = "relu" in parts or "affine" in parts
    y, dx = exact(x, weight, bias, scale, shift, relu, residual, gradient)
    _, c, k, _, _ = shape
    keywords = {"scale": scale, "shift": shift, "relu": relu}
    forward, backward = ops.winograd_weights(weight), ops.winograd_weights(weight, rotated=True)
    close(ops.winograd_conv3x3(x, forward, k, bias, residual=residual, **keywords), y)
    close(ops.winograd_conv3x3_gradient(gradient, backward, c, x if relu else None, **keywords), dx)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(generator, lay_out, same_bits, layout):
    x, weight, _, scale, shift, residual, gradient = draw((2, 24, 40, 6, 8), generator)
    forward, backward = ops.winograd_weights(weight), ops.winograd_weights(weight, rotated=True)
    keywords = {"scale": scale, "shift": shift, "relu": True}
    turned = [lay_out(t, layout) for t in (x, residual, gradient)]
    ours = ops.winograd_conv3x3(turned[0], forward, 40, residual=turned[1], **keywords)
    same_bits(ours, ops.winograd_conv3x3(x, forward, 40, residual=residual, **keywords))
    ours = ops.winograd_conv3x3_gradient(turned[2], backward, 24, turned[0], **keywords)
    same_bits(ours, ops.winograd_conv3x3_gradient(gradient, backward, 24, x, **keywords))


@pytest.mark.parametrize(("channels", "bound"), [(64, 6e-6), (512, 1.2e-5)])
def test_rounding(generator, channels, bound):
    """Far below 1e-4 of the largest output, after a ReLU, where nothing cancels in the transformed sums."""
    x = torch.randn(4, channels, 8, 8, generator=generator).relu()
    weight = torch.randn(64, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    close(ops.winograd_conv3x3(x, ops.winograd_weights(weight), 64), expected, bound)


def test_padding_is_zero_after_the_activation():
    """Where relu(shift) is not 0, padding before the activation would show at the border."""
    weight, ones = torch.ones(1, 1, 3, 3), torch.ones(1)
    y = ops.winograd_conv3x3(
        torch.zeros(1, 1, 4, 4), ops.winograd_weights(weight), 1, scale=ones, shift=ones, relu=True
    )
    torch.testing.assert_close(y[0, 0, :2, :3], torch.tensor([[4.0, 6, 6], [6, 9, 9]]))


def test_zero_and_nan_at_the_relu():
    """As torch.relu: no gradient at 0, and NaN stays NaN in both directions."""
    x = torch.tensor([0.0, -0.0, -1, 1, torch.nan]).reshape(5, 1, 1, 1)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    y = ops.winograd_conv3x3(x, ops.winograd_weights(weight), 1, relu=True).flatten()
    torch.testing.assert_close(y, torch.tensor([0.0, 0, 0, 1, torch.nan]), equal_nan=True)
    rotated = ops.winograd_weights(weight, rotated=True)
    dx = ops.winograd_conv3x3_gradient(torch.ones(5, 1, 1, 1), rotated, 1, x, relu=True).flatten()
    torch.testing.assert_close(dx, torch.tensor([0.0, 0, 0, 1, 1]))


def test_threads_and_batch_do_not_matter(generator, same_bits):
    """Few tiles (threads share a block), many tiles (each has its own), one image at a time."""
    before = torch.get_num_threads()
    try:
        for shape in ((2, 48, 80, 8, 8), (40, 48, 80, 9, 7)):
            x, weight, bias, *_ = draw(shape, generator)
            transformed = ops.winograd_weights(weight)
            torch.set_num_threads(1)
            expected = ops.winograd_conv3x3(x, transformed, 80, bias)
            same_bits(torch.cat([ops.winograd_conv3x3(one, transformed, 80, bias) for one in x.split(1)]), expected)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                same_bits(ops.winograd_conv3x3(x, transformed, 80, bias), expected, (shape, threads))
                same_bits(ops.winograd_weights(weight), transformed)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The variants that this processor would not choose, in processes of their own."""
    program = (
        "import torch; from synthfast import ops; from synthfast.ops import reference_nn as r\n"
        "torch.manual_seed(0)\n"
        "for n, c, k, h, w in ((3, 40, 70, 7, 9), (1, 7, 33, 4, 4)):\n"
        "    x, g, a, b = torch.randn(n, c, h, w), torch.randn(n, k, h, w), torch.randn(c), torch.randn(c)\n"
        "    t = torch.randn(k, c, 3, 3) / c ** 0.5\n"
        "    u, v = ops.winograd_weights(t), ops.winograd_weights(t, True)\n"
        "    options = dict(scale=a, shift=b, relu=True)\n"
        "    pairs = [(f.winograd_conv3x3(x, u, k, **options), f.winograd_conv3x3_gradient(g, v, c, x, **options))\n"
        "             for f in (ops, r)]\n"
        "    assert all((p - q).abs().max() < 1e-4 for p, q in zip(*pairs)), pairs\n"
        "print(ops.cpu_capability())\n"
    )
    environment = {**os.environ, "SYNTHFAST_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in (capability, "default")


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4), (2, 16, 4, 0)])
def test_empty(shape):
    y = ops.winograd_conv3x3(torch.zeros(shape), torch.zeros(36, 2, 16, 32), 40)
    assert y.shape == (shape[0], 40, *shape[2:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(generator, lay_out, layout):
    library = torch.ops.synthfast
    x, weight, bias, scale, shift, residual, gradient = draw((2, 5, 7, 4, 6), generator)
    x, residual, gradient = (lay_out(t, layout) for t in (x, residual, gradient))
    forward, backward = ops.winograd_weights(weight), ops.winograd_weights(weight, rotated=True)
    opcheck(library.winograd_weights_.default, (torch.empty_like(forward), weight))
    opcheck(library.winograd_conv3x3.default, (x, forward, 7, bias, scale, shift, True, residual))
    opcheck(library.winograd_conv3x3_gradient.default, (gradient, backward, 5, x, scale, shift, True))


X, U = torch.zeros(2, 16, 4, 4), torch.zeros(36, 2, 16, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x must be float32 \[N, C, H, W\] on the CPU; got \[16, 4, 4\]"),
        ({"x": X.double()}, r"x must be float32 .* got .* Double"),
        ({"x": X[:, :8]}, r"transformed must be float32 \[36, 2, 8, 32\] .* got \[36, 2, 16, 32\]"),
        ({"channels": 65}, r"transformed must be float32 \[36, 3, 16, 32\]"),
        ({"channels": 0}, "transformed must be"),
        ({"bias": torch.zeros(16)}, r"bias must be float32 \[40\] on the CPU; got \[16\]"),
        ({"scale": torch.zeros(16), "relu": True}, "scale and shift must be given both or not at all"),
        ({"scale": torch.zeros(16), "shift": torch.zeros(16)}, "and with relu"),
        ({"scale": torch.zeros(40), "shift": torch.zeros(16), "relu": True}, r"scale must be float32 \[16\]"),
        ({"residual": torch.zeros(2, 16, 4, 4)}, r"residual must be \[2, 40, 4, 4\]; got \[2, 16, 4, 4\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=f"winograd_conv3x3: .*{message}"):
        ops.winograd_conv3x3(**{"x": X, "transformed": U, "channels": 40, **arguments})


def test_wrong_arguments_of_the_others():
    with pytest.raises(RuntimeError, match="winograd_conv3x3_gradient: x must be given with relu"):
        ops.winograd_conv3x3_gradient(X, U, 40, relu=True)
    with pytest.raises(RuntimeError, match="winograd_conv3x3_gradient: x must be given with relu"):
        ops.winograd_conv3x3_gradient(X, U, 40, torch.zeros(2, 40, 4, 4))
    for weight in (torch.zeros(4, 4, 5, 5), torch.zeros(4, 4), torch.zeros(4, 4, 3, 3).half(), torch.zeros(0, 4, 3, 3)):
        with pytest.raises(RuntimeError, match=r"winograd_weights: weight must be float32 \[K, C, 3, 3\]"):
            ops.winograd_weights(weight)
    with pytest.raises(RuntimeError, match=r"winograd_weights: out must be contiguous float32 \[36, 1, 4, 32\]"):
        ops.winograd_weights_(torch.zeros(36, 2, 4, 32), torch.zeros(4, 4, 3, 3))
