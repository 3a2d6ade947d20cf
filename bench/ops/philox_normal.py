"""philox_normal_ against torch's own generator.

    python -m bench.ops.philox_normal [--device cuda] [--threads 2]

torch's numbers depend on call order and device; ours on seed and sample index alone. The check compares ours with the reference,
and the moments of both.
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


def make_case(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> harness.Case:
    index = torch.arange(shape[0], device=device)
    ours, theirs = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
    name = f"normals, {harness.describe(shape, (dtype,))}"
    generator = torch.Generator(device).manual_seed(0)
    few = index[:512]

    def check() -> None:
        ops.philox_normal_(ours, index, 1, 0)
        expected = reference.philox_normal_(torch.empty_like(ours[:512]), few, 1, 0)
        harness.close(ours[:512], expected, 1e-5 if dtype == torch.float32 else 0.04, name)
        for values in (ours, theirs.normal_(generator=generator)):
            _check_moments(values, name)

    variants = {
        "philox_normal_": lambda: ops.philox_normal_(ours, index, 1, 0),
        "normal_": lambda: theirs.normal_(generator=generator),
        "randn_like": lambda: torch.randn_like(theirs),
    }
    return harness.Case(name, "philox_normal_", variants, check, ours.numel() * ours.element_size())


def _check_moments(values: Tensor, name: str) -> None:
    values = values.float()
    assert abs(values.mean().item()) < 0.01 and abs(values.std().item() - 1) < 0.01, name


def cases(device: torch.device) -> Iterator[harness.Case]:
    for shape in (SHAPE, LARGE) if device.type == "cuda" else (SHAPE,):
        for dtype in (torch.float32, torch.bfloat16):
            yield make_case(device, shape, dtype)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    harness.run("philox_normal", cases(harness.prepare(options)), options)


if __name__ == "__main__":
    main()
