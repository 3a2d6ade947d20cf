"""quantize_uint8 against eager PyTorch and torch.compile.

python -m bench.ops.quantize_uint8 [--device cuda] [--threads 2]
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench import harness
from synthfast import ops

SHAPE = (512, 3, 32, 32)


def eager(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


def make_case(device: torch.device, layout: torch.memory_format, dtype: torch.dtype) -> harness.Case:
    torch.manual_seed(0)
    x = torch.randn(SHAPE, device=device).to(dtype).contiguous(memory_format=layout)
    name = f"to bytes, {list(SHAPE)} {str(dtype).removeprefix('torch.')}"
    name += " channels_last" if layout == torch.channels_last else ""
    compiled = torch.compile(eager, fullgraph=True)

    def check() -> None:
        # In 16-bit types the peers round before they clamp and scale, so a level of difference is theirs.
        for theirs in (eager(x), compiled(x)):
            harness.close(ops.quantize_uint8(x), theirs, 0 if dtype == torch.float32 else 1, name)

    variants = {
        "quantize_uint8": lambda: ops.quantize_uint8(x),
        "eager": lambda: eager(x),
        "torch.compile": lambda: compiled(x),
    }
    return harness.Case(name, "quantize_uint8", variants, check, x.numel() * (x.element_size() + 1))


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    kinds = [(torch.contiguous_format, torch.float32), (torch.channels_last, torch.float32)]
    if device.type == "cuda":
        kinds.append((torch.channels_last, torch.bfloat16))
    harness.run("quantize_uint8", [make_case(device, *kind) for kind in kinds], options)


if __name__ == "__main__":
    main()
