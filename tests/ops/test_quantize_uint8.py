"""quantize_uint8: the reference, all levels, halves, bounds, NaN, types, layouts and sizes."""

from __future__ import annotations

import pytest
import torch

from synthfast import ops
from synthfast.ops import reference


def test_every_level_comes_back():
    """What a data set's bytes become for the model, x = level / 127.5 - 1, goes back to the same byte."""
    levels = torch.arange(256).reshape(1, 16, 16, 1)
    x = (levels.permute(0, 3, 1, 2) / 127.5 - 1).float()
    assert torch.equal(ops.quantize_uint8(x), levels.to(torch.uint8))
    assert torch.equal(ops.quantize_uint8(x.half()), levels.to(torch.uint8))


def test_rounds_to_nearest_even():
    halves = torch.arange(-3, 260) + 0.5
    x = (halves - 127.5) / 127.5
    scaled = x * 127.5 + 127.5
    exact = scaled == halves  # not every half is reached in float32
    assert exact.sum() > 100
    expected = halves.round().clamp(0, 255).to(torch.uint8)
    ours = ops.quantize_uint8(x.reshape(1, 1, 1, -1)).flatten()
    assert torch.equal(ours[exact], expected[exact])
    assert torch.equal(ours, scaled.clamp(0, 255).round().to(torch.uint8))


def test_out_of_range_and_nan(dtype):
    values = [-1, 1, -1.1, 1.1, -300, 300, -60000, 60000, -torch.inf, torch.inf, torch.nan, -torch.nan, -0.0, 1e-30]
    x = torch.tensor(values, dtype=dtype).reshape(1, 1, 2, 7)
    expected = [0, 255, 0, 255, 0, 255, 0, 255, 0, 255, 0, 0, 128, 128]
    for tensor in (x, x.repeat(1, 3, 1, 1), x.repeat(1, 3, 40, 1).contiguous(memory_format=torch.channels_last)):
        ours = ops.quantize_uint8(tensor)
        for channel in range(tensor.shape[1]):
            assert ours[0, :2, :, channel].flatten().tolist() == expected


def test_nan_with_any_payload():
    """The rounding trick reads the low bits of a float, where a NaN may carry a payload."""
    x = torch.tensor([0x7FC000FF, 0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    assert ops.quantize_uint8(x.reshape(1, 2, 1, 2)).flatten().tolist() == [0] * 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "channel_slice", "expanded"])
def test_equals_reference(generator, same_bits, lay_out, dtype, layout):
    for channels in (1, 2, 3, 4, 5):
        for n, h, w in (
            (1, 1, 1),
            (2, 1, 5),
            (3, 3, 5),
            (1, 4, 4),
            (2, 7, 9),
            (1, 16, 16),
            (1, 19, 27),
            (2, 32, 32),
            (2, 32, 33),
        ):
            x = lay_out((torch.randn(n, channels, h, w, generator=generator) * 0.8).to(dtype), layout)
            ours = ops.quantize_uint8(x)
            assert ours.is_contiguous()
            same_bits(ours, reference.quantize_uint8(x), (n, channels, h, w))


def test_every_16_bit_value(every_16_bit_value, same_bits):
    for dtype in (torch.bfloat16, torch.float16):
        x = every_16_bit_value(dtype)
        same_bits(ops.quantize_uint8(x), reference.quantize_uint8(x), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_matter(generator, same_bits, lay_out, layout):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for shape in ((7, 3, 129, 131), (2, 1, 401, 403), (1200, 4, 9, 11)):
            x = lay_out(torch.randn(shape, generator=generator), layout)
            same_bits(ops.quantize_uint8(x), reference.quantize_uint8(x), shape)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)])
def test_empty(dtype, shape):
    n, c, h, w = shape
    ours = ops.quantize_uint8(torch.empty(shape, dtype=dtype))
    assert ours.shape == (n, h, w, c) and ours.dtype == torch.uint8


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4, 4), r"x must be \[N, C, H, W\]; got \[3, 4, 4\]"),
        (torch.zeros(()), "x must have a batch dimension"),
        (torch.zeros(1, 3, 4, 4).double(), "x must be float32, bfloat16 or float16; got .* Double"),
        (torch.zeros(1, 3, 4, 4).byte(), "x must be float32, bfloat16 or float16; got .* Byte"),
    ],
)
def test_wrong_arguments(x, message):
    with pytest.raises(RuntimeError, match=f"quantize_uint8: {message}"):
        ops.quantize_uint8(x)
