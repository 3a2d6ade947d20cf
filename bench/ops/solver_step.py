"""solver_step against eager PyTorch and torch.compile, noise included.

    python -m bench.ops.solver_step [--device cuda] [--threads 2]

Both peers run in their natural form and in place; torch.compile runs at each setting that matters here, and the fastest of its
rows is its best. Coefficients are constants for the peers, which is the most that a compiler can ask for. Noise cannot be equal
between generators: the check compares the deterministic part value by value, and the noise in distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import harness
from synthfast import ops
from synthfast.ops import reference

SHAPE = (512, 3, 32, 32)
LARGE = (16384, 3, 32, 32)  # beyond a GPU's cache
DDPM = (1.2, -0.6, 0.69, 0.3, 0.0, 0.1, 1.0, -1.0, 1.0)
MULTISTEP = (1.1, -0.5, 0.6, 0.7, -0.3, 0.0, 1.0, -1.0, 1.0)
GUIDED = (1.1, -0.5, 0.6, 0.4, 0.0, 0.0, 2.5, -1.0, 1.0)
# Title, coefficients, parts: "z" noise, "p" history, "u" guidance.
ROWS = (("ddpm, noise inside", DDPM, "z"), ("2M, history", MULTISTEP, "p"), ("guidance", GUIDED, "u"))

Step = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def functional_peer(row: tuple[float, ...], parts: str) -> Step:
    """The stage as one would write it in PyTorch: (x', D) from x, model output, history and unconditional output."""
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


def in_place_peer(row: tuple[float, ...], parts: str) -> Step:
    """With as few passes and new tensors as PyTorch's in-place operations allow: x becomes x', the history D.

    torch's normals are many times slower on a CPU when the tensor is channels_last, so they are drawn in storage order.
    """
    kx, km, ax, ad, ap, az, w, lo, hi = row

    def step(x: Tensor, m: Tensor, p: Tensor, mu: Tensor) -> None:
        if "u" in parts:
            m = torch.lerp(mu, m, w)
        d = torch.mul(x, kx).add_(m, alpha=km).clamp_(lo, hi)
        x.mul_(ax).add_(d, alpha=ad)
        if "p" in parts:
            x.add_(p, alpha=ap)
            p.copy_(d)
        if "z" in parts:
            x.add_(_storage_order_randn(x), alpha=az)

    return step


def _storage_order_randn(x: Tensor) -> Tensor:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return torch.randn_like(x)
    n, c, h, w = x.shape
    return torch.randn((n, h, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


def compile_settings(parts: str, shape: tuple[int, ...], device: torch.device) -> dict[str, dict[str, Any]]:
    """Name to arguments of torch.compile."""
    settings: dict[str, dict[str, Any]] = {"torch.compile": {}}
    if "z" in parts:
        settings["torch.compile fallback_random"] = {"options": {"fallback_random": True}}
    if device.type == "cuda" and shape == LARGE:  # on a CPU it changes nothing for such loops; small ones are launches
        settings["torch.compile max-autotune"] = {"mode": "max-autotune-no-cudagraphs"}
    return settings


def make_case(
    title: str,
    row: tuple[float, ...],
    parts: str,
    device: torch.device,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> harness.Case:
    generator = torch.Generator(device).manual_seed(0)
    draws = (torch.randn(shape, device=device, generator=generator) for _ in range(4))
    x, m, p, mu = (
        t.to(dtype).contiguous(memory_format=layout)
        for t, dtype in zip(draws, (dtypes[0], dtypes[1], dtypes[0], dtypes[1]), strict=True)
    )
    index = torch.arange(shape[0], device=device)
    coefficients = torch.tensor(row, device=device)
    guidance = mu if "u" in parts else None

    def fused() -> tuple[Tensor, Tensor]:
        return ops.solver_step(
            x,
            m,
            coefficients,
            index,
            seed=1,
            step=2,
            unconditional=guidance,
            previous=p if "p" in parts else None,
        )

    state, history = x.clone(), p.clone()

    def fused_in_place() -> None:
        ops.solver_step_(
            state,
            m,
            coefficients,
            index,
            seed=1,
            step=2,
            unconditional=guidance,
            history=history if "p" in parts else None,
        )

    functional: dict[str, Step] = {"eager": functional_peer(row, parts)}
    in_place: dict[str, Step] = {"eager in place": in_place_peer(row, parts)}
    for name, setting in compile_settings(parts, shape, device).items():
        functional[name] = torch.compile(functional_peer(row, parts), fullgraph=True, **setting)
    if "z" in parts:
        name, setting = "torch.compile fallback_random in place", {"options": {"fallback_random": True}}
    else:
        name, setting = "torch.compile in place", {}
    in_place[name] = torch.compile(in_place_peer(row, parts), fullgraph=True, **setting)
    peer_states = {name: (x.clone(), p.clone()) for name in in_place}

    def check() -> None:
        """Ours against the reference; every peer against ours, with the noise taken off."""
        tolerance = 1e-5 if dtypes[0] == dtypes[1] == torch.float32 else 0.05  # peers round 16-bit values in between
        ours = fused()
        expected = reference.solver_step(
            x,
            m,
            coefficients,
            index,
            seed=1,
            step=2,
            unconditional=guidance,
            previous=p if "p" in parts else None,
        )
        for k, what in enumerate(("x'", "D")):
            harness.close(ours[k], expected[k], tolerance, f"{title}: {what} against the reference")
        quiet = functional_peer(row, parts.replace("z", ""))(x, m, p, mu)
        _check_result(title, "fused", ours[0], quiet[0], row[5], tolerance)
        fused_in_place()
        _check_result(title, "fused in place", state, quiet[0], row[5], tolerance)
        if "p" in parts:
            harness.close(history, ours[1], 0, f"{title}: history in place")
        for name, peer in functional.items():
            theirs = peer(x, m, p, mu)
            harness.close(ours[1], theirs[1], tolerance, f"{title}: D of {name}")
            _check_result(title, name, theirs[0], quiet[0], row[5], tolerance)
        for name, peer in in_place.items():
            peer(peer_states[name][0], m, peer_states[name][1], mu)
            _check_result(title, name, peer_states[name][0], quiet[0], row[5], tolerance)
            if "p" in parts:
                harness.close(peer_states[name][1], ours[1], tolerance, f"{title}: history of {name}")

    variants: dict[str, Callable[[], object]] = {"fused in place": fused_in_place, "fused": fused}
    for name, peer in functional.items():
        variants[name] = lambda peer=peer: peer(x, m, p, mu)
    for name, peer in in_place.items():
        variants[name] = lambda peer=peer, name=name: peer(peer_states[name][0], m, peer_states[name][1], mu)
    # Of our functional form: x, m and what else is read; x' and D written.
    state_bytes, output_bytes = (t.numel() * t.element_size() for t in (x, m))
    moved = state_bytes * (3 + ("p" in parts)) + output_bytes * (1 + ("u" in parts))
    return harness.Case(title, "fused", variants, check, bytes_moved=moved)


def _check_result(title: str, name: str, result: Tensor, quiet: Tensor, az: float, tolerance: float) -> None:
    """x' equals the deterministic part, or differs from it by ``az`` times a standard normal that does not depend on it."""
    if az == 0:
        harness.close(result, quiet, tolerance, f"{title}: x' of {name}")
        return
    noise = (result.float() - quiet.float()) / az
    bound = 6 / noise.numel() ** 0.5 + tolerance / 10
    moments = (noise.mean(), noise.square().mean() - 1, (noise * quiet.float()).mean())
    assert all(abs(moment.item()) < 2 * bound for moment in moments), f"{title}: the noise of {name}: {moments}"


def cases(device: torch.device) -> Iterator[harness.Case]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    kinds = [
        (SHAPE, torch.contiguous_format, (float32, float32), "zpu"),
        (SHAPE, torch.channels_last, (float32, float32), "zpu"),
        (SHAPE, torch.channels_last, (float32, bfloat16), "z"),
        (SHAPE, torch.channels_last, (bfloat16, bfloat16), "z"),
    ]
    if device.type == "cuda":
        kinds.append((LARGE, torch.channels_last, (float32, float32), "zp"))
        kinds.append((LARGE, torch.channels_last, (bfloat16, bfloat16), "z"))
    for shape, layout, dtypes, wanted in kinds:
        for title, row, parts in ROWS:
            if parts in wanted:
                name = f"{title}, {harness.describe(shape, dtypes, layout)}"
                yield make_case(name, row, parts, device, shape, layout, dtypes)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    device = harness.prepare(options)
    with torch.no_grad():
        harness.run("solver_step", cases(device), options)


if __name__ == "__main__":
    main()
