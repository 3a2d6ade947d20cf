"""The networks of a GAN: sizes, labels, spectral normalisation, and that an image depends on nothing but its own inputs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from synthfast import ops
from synthfast.errors import UsageError
from synthfast.models.gan import (
    Discriminator,
    GANConfig,
    Generator,
    _DownBlock,
    _UpBlock,
    draw_images,
    latents,
    small_gan_config,
)
from synthfast.models.spectral_norm import SpectralConv2d, power_iteration, start_iteration


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks(size: int = 8, channels: int = 1, classes: int | None = 3) -> tuple[Generator, Discriminator]:
    config = GANConfig(size, channels, classes, latent=5, width=16)
    return Generator(config).init_weights(random()), Discriminator(config).init_weights(random(1))


def inputs(network: Generator, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    classes = network.config.num_classes
    z = torch.randn(n, network.config.latent, generator=random(seed))
    return z, None if classes is None else torch.arange(n) % classes


@pytest.mark.parametrize("size", [8, 9, 12, 15, 28, 32, 36, 100, 128])
@pytest.mark.parametrize(("channels", "classes"), [(1, 3), (3, None)])
def test_images_of_every_size(size, channels, classes):
    make, judge = networks(size, channels, classes)
    z, labels = inputs(make, 2)
    images = make(z, labels)
    assert images.shape == (2, channels, size, size) and images.dtype == torch.float32
    assert images.abs().max() < 1 and images.std() > 0.05
    assert images.is_contiguous(memory_format=torch.channels_last)
    values = judge(images, labels)
    assert values.shape == (2,) and values.dtype == torch.float32
    values.sum().backward()
    for network in (make, judge):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    ("size", "width", "levels"),
    [
        (8, 64, [(8, 64), (4, 128)]),
        (28, 128, [(28, 128), (14, 256), (7, 512), (4, 512)]),
        (15, 32, [(15, 32), (8, 64), (4, 128)]),
        (10, 640, [(10, 640), (5, 640)]),
    ],
)
def test_resolutions_and_widths(size, width, levels):
    assert GANConfig(size, 1, None, width=width).levels == levels


def test_default_widths():
    assert [small_gan_config(size, 3, None).width for size in (8, 16, 17, 32, 33, 128)] == [32, 32, 128, 128, 64, 64]
    assert small_gan_config(8, 3, None, latent=7, width=32) == GANConfig(8, 3, None, 7, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 7}, "image_size 7: expected a whole number of at least 8 for a GAN"),
        ({"image_size": 8.0}, "image_size 8.0: expected a whole number of at least 8"),
        ({"channels": 0}, "channels 0: expected"),
        ({"num_classes": 0}, "num_classes 0: expected"),
        ({"num_classes": True}, "num_classes True: expected"),
        ({"latent": None}, "latent None: expected"),
        ({"width": 8}, "width 8: expected a whole number of at least 16"),
        ({"width": 40}, "width 40: expected a multiple of 16"),
    ],
)
def test_networks_that_cannot_be_are_refused(values, message):
    with pytest.raises(UsageError) as caught:
        GANConfig(**{"image_size": 8, "channels": 1, "num_classes": None, **values})
    assert str(caught.value).startswith(message)


def test_weights_depend_on_the_generator_of_random_numbers_alone():
    state = torch.random.get_rng_state()
    first, second = networks(), networks()
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    other = Generator(first[0].config).init_weights(random(1))
    assert not torch.equal(other.start.weight, first[0].start.weight)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw_images(first[0], torch.arange(2), torch.arange(2), 0)
    assert torch.equal(torch.rand(3), expected)
    torch.random.set_rng_state(state)


def test_no_image_depends_on_the_others_of_its_batch_even_in_training():
    make, judge = networks()
    z, labels = inputs(make, 6)
    images = make.train()(z, labels)
    values = judge.train()(images, labels)
    for rows in (slice(0, 1), slice(2, 5)):
        torch.testing.assert_close(make(z[rows], labels[rows]), images[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(judge(images[rows], labels[rows]), values[rows], rtol=1e-4, atol=1e-5)


def test_noise_and_labels_reach_the_image_at_every_level():
    make, _ = networks(16)
    z, labels = inputs(make, 4)
    images = make(z, labels)
    assert (make(z, (labels + 1) % 3) - images).abs().mean() > 0.05
    assert (make(z + 0.5, labels) - images).abs().mean() > 0.05
    # Through the norms alone, with the same first layer.
    with torch.no_grad():
        make.start.weight.zero_()
        make.start.bias.copy_(torch.randn(make.start.bias.shape, generator=random()))
    assert (make(z[:1], labels[:1]) - make(z[1:2], labels[:1])).abs().mean() > 0.02
    assert len(make.norms) == 2 * len(make.blocks) + 1


def test_image_i_comes_from_the_seed_and_its_index():
    make, _ = networks()
    index = torch.tensor([3, 2**40, 0])
    expected = ops.philox_normal_(torch.empty(3, 5), index, 7, ops.Stream.NOISE)
    assert torch.equal(latents(make.config, index, 7), expected)
    assert not torch.equal(latents(make.config, index, 7, ops.Stream.TRAINING_NOISE), expected)
    labels = torch.tensor([0, 1, 2])
    images = draw_images(make, index, labels, 7)
    torch.testing.assert_close(images, make(expected, labels).detach())
    assert not images.requires_grad
    torch.testing.assert_close(draw_images(make, index[1:2], labels[1:2], 7), images[1:2], rtol=1e-4, atol=1e-5)


def test_the_discriminator_projects_on_the_class():
    """D(x, y) - D(x, y') = <e_y - e_y', phi(x)>, Miyato and Koyama 2018, eq. 8."""
    make, judge = networks()
    x = make(*inputs(make, 4)).detach()
    zero, two = torch.zeros(4, dtype=torch.long), torch.full((4,), 2)
    phi = judge.blocks(x).relu().sum((2, 3))
    difference = judge.embedding.weight[0] - judge.embedding.weight[2]
    torch.testing.assert_close(judge(x, zero) - judge(x, two), phi @ difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [SpectralConv2d(3, 8, 3), SpectralConv2d(8, 3, 1), SpectralConv2d(4, 4, 1)])
def test_weights_have_a_largest_singular_value_of_1(layer):
    layer.to(memory_format=torch.channels_last)
    start_iteration(layer, random())
    for _ in range(100):
        power_iteration(layer)
    assert torch.linalg.matrix_norm(layer.normalized().flatten(1), 2).item() == pytest.approx(1, abs=1e-4)
    ratio = layer.normalized() / layer.weight
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))


def test_gradients_and_iterations_are_those_of_torch():
    """torch iterates in each forward call in training mode, first u and then v."""
    conv = SpectralConv2d(3, 6, 3)
    start_iteration(conv, random())
    peer = nn.Conv2d(3, 6, 3, padding=1)
    peer.load_state_dict({"weight": conv.weight.detach(), "bias": conv.bias.detach()})
    peer = parametrizations.spectral_norm(peer)
    state = peer.parametrizations.weight[0]
    with torch.no_grad():
        state._u.copy_(conv.u)
        state._v.copy_(conv.v.view(3, 3, 3).permute(2, 0, 1).flatten())  # ours are in the order of channels_last
    x = torch.randn(2, 3, 5, 5, generator=random())
    peer.eval()
    for _ in range(2):
        ours, theirs = conv(x), peer(x)
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad((y**2).sum(), w)[0] for y, w in (
            (ours, conv.weight), (theirs, peer.parametrizations.weight.original),
        )]  # fmt: skip
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            conv.weight.add_(torch.randn(conv.weight.shape, generator=random(5)))
            peer.parametrizations.weight.original.copy_(conv.weight)
        power_iteration(conv)
        matrix = conv.weight.flatten(1)
        state._v.copy_(nn.functional.normalize(matrix.t() @ state._u, dim=0).detach())
        state._u.copy_(nn.functional.normalize(matrix @ state._v, dim=0).detach())


def test_a_forward_call_changes_nothing_and_an_iteration_every_layer():
    make, judge = networks()
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    x = make(*inputs(make, 4)).detach()
    assert torch.equal(judge(x, torch.zeros(4, dtype=torch.long)), judge(x, torch.zeros(4, dtype=torch.long)))
    assert all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random(3)))
    power_iteration(judge)
    after = judge.state_dict().items()
    # One of the two is a single number, 1 or -1, where a layer has one input or output.
    moved = {
        name.rpartition(".")[0] for name, x in after if name[-2:] in (".u", ".v") and not torch.equal(x, before[name])
    }
    assert moved == {name for name, m in judge.named_modules() if isinstance(m, nn.Conv2d)} and len(moved) == 6


def test_bfloat16_values_are_close():
    make, judge = networks(16, 3)
    z, labels = inputs(make, 8)
    images = make(z, labels)
    values = judge(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rough, judged = make(z, labels), judge(images, labels)
    assert rough.dtype == judged.dtype == torch.float32
    assert 0 < (rough - images).abs().max() < 0.1
    assert 0 < (judged - values).abs().max() < 0.05 * values.abs().max() + 0.05


@pytest.mark.parametrize(("first", "down"), [(True, True), (False, True), (False, False)])
def test_the_discriminator_s_blocks(first, down):
    """conv(ReLU(conv(ReLU(x)))) + skip(x), each pooled; the first block has no ReLU before it. In plain convolutions."""
    block = _DownBlock(3, 4, first=first, down=down)
    start_iteration(block, random())
    x = torch.randn(2, 3, 7, 7, generator=random())
    kept = x.clone()
    pool = functools.partial(F.avg_pool2d, kernel_size=2, ceil_mode=True) if down else nn.Identity()
    conv1, conv2, skip = (functools.partial(F.conv2d, weight=c.normalized(), bias=c.bias) for c in block.children())
    inner = conv1(x if first else F.relu(x), padding=1)
    expected = pool(conv2(F.relu(inner), padding=1)) + pool(skip(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)


def test_the_generator_s_blocks():
    """conv(ReLU(norm(conv(up(ReLU(norm(x))))))) + skip(up(x)), cut to an odd size."""
    block = _UpBlock(32, 16, size=7)
    x = torch.randn(2, 32, 4, 4, generator=random())
    first, second = torch.randn(2, 64, generator=random(1)), torch.randn(2, 32, generator=random(2))

    def norm(y, modulation, groups):
        scale, shift = modulation[:, :, None, None].chunk(2, 1)
        return F.relu(F.group_norm(y, groups) * (1 + scale) + shift)

    up = nn.Upsample(scale_factor=2)
    h = block.conv1(up(norm(x, first, 2))[:, :, :7, :7])
    expected = block.conv2(norm(h, second, 1)) + block.skip(up(x)[:, :, :7, :7])
    torch.testing.assert_close(block(x, first, second), expected, rtol=1e-4, atol=1e-5)
