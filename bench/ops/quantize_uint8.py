"""quantize_uint8 against eager PyTorch and torch.compile.

python -m bench.ops.quantize_uint8 [--device cuda] [--threads 2]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import harness
from synthfast import ops
from synthfast.ops import reference

SHAPE = (512, 3, 32, 32)
LARGE = (16384, 3, 32, 32)  # beyond a GPU's cache


def eager(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


def eager_in_place(x: Tensor) -> Tensor:
    """One temporary instead of four."""
    scaled = torch.mul(x.permute(0, 2, 3, 1), 127.5).add_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).contiguous()


def make_case(
    device: torch.device, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> harness.Case:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, device=device, generator=generator).to(dtype).contiguous(memory_format=layout)
    name = f"to bytes, {harness.describe(shape, (dtype,), layout)}"
    peers = {
        "eager": eager,
        "eager in place": eager_in_place,
        "torch.compile": torch.compile(eager, fullgraph=True),
    }

    def check() -> None:
        ours = ops.quantize_uint8(x)
        harness.close(ours, reference.quantize_uint8(x), 0, f"{name}: against the reference")
        for peer, function in peers.items():
            # In 16-bit types the peers round before they clamp and scale, so a level of difference is theirs. torch.compile
            # fuses the product and the sum, which moves a value that lies half-way between two levels.
            theirs = function(x)
            exact = dtype == torch.float32 and peer != "torch.compile"
            harness.close(ours, theirs, 0 if exact else 1, f"{name}: {peer}")
            if dtype == torch.float32:
                assert (ours != theirs).float().mean().item() < 1e-4, f"{name}: {peer} differs too often"

    variants = {"quantize_uint8": lambda: ops.quantize_uint8(x)}
    variants |= {peer: lambda function=function: function(x) for peer, function in peers.items()}
    return harness.Case(name, "quantize_uint8", variants, check, x.numel() * (x.element_size() + 1))


def cases(device: torch.device) -> Iterator[harness.Case]:
    kinds = [
        (SHAPE, torch.contiguous_format, torch.float32),
        (SHAPE, torch.channels_last, torch.float32),
        (SHAPE, torch.channels_last, torch.bfloat16),
    ]
    if device.type == "cuda":
        kinds += [(LARGE, layout, torch.float32) for layout in (torch.contiguous_format, torch.channels_last)]
    for kind in kinds:
        yield make_case(device, *kind)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    harness.run("quantize_uint8", cases(harness.prepare(options)), options)


if __name__ == "__main__":
    main()
