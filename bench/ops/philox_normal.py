"""philox_normal_ against torch's own generator.

    python -m bench.ops.philox_normal [--device cuda] [--threads 2]

torch's numbers depend on call order and device; ours on seed and sample index alone. The check compares ours with the reference,
and the moments of both.
"""

from __future__ import annotations

import torch

from bench import harness
from synthfast import ops
from synthfast.ops import reference

SHAPE = (512, 3, 32, 32)


def make_case(device: torch.device, dtype: torch.dtype) -> harness.Case:
    index = torch.arange(SHAPE[0], device=device)
    ours, theirs = (torch.empty(SHAPE, device=device, dtype=dtype) for _ in range(2))
    name = f"normals, {list(SHAPE)} {str(dtype).removeprefix('torch.')}"

    def check() -> None:
        ops.philox_normal_(ours, index, 1, 0)
        expected = reference.philox_normal_(torch.empty_like(ours), index, 1, 0)
        harness.close(ours, expected, 1e-5 if dtype == torch.float32 else 0.04, name)
        for values in (ours, theirs.normal_()):
            assert abs(values.float().mean().item()) < 0.01 and abs(values.float().std().item() - 1) < 0.01, name

    variants = {
        "philox_normal_": lambda: ops.philox_normal_(ours, index, 1, 0),
        "normal_": theirs.normal_,
        "randn_like": lambda: torch.randn_like(theirs),
    }
    return harness.Case(name, "philox_normal_", variants, check, ours.numel() * ours.element_size())


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    cases = [make_case(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    harness.run("philox_normal", cases, options)


if __name__ == "__main__":
    main()
