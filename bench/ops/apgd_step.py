"""apgd_step in both norms against eager PyTorch and torch.compile.

    python -m bench.ops.apgd_step [--device cuda] [--threads 2]

torch.compile in place takes part in the l-infinity norm only: Inductor of torch 2.14 fails on the other (KeyError: 'buf3').
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

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def linf(x: Tensor, p: Tensor, g: Tensor, o: Tensor, eps: Tensor, a: Tensor, m: Tensor) -> Tensor:
    low, high = (o - eps).clamp(LO, HI), (o + eps).clamp(LO, HI)
    z = torch.minimum(torch.maximum(x + a * g.sign(), low), high)
    v = x + m * (z - x) + (1 - m) * (x - p)
    return torch.minimum(torch.maximum(v, low), high)


def _linf_in_place(x: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
    return p.copy_(linf(x, p, *rest))


def _l2_project(v: Tensor, o: Tensor, eps: Tensor) -> Tensor:
    t = v - o
    return (o + t * (eps / norm_of(t)).clamp(max=1)).clamp(LO, HI)


def l2(x: Tensor, p: Tensor, g: Tensor, o: Tensor, eps: Tensor, a: Tensor, m: Tensor) -> Tensor:
    z = _l2_project(x + a * (g / norm_of(g)), o, eps)
    return _l2_project(x + m * (z - x) + (1 - m) * (x - p), o, eps)


def make_case(device: torch.device, shape: tuple[int, ...], layout: torch.memory_format, norm: str) -> harness.Case:
    name = f"{norm}, {harness.describe(shape, (torch.float32,), layout)}"
    i = attack_cases.make_inputs(device, shape, layout, torch.float32, norm)
    columns = [i.column(value) for value in (i.eps, i.step_size, i.momentum)]
    step: Step = linf if norm == "linf" else l2
    peers: dict[str, Step] = {"eager": step}
    for title, setting in attack_cases.settings(device, shape).items():
        peers[title] = torch.compile(step, fullgraph=True, **setting)
        if norm == "linf":
            peers[f"{title} in place"] = torch.compile(_linf_in_place, fullgraph=True, **setting)
    previous = {title: i.previous.clone() for title in (*peers, "ours")}
    scalars = (i.eps, i.step_size, i.momentum, norm)

    def run(title: str) -> Tensor:
        p = previous[title] if title.endswith("in place") else i.previous
        return peers[title](i.x, p, i.gradient, i.origin, *columns)

    def check() -> None:
        expected = reference.apgd_step(i.x, i.previous, i.gradient, i.origin, *scalars)
        in_place = ops.apgd_step_(previous["ours"].clone(), i.x, i.gradient, i.origin, *scalars)
        harness.close(in_place, expected, 1e-6, name)
        attack_cases.check(
            name,
            lambda: ops.apgd_step(i.x, i.previous, i.gradient, i.origin, *scalars),
            {title: lambda title=title: run(title) for title in peers},
            expected,
            1e-6,
        )

    variants: dict[str, Callable[[], object]] = {
        "apgd_step_": lambda: ops.apgd_step_(previous["ours"], i.x, i.gradient, i.origin, *scalars),
        "apgd_step_ functional": lambda: ops.apgd_step(i.x, i.previous, i.gradient, i.origin, *scalars),
    }
    variants |= {title: lambda title=title: run(title) for title in peers}
    return harness.Case(name, "apgd_step_", variants, check, 5 * i.x.numel() * i.x.element_size())


def cases(device: torch.device) -> Iterator[harness.Case]:
    for norm in ("linf", "l2"):
        yield make_case(device, SHAPE, torch.contiguous_format, norm)
        yield make_case(device, SHAPE, torch.channels_last, norm)
        if device.type == "cuda":
            yield make_case(device, attack_cases.LARGE_CUDA, torch.contiguous_format, norm)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    with torch.no_grad():
        harness.run("apgd_step", cases(device), options)


if __name__ == "__main__":
    main()
