"""l2_step against eager PyTorch and torch.compile.

    python -m bench.ops.l2_step [--device cuda] [--threads 2]

The peers add squares in the type of the images and do not round towards the origin, so their results may lie outside the ball.
torch.compile takes part in its functional form only: Inductor of torch 2.14 fails on the one in place (KeyError: 'buf1').
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


def functional(x: Tensor, g: Tensor, o: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    t = x + a * (g / norm_of(g)) - o
    return (o + t * (eps / norm_of(t)).clamp(max=1)).clamp(LO, HI)


def in_place(x: Tensor, g: Tensor, o: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    x.addcmul_(g, a / norm_of(g)).sub_(o)
    return x.mul_((eps / norm_of(x)).clamp_(max=1)).add_(o).clamp_(LO, HI)


def make_case(
    device: torch.device, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> harness.Case:
    name = f"step, {harness.describe(shape, (dtype,), layout)}"
    i = attack_cases.make_inputs(device, shape, layout, dtype, "l2")
    eps, a = i.column(i.eps), i.column(i.step_size)
    eager = {"eager": functional}
    placed = {"eager in place": in_place}
    for title, setting in attack_cases.settings(device, shape).items():
        eager[title] = torch.compile(functional, fullgraph=True, **setting)
    states = {title: i.x.clone() for title in (*placed, "ours")}

    def check() -> None:
        expected = reference.l2_step(i.x, i.gradient, i.origin, i.eps, i.step_size)
        tolerance = 1e-6 if dtype == torch.float32 else 0.02
        harness.close(ops.l2_step(i.x, i.gradient, i.origin, i.eps, i.step_size), expected, tolerance, name)
        peers = {title: lambda f=f: f(i.x, i.gradient, i.origin, eps, a) for title, f in eager.items()}
        peers |= {title: lambda f=f, t=title: f(states[t], i.gradient, i.origin, eps, a) for title, f in placed.items()}
        attack_cases.check(
            name,
            lambda: ops.l2_step_(states["ours"], i.gradient, i.origin, i.eps, i.step_size),
            peers,
            expected,
            tolerance,
        )

    variants: dict[str, Callable[[], object]] = {
        "l2_step_": lambda: ops.l2_step_(states["ours"], i.gradient, i.origin, i.eps, i.step_size),
        "l2_step_ functional": lambda: ops.l2_step(i.x, i.gradient, i.origin, i.eps, i.step_size),
    }
    for title, f in eager.items():
        variants[title] = lambda f=f: f(i.x, i.gradient, i.origin, eps, a)
    for title, f in placed.items():
        variants[title] = lambda f=f, t=title: f(states[t], i.gradient, i.origin, eps, a)
    return harness.Case(name, "l2_step_", variants, check, 4 * i.x.numel() * i.x.element_size())


def cases(device: torch.device) -> Iterator[harness.Case]:
    for shape, layout in (
        (SHAPE, torch.contiguous_format),
        (SHAPE, torch.channels_last),
        (attack_cases.large(device), torch.contiguous_format),
    ):
        yield make_case(device, shape, layout, torch.float32)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    with torch.no_grad():
        harness.run("l2_step", cases(device), options)


if __name__ == "__main__":
    main()
