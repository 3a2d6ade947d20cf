"""solver_step against eager PyTorch and torch.compile, noise included.

    python -m bench.ops.solver_step [--device cuda] [--threads 2]

torch.compile runs at each of its settings that matter here; the fastest is its best. Noise cannot be equal between generators:
the check compares the deterministic part exactly, and the noise with the reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import harness
from synthfast import ops
from synthfast.ops import reference

SHAPE = (512, 3, 32, 32)
DDPM = (1.2, -0.6, 0.69, 0.3, 0.0, 0.1, 1.0, -1.0, 1.0)
MULTISTEP = (1.1, -0.5, 0.6, 0.7, -0.3, 0.0, 1.0, -1.0, 1.0)
GUIDED = (1.1, -0.5, 0.6, 0.4, 0.0, 0.0, 2.5, -1.0, 1.0)


def eager(row: tuple[float, ...], parts: str) -> Callable[..., Tensor]:
    """The stage as one would write it in PyTorch: ``parts`` of "z" (noise), "p" (history), "u" (guidance)."""
    kx, km, ax, ad, ap, az, w, lo, hi = row

    def step(x: Tensor, m: Tensor, p: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        if "u" in parts:
            m = mu + w * (m - mu)
        d = (kx * x + km * m).clamp(lo, hi)
        result = ax * x + ad * d
        if "p" in parts:
            result = result + ap * p
        if "z" in parts:
            result = result + az * torch.randn_like(x)
        return result, d

    return step


def make_case(
    title: str,
    row: tuple[float, ...],
    parts: str,
    device: torch.device,
    layout: torch.memory_format,
    dtype: torch.dtype,
) -> harness.Case:
    torch.manual_seed(0)
    x, m, p, mu = (torch.randn(SHAPE, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(4))
    index = torch.arange(SHAPE[0], device=device)
    coefficients = torch.tensor(row, device=device)
    plain = eager(row, parts)
    unconditional, previous = (mu if "u" in parts else None), (p if "p" in parts else None)
    state, history = x.clone(), p.clone()

    def fused() -> tuple[Tensor, Tensor]:
        return ops.solver_step(
            x, m, coefficients, index, seed=1, step=2, unconditional=unconditional, previous=previous
        )

    def fused_in_place() -> None:
        ops.solver_step_(
            state,
            m,
            coefficients,
            index,
            seed=1,
            step=2,
            unconditional=unconditional,
            history=history if "p" in parts else None,
        )

    settings = {"torch.compile": {}, "torch.compile fallback_random": {"fallback_random": True}}
    if "z" not in parts:
        settings.pop("torch.compile fallback_random")
    compiled = {
        name: torch.compile(eager(row, parts), fullgraph=True, options=options) for name, options in settings.items()
    }

    # The in-place form of the peer, for the same memory traffic as ours: x' over x, D over the history.
    def plain_in_place(x: Tensor, m: Tensor, p: Tensor, mu: Tensor) -> None:
        result, d = plain(x, m, p, mu)
        x.copy_(result)
        if "p" in parts:
            p.copy_(d)

    best = {"fallback_random": True} if "z" in parts else {}
    compiled_in_place = torch.compile(plain_in_place, fullgraph=True, options=best)
    peer_state, peer_history = x.clone(), p.clone()

    def check() -> None:
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        ours = fused()
        expected = reference.solver_step(
            x, m, coefficients, index, seed=1, step=2, unconditional=unconditional, previous=previous
        )
        for k, what in enumerate(("x'", "D")):
            harness.close(ours[k], expected[k], tolerance, f"{title}: {what} against the reference")
        fused_in_place()
        harness.close(state, expected[0], tolerance, f"{title}: x' in place")
        if "z" not in parts:
            compiled_in_place(peer_state, m, peer_history, mu)
            harness.close(peer_state, expected[0], tolerance, f"{title}: x' of torch.compile in place")
        for name, peer in {"eager": plain, **compiled}.items():
            theirs = peer(x, m, p, mu)
            harness.close(ours[1], theirs[1], tolerance, f"{title}: D of {name}")
            if "z" not in parts:
                harness.close(ours[0], theirs[0], tolerance, f"{title}: x' of {name}")
            else:  # equal in distribution: the noise left when the deterministic part is taken off
                quiet = eager(row, parts.replace("z", ""))(x, m, p, mu)[0].float()
                for result in (ours[0], theirs[0]):
                    noise = (result.float() - quiet) / row[5]
                    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.02, f"{title}: {name}"

    variants = {"fused": fused, "fused in place": fused_in_place, "eager": lambda: plain(x, m, p, mu)}
    variants |= {name: lambda peer=peer: peer(x, m, p, mu) for name, peer in compiled.items()}
    variants["torch.compile in place"] = lambda: compiled_in_place(peer_state, m, peer_history, mu)
    moved = x.numel() * x.element_size() * (4 + ("p" in parts) + ("u" in parts))  # x, m in; x', D out
    return harness.Case(title, "fused", variants, check, bytes_moved=moved)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    rows = (("ddpm, noise inside", DDPM, "z"), ("2M, history", MULTISTEP, "p"), ("guidance", GUIDED, "u"))
    kinds = [(torch.contiguous_format, torch.float32), (torch.channels_last, torch.float32)]
    if device.type == "cuda":
        kinds.append((torch.channels_last, torch.bfloat16))
    cases = []
    for title, row, parts in rows:
        for layout, dtype in kinds:
            name = f"{title}, {list(SHAPE)} {str(dtype).removeprefix('torch.')}"
            name += " channels_last" if layout == torch.channels_last else ""
            cases.append(make_case(name, row, parts, device, layout, dtype))
    with torch.no_grad():
        harness.run("solver_step", cases, options)


if __name__ == "__main__":
    main()
