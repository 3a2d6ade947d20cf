"""Winograd's 3x3 convolutions against torch's, forward and gradient for the input, with weights that stay the same.

    python -m bench.ops.winograd_conv3x3 [--threads 2]

On a CPU and in float32 only. The shapes are those of the four stages of a ResNet-18 for 32x32 images, and what lies around the
rule of synthfast.models.frozen by which a layer takes one or the other: few channels, images that do not fill the tiles, and few
images. Transformed weights are made beforehand, as in an attack; one case measures the making.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import harness
from synthfast import ops
from synthfast.ops import reference_nn

# N, C, K, H
STAGES = ((128, 64, 64, 32), (128, 128, 128, 16), (128, 256, 256, 8), (128, 512, 512, 4))
EDGES = (
    (128, 16, 16, 32),
    (32, 160, 160, 32),
    (64, 64, 64, 7),
    (64, 64, 64, 6),
    (64, 64, 64, 5),
    (64, 64, 64, 3),
    (1, 512, 512, 8),
)
TOLERANCE = 5e-5  # of outputs of size 1 to 6


def make_case(shape: tuple[int, int, int, int], backward: bool) -> harness.Case:
    n, c, k, h = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((n, c, h, h), generator=generator)
    weight = torch.randn((k, c, 3, 3), generator=generator) * (2 / (9 * c)) ** 0.5
    gradient = torch.randn((n, k, h, h), generator=generator)
    source, channels = (gradient, c) if backward else (x, k)
    transformed = ops.winograd_weights(weight, rotated=backward)

    def peer(layout: torch.memory_format) -> Callable[[], Tensor]:
        images, weights, gradients = (t.contiguous(memory_format=layout) for t in (x, weight, gradient))
        if not backward:
            return lambda: F.conv2d(images, weights, padding=1)
        one = [1, 1]
        return lambda: torch.ops.aten.convolution_backward(
            gradients, images, weights, None, one, one, one, False, [0, 0], 1, [True, False, False]
        )[0]

    images = source.contiguous(memory_format=torch.channels_last)
    run = ops.winograd_conv3x3_gradient if backward else ops.winograd_conv3x3
    variants: dict[str, Callable[[], object]] = {
        "winograd": lambda: run(images, transformed, channels),
        "eager channels_last": peer(torch.channels_last),
        "eager contiguous": peer(torch.contiguous_format),
    }
    what = "gradient for the input" if backward else "forward"
    title = f"{what}, {c} to {k} channels, {harness.describe((n, c, h, h), (torch.float32,))}"

    def check() -> None:
        few = min(n, 4)
        run_reference = reference_nn.winograd_conv3x3_gradient if backward else reference_nn.winograd_conv3x3
        expected = run_reference(source[:few], reference_nn.winograd_weights(weight, backward), channels)
        outputs = {name: function() for name, function in variants.items()}
        harness.close(outputs["winograd"][:few], expected, TOLERANCE, f"{title}: winograd against the reference")
        for name, output in outputs.items():
            harness.close(output, outputs["winograd"], TOLERANCE, f"{title}: {name}")

    return harness.Case(title, "winograd", variants, check, items=n)


def weights_case() -> harness.Case:
    """Making transformed weights anew, into memory that is there; beside it the memory traffic alone."""
    weight = torch.randn((512, 512, 3, 3), generator=torch.Generator().manual_seed(0))
    out = ops.winograd_weights(weight)

    def check() -> None:
        harness.close(out, reference_nn.winograd_weights(weight), 1e-5, "transformed weights")

    title = f"transformed weights, {harness.describe(tuple(weight.shape), (torch.float32,))}"
    variants = {"winograd_weights_": lambda: ops.winograd_weights_(out, weight)}
    return harness.Case(title, "winograd_weights_", variants, check, bytes_moved=4 * (weight.numel() + out.numel()))


def cases() -> Iterator[harness.Case]:
    for shape in STAGES:
        for backward in (False, True):
            yield make_case(shape, backward)
    for shape in EDGES:
        yield make_case(shape, False)
    yield weights_case()


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    if options.device == "cuda":
        sys.exit("bench.ops.winograd_conv3x3: the operation runs on CPUs only; give --device cpu")
    harness.prepare(options)
    with torch.no_grad():
        harness.run("winograd_conv3x3", cases(), options)


if __name__ == "__main__":
    main()
