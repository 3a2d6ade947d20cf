"""Inputs and comparisons that the tests of the operations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# State and model output of solver_step.
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
# Rows of coefficients: kx, km, ax, ad, ap, az, w, lo, hi.
ROWS = {
    "plain": (1.3, -0.7, 0.6, 0.45, 0.0, 0.0, 1.0, -1.0, 1.0),
    "noise": (1.3, -0.7, 0.6, 0.45, 0.0, 0.3, 1.0, -1.0, 1.0),
    "history": (1.3, -0.7, 0.6, 0.45, -0.2, 0.0, 1.0, -1.0, 1.0),
    "history, noise": (1.3, -0.7, 0.6, 0.45, -0.2, 0.3, 1.0, -torch.inf, 0.8),
    "guidance": (1.3, -0.7, 0.6, 0.45, 0.0, 0.0, 2.5, -1.0, 1.0),
    "all": (1.3, -0.7, 0.6, 0.45, -0.2, 0.3, 2.5, -0.9, 0.6),
    "zero": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0),
}
# Around the vector widths, chunks, Philox blocks, tiles (512) and thread blocks (256) of the kernels.
SIZES = (1, 3, 4, 5, 7, 15, 16, 17, 63, 64, 255, 256, 257, 511, 512, 513, 1000, 3072)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=FLOATS, ids=_name)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{_name(pair[0])}-{_name(pair[1])}")
def pair(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    """Types of the state and of the model output."""
    return request.param


@pytest.fixture
def sizes() -> tuple[int, ...]:
    """Elements per sample."""
    return SIZES


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> tuple[float, ...]:
    return ROWS[request.param]


@pytest.fixture
def rows() -> dict[str, tuple[float, ...]]:
    return ROWS


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout. All but "expanded" (whose samples are all alike) can be written to."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "channel_slice":  # as of a model that predicts the variance in further channels
        return torch.cat((tensor, tensor), 1).contiguous(memory_format=torch.channels_last)[:, : tensor.shape[1]]
    assert layout == "expanded", layout
    return tensor[:1].expand(tensor.shape)


@pytest.fixture
def lay_out() -> Callable[[Tensor, str], Tensor]:
    return _lay_out


@pytest.fixture
def same_bits() -> Callable[..., None]:
    """same_bits(a, b, what): type, shape and every bit are equal; a NaN equals any NaN."""

    def same_bits(a: Tensor, b: Tensor, what: object = "") -> None:
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.contiguous(), b.contiguous()
        differ = a.view(integer) != b.view(integer)
        if a.is_floating_point():
            differ &= ~(a.isnan() & b.isnan())
        if differ.any():
            at = differ.nonzero()[0].tolist()
            raise AssertionError(
                f"{what}: {int(differ.sum())} of {a.numel()} differ; at {at}: {a[tuple(at)]}, {b[tuple(at)]}"
            )

    return same_bits


@pytest.fixture
def solver_inputs(generator: torch.Generator) -> Callable[..., dict[str, Any]]:
    """solver_inputs(shape, pair, row) -> the arguments of solver_step; unconditional and previous where the row uses them."""

    def make(shape: tuple[int, ...], pair: tuple[torch.dtype, torch.dtype], row: tuple[float, ...]) -> dict[str, Any]:
        state, output = pair
        draw = [torch.randn(shape, generator=generator) for _ in range(4)]
        return {
            "x": draw[0].to(state),
            "model_output": draw[1].to(output),
            "coefficients": torch.tensor(row),
            "index": torch.randint(-(2**62), 2**62, shape[:1], generator=generator),
            "seed": -5,
            "step": 77,
            "unconditional": draw[2].to(output) if row[6] != 1 else None,
            "previous": draw[3].to(state) if row[4] != 0 else None,
        }

    return make


@pytest.fixture
def every_16_bit_value() -> Callable[[torch.dtype], Tensor]:
    """All 65,536 values of a 16-bit type, subnormals, infinities and NaN among them, as [1, 1, 256, 256]."""
    return lambda dtype: torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)


# Factors that put products of 16-bit values on, just below and just above half-way between two of them, among the
# subnormals, and beyond the largest.
SCALES = (
    1.0,
    1.5,
    1.25,
    0.75,
    1 + 2.0**-11,
    1 - 2.0**-12,
    1 / 3,
    2.0**-9,
    1.5 * 2.0**-12,
    2.0**-24,
    1.5 * 2.0**-125,
    2.0**15,
)


@pytest.fixture
def conversions(every_16_bit_value) -> Callable[[torch.dtype], Iterator[tuple[str, dict[str, Any]]]]:
    """Arguments of solver_step that read all values of a 16-bit type, and that round float32 values to it."""

    def make(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
        every, common = every_16_bit_value(dtype), {"index": torch.zeros(1, dtype=torch.int64), "seed": 0, "step": 0}
        read = torch.tensor([0.0, 1, 0, 1, 0, 0, 1, -torch.inf, torch.inf])
        yield "read", {"x": torch.zeros(every.shape), "model_output": every, "coefficients": read, **common}
        for scale in SCALES:
            scaled = torch.tensor([1.0, 0, scale, 0, 0, 0, 1, -1, 1])
            arguments = {"x": every, "model_output": torch.zeros_like(every), "coefficients": scaled, **common}
            yield f"rounded, times {scale}", arguments

    return make


@pytest.fixture
def attack_inputs(generator: torch.Generator) -> Callable[..., dict[str, Any]]:
    """attack_inputs(shape, dtype) -> x, previous, gradient, origin, eps, step_size, momentum of attack steps: pixels in [0, 1],
    some on the edges of the box and of the ball, gradients that are 0 or not finite (in the last sample alone), and a radius,
    a step and a momentum for each sample, among them a radius of 0 and a negative step."""

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        n = shape[0]
        origin = (torch.rand(shape, generator=generator) * 1.2 - 0.1).clamp(0, 1).to(dtype)
        eps = torch.tensor([8 / 255, 0.1, 0.0, 1e-9, 0.5, 3.0])[torch.arange(n) % 6]
        column = eps.reshape(-1, *[1] * (len(shape) - 1))
        draw = [torch.randn(shape, generator=generator) for _ in range(3)]
        x, previous = (origin.float() + (column * d).clamp(-column, column) for d in draw[:2])
        gradient = draw[2].masked_fill(torch.rand(shape, generator=generator) < 0.1, 0)
        if n > 1 and gradient.numel():
            last = gradient[-1].reshape(-1)
            last[:: max(1, len(last) // 7)] = torch.tensor(torch.nan)
            last[1 :: max(1, len(last) // 5)] = torch.inf
        return {
            "x": x.clamp(0, 1).to(dtype),
            "previous": previous.clamp(0, 1).to(dtype),
            "gradient": gradient.to(dtype),
            "origin": origin,
            "eps": eps,
            "step_size": torch.tensor([2 / 255, -0.05, 0.3, 1.0, 0.01])[torch.arange(n) % 5],
            "momentum": torch.tensor([0.75, 1.0, 0.5, 0.0])[torch.arange(n) % 4],
        }

    return make


def _per_pixel(value: Tensor, like: Tensor) -> Tensor:
    return value.double().reshape(-1, *[1] * (like.dim() - 1)).expand(like.shape)


@pytest.fixture
def assert_inside() -> Callable[..., None]:
    """assert_inside(v, origin, eps, norm, lo, hi): the stored values lie in the ball and the box, in exact arithmetic
    (l-infinity: float64 with its rounding error; l2: a float64 sum, 1e-12 relative)."""

    def assert_inside(
        v: Tensor, origin: Tensor, eps: Tensor, norm: str, lo: float = 0.0, hi: float = 1.0, what: object = ""
    ) -> None:
        v, origin = v.double(), origin.double()
        assert ((v >= lo) & (v <= hi)).all(), f"{what}: outside [{lo}, {hi}]"
        if norm == "l2":
            distance = (v - origin).flatten(1).norm(dim=1)
            assert (distance <= eps.double() * (1 + 1e-12)).all(), f"{what}: {distance.tolist()} > {eps.tolist()}"
            return
        radius = _per_pixel(eps, v)
        difference = v - origin
        part = difference - v  # what rounding took from the difference, by Knuth's two-sum
        error = (v - (difference - part)) - (origin + part)
        away, size = error * difference.sign(), difference.abs()
        outside = (size > radius) | ((size == radius) & (away > 0))
        assert not outside.any(), f"{what}: {int(outside.sum())} outside; {v[outside][0]}, {origin[outside][0]}, {eps}"

    return assert_inside
