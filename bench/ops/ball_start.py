"""ball_start in both norms against eager PyTorch and torch.compile, random numbers included.

    python -m bench.ops.ball_start [--device cuda] [--threads 2]

The peers draw from torch's generator, so the numbers differ: the check compares ours with the reference, and, of all, the mean
and variance of the displacement over eps. For l2 the peers use normals and a power of a uniform, as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import harness
from bench.ops import attack_cases
from bench.ops.attack_cases import HI, LO, SHAPE, norm_of
from synthfast import ops
from synthfast.ops import reference_attacks as reference


def linf(o: Tensor, eps: Tensor) -> Tensor:
    return (o + eps * (2 * torch.rand_like(o) - 1)).clamp(LO, HI)


def l2(o: Tensor, eps: Tensor) -> Tensor:
    z = torch.randn_like(o)
    radius = torch.rand_like(eps) ** (1 / o[0].numel())
    return (o + z * (eps * radius / norm_of(z))).clamp(LO, HI)


def _check_moments(t: Tensor, variance: float, name: str) -> None:
    mean, second = t.double().mean().item(), t.double().square().mean().item()
    assert abs(mean) < 0.02 * variance**0.5 and abs(second / variance - 1) < 0.02, f"{name}: {mean}, {second}"


def make_case(device: torch.device, shape: tuple[int, ...], norm: str) -> harness.Case:
    name = f"{norm}, {harness.describe(shape, (torch.float32,))}"
    elements = shape[1] * shape[2] * shape[3]
    origin = torch.full(shape, 0.5, device=device)
    eps = torch.full(shape[:1], 0.25 if norm == "linf" else 5.0, device=device)
    column = eps.reshape(-1, 1, 1, 1)
    index = torch.arange(shape[0], device=device)
    start = linf if norm == "linf" else l2
    peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": start,
        "torch.compile": torch.compile(start, fullgraph=True),
        "torch.compile fallback_random": torch.compile(start, fullgraph=True, options={"fallback_random": True}),
    }

    def check() -> None:
        ours = ops.ball_start(origin, index, eps, norm, 1)
        few = slice(0, 512)
        expected = reference.ball_start(origin[few], index[few], eps[few], norm, 1)
        harness.close(ours[few], expected, 1e-5, name)
        variance = 1 / 3 if norm == "linf" else 1 / (elements + 2)
        for title, values in {"ours": ours, **{t: f(origin, column) for t, f in peers.items()}}.items():
            _check_moments((values - origin) / column, variance, f"{name}: {title}")

    variants = {"ball_start": lambda: ops.ball_start(origin, index, eps, norm, 1)}
    variants |= {title: lambda f=f: f(origin, column) for title, f in peers.items()}
    return harness.Case(name, "ball_start", variants, check, 2 * origin.numel() * origin.element_size())


def cases(device: torch.device) -> Iterator[harness.Case]:
    for norm in ("linf", "l2"):
        for shape in (SHAPE, attack_cases.LARGE_CUDA) if device.type == "cuda" else (SHAPE,):
            yield make_case(device, shape, norm)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    with torch.no_grad():
        harness.run("ball_start", cases(device), options)


if __name__ == "__main__":
    main()
