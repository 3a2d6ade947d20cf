"""R networks of one architecture as one: one call computes all of them, and one optimizer trains them.

    bank = Bank([make_classifier("small-cnn", (8, 8, 1), 2) for _ in range(8)])
    optimizer = torch.optim.Adam(bank.parameters())            # equals 8 optimizers, for it works element by element
    logits = bank(images)                                      # [8 * N, C, H, W] to [8 * N, 2]: network r has rows r N on
    losses = F.cross_entropy(logits, labels, reduction="none").view(8, -1).mean(1)
    losses.sum().backward()                                    # each network receives the gradient of its own loss
    optimizer.step()
    attacked = freeze(bank)                                    # for attacks, with radii [8 * N] in one call
    state = bank.state(3)                                      # loads into a single network

Each network is what it would be alone: its batch norm sees its own images, its weights receive their own gradients. (What couples
the weights of a model, such as clipping by the norm of the whole gradient, would couple the networks.) Sums are taken in another
order, so numbers agree up to rounding.

The classifiers of this package run as one network whose convolutions have groups, on images [N, R C, H, W]; others, such as
timm's, by torch.func.vmap, which must know their operations and takes 1.2 to 1.6 times as long where both can.

What is saved is calls, not arithmetic (bench.pipeline.bank). On a CPU that pays for small networks and batches: the gradients of
8 small-cnn for 16 images of 8x8 each take 0.7 times as long as those of frozen networks one after the other, for 64 images each
as long, and those of ResNets on 32x32 images twice as long; training takes 0.75, 1.1 and 1.05 times as long. A thread a network
is the better plan there; a bank is for GPUs, which a single small network cannot fill.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from synthfast.errors import UsageError
from synthfast.models.classifier_parts import Normalize, SamePad
from synthfast.models.preact_resnet import PreActBlock, PreActResNet
from synthfast.models.resnet import Block, ResNet
from synthfast.models.small_cnn import SmallCNN
from synthfast.models.wide_resnet import WideBlock, WideResNet, WideStage

# What treats channels alike and apart: right for the channels of R networks side by side if it is right for those of one.
_CHANNELWISE = (nn.ReLU, nn.SiLU, nn.Identity, nn.MaxPool2d, SamePad)
# What calls other modules, adds their results, and averages over pixels before its last layer, a linear one.
_CONTAINERS = (nn.Sequential, SmallCNN, ResNet, Block, PreActResNet, PreActBlock, WideResNet, WideStage, WideBlock)


class Bank(nn.Module):
    """See the module. It holds a copy of the networks, which stay as they are.

    The parameters are leaves, each with one parameter of all networks, under the name that this has in a network behind
    ``network.``. Mode, device, type and ``requires_grad`` are changed as for any module, and :func:`synthfast.models.freeze`
    takes a bank as it takes a network. A bank that runs by vmap (``is_grouped`` is False) must not be called by several
    threads at once.

    Args:
        networks: at least one; all equal but for the values of their tensors, and on one device. The bank begins in the mode
            of the first.

    Raises:
        UsageError: there is no network, or one differs from the first.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        networks = list(networks)
        _check_alike(networks)
        self.count = len(networks)  # R
        self.is_grouped = _works_in_groups(networks[0])
        self._shapes = {name: tensor.shape for name, tensor in _tensors(networks[0])}
        self._persistent = tuple(networks[0].state_dict())
        # The modules of one network without values, as they were and as vmap calls them. In tuples, for they are no submodules.
        self._template = (_replaced(networks[0], _on_meta),)
        self._called = (_for_vmap(networks[0]),)
        self.network = _grouped(networks) if self.is_grouped else _stacked(networks)
        self.train(networks[0].training)

    def forward(self, images: Tensor) -> Tensor:
        """Images [R * N, C, H, W], those of network r in rows r N to (r + 1) N, to logits [R * N, K] in the same order."""
        images = _by_network(images, self.count)
        if self.is_grouped:
            return self.network(images.transpose(0, 1).flatten(1, 2)).flatten(0, 1)
        (called,) = self._called

        def one(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(called, tensors, (x,))

        return torch.func.vmap(one, randomness="different")(dict(_tensors(self.network)), images).flatten(0, 1)

    def train(self, mode: bool = True) -> Bank:
        """Training or evaluation mode, for all networks."""
        self._called[0].train(mode)
        return super().train(mode)

    def part(self, tensor: Tensor, name: str) -> Tensor:
        """A view [R, ...] of a tensor that is shaped as the bank's ``name``: of itself, its gradient, an optimizer's average.

        name: of a parameter or buffer, as a single network has it. What follows R is the shape there.
        """
        return tensor.view(self.count, *self._shapes[name])

    def state(self, row: int) -> dict[str, Tensor]:
        """A copy of the state dict of network ``row``, which loads into a single network."""
        return {name: self._of(row)[name].clone() for name in self._persistent}

    def load_state(self, row: int, state: Mapping[str, Tensor]) -> None:
        """Put the state dict of a single network in the place of network ``row``.

        Raises:
            UsageError: names or shapes are not those of the bank's networks; nothing has been changed then.
        """
        own = {name: tensor for name, tensor in self._of(row).items() if name in self._persistent}
        if state.keys() != own.keys():
            missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise UsageError(
                "expected the state of a network of this bank; "
                + (f"{missing[0]} is missing" if missing else f"{surplus[0]} is none of its tensors")
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise UsageError(
                    f"expected the state of a network of this bank, with {name} {list(tensor.shape)}, "
                    f"found {list(state[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def single(self, row: int) -> nn.Module:
        """A copy of network ``row``, a module like those that the bank was made of."""
        own = self._of(row)
        return _replaced(self._template[0], lambda name, _: own[name].clone()).train(self.training)

    def take(self, rows: Sequence[int]) -> Bank:
        """A bank of copies of these networks, in this order.

        The averages that an optimizer holds for a parameter go along as ``bank.part(average, name)[rows]``, reshaped to the
        new parameter.
        """
        return Bank([self.single(row) for row in rows])

    def _of(self, row: int) -> dict[str, Tensor]:
        """The tensors of a network as views into the bank's, without gradients."""
        if not 0 <= row < self.count:
            raise UsageError(f"expected a network from 0 to {self.count - 1} of a bank of {self.count}, found {row}")
        return {name: self.part(tensor.detach(), name)[row] for name, tensor in _tensors(self.network)}

    def extra_repr(self) -> str:
        return f"count={self.count}, is_grouped={self.is_grouped}"


@fx.wrap  # a trace keeps the call, and with it the check
def _by_network(images: Tensor, count: int) -> Tensor:
    """[R * N, ...] as [R, N, ...]."""
    if images.dim() != 4 or len(images) % count:
        raise UsageError(
            f"a bank of {count} networks expects images [{count} * N, C, H, W], found {list(images.shape)}"
        )
    return images.unflatten(0, (count, len(images) // count))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, those left out of the state dict too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _replaced(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A copy of the modules with ``make(name, tensor)`` for each parameter and buffer."""
    memo: dict[int, object] = {}
    for name, tensor in _tensors(model):
        made = make(name, tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(model, memo)


def _on_meta(name: str, tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _for_vmap(network: nn.Module) -> nn.Module:
    """The modules without values, and without the change of layout that vmap does not know."""
    called = _replaced(network, _on_meta)
    for name, module in list(called.named_modules()):
        if isinstance(module, Normalize):
            plain = _Normalizes(module.is_identity)
            for key, tensor in _tensors(module):
                plain.register_buffer(key, tensor, persistent=False)
            called.set_submodule(name, plain)
    return called


def _check_alike(networks: Sequence[nn.Module]) -> None:
    if not networks:
        raise UsageError("a bank needs at least one network, found none")
    first = networks[0]
    tensors = dict(_tensors(first))
    for number, other in enumerate(networks[1:], start=1):
        found = dict(_tensors(other))
        difference = ""
        for name in (*tensors, *found):
            ours, theirs = tensors.get(name), found.get(name)
            if ours is None or theirs is None:
                difference = f"{name} in only one of the two"
            elif ours.shape != theirs.shape:
                difference = f"{name} {list(theirs.shape)} instead of {list(ours.shape)}"
            elif (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
                difference = f"{name} in {theirs.dtype} on {theirs.device} instead of {ours.dtype} on {ours.device}"
            if difference:
                break
        else:
            if type(first) is not type(other) or repr(first) != repr(other):
                difference = "other modules or settings"
        if difference:
            raise UsageError(
                f"a bank needs networks of one architecture; network {number} differs from network 0: {difference}"
            )


def _works_in_groups(network: nn.Module) -> bool:
    """Whether the network consists of what is known to work on the channels of several networks side by side."""
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return False
        if type(module) is nn.BatchNorm2d:
            if module.momentum is None or not module.track_running_stats:
                return False
        elif type(module) is nn.Conv2d:
            if module.padding_mode != "zeros":
                return False
        elif type(module) not in (nn.Linear, Normalize, *_CHANNELWISE, *_CONTAINERS):
            return False
    return type(network) in _CONTAINERS and sum(type(module) is nn.Linear for module in network.modules()) == 1


def _grouped(networks: Sequence[nn.Module]) -> nn.Module:
    """One network on images [N, R C, H, W] with the channels of one network after those of another, to logits [R, N, K]."""
    count = len(networks)
    network = _replaced(networks[0], _on_meta)
    for name, module in list(network.named_modules()):
        sources = [other.get_submodule(name) for other in networks]
        made: nn.Module
        if isinstance(module, nn.Conv2d):
            made = nn.Conv2d(
                count * module.in_channels,
                count * module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                count * module.groups,
                module.bias is not None,
                device="meta",
            )
        elif isinstance(module, nn.BatchNorm2d):
            made = nn.BatchNorm2d(
                count * module.num_features, module.eps, module.momentum, module.affine, device="meta"
            )
        elif isinstance(module, nn.Linear):
            made = _Linears(count)
        elif isinstance(module, Normalize):
            made = _Normalizes(module.is_identity)
        else:
            continue
        for key, tensor in _tensors(sources[0]):
            every = torch.stack([dict(_tensors(source))[key].detach() for source in sources])
            if isinstance(tensor, nn.Parameter):
                # Contiguous: with groups channels_last takes up to 1.2 times as long on a CPU.
                setattr(made, key, nn.Parameter(every.flatten(0, 1).contiguous(), tensor.requires_grad))
            elif isinstance(module, Normalize):
                made.register_buffer(key, every.view(1, -1, 1, 1), persistent=False)
            else:
                setattr(made, key, every.flatten())
        network.set_submodule(name, made)
    return network


class _Linears(nn.Module):
    """The last layers of R networks, features [N, R C] to logits [R, N, K]; weights [R K, C], biases [R K]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        features = x.unflatten(1, (self.count, -1)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.count, -1)).transpose(1, 2)
        if self.bias is None:
            return torch.bmm(features, weight)
        return torch.baddbmm(self.bias.view(self.count, 1, -1), features, weight)


class _Normalizes(nn.Module):
    """Normalize for the images of R networks, in the layout that they come in."""

    def __init__(self, is_identity: bool) -> None:
        super().__init__()
        self.is_identity = is_identity

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_identity else torch.addcmul(self.shift, x, self.scale)


def _stacked(networks: Sequence[nn.Module]) -> nn.Module:
    """Modules that do nothing, with the tensors of the networks stacked, under their names."""
    root = nn.Module()
    every = [dict(_tensors(network)) for network in networks]
    persistent = networks[0].state_dict()
    for name, tensor in every[0].items():
        *path, last = name.split(".")
        holder = root
        for part in path:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        stack = torch.stack([tensors[name].detach() for tensors in every])
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(last, nn.Parameter(stack, tensor.requires_grad))
        else:
            holder.register_buffer(last, stack, persistent=name in persistent)
    return root
