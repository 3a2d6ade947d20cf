"""Training losses against float64 formulas written out by hand, and their independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from synthfast import ops
from synthfast.diffusion import EDM, VP, EDMLoss, LabelDrop, VPLoss
from synthfast.errors import UsageError

SEED = 5


def make_images(count, shape=(3, 4, 6)):
    generator = torch.Generator().manual_seed(0)
    return torch.rand((count, *shape), generator=generator).mul_(2).sub_(1)


def training_noise(images, index):
    out = torch.empty_like(images, memory_format=torch.channels_last)
    return ops.philox_normal_(out, index, SEED, ops.Stream.TRAINING_NOISE).double()


def toy(x, t, labels=None):
    """A network of float64 or float32 state, level and label."""
    level = t.view(-1, 1, 1, 1).to(x.dtype) / 100
    return 0.6 * torch.tanh(1.3 * x + level) + (0 if labels is None else 0.1 * labels.view(-1, 1, 1, 1).to(x.dtype))


class Recorder:
    """A network that keeps what it was called with."""

    def __init__(self, network=toy):
        self.network = network

    def __call__(self, x, t, labels):
        self.x, self.t, self.labels = x, t, labels
        return self.network(x, t, labels)


def test_edm_loss_is_the_published_one():
    images, labels = make_images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    index = torch.tensor([0, 5, 6, 2**31, 2**32 + 1, 2**40])
    data, p_mean, p_std = 0.4, -0.9, 1.1
    z = ops.philox_normal_(torch.empty(6, 1), index, SEED, ops.Stream.LEVEL)[:, 0].double()
    sigma = (p_mean + p_std * z).exp().view(-1, 1, 1, 1)
    y = images.double() + sigma * training_noise(images, index)
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    c_in = 1 / (sigma**2 + data**2).sqrt()
    denoised = c_skip * y + c_out * toy(c_in * y, sigma.log().flatten() / 4, labels)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    expected = (weight * (denoised - images.double()) ** 2).mean((1, 2, 3))
    model = Recorder()
    loss = EDMLoss(EDM(sigma_data=data), p_mean, p_std)(model, images, labels, index, SEED)
    assert loss.shape == (6,) and loss.dtype == torch.float32
    assert model.x.dtype == model.t.dtype == torch.float32 and model.t.shape == (6,)
    assert model.x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_vp_loss_is_the_published_one(prediction, gamma):
    images, index = make_images(40), torch.arange(40) * 977
    vp = VP(prediction=prediction)
    u = ops.philox_uniform_(torch.empty(40, 1), index, SEED, ops.Stream.LEVEL)[:, 0].double()
    t = (1000 * u).floor().long()
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    x0, n = images.double(), training_noise(images, index)
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * n
    target = {"eps": n, "x0": x0, "v": alpha_bar.sqrt() * n - (1 - alpha_bar).sqrt() * x0}[prediction]
    expected = ((toy(x, t) - target) ** 2).mean((1, 2, 3))
    if gamma is not None:
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        assert (snr < gamma).any() and (snr > gamma).any()
        clipped = snr.clamp(max=gamma)
        expected = expected * {"eps": clipped / snr, "v": clipped / (snr + 1), "x0": clipped}[prediction]
    model = Recorder()
    loss = VPLoss(vp, gamma)(model, images, None, index, SEED)
    assert model.labels is None and torch.equal(model.t, t.float())
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [EDMLoss(), VPLoss(), VPLoss(VP(prediction="v"), 5.0), VPLoss(VP(prediction="x0", schedule="squaredcos_cap_v2"))],
)
def test_the_perfect_denoiser_has_no_loss(loss):
    """A network that knows the images and inverts D = kx x + km m."""
    images, index = make_images(16), torch.arange(16)
    parameterization = loss.parameterization

    def perfect(x, t, labels):
        s = (
            torch.exp(4 * t.double())
            if parameterization.kind == "edm"
            else torch.from_numpy(parameterization.ratios)[t.long()]
        )
        kx, km = (k.view(-1, 1, 1, 1) for k in parameterization.denoiser(s))
        return ((images.double() - kx * x.double()) / km).float()

    assert float(loss(perfect, images, None, index, SEED).max()) < 1e-6
    assert float(loss(lambda x, t, labels: torch.zeros_like(x), images, None, index, SEED).mean()) > 0.01


def test_level_distributions():
    images, index = torch.zeros(20000, 1, 1, 1), torch.arange(20000)
    model = Recorder()
    EDMLoss(p_mean=-1.2, p_std=1.2)(model, images, None, index, SEED)
    log_sigma = 4 * model.t.double()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=5 * 1.2 / math.sqrt(20000))
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=5 * 1.2 / math.sqrt(40000))
    VPLoss(VP(timesteps=10))(model, images, None, index, SEED)
    counts = torch.bincount(model.t.long(), minlength=10)
    assert (
        len(counts) == 10 and float(((counts - 2000.0) ** 2 / 2000).sum()) < 35
    )  # chi^2, 9 degrees of freedom, p < 1e-4


@pytest.mark.parametrize("loss", [EDMLoss(label_drop=LabelDrop(0.4, 3)), VPLoss(VP(), 5.0, LabelDrop(0.4, 3))])
def test_losses_do_not_depend_on_the_batch(loss):
    images, labels, index = make_images(12), torch.arange(12) % 3, torch.arange(100, 112)
    whole = loss(toy, images, labels, index, SEED)
    parts = [
        loss(toy, images[part], labels[part], index[part], SEED) for part in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)
    assert not torch.allclose(whole, loss(toy, images, labels, index, SEED + 1))
    assert not torch.allclose(whole, loss(toy, images, labels, index + 12, SEED))


def test_label_dropout():
    images, labels, index = torch.zeros(20000, 1, 1, 1), torch.arange(20000) % 7, torch.arange(20000)
    model = Recorder()
    EDMLoss(label_drop=LabelDrop(0.1, 7))(model, images, labels, index, SEED)
    dropped = model.labels == 7
    assert torch.equal(model.labels[~dropped], labels[~dropped])
    assert float(dropped.double().mean()) == pytest.approx(0.1, abs=5 * 0.3 / math.sqrt(20000))
    EDMLoss(label_drop=LabelDrop(0.0, 7))(model, images, labels, index, SEED)
    assert torch.equal(model.labels, labels)
    with pytest.raises(UsageError, match=r"--label-dropout 1\.0: expected a number from 0 to below 1"):
        LabelDrop(1.0, 7)


def test_gradients_and_low_precision_outputs():
    scale = torch.tensor(0.5, requires_grad=True)
    images, index = make_images(4), torch.arange(4)
    EDMLoss()(lambda x, t, labels: scale * x, images, None, index, SEED).mean().backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0
    low = EDMLoss()(lambda x, t, labels: toy(x, t).bfloat16(), images, None, index, SEED)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, EDMLoss()(toy, images, None, index, SEED), rtol=0.02, atol=0.01)


def test_bad_options():
    with pytest.raises(UsageError, match="--min-snr-gamma 0: expected a positive number"):
        VPLoss(min_snr_gamma=0)
    with pytest.raises(UsageError, match="--p-std 0: expected a positive number"):
        EDMLoss(p_std=0)
