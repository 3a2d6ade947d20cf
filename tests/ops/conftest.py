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
