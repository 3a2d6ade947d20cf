"""solver_step and solver_step_ against the reference: every pair of types, block edges, layouts, coefficients, errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from synthfast import ops
from synthfast.ops import reference

IMAGE = (3, 4, 5, 7)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "channel_slice", "expanded")


@pytest.fixture
def native_noise(monkeypatch):
    """The reference with the native normals (compared in test_philox.py), so that everything else is equal bit for bit."""
    monkeypatch.setattr(reference, "philox_normal_", ops.philox_normal_)


def in_place(arguments, **changes):
    """Results (x', D or None) of solver_step_ for arguments of solver_step; their x and previous are left alone."""
    arguments = {**arguments, **changes}
    x, history = arguments.pop("x").clone(), arguments.pop("previous")
    history = history if history is None else history.clone()
    assert ops.solver_step_(x, **arguments, history=history) is None
    return x, history


def test_equals_reference_at_every_size(native_noise, solver_inputs, same_bits, pair, row, sizes):
    for elements, batch in itertools.product(sizes, (1, 3)):
        arguments = solver_inputs((batch, elements), pair, row)
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        ours, theirs = ops.solver_step(**arguments), reference.solver_step(**arguments)
        for k, name in enumerate(("x'", "D")):
            same_bits(ours[k], theirs[k], (name, elements, batch))
        for name, tensor in before.items():
            same_bits(arguments[name], tensor, f"{name} was changed")
        x, history = in_place(arguments)
        same_bits(x, ours[0], ("in place x'", elements, batch))
        if history is not None:
            same_bits(history, ours[1], ("history", elements, batch))


def test_every_combination_of_optional_inputs_and_zeros(native_noise, solver_inputs, same_bits, pair):
    for guided, given, *zero in itertools.product((False, True), repeat=8):
        zeroed = [value * (not z) for value, z in zip((1.3, -0.7, 0.6, 0.45, -0.2, 0.3), zero, strict=True)]
        row = (*zeroed, 2.5, -1.0, 1.0)
        if row[4] and not given:
            continue
        arguments = solver_inputs((2, 37), pair, (*row[:4], 1.0, *row[5:]))
        arguments["coefficients"] = torch.tensor(row)
        if not guided:
            arguments["unconditional"] = None
        if not given:
            arguments["previous"] = None
        ours, theirs = ops.solver_step(**arguments), reference.solver_step(**arguments)
        same_bits(ours[0], theirs[0], row)
        same_bits(ours[1], theirs[1], row)
        x, history = in_place(arguments)
        same_bits(x, ours[0], row)
        if given:
            same_bits(history, ours[1], row)


def test_equals_plain_reference(solver_inputs, pair, rows):
    """With the reference's own normals: float64 logarithm and sine."""
    row = rows["all"]
    arguments = solver_inputs((5, 2000), pair, row)
    ours, theirs = ops.solver_step(**arguments)[0], reference.solver_step(**arguments)[0]
    eps = torch.finfo(pair[0]).eps
    torch.testing.assert_close(ours, theirs, rtol=eps, atol=2e-6 * row[5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_and_rounded_to(conversions, same_bits, dtype):
    for what, arguments in conversions(dtype):
        ours, theirs = ops.solver_step(**arguments), reference.solver_step(**arguments)
        same_bits(ours[0], theirs[0], what)
        same_bits(ours[1], theirs[1], what)


def test_noise_is_that_of_philox_normal(same_bits):
    index = torch.tensor([2**33, -4, 0])
    coefficients = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, -1, 1])
    x = torch.zeros(3, 1000)
    noise = ops.solver_step(x, x, coefficients, index, seed=12, step=34)[0]
    same_bits(noise, ops.philox_normal_(torch.empty(3, 1000), index, 12, ops.Stream.NOISE, 34))
    for other in ({"seed": 13, "step": 34}, {"seed": 12, "step": 35}):
        assert not torch.equal(noise, ops.solver_step(x, x, coefficients, index, **other)[0])


def test_error_against_float64(solver_inputs, pair, row):
    arguments = solver_inputs((4, 1500), pair, row)
    kx, km, ax, ad, ap, az, w, lo, hi = arguments["coefficients"].double()
    x, m = arguments["x"].double(), arguments["model_output"].double()
    magnitude = torch.zeros_like(x)
    if arguments["unconditional"] is not None:
        mu = arguments["unconditional"].double()
        magnitude = km.abs() * ((1 + w).abs() * m.abs() + (1 + w).abs() * mu.abs())
        m = mu + w * (m - mu)
    magnitude += kx.abs() * x.abs() + km.abs() * m.abs()
    denoised = (kx * x + km * m).clamp(lo, hi)
    expected = ax * x + ad * denoised
    size = ax.abs() * x.abs() + ad.abs() * magnitude
    if ap != 0:
        expected += ap * arguments["previous"].double()
        size += (ap * arguments["previous"].double()).abs()
    if az != 0:
        noise = ops.philox_normal_(torch.empty_like(x, dtype=torch.float32), arguments["index"], -5, 0, 77).double()
        expected += az * noise
        size += (az * noise).abs()
    result, d = ops.solver_step(**arguments)
    eps, unit = torch.finfo(pair[0]).eps / 2, torch.finfo(torch.float32).eps / 2
    tiny = torch.finfo(pair[0]).smallest_normal * torch.finfo(pair[0]).eps
    assert ((result.double() - expected).abs() <= eps * 1.01 * expected.abs() + 8 * unit * size + tiny).all()
    assert ((d.double() - denoised).abs() <= eps * 1.01 * denoised.abs() + 8 * unit * magnitude + tiny).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(native_noise, solver_inputs, same_bits, lay_out, pair, rows, layout):
    """Any layout of any input gives the reference's values; the outputs have the layout of a dense x."""
    for other in LAYOUTS:
        for name in ("all", "history", "noise"):
            arguments = solver_inputs(IMAGE, pair, rows[name])
            arguments["x"] = lay_out(arguments["x"], layout)
            for k, key in enumerate(("model_output", "unconditional", "previous")):
                if arguments[key] is not None:
                    arguments[key] = lay_out(arguments[key], (other, layout, LAYOUTS[k])[k])
            ours, theirs = ops.solver_step(**arguments), reference.solver_step(**arguments)
            what = (layout, other, name)
            same_bits(ours[0], theirs[0], what)
            same_bits(ours[1], theirs[1], what)
            for result in ours:
                wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
                assert result.is_contiguous(memory_format=wanted), what


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_in_place_layouts(native_noise, solver_inputs, same_bits, lay_out, pair, rows, layout):
    for other in LAYOUTS[:-1]:
        arguments = solver_inputs(IMAGE, pair, rows["all"])
        arguments["x"] = lay_out(arguments["x"], layout)
        arguments["unconditional"] = lay_out(arguments["unconditional"], other)
        expected = reference.solver_step(**arguments)
        x, history = arguments.pop("x"), lay_out(arguments.pop("previous"), other)
        places = [(t.data_ptr(), t.stride()) for t in (x, history)]
        ops.solver_step_(x, **arguments, history=history)
        assert places == [(t.data_ptr(), t.stride()) for t in (x, history)]
        same_bits(x, expected[0], (layout, other))
        same_bits(history, expected[1], (layout, other))


def test_noise_follows_storage_order(same_bits):
    coefficients, index = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, -1, 1]), torch.arange(2)
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    ours = ops.solver_step(x, x, coefficients, index, seed=1, step=0)[0]
    flat = ops.philox_normal_(torch.empty(2, 60), index, 1, 0)
    same_bits(ours.permute(0, 2, 3, 1).reshape(2, 60), flat)


def test_strided_index_and_coefficients(solver_inputs, same_bits, rows):
    arguments = solver_inputs((3, 20), (torch.float32, torch.float32), rows["all"])
    expected = ops.solver_step(**arguments)
    for name in ("index", "coefficients"):
        strided = torch.stack((arguments[name], arguments[name] + 1), 1)[:, 0]
        assert not strided.is_contiguous()
        ours = ops.solver_step(**{**arguments, name: strided})
        same_bits(ours[0], expected[0], name)
        same_bits(ours[1], expected[1], name)


def test_sample_does_not_depend_on_the_batch(solver_inputs, same_bits, pair, rows):
    arguments = solver_inputs((5, 3, 11, 13), pair, rows["all"])
    whole = ops.solver_step(**arguments)
    for k in range(5):
        batched = ("x", "model_output", "index", "unconditional", "previous")
        one = ops.solver_step(**{n: v[k : k + 1] if n in batched else v for n, v in arguments.items()})
        same_bits(one[0][0], whole[0][k], k)
        same_bits(one[1][0], whole[1][k], k)


def test_threads_do_not_matter(solver_inputs, same_bits, rows):
    arguments = solver_inputs((70, 3, 32, 32), (torch.float32, torch.float32), rows["all"])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ops.solver_step(**arguments))
    finally:
        torch.set_num_threads(before)
    same_bits(results[0][0], results[1][0])
    same_bits(results[0][1], results[1][1])


def test_bounds(pair):
    """D never leaves [lo, hi]; infinite bounds clamp nothing, and infinities are clamped."""
    x = torch.linspace(-60000, 60000, 1001).repeat(2, 1).to(pair[0])
    m = torch.zeros_like(x, dtype=pair[1])
    index = torch.arange(2)

    def denoised(lo: float, hi: float, x: torch.Tensor = x) -> torch.Tensor:
        return ops.solver_step(x, m, torch.tensor([1.0, 1, 1, 1, 0, 0, 1, lo, hi]), index, seed=0, step=0)[1]

    for lo, hi in ((-1, 1), (0, 0.5), (-torch.inf, 0), (0, torch.inf)):
        d = denoised(lo, hi)
        assert torch.equal(d, x.clamp(lo, hi))
    assert torch.equal(denoised(-torch.inf, torch.inf), x)
    ends = torch.tensor([[torch.inf, -torch.inf], [-torch.inf, torch.inf]], dtype=pair[0])
    m = torch.zeros_like(ends, dtype=pair[1])
    assert denoised(-1, 1, ends).tolist() == [[1, -1], [-1, 1]]
    assert torch.equal(denoised(-torch.inf, torch.inf, ends), ends)


@pytest.mark.parametrize("bad", ["x", "model_output", "unconditional", "previous"])
def test_nan_goes_through(solver_inputs, pair, rows, bad):
    arguments = solver_inputs((2, 40), pair, rows["all"])
    arguments[bad][1, 9] = torch.nan
    for result, reached in zip(ops.solver_step(**arguments), (True, bad != "previous"), strict=True):
        expected = torch.zeros(2, 40, dtype=torch.bool)
        expected[1, 9] = reached
        assert torch.equal(result.isnan(), expected)


def test_unused_history_is_not_read(solver_inputs, same_bits, pair, rows):
    """With ap = 0 the history may hold anything, as it does before the first step of a multistep solver."""
    arguments = solver_inputs((2, 40), pair, rows["noise"])
    expected = ops.solver_step(**arguments)
    x, history = in_place(arguments, previous=torch.full_like(arguments["x"], torch.nan))
    same_bits(x, expected[0])
    same_bits(history, expected[1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (3, 0)])
def test_empty(solver_inputs, pair, rows, shape):
    arguments = solver_inputs(shape, pair, rows["all"])
    for result in (*ops.solver_step(**arguments), *in_place(arguments)):
        assert result.shape == shape and result.dtype == pair[0]


def test_zero_images(solver_inputs, same_bits):
    """One element a sample: [N] itself is a batch."""
    x = torch.linspace(-1, 1, 5)
    result = ops.solver_step(x, x, torch.tensor([1.0, 0, 0, 1, 0, 0, 1, -0.5, 0.5]), torch.arange(5), seed=0, step=0)
    same_bits(result[0], x.clamp(-0.5, 0.5))


WRONG = [
    ("x", lambda a: a["x"].double(), "x must be float32, bfloat16 or float16; got .* Double"),
    ("x", lambda a: a["x"].half(), "model_output must have the type of x, .* Half on cpu; got .* Float"),
    ("x", lambda a: torch.zeros(()), r"x must have a batch dimension"),
    ("model_output", lambda a: a["model_output"][:, :3], r"model_output must have the shape and device of x, \[3, 4\]"),
    ("model_output", lambda a: a["model_output"][None], "model_output must have the shape"),
    (
        "model_output",
        lambda a: a["model_output"].long(),
        "model_output must be float32, bfloat16 or float16; got .* Long",
    ),
    ("unconditional", lambda a: a["x"][:1], "unconditional must have the shape"),
    ("unconditional", lambda a: a["x"].half(), "unconditional must have the type of model_output"),
    ("previous", lambda a: a["x"][:, :1], "previous must have the shape"),
    ("previous", lambda a: a["x"].bfloat16(), "previous must have the type of x"),
    ("previous", lambda a: None, r"previous \(history\) must be given when coefficient ap is not 0"),
    ("index", lambda a: torch.arange(4), r"index must be int64 \[3\].*got \[4\] Long"),
    ("index", lambda a: torch.arange(3).int(), "index must be int64"),
    ("index", lambda a: torch.arange(3)[:, None], "index must be int64"),
    ("coefficients", lambda a: torch.zeros(8), r"coefficients must be float32 \[9\] .*got \[8\] Float"),
    ("coefficients", lambda a: torch.zeros(9).double(), r"coefficients must be float32 \[9\]"),
    ("coefficients", lambda a: torch.zeros(1, 9), r"coefficients must be float32 \[9\]"),
    ("step", lambda a: -1, r"step must lie in \[0, 2\^24\); got -1"),
    ("step", lambda a: 2**24, r"step must lie in \[0, 2\^24\); got 16777216"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[f"{w[0]}: {w[2][:40]}" for w in WRONG])
def test_wrong_arguments(solver_inputs, rows, name, change, message):
    arguments = solver_inputs((3, 4), (torch.float32, torch.float32), rows["all"])
    arguments[name] = change(arguments)
    with pytest.raises(RuntimeError, match=f"solver_step: {message}"):
        ops.solver_step(**arguments)
    before = arguments["x"].clone()
    x, history = arguments.pop("x"), arguments.pop("previous")
    with pytest.raises(RuntimeError, match=f"solver_step: {message}"):
        ops.solver_step_(x, **arguments, history=history)
    assert torch.equal(x, before), "changed before the check"
