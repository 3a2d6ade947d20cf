"""Philox words, uniforms and normals: known answers, the reference, keying by sample, distribution, CPU variants."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from synthfast import ops
from synthfast.ops import reference

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
FILLS = {"normal": ops.philox_normal_, "uniform": ops.philox_uniform_}
REFERENCES = {"normal": reference.philox_normal_, "uniform": reference.philox_uniform_}


def drawn(shape: tuple[int, ...], index: Tensor, *where: int, fill: str = "normal", dtype=torch.float32) -> Tensor:
    return FILLS[fill](torch.full(shape, torch.nan, dtype=dtype), index, *where)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert ops.philox4x32(counter, key) == words
    assert tuple(reference.philox4x32(torch.tensor(counter), key).tolist()) == words


def test_words_of_kernels_are_the_known_answers(same_bits):
    """The counter of the third vector, reached through seed, index, stream and step: block 0x243F6A88 lies far inside a
    sample too large to draw, so the vectors with block 0 go through the operation, and the words in between by formula."""
    index, seed = 0x85A308D3 | 0x13198A2E << 32, 0x299F31D0 << 32 | 0xA4093822
    out = drawn((1, 4096), torch.tensor([index]), seed, 0x03, 0x707344, fill="uniform")
    words = [
        w
        for b in range(1024)
        for w in ops.philox4x32((b, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    ]
    same_bits(out, reference.uniforms(torch.tensor([words])))
    zeros = drawn((1, 4), torch.tensor([0]), 0, 0, 0, fill="uniform")
    same_bits(zeros, reference.uniforms(torch.tensor([KNOWN_ANSWERS[0][2]])))


@pytest.mark.parametrize("fill", FILLS)
def test_equals_reference(fill, dtype, sizes, same_bits):
    for elements in sizes:
        index = torch.tensor([0, 1, -1, 2**32, 2**32 - 1, 2**63 - 1, -(2**63)])
        for where in ((0, 0, 0), (-1, 255, 2**24 - 1), (2**63 - 1, 1, 5), (-(2**63), 4, 0)):
            ours = drawn((len(index), elements), index, *where, fill=fill, dtype=dtype)
            theirs = REFERENCES[fill](torch.empty_like(ours), index, *where)
            if fill == "uniform":
                same_bits(ours, theirs, (elements, where))
            elif dtype == torch.float32:
                torch.testing.assert_close(ours, theirs, rtol=4 * 2.0**-24, atol=4e-7)
            else:  # a float32 difference of an ulp may cross a rounding boundary
                torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_16_bit_normals_are_rounded_float32_ones(same_bits):
    index = torch.arange(5)
    full = drawn((5, 777), index, 3, 0)
    for dtype in (torch.bfloat16, torch.float16):
        same_bits(drawn((5, 777), index, 3, 0, dtype=dtype), full.to(dtype), dtype)


@pytest.mark.parametrize("fill", FILLS)
def test_sample_depends_on_seed_and_index_alone(fill, dtype, same_bits):
    shape = (3, 17, 13)
    index = torch.tensor([5, 2**40 + 3, -9, 5, 0, 123456789])
    batch = drawn((6, *shape), index, 11, 1, 2, fill=fill, dtype=dtype)
    same_bits(batch[0], batch[3], "the same index twice")
    for k in range(6):
        same_bits(drawn((1, *shape), index[k : k + 1], 11, 1, 2, fill=fill, dtype=dtype)[0], batch[k], k)
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    same_bits(drawn((6, *shape), index[order], 11, 1, 2, fill=fill, dtype=dtype), batch[order], "another order")
    strided = torch.stack((index, -index), 1)[:, 0]
    same_bits(drawn((6, *shape), strided, 11, 1, 2, fill=fill, dtype=dtype), batch, "strided index")


@pytest.mark.parametrize("fill", FILLS)
def test_larger_samples_begin_like_smaller_ones(fill, same_bits):
    index = torch.tensor([7, 8])
    small, large = (drawn((2, n), index, 1, 0, fill=fill) for n in (515, 5000))
    same_bits(small, large[:, :515])


@pytest.mark.parametrize("fill", FILLS)
def test_filled_in_storage_order(fill, dtype, same_bits, lay_out):
    n, c, h, w = 2, 3, 5, 7
    index = torch.arange(n)
    plain = drawn((n, c, h, w), index, 1, 0, fill=fill, dtype=dtype)
    flat = plain.reshape(n, -1)
    out = lay_out(torch.zeros(n, c, h, w, dtype=dtype), "channels_last")
    assert FILLS[fill](out, index, 1, 0) is out
    assert out.is_contiguous(memory_format=torch.channels_last)
    same_bits(out.permute(0, 2, 3, 1).reshape(n, -1), flat, "channels_last")
    for layout in ("sliced", "transposed", "channel_slice"):
        out = lay_out(torch.zeros(n, c, h, w, dtype=dtype), layout)
        same_bits(FILLS[fill](out, index, 1, 0), plain, layout)
    # The stride of a dimension with one entry does not matter.
    one = lay_out(torch.zeros(n, c, h, w, dtype=dtype), "channels_last")[1::2]
    assert one.stride(0) != one.numel() and one.is_contiguous(memory_format=torch.channels_last)
    same_bits(FILLS[fill](one, index[1:], 1, 0).permute(0, 2, 3, 1).reshape(1, -1), flat[1:], "one of a batch")


def test_writes_only_its_elements(dtype):
    for elements in (1, 3, 5, 513):
        wide = torch.full((3, elements), 7.0, dtype=dtype)
        ops.philox_normal_(wide[1:2], torch.tensor([1]), 0, 0)
        assert (wide[[0, 2]] == 7).all(), elements
        wide = torch.full((2, elements + 2), 7.0, dtype=dtype)
        ops.philox_normal_(wide[:, 1:-1], torch.tensor([1, 2]), 0, 0)
        assert (wide[:, [0, -1]] == 7).all(), elements


def test_threads_do_not_matter(same_bits):
    index = torch.arange(300)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(drawn((300, 1000), index, 1, 0))
    finally:
        torch.set_num_threads(before)
    same_bits(*results)


def test_distinct_draws_differ():
    """No two of these share more than chance allows: 24 bits agree once in 2^24."""
    index = torch.arange(4)
    keys = [(s, stream, step) for s in (0, 1, 2**32, -1) for stream in (0, 1, 255) for step in (0, 1, 2**16)]
    values = torch.stack([drawn((4, 64), index, *key, fill="uniform").flatten() for key in keys])
    assert len(values.flatten().unique()) > values.numel() - 20
    shifted = drawn((4, 64), index + 2**32, 0, 0, 0, fill="uniform")
    assert (shifted != values[0].view(4, 64)).all()


def test_empty_batch_and_empty_samples():
    for shape in ((0, 3, 4, 4), (0,), (2, 0)):
        out = torch.empty(shape)
        assert ops.philox_normal_(out, torch.arange(shape[0]), 0, 0) is out
        assert ops.philox_uniform_(out, torch.arange(shape[0]), 0, 0) is out


def test_uniforms_lie_in_the_half_open_interval(dtype):
    values = drawn((64, 1 << 14), torch.arange(64), 9, 1, fill="uniform", dtype=dtype).double()
    digits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    assert values.min() >= 0 and values.max() < 1
    assert values.max() >= 1 - 2.0 ** -min(digits, 16)
    scaled = values * 2**digits
    assert torch.equal(scaled, scaled.round())
    n = values.numel()
    bins = torch.histc(values, 256, 0, 1)
    chi_square = ((bins - n / 256) ** 2 / (n / 256)).sum().item()
    assert 170 < chi_square < 350, chi_square  # 255 degrees of freedom: within 4 sigma


def test_normals_are_normal():
    """Fixed seeds, so these pass or fail always; the bounds are those of about 4 sigma."""
    samples, elements = 256, 4096
    z = drawn((samples, elements), torch.arange(samples), 2024, 0).double()
    flat, n = z.flatten(), z.numel()
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        assert abs((flat**moment).mean().item() - expected) < 4 * (variance / n) ** 0.5, moment
    ordered = flat.sort().values
    cdf = torch.special.ndtr(ordered)
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((cdf - rank / n).abs(), ((rank + 1) / n - cdf).abs()).max().item()
    assert distance < 1.63 / n**0.5, distance  # Kolmogorov-Smirnov at 1%
    for bound in (1, 2, 3, 4):
        expected = 2 * n * torch.special.ndtr(torch.tensor(-float(bound), dtype=torch.float64)).item()
        assert abs((flat.abs() > bound).sum().item() - expected) < 4 * expected**0.5, bound
    assert flat.abs().max() < 5.9  # sqrt(-2 log 2^-25)
    # Neighbours: the two of a pair, the two pairs of a block, blocks, samples.
    for a, b in ((z[:, 0::2], z[:, 1::2]), (z[:, 0::4], z[:, 2::4]), (z[:, :-4], z[:, 4:]), (z[:-1], z[1:])):
        assert abs((a * b).mean().item()) < 4 / a.numel() ** 0.5
        assert abs(((a * a - 1) * (b * b - 1)).mean().item()) < 4 * 2 / a.numel() ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda o, i: (o.double(), i, 0, 0, 0), "out must be float32, bfloat16 or float16"),
        (lambda o, i: (torch.zeros(()), i, 0, 0, 0), "out must have a batch dimension"),
        (lambda o, i: (o, i[:2], 0, 0, 0), r"index must be int64 \[3\].*got \[2\]"),
        (lambda o, i: (o, i.int(), 0, 0, 0), "index must be int64"),
        (lambda o, i: (o, i[:, None], 0, 0, 0), "index must be int64"),
        (lambda o, i: (o, i, 0, 256, 0), r"stream must lie in \[0, 256\); got 256"),
        (lambda o, i: (o, i, 0, -1, 0), "stream must lie in"),
        (lambda o, i: (o, i, 0, 0, 2**24), r"step must lie in \[0, 2\^24\); got 16777216"),
        (lambda o, i: (o, i, 0, 0, -1), "step must lie in"),
    ],
)
@pytest.mark.parametrize("fill", FILLS)
def test_wrong_arguments(fill, arguments, message):
    with pytest.raises(RuntimeError, match=f"philox_{fill}_: {message}"):
        FILLS[fill](*arguments(torch.zeros(3, 4), torch.arange(3)))


# Every operation over every type, odd sizes and special values, hashed: all instruction sets must print the same.
HASHES = """
import hashlib, torch
from synthfast import ops
digest = hashlib.sha256()
def add(tensor):
    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
generator = torch.Generator().manual_seed(0)
rows = (
    (1.3, -0.7, 0.6, 0.45, -0.2, 0.3, 2.5, -1, 1),
    (1.3, -0.7, 0.6, 0.45, 0, 0, 1, -1, 1),
    (1, -0.1, 0.6, 0.45, -0.2, 0, 1, -9, 9),
)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    special = torch.tensor([0.0, -0.0, 1e-8, -6e-8, 1e-40, 65504.0, 7e4, -1e30, torch.inf, -torch.inf]).to(dtype)
    for n in (1, 5, 17, 63, 257, 513, 1027):
        index = torch.tensor([3, 2**40, -1])
        add(ops.philox_normal_(torch.empty(3, n, dtype=dtype), index, 7, 0))
        add(ops.philox_uniform_(torch.empty(3, n, dtype=dtype), index, 7, 1))
        for output in (torch.float32, torch.bfloat16, torch.float16) if dtype == torch.float32 else (dtype,):
            x, p = (torch.randn(3, n, generator=generator).to(dtype) for _ in range(2))
            m, mu = (torch.randn(3, n, generator=generator).to(output) for _ in range(2))
            x[0, : len(special)] = special[:n]
            for row in rows:
                for result in ops.solver_step(x, m, torch.tensor(row), index, seed=1, step=2, unconditional=mu, previous=p):
                    result[result.isnan()] = 0  # payloads of NaN are nobody's promise
                    add(result)
        for c in (1, 3, 4):
            x = torch.randn(2, c, 3, n, generator=generator).to(dtype)
            x[0, 0, 0, : len(special)] = special[:n]
            add(ops.quantize_uint8(x))
            add(ops.quantize_uint8(x.contiguous(memory_format=torch.channels_last)))
print(ops.cpu_capability(), digest.hexdigest())
"""


def test_cpu_variants_give_the_same_bits(capsys):
    """This process runs the best variant of the machine; the slower ones run in processes of their own."""
    wanted = ("default", "avx2", "avx512")
    best = wanted.index(ops.cpu_capability())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HASHES],
            env={**os.environ, "SYNTHFAST_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in wanted[:best]
    ]
    exec(HASHES, {})
    lines = [process.communicate(timeout=120)[0].split() for process in running]
    lines.append(capsys.readouterr().out.split())
    assert [capability for capability, _ in lines] == list(wanted[: best + 1])
    assert len({digest for _, digest in lines}) == 1, lines
