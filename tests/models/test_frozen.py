"""Frozen networks: the original in float64, which layers take which convolution, refresh, and that nothing is changed."""

from __future__ import annotations

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from synthfast import ops
from synthfast.models import frozen
from synthfast.models.frozen import freeze
from synthfast.models.small_cnn import SmallCNN


class PreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, activation):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.activation = activation

    def forward(self, x):
        out = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.activation(self.bn2(self.conv1(out))))
        return out + shortcut


class PreActNet(nn.Module):
    """As PreActResNet and WideResNet: 5 convolutions of the 7 are 3x3 and of stride 1, one of them with 3 channels in."""

    def __init__(self, activation=None):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4), persistent=False)
        activation = activation or nn.ReLU(inplace=True)
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(PreActBlock(16, 16, 1, activation), PreActBlock(16, 48, 2, activation))
        self.bn, self.activation, self.linear = nn.BatchNorm2d(48), activation, nn.Linear(48, 10)

    def forward(self, x):
        x = (x.contiguous(memory_format=torch.channels_last) - self.mean) / 0.25
        return self.linear(self.activation(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))


class PostActNet(nn.Module):
    """As ResNet: convolutions with bias, addition in place, functional activations, dropout."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 24, 3, 1, 1), nn.BatchNorm2d(24)
        self.conv1, self.bn1 = nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24, affine=False)
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(24, 10)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        out = self.bn2(self.conv2(self.dropout(torch.relu(self.bn1(self.conv1(x))))))
        out += x
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(out.relu_(), 1), 1))


class UntraceableNet(PreActNet):
    """Its path depends on values, which no trace can follow."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else x + 1)


NETS = {
    "preact": PreActNet,
    "swish": lambda: PreActNet(nn.SiLU()),
    "postact": PostActNet,
    "untraceable": UntraceableNet,
    "small-cnn": lambda: SmallCNN(3, 10, mean=(0.5,) * 3, std=(0.5,) * 3, widths=(16, 32)),
}
# Winograd convolutions in a forward pass at 8x8 (small-cnn, 16 wide: stem 3 -> 16 no, 16 -> 16, strided no, 32 -> 32).
WINOGRADS = {"preact": 3, "swish": 3, "postact": 2, "untraceable": 3, "small-cnn": 2}


def make(name: str, generator: torch.Generator) -> nn.Module:
    """With running statistics and affine maps that differ from those of a new network."""
    net = NETS[name]()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, (1.6 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.3, generator)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5, generator=generator)
    return net.to(memory_format=torch.channels_last)


@pytest.fixture(params=NETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(name, generator) -> nn.Module:
    return make(name, generator)


@pytest.fixture
def x(generator) -> Tensor:
    return torch.rand(16, 3, 8, 8, generator=generator)


def logits_and_gradient(f, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = f(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


def agree(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Logits within 1e-5 of the largest; gradients of all but one image in eight, where a ReLU may have been at the edge."""
    scale = expected[0].abs().max().item()
    assert scale > 0.1
    torch.testing.assert_close(ours[0].double(), expected[0].double(), rtol=0, atol=1e-5 * scale)
    errors = (ours[1].double() - expected[1].double()).flatten(1).norm(dim=1) / expected[1].flatten(1).norm(dim=1)
    assert errors.sort().values[:-2].max() < 2e-5, errors


def evaluated(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return logits_and_gradient(copy.deepcopy(net).double().eval(), x.double())


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(f, x: Tensor) -> Counter[str]:
    """Operations of a forward and backward pass whose derived weights are there already."""
    logits_and_gradient(f, x)
    with Count() as mode:
        logits_and_gradient(f, x)
    return mode.calls


needs_vectors = pytest.mark.skipif(ops.cpu_capability() == "default", reason="the rule asks for AVX2")


def test_equals_the_network_in_float64(name, net, x):
    expected = evaluated(net, x)
    f = freeze(net)
    assert isinstance(f._fast, fx.GraphModule) == (name != "untraceable")
    agree(logits_and_gradient(f, x), expected)
    agree(logits_and_gradient(f, x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.no_grad():
        without = f(x)
    assert torch.equal(without, logits_and_gradient(f, x)[0])


@needs_vectors
def test_which_convolutions_and_what_is_left(name, net, x):
    """The rule by layer; folded and fused batch norms and activations no longer show."""
    calls = count(freeze(net), x)
    assert calls["winograd_conv3x3"] == calls["winograd_conv3x3_gradient"] == WINOGRADS[name]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert calls["convolution"] == calls["convolution_backward"] == convolutions - WINOGRADS[name]
    norms = sum(n for op, n in calls.items() if "batch_norm" in op and "backward" not in op)
    # preact: bn1 of the first block is fused, bn2 of both folded; what remains are bn1 with two users and the last one.
    assert norms == {"preact": 2, "swish": 3, "postact": 0, "untraceable": 5, "small-cnn": 0}[name]
    additions = calls["add"] + calls["add_"]
    # The sum of two gradients is an addition as well, one a block.
    assert additions == {"preact": 2, "swish": 2, "postact": 1, "untraceable": 4, "small-cnn": 0}[name], calls


@needs_vectors
@pytest.mark.parametrize(
    ("shape", "used"),
    [
        ((1, 3, 8, 8), 3),  # 4 tiles, at 4x4 in the second block only 1
        ((4, 3, 8, 8), 3),
        ((8, 3, 5, 5), 0),  # 39% of the tiles are image; and 3x3 in the second block: 56%
        ((8, 3, 16, 4), 3),
        ((8, 3, 2, 2), 0),
    ],
)
def test_rule_by_shape(generator, shape, used):
    net = make("preact", generator)
    expected = {(1, 3, 8, 8): 2, (8, 3, 5, 5): 1, (8, 3, 16, 4): 2}.get(shape, used)
    x = torch.rand(shape, generator=generator)
    f = freeze(net)
    assert count(f, x)["winograd_conv3x3"] == expected
    torch.testing.assert_close(f(x).double(), evaluated(net, x)[0], rtol=0, atol=2e-5)


def test_exact_is_bit_for_bit(net, x):
    expected = logits_and_gradient(copy.deepcopy(net).eval(), x)
    f = freeze(net, exact=True)
    ours = logits_and_gradient(f, x)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert not any("winograd" in op for op in count(f, x))


def test_original_is_not_touched(net, x):
    net.train()
    ran = []
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_hook(lambda *_: ran.append(1))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modules = list(net.named_modules())
    f = freeze(net)
    logits_and_gradient(f, x)
    f.refresh()
    logits_and_gradient(f, x)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None and p.grad_fn is None for p in net.parameters())
    assert all(m.training for m in net.modules()) and list(net.named_modules()) == modules
    assert len(ran) == 2  # the hook's module was left whole and runs once a call
    expected = evaluated(net, x)
    agree(logits_and_gradient(f, x), expected)


def test_parameters_share_their_memory(net):
    f = freeze(net)
    ours = {t.data_ptr() for t in [*f._plain.parameters(), *f._plain.buffers()]}
    assert ours == {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}
    assert not any(p.requires_grad for p in f._plain.parameters())


def test_refresh(net, x, generator):
    f = freeze(net)
    agree(logits_and_gradient(f, x), evaluated(net, x))
    with torch.no_grad():
        for parameter in net.parameters():  # as an optimizer does
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    net.train()
    net(x)  # moves the running statistics
    f.refresh()
    agree(logits_and_gradient(f, x), evaluated(net, x))
    addresses = [t.data_ptr() for layer in f._layers for t in layer._transformed.values()]
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    net.load_state_dict(other.state_dict(), assign=True)  # other tensors in place of the old
    f.refresh()
    agree(logits_and_gradient(f, x), evaluated(net, x))
    assert [t.data_ptr() for layer in f._layers for t in layer._transformed.values()] == addresses


def test_refresh_after_another_type(generator, x):
    net = make("preact", generator)
    f = freeze(net)
    f(x)
    net.double()
    f.refresh()
    assert torch.equal(f(x.double()), copy.deepcopy(net).eval()(x.double()))
    net.float()
    f.refresh()
    agree(logits_and_gradient(f, x), evaluated(net, x))


@needs_vectors
def test_gradient_weights_are_made_when_needed(generator, x):
    net = make("preact", generator)
    f = freeze(net)
    with torch.no_grad():
        f(x)
    assert [list(layer._transformed) for layer in f._layers if layer._transformed] == [[False]] * 3
    logits_and_gradient(f, x)
    assert [list(layer._transformed) for layer in f._layers if layer._transformed] == [[False, True]] * 3


@needs_vectors
def test_memory_limit(generator, x, monkeypatch):
    net = make("preact", generator)
    monkeypatch.setattr(frozen, "MOST_BYTES", 2 * 4 * 36 * 16 * 16 * 2)  # the two layers of the first block
    f = freeze(net)
    assert count(f, x)["winograd_conv3x3"] == 2
    agree(logits_and_gradient(f, x), evaluated(net, x))


def test_no_gradient_of_a_gradient(generator, x):
    net = make("preact", generator)
    x.requires_grad_()
    gradient = torch.autograd.grad(freeze(net)(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    gradient = torch.autograd.grad(freeze(net, exact=True)(x).square().sum(), x, create_graph=True)[0]
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()


def test_other_types_and_autocast(generator, x):
    """There the ordinary convolution runs."""
    net = make("preact", generator)
    f = freeze(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert not any("winograd" in op for op in count(f, x))
    double = make("preact", generator).double()
    assert torch.equal(freeze(double)(x.double()), copy.deepcopy(double).eval()(x.double()))


def test_threads_may_share_it(generator, x):
    net = make("preact", generator)
    f, parts = freeze(net), x.split(4)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: logits_and_gradient(f, part), parts))
    f = freeze(net)
    for ours, part in zip(together, parts, strict=True):
        alone = logits_and_gradient(f, part)
        assert torch.equal(ours[0], alone[0]) and torch.equal(ours[1], alone[1])


class Shared(nn.Module):
    """One convolution in several places, a norm and an in-place ReLU whose input are used again, additions that broadcast."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.offset = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x):
        normed = self.norm(x)
        a = self.conv(F.relu(normed)) * normed
        b = self.conv(self.relu(a))
        c = self.conv(F.relu(b + self.offset)) + self.offset
        return self.conv(F.relu(c + 1)) + a + b + 1


def test_first_used_in_inference_mode(net, x):
    """As evaluation does, which predicts before it attacks: what is derived there must serve autograd later."""
    fast = freeze(net)
    with torch.inference_mode():
        fast(x)
    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(images).sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_what_looks_alike_but_is_not(generator):
    net = Shared()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.2, generator)
    x = torch.randn(4, 16, 8, 8, generator=generator)
    f = freeze(net)
    assert isinstance(f._fast, fx.GraphModule)
    agree(logits_and_gradient(f, x), evaluated(net, x))
    assert len(f._layers) == 2  # the convolution with and without a ReLU


class Writes(nn.Module):
    """Something writes into what a convolution has read, before that convolution could go along with what follows it."""

    def __init__(self, write, place):
        super().__init__()
        self.conv, self.norm, self.write, self.place = nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), write, place

    def forward(self, x):
        x = x * 1
        if self.place == "relu":
            a = F.relu(x)
            self.write(x)
            return self.conv(a) + x
        y = self.conv(F.relu(x))
        self.write(x)
        return self.norm(y) if self.place == "norm" else y + x


WRITES = {
    "method": lambda x: x.mul_(-1),
    "argument": lambda x: F.elu(x - 1, 1.0, True) + F.silu(x, inplace=True),
    "module": nn.SiLU(inplace=True),
}


@needs_vectors
@pytest.mark.parametrize("place", ["relu", "norm", "sum"])
@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_read_later_than_it_is_written_to(generator, write, place):
    net = Writes(WRITES[write], place).eval()
    x = torch.randn(4, 16, 8, 8, generator=generator)
    f = freeze(net)
    assert isinstance(f._fast, fx.GraphModule) and count(f, x)["winograd_conv3x3"] == 1
    agree(logits_and_gradient(f, x), evaluated(net, x))
