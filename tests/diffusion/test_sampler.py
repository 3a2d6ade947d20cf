"""The sampling loop: guidance, independence of the batch, layout, and what it tells about wrong models."""

from __future__ import annotations

import pytest
import torch

from synthfast.diffusion import EDM, SOLVERS, VP, SolverConfig, make_table, sample
from synthfast.errors import SynthfastError, UsageError

SHAPE = (3, 4, 5)
NULL = 10
TABLE = make_table(EDM(), SolverConfig("heun", 6, churn=3))


def toy(x, t, labels):
    """Depends on the label, sample by sample."""
    shift = 0 if labels is None else (labels.view(-1, 1, 1, 1).float() - 4) / 10
    return 0.6 * torch.tanh(1.5 * x + t + shift)


def run(count=6, model=toy, table=TABLE, start=0, **options):
    index = torch.arange(start, start + count)
    options.setdefault("labels", index % 10)
    return sample(model, table, index, shape=SHAPE, seed=9, **options)


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_batches_do_not_matter(solver, guidance):
    options = {"guidance": guidance, "null_label": NULL, "table": make_table(VP(), SolverConfig(solver, 5))}
    whole = run(7, start=2**32 - 3, **options)
    parts = [run(count, start=2**32 - 3 + first, **options) for first, count in ((0, 1), (1, 4), (5, 2))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, run(7, start=2**32 - 2, **options))


def test_result_is_an_ordinary_channels_last_tensor():
    for guidance in (None, 3.0):
        images = run(guidance=guidance, null_label=NULL)
        assert images.shape == (6, *SHAPE) and images.dtype == torch.float32 and not images.is_inference()
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.untyped_storage().nbytes() == 4 * images.numel()
        images.mul_(2)


def test_guidance_weights_0_and_1_are_the_unconditional_and_the_conditional_model():
    conditional = run()
    unconditional = run(labels=torch.full((6,), NULL))
    assert (conditional - unconditional).abs().max() > 0.1
    assert torch.equal(run(guidance=1.0, null_label=NULL), conditional)
    torch.testing.assert_close(run(guidance=0.0, null_label=NULL), unconditional, rtol=0, atol=1e-5)
    # next to 1 the doubled batch is used, and must give nearly the same
    torch.testing.assert_close(run(guidance=1.000001, null_label=NULL), conditional, rtol=0, atol=1e-4)


def test_guidance_extrapolates_from_the_unconditional_output():
    def guided(x, t, labels):
        null = torch.full_like(labels, NULL)
        return toy(x, t, null) + 2.5 * (toy(x, t, labels) - toy(x, t, null))

    torch.testing.assert_close(run(guidance=2.5, null_label=NULL), run(model=guided), rtol=0, atol=1e-4)


def test_the_network_runs_once_a_stage():
    calls = []

    def counting(x, t, labels):
        calls.append((tuple(x.shape), tuple(t.shape), t.dtype, None if labels is None else labels.tolist()))
        assert x.is_contiguous(memory_format=torch.channels_last) and torch.is_inference_mode_enabled()
        return toy(x, t, labels)

    stages = []
    run(2, model=counting, callback=lambda stage, x: stages.append(stage))
    assert stages == list(range(TABLE.evaluations)) and len(calls) == TABLE.evaluations == 11
    assert calls[0] == ((2, *SHAPE), (), torch.float32, [0, 1])
    calls.clear()
    run(2, model=counting, guidance=2.0, null_label=NULL)
    assert len(calls) == TABLE.evaluations
    assert calls[0] == ((4, *SHAPE), (), torch.float32, [0, 1, NULL, NULL])


def test_autocast_lets_the_network_compute_in_bfloat16():
    weight = torch.eye(5) * 0.5
    seen = []

    def matmul(x, t, labels):
        output = torch.tanh(x) @ weight
        seen.append(output.dtype)
        return output

    low = run(model=matmul, labels=None, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and low.dtype == torch.float32
    torch.testing.assert_close(low, run(model=matmul, labels=None), rtol=0, atol=0.05)


def test_clipping_bounds_the_images():
    images = run(model=lambda x, t, labels: 5 * x, table=make_table(VP(prediction="x0"), SolverConfig("ddpm", 4)))
    assert float(images.abs().max()) == 1.0


def test_no_images():
    assert run(0).shape == (0, *SHAPE)


def test_errors():
    with pytest.raises(UsageError, match=r"--guidance 2: expected a class-conditional model .* found no null label"):
        run(guidance=2.0)
    with pytest.raises(UsageError, match="found no labels"):
        run(guidance=2.0, labels=None, null_label=NULL)
    with pytest.raises(SynthfastError, match=r"expected a tensor of shape \[6, 3, 4, 5\], found \[6, 6, 4, 5\]"):
        run(model=lambda x, t, labels: torch.cat((x, x), 1))
    with pytest.raises(UsageError, match="--guidance nan: expected a finite number"):
        run(guidance=float("nan"), null_label=NULL)
    with pytest.raises(SynthfastError, match="found tuple"):
        run(model=lambda x, t, labels: (x,))
