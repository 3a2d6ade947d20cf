"""linf_step against eager PyTorch, torch.compile, and an addcmul_ with the same memory traffic.

    python -m bench.ops.linf_step [--device cuda] [--threads 2]

The peers do what an attack writes, x + a sign(g), clamped to the ball and to the box. They do not round their bounds inwards, so
their results may lie outside the ball by a unit in the last place. addcmul_ reads three tensors and writes one, as our form in
place does, and computes something else: it shows how fast memory allows any such operation to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import harness
from bench.harness import TRAFFIC
from bench.ops import attack_cases
from bench.ops.attack_cases import HI, LO, SHAPE
from synthfast import ops
from synthfast.ops import reference_attacks as reference

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def functional(x: Tensor, g: Tensor, o: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    v = x + a * g.sign()
    return torch.minimum(torch.maximum(v, o - eps), o + eps).clamp(LO, HI)


def in_place(x: Tensor, g: Tensor, o: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """With as few new tensors as PyTorch's in-place operations allow."""
    x.addcmul_(g.sign(), a)
    torch.minimum(x, o + eps, out=x)
    torch.maximum(x, o - eps, out=x)
    return x.clamp_(LO, HI)


def in_place_fused(x: Tensor, g: Tensor, o: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """What torch.compile turns into one loop that writes over x."""
    return x.copy_(functional(x, g, o, eps, a))


def make_case(
    device: torch.device, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> harness.Case:
    name = f"step, {harness.describe(shape, (dtype,), layout)}"
    i = attack_cases.make_inputs(device, shape, layout, dtype, "linf")
    eps, a = i.column(i.eps), i.column(i.step_size)
    eager: dict[str, Step] = {"eager": functional}
    placed: dict[str, Step] = {"eager in place": in_place}
    for title, setting in attack_cases.settings(device, shape).items():
        eager[title] = torch.compile(functional, fullgraph=True, **setting)
        placed[f"{title} in place"] = torch.compile(in_place_fused, fullgraph=True, **setting)
    states = {title: i.x.clone() for title in (*placed, TRAFFIC, "ours")}

    def check() -> None:
        expected = reference.linf_step(i.x, i.gradient, i.origin, i.eps, i.step_size)
        tolerance = 2e-7 if dtype == torch.float32 else 0.02
        harness.close(ops.linf_step(i.x, i.gradient, i.origin, i.eps, i.step_size), expected, 0, name)
        peers = {title: lambda f=f: f(i.x, i.gradient, i.origin, eps, a) for title, f in eager.items()}
        peers |= {title: lambda f=f, t=title: f(states[t], i.gradient, i.origin, eps, a) for title, f in placed.items()}
        attack_cases.check(
            name,
            lambda: ops.linf_step_(states["ours"], i.gradient, i.origin, i.eps, i.step_size),
            peers,
            expected,
            tolerance,
        )

    variants: dict[str, Callable[[], object]] = {
        "linf_step_": lambda: ops.linf_step_(states["ours"], i.gradient, i.origin, i.eps, i.step_size),
        "linf_step_ functional": lambda: ops.linf_step(i.x, i.gradient, i.origin, i.eps, i.step_size),
    }
    for title, f in eager.items():
        variants[title] = lambda f=f: f(i.x, i.gradient, i.origin, eps, a)
    for title, f in placed.items():
        variants[title] = lambda f=f, t=title: f(states[t], i.gradient, i.origin, eps, a)
    variants[TRAFFIC] = lambda: states[TRAFFIC].addcmul_(i.gradient, i.origin, value=1e-9)
    return harness.Case(name, "linf_step_", variants, check, 4 * i.x.numel() * i.x.element_size())


def cases(device: torch.device) -> Iterator[harness.Case]:
    kinds = [
        (SHAPE, torch.contiguous_format, torch.float32),
        (SHAPE, torch.channels_last, torch.float32),
        (SHAPE, torch.contiguous_format, torch.bfloat16),
        (attack_cases.large(device), torch.contiguous_format, torch.float32),
    ]
    for kind in kinds:
        yield make_case(device, *kind)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    with torch.no_grad():
        harness.run("linf_step", cases(device), options)


if __name__ == "__main__":
    main()
