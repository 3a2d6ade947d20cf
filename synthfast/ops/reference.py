"""Plain PyTorch versions of every native operation, written for reading.

They define what the kernels compute: the tests compare the two, and they run where the extension is not built.
Integer results are equal bit for bit. Normals agree to a few units in the last place, because the kernels use their own
logarithm and sine.

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int = 10) -> Tensor:
    """Philox4x32: ``counter`` int64 [..., 4] with values in [0, 2^32), ``key`` two such words; the same shape back."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply_high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def _multiply_high_low(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 arithmetic that never overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & _MASK, total & _MASK


def philox_bits(elements: int, index: Tensor, seed: int, stream: int, step: int = 0) -> Tensor:
    """Random 32-bit words, int64 [N, elements]: element e of sample i is word e % 4 of the block with the counter
    (e // 4, index low, index high, stream << 24 | step) under the key ``seed``."""
    blocks = (elements + 3) // 4
    block = torch.arange(blocks, device=index.device).expand(len(index), blocks)
    low = (index & _MASK).unsqueeze(1).expand_as(block)
    high = ((index >> 32) & _MASK).unsqueeze(1).expand_as(block)
    last = torch.full_like(block, stream << 24 | step)
    words = philox4x32(torch.stack((block, low, high, last), -1), (seed & _MASK, seed >> 32 & _MASK))
    return words.flatten(1)[:, :elements]


def uniforms(bits: Tensor) -> Tensor:
    """float32 in [0, 1) from 32-bit words: their upper 24 bits times 2^-24."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def normals(bits: Tensor) -> Tensor:
    """float32 standard normals from 32-bit words [N, 4k], two words each pair (Box and Muller, 1958).

    The first word gives the radius from u = (upper 24 bits + 1/2) 2^-24, rounded to float32; the second the angle: its upper
    2 bits the quadrant, the next 24 the position t in [-1/2, 1/2) around the quadrant's axis.
    """
    first, second = bits.reshape(len(bits), -1, 2).unbind(-1)
    unit = (first >> 8).float() * 2.0**-24 + 2.0**-25
    radius = (-2 * torch.log(unit.double())).sqrt()
    position = ((second >> 6) & 0xFFFFFF).double() * 2.0**-24 - 0.5
    angle = (position + (second >> 30)) * (torch.pi / 2)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1).float()


def is_dense(tensor: Tensor) -> bool:
    """Contiguous or channels_last: kernels take such tensors as they are, others as contiguous copies."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _fill(out: Tensor, values: Tensor) -> Tensor:
    """Copy ``values`` [N, elements] into ``out`` in storage order."""
    if out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = out.shape
        return out.copy_(values.reshape(n, h, w, c).permute(0, 3, 1, 2))
    return out.copy_(values.reshape(out.shape))


def _draw_normals(elements: int, index: Tensor, seed: int, stream: int, step: int) -> Tensor:
    padded = (elements + 3) // 4 * 4
    return normals(philox_bits(padded, index, seed, stream, step))[:, :elements]


def philox_normal_(out: Tensor, index: Tensor, seed: int, stream: int, step: int = 0) -> Tensor:
    """See :func:`synthfast.ops.philox_normal_`."""
    return _fill(out, _draw_normals(out[0].numel(), index, seed, stream, step)) if out.numel() else out


def philox_uniform_(out: Tensor, index: Tensor, seed: int, stream: int, step: int = 0) -> Tensor:
    """See :func:`synthfast.ops.philox_uniform_`. In float16 and bfloat16 the value is rounded toward zero."""
    if not out.numel():
        return out
    bits = philox_bits(out[0].numel(), index, seed, stream, step)
    digits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[out.dtype]
    return _fill(out, (bits >> (32 - digits)).to(torch.float32) * 2.0**-digits)


def solver_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    *,
    seed: int,
    step: int,
    unconditional: Tensor | None = None,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`synthfast.ops.solver_step`."""
    kx, km, ax, ad, ap, az, w, lo, hi = coefficients.to(x.device, torch.float32).unbind()
    state = x.float()
    m = model_output.float()
    if unconditional is not None:
        m = unconditional.float() + w * (m - unconditional.float())
    denoised = torch.minimum(torch.maximum(kx * state + km * m, lo), hi)
    result = ax * state + ad * denoised
    if ap != 0:
        if previous is None:
            raise ValueError("solver_step: coefficient ap is not 0, so `previous` must be given")
        result = result + ap * previous.float()
    if az != 0:
        layout = torch.preserve_format if is_dense(x) else torch.contiguous_format
        noise = torch.empty_like(x, dtype=torch.float32, memory_format=layout)
        result = result + az * philox_normal_(noise, index, seed, _NOISE, step)
    return result.to(x.dtype), denoised.to(x.dtype)


def solver_step_(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    *,
    seed: int,
    step: int,
    unconditional: Tensor | None = None,
    history: Tensor | None = None,
) -> None:
    """See :func:`synthfast.ops.solver_step_`."""
    result, denoised = solver_step(
        x, model_output, coefficients, index, seed=seed, step=step, unconditional=unconditional, previous=history
    )
    x.copy_(result)
    if history is not None:
        history.copy_(denoised)


_NOISE = 0  # synthfast.ops.Stream.NOISE; this module imports nothing of the package


def quantize_uint8(x: Tensor) -> Tensor:
    """See :func:`synthfast.ops.quantize_uint8`."""
    scaled = x.permute(0, 2, 3, 1).float() * 127.5 + 127.5
    return scaled.clamp(0, 255).nan_to_num(nan=0.0).round().to(torch.uint8).contiguous()
