"""Banks: each network is what it would be alone, in outputs, gradients, statistics and weights after training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from synthfast.attacks.pgd import pgd_maximize
from synthfast.errors import UsageError
from synthfast.models import build_classifier, describe_classifier, freeze, make_classifier, preact_resnet, resnet
from synthfast.models.bank import Bank

COUNT, BATCH, CLASSES = 3, 4, 3

# Name of the network, shape of its images, whether it runs in groups. All in float64, so that only mistakes are seen.
NETWORKS = [
    ("small-cnn", (8, 8, 1), True),
    ("small-cnn-swish", (7, 7, 3), True),
    ("resnet-18", (9, 9, 3), True),
    ("preact-resnet-18", (8, 8, 3), True),
    ("preact-resnet-18-swish", (10, 8, 3), True),
    ("wrn-10-2", (8, 8, 3), True),
    ("wrn-10-1-swish", (9, 9, 2), True),
    ("preact-resnet-18", (128, 128, 1), True),  # a stem of stride 2 and max pooling
    ("timm:resnet10t", (32, 32, 3), False),
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Narrow ResNets, for the sake of time."""
    for module in (resnet, preact_resnet):
        monkeypatch.setattr(module, "RESNET_WIDTHS", (4, 6, 8, 10))


def make(name, shape, seed):
    torch.manual_seed(seed)
    pixels = {"mean": [0.1 * (c + 1) for c in range(shape[2])], "std": [0.5 + 0.1 * c for c in range(shape[2])]}
    if name.startswith("small-cnn"):
        model = build_classifier(describe_classifier(name, shape, CLASSES, widths=[6, 8], **pixels))
    else:
        model = make_classifier(name, shape, CLASSES, **pixels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(seed)
    return model.double()


def images(shape, count=COUNT, batch=BATCH, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count * batch, shape[2], *shape[:2], generator=generator, dtype=torch.float64)


def small(count=COUNT):
    return [make("small-cnn", (8, 8, 1), seed) for seed in range(count)]


def each(networks, x):
    return torch.cat([network(part) for network, part in zip(networks, x.chunk(len(networks)), strict=True)])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def same_states(bank, networks):
    for row, network in enumerate(networks):
        state, expected = bank.state(row), network.state_dict()
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            close(state[name], tensor)


@pytest.mark.parametrize(("name", "shape", "is_grouped"), NETWORKS)
def test_training_is_that_of_separate_networks(name, shape, is_grouped):
    """Outputs, gradients of images and weights, and after steps of each optimizer weights, averages and statistics."""
    networks = [make(name, shape, seed) for seed in range(COUNT)]
    bank = Bank(networks)
    assert bank.is_grouped == is_grouped
    labels = torch.arange(COUNT * BATCH) % CLASSES
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
    ours = torch.optim.SGD(bank.parameters(), **settings)
    theirs = [torch.optim.SGD(network.parameters(), **settings) for network in networks]
    for step in range(3):
        x = images(shape, seed=step).requires_grad_()
        logits, expected = bank(x), each(networks, x)
        assert logits.shape == (COUNT * BATCH, CLASSES)
        close(logits, expected)
        for optimizer in (ours, *theirs):
            optimizer.zero_grad()
        losses = F.cross_entropy(logits, labels, reduction="none").view(COUNT, -1).mean(1)
        (for_x,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
        losses.sum().backward()
        wanted = [F.cross_entropy(*pair) for pair in zip(expected.chunk(COUNT), labels.chunk(COUNT), strict=True)]
        (wanted_for_x,) = torch.autograd.grad(sum(wanted), x, retain_graph=True)
        sum(wanted).backward()
        close(for_x, wanted_for_x)
        for key in dict(networks[0].named_parameters()):
            gradient = bank.part(bank.network.get_parameter(key).grad, key)
            for row, network in enumerate(networks):
                close(gradient[row], network.get_parameter(key).grad)
        for optimizer in (ours, *theirs):
            optimizer.step()
        same_states(bank, networks)
    x = images(shape)
    for network in (bank, *networks):
        network.eval()
    with torch.no_grad():
        close(bank(x), each(networks, x))
    same_states(bank, networks)  # evaluation leaves the statistics alone


def test_adam_is_that_of_separate_networks():
    networks = small()
    bank = Bank(networks)
    optimizers = [torch.optim.Adam(network.parameters(), lr=0.01) for network in (bank, *networks)]
    for step in range(4):
        x = images((8, 8, 1), seed=step)
        (bank(x)[:, 0].sum() + each(networks, x)[:, 0].sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same_states(bank, networks)


def test_the_networks_stay_as_they_are():
    networks = small()
    before = copy.deepcopy([network.state_dict() for network in networks])
    bank = Bank(networks)
    optimizer = torch.optim.SGD(bank.parameters(), lr=1.0)
    bank(images((8, 8, 1))).sum().backward()
    optimizer.step()
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["small-cnn", "timm:resnet10t"])
def test_states_go_out_and_in(name):
    shape = (8, 8, 1) if name == "small-cnn" else (32, 32, 3)
    networks = [make(name, shape, seed) for seed in range(COUNT)]
    bank, x = Bank(networks).eval(), images(shape)
    single = make(name, shape, 7).eval()
    single.load_state_dict(bank.state(1))
    close(single(x[:BATCH]), networks[1].eval()(x[:BATCH]))
    close(bank.single(1)(x[:BATCH]), single(x[:BATCH]))
    other = make(name, shape, 8)
    bank.load_state(2, other.state_dict())
    same_states(bank, [networks[0], networks[1], other])
    state = bank.state(0)
    for tensor in state.values():
        tensor.zero_()
    same_states(bank, [networks[0], networks[1], other])  # what is handed out is a copy


@pytest.mark.parametrize("name", ["small-cnn", "timm:resnet10t"])
def test_a_bank_of_some_of_the_networks(name):
    shape = (8, 8, 1) if name == "small-cnn" else (32, 32, 3)
    networks = [make(name, shape, seed) for seed in range(COUNT)]
    bank = Bank(networks)
    taken = bank.eval().take([2, 0])
    assert taken.count == 2 and not any(module.training for module in taken.modules())
    x = images(shape, count=2)
    close(taken(x), each([networks[2].eval(), networks[0].eval()], x))
    taken.network.get_parameter(next(iter(dict(networks[0].named_parameters())))).data.zero_()
    same_states(bank, networks)
    assert all(module.training for module in Bank(networks[:1]).train().take([0]).modules())


def test_an_optimizers_average_of_some_of_the_networks():
    bank = Bank(small())
    average = torch.arange(float(bank.network.get_parameter("features.3.weight").numel()))
    average = average.view_as(bank.network.get_parameter("features.3.weight"))
    part = bank.part(average, "features.3.weight")
    assert part.shape == (COUNT, 6, 6, 3, 3)
    assert torch.equal(part[[2, 0]].flatten(0, 1), torch.cat([average[12:], average[:6]]))


def test_modes():
    networks = small()
    bank = Bank([network.eval() for network in networks])
    assert not bank.training
    x = images((8, 8, 1))
    assert torch.equal(bank(x), bank.train().eval()(x))
    assert not torch.equal(bank(x), bank.train()(x))


@pytest.mark.parametrize("name", ["small-cnn", "preact-resnet-18", "timm:resnet10t"])
def test_frozen_for_attacks(name):
    """As attacks call it: a view in evaluation mode that takes in new weights, whatever the mode of the bank."""
    shape = (32, 32, 3) if name.startswith("timm") else (8, 8, 1)
    networks = [make(name, shape, seed).float() for seed in range(COUNT)]
    bank, x = Bank(networks).train(), images(shape).float()
    frozen = freeze(bank)
    for network in networks:
        network.eval()
    torch.testing.assert_close(frozen(x), each(networks, x), rtol=1e-4, atol=1e-5)
    assert bank.training
    bank(x)[:, 0].sum().backward()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter -= 1e-4 * parameter.grad
    frozen.refresh()
    bank.eval()
    torch.testing.assert_close(frozen(x), bank(x), rtol=1e-4, atol=1e-5)


def test_one_attack_with_a_radius_a_network():
    networks, x = [network.eval() for network in small()], images((8, 8, 1))
    bank = Bank(networks)
    radii = torch.tensor([0.0, 0.2, 0.7])
    eps = radii.repeat_interleave(BATCH)
    labels = torch.arange(len(x)) % CLASSES

    def attack(network, rows, eps):
        def loss(images):
            return F.cross_entropy(network(images.double()), labels[rows], reduction="none")

        start = x[rows].float()
        return pgd_maximize(loss, start, start, norm="l2", eps=eps, step_size=eps / 4, steps=5)

    found = attack(bank, slice(None), eps)
    for row, network in enumerate(networks):
        rows = slice(row * BATCH, (row + 1) * BATCH)
        torch.testing.assert_close(found[rows], attack(network, rows, eps[rows]), rtol=0, atol=1e-6)
    moved = (found - x.float()).flatten(1).norm(dim=1)
    assert moved[:BATCH].max() == 0 and moved[BATCH : 2 * BATCH].max() <= 0.2 + 1e-6 and moved[-BATCH:].min() > 0.3
    assert all(parameter.grad is None for parameter in bank.parameters())


def test_no_images():
    assert Bank(small()).eval()(torch.zeros(0, 1, 8, 8).double()).shape == (0, CLASSES)


def test_hooked_networks_run_as_they_are():
    networks, calls = small(), []
    networks[0].head.register_forward_hook(lambda *_: calls.append(1))
    bank = Bank(networks)
    x = images((8, 8, 1))
    assert not bank.is_grouped
    close(bank(x), each(networks, x))
    assert len(calls) == 2


def different(**details):
    return build_classifier(
        describe_classifier("small-cnn", (8, 8, 1), CLASSES, **{"widths": [6, 8], **details})
    ).double()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: different(widths=[6, 9]), r"network 1 .*: features.6.weight \[9, 6, 3, 3\] instead of \[8, 6, 3, 3\]"),
        (lambda: different(widths=[6]), "network 1 .* in only one of the two"),
        (lambda: different(widths=[6, 8, 8]), "network 1 .* in only one of the two"),
        (lambda: different(mean=0.2, std=0.7), "network 1 .*: other modules or settings"),
        (lambda: different().float(), "torch.float32 on cpu instead of torch.float64 on cpu"),
        (lambda: make("small-cnn-swish", (8, 8, 1), 0), "network 1 .*: other modules or settings"),
    ],
)
def test_networks_that_differ(other, message):
    with pytest.raises(UsageError, match=message) as error:
        Bank([different(), other()])
    assert "\n" not in str(error.value)


def test_wrong_use():
    bank = Bank(small())
    with pytest.raises(UsageError, match="at least one network, found none"):
        Bank([])
    with pytest.raises(
        UsageError, match=r"a bank of 3 networks expects images \[3 \* N, C, H, W\], found \[4, 1, 8, 8\]"
    ):
        bank(torch.zeros(4, 1, 8, 8).double())
    with pytest.raises(UsageError, match="network from 0 to 2 of a bank of 3, found 3"):
        bank.state(3)
    before = bank.state(0)
    state = {**before, "head.bias": torch.zeros(CLASSES + 1)}
    with pytest.raises(UsageError, match=r"head.bias \[3\], found \[4\]"):
        bank.load_state(0, state)
    with pytest.raises(UsageError, match=r"head\.bias is missing"):
        bank.load_state(0, {name: tensor + 1 for name, tensor in before.items() if name != "head.bias"})
    with pytest.raises(UsageError, match="extra is none of its tensors"):
        bank.load_state(0, {**before, "extra": torch.zeros(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.state(0).items())
