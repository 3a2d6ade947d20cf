"""A network as attacks see it: evaluation mode, gradients for the images only, and faster on a CPU.

In an attack the weights stay the same for 10 to 100 forward and backward passes. So on a CPU in float32 the network is traced
(torch.fx) and rebuilt: batch norm is folded into the convolution before it; 3x3 convolutions of stride 1 run by Winograd's
algorithm with transformed weights that are kept (:func:`synthfast.ops.winograd_conv3x3`), with the batch norm and ReLU before
them and the addition after them in the same pass. Elsewhere, and where a network cannot be traced, what is left is an ordinary
evaluation.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from synthfast import ops

Derive = TypeVar("Derive", bound=Callable[..., Any])

# Measured (bench.ops.winograd_conv3x3): Winograd's algorithm pays from so many channels on, unless too much of its 4x4 tiles lies
# outside of the image (5x5 images fill 39% of theirs, and lose), or there are too few of them for the transformed weights to
# be read, 4 times as many as the weights.
LEAST_CHANNELS = 16
LEAST_COVERED = 0.55
LEAST_TILES = 4
# Transformed weights of both directions take 8 times the memory of the weights; layers beyond this many bytes do without.
MOST_BYTES = 4 << 30


def freeze(model: nn.Module, *, exact: bool = False) -> Frozen:
    """The network as a function for attacks: images [N, C, H, W] to logits, in evaluation mode, with gradients for images only.

    Args:
        model: stays as it is: its mode, parameters, ``requires_grad`` and hooks are not touched. Nothing of it is copied but
            what its folded and transformed weights take (on a CPU in float32, up to 9 times the memory of the weights; the
            transformed ones are made when a layer first needs them).
        exact: the very operations of ``model`` in evaluation mode, so that results are equal bit for bit. Otherwise they agree
            up to rounding: both are about as far (1e-6) from the network in float64. As with any change of rounding, a ReLU
            whose input is that close to 0 may open or close, which shows in the gradient of that image. A gradient of a
            gradient exists only with ``exact``.

    Returns:
        :class:`Frozen`; call its ``refresh()`` after weights or statistics of ``model`` changed.
    """
    return Frozen(model, exact=exact)


class Frozen:
    """See :func:`freeze`. Calls may come from several threads, but not during ``refresh()``."""

    def __init__(self, model: nn.Module, *, exact: bool = False) -> None:
        self._model, self._exact = model, exact
        self._build()

    def _build(self) -> None:
        self._plain = _view(self._model)
        self._fast = None if self._exact else _rebuilt(self._plain)
        self._layers = [] if self._fast is None else [m for m in self._fast.modules() if isinstance(m, FrozenConv)]
        left = MOST_BYTES
        for layer in self._layers:
            left -= layer.transformed_bytes()
            layer.may_transform = layer.may_transform and left >= 0

    def __call__(self, x: Tensor) -> Tensor:
        fast = self._fast is not None and x.device.type == "cpu" and x.dtype == torch.float32
        return self._fast(x) if fast and not torch.is_autocast_enabled("cpu") else self._plain(x)

    def refresh(self) -> None:
        """Take in changed weights and statistics of the model. Folded and transformed weights are made anew when next needed."""
        pairs = list(zip(_tensors(self._plain), _tensors(self._model), strict=True))
        if any((a.device, a.dtype, a.shape) != (b.device, b.dtype, b.shape) for a, b in pairs):
            return self._build()
        for ours, theirs in pairs:
            ours.data = theirs.data  # the same memory, unless the model was given other tensors
        for layer in self._layers:
            layer.stale()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _view(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same memory, in evaluation mode, without gradients."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo).eval()


def _ordinary(derive: Derive) -> Derive:
    """Derived weights outlive the call that first needs them: they must not become inference tensors, which autograd refuses."""

    @functools.wraps(derive)
    def call(*arguments: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return derive(*arguments)
        with torch.inference_mode(False), torch.no_grad():
            return derive(*arguments)

    return cast(Derive, call)


class FrozenConv(nn.Module):
    """A convolution with what surrounds it: batch norm and ReLU before, batch norm and the addition of a residual after.

    Its weights are derived from those of the modules that it was made of, when they are first needed.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        norm: nn.BatchNorm2d | None = None,
        relu: bool = False,
        after: nn.BatchNorm2d | None = None,
    ) -> None:
        super().__init__()
        # In a tuple, so that they do not count as modules of this one: the state belongs to the model.
        self._sources = (conv, norm, after)
        self.relu = relu
        self.may_transform = _fits_winograd(conv)
        self._folded: tuple[Tensor, Tensor | None] | None = None
        self._affine: tuple[Tensor | None, Tensor | None] | None = None
        self._transformed: dict[bool, Tensor] = {}
        self._fresh: set[bool] = set()

    def transformed_bytes(self) -> int:
        """Memory of the transformed weights of both directions."""
        weight = self._sources[0].weight
        return 2 * 4 * 36 * weight.shape[0] * weight.shape[1] if self.may_transform else 0

    def stale(self) -> None:
        """Forget derived weights, but keep the memory of the transformed ones."""
        self._folded = self._affine = None
        self._fresh = set()

    @_ordinary
    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, with the batch norm that follows."""
        folded = self._folded
        if folded is None:
            conv, _, after = self._sources
            folded = conv.weight.data, None if conv.bias is None else conv.bias.data
            if after is not None:
                scale, shift = _scale_and_shift(after)
                bias = shift if folded[1] is None else torch.addcmul(shift, folded[1], scale)
                folded = folded[0] * scale[:, None, None, None], bias
            self._folded = folded
        return folded

    @_ordinary
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of the batch norm before the ReLU."""
        affine = self._affine
        if affine is None:
            norm = self._sources[1]
            self._affine = affine = (None, None) if norm is None else _scale_and_shift(norm)
        return affine

    @_ordinary
    def transformed(self, rotated: bool) -> Tensor:
        """Weights for Winograd's algorithm, forward or (rotated) backward."""
        if rotated not in self._fresh:
            weight = self.folded()[0]
            out = self._transformed.get(rotated)
            if out is None:
                out = ops.winograd_weights(weight, rotated)
            else:
                ops.winograd_weights_(out, weight, rotated)
            self._transformed[rotated] = out
            self._fresh = self._fresh | {rotated}
        return self._transformed[rotated]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.may_transform and pays(x.shape):
            fused = residual is not None and residual.shape == (x.shape[0], self._sources[0].out_channels, *x.shape[2:])
            y = _Winograd.apply(x, residual if fused else None, self)
            return y if fused or residual is None else y + residual
        conv, norm, _ = self._sources
        if norm is not None:
            x = norm(x)
        if self.relu:
            x = F.relu(x, inplace=norm is not None)
        weight, bias = self.folded()
        y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y if residual is None else y + residual


def pays(shape: torch.Size) -> bool:
    """Whether Winograd's algorithm is the faster one for images [N, C, H, W] of this shape."""
    if len(shape) != 4 or ops.cpu_capability() == "default":
        return False
    height, width = shape[2:]
    tiles = -(-height // 4) * -(-width // 4)
    return shape[0] * tiles >= LEAST_TILES and height * width >= LEAST_COVERED * 16 * tiles


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, layer: FrozenConv) -> Tensor:
        ctx.layer, ctx.has_residual = layer, residual is not None
        if layer.relu:
            ctx.save_for_backward(x)
        weight, bias = layer.folded()
        scale, shift = layer.affine()
        return ops.winograd_conv3x3(
            x, layer.transformed(False), len(weight), bias, scale=scale, shift=shift, relu=layer.relu, residual=residual
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer: FrozenConv = ctx.layer
        for_x = None
        if ctx.needs_input_grad[0]:
            scale, shift = layer.affine()
            for_x = ops.winograd_conv3x3_gradient(
                gradient,
                layer.transformed(True),
                layer.folded()[0].shape[1],
                *ctx.saved_tensors,
                scale=scale,
                shift=shift,
                relu=layer.relu,
            )
        return for_x, gradient if ctx.has_residual else None, None


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm in evaluation mode is scale * x + shift by channel."""
    scale = (norm.running_var.data + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.data
    shift = -norm.running_mean.data * scale
    return scale, shift if norm.bias is None else shift + norm.bias.data


def _fits_winograd(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return (
        shape == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and _float_cpu(conv)
    )


def _float_cpu(module: nn.Module) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in module.parameters())


def _is_conv(module: object) -> bool:
    """A convolution that is what it seems: no subclass, no hooks, no parametrization that makes weights on the fly."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and _is_plain(module)


def _is_norm(module: object) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and _float_cpu(module)


def _rebuilt(plain: nn.Module) -> nn.Module | None:
    """The network with fast convolutions; None where it has none that could be faster."""
    if not any(_is_conv(m) for m in plain.modules()):
        return None
    try:
        graph = _Tracer().trace(plain)
        module = _rewritten(fx.GraphModule(plain, graph))
    except Exception:  # whatever a forward method does that cannot be traced
        return _with_convolutions_replaced(plain)
    return module


class _Tracer(fx.Tracer):
    """Modules with hooks stay whole, so that the hooks run with each call and not once while tracing."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        hooked = bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        return hooked or super().is_leaf_module(module, qualified_name)


def _with_convolutions_replaced(plain: nn.Module) -> nn.Module | None:
    """Module by module: each 3x3 convolution alone, with nothing folded into it."""
    memo: dict[int, object] = {id(t): t for t in _tensors(plain)}
    replaced = False
    for module in plain.modules():
        if _is_conv(module) and _fits_winograd(module):
            memo[id(module)] = FrozenConv(module)
            replaced = True
    return copy.deepcopy(plain, memo) if replaced else None


def _rewritten(module: fx.GraphModule) -> fx.GraphModule:
    """Replace each convolution and what can go along with it. The order matters: identities first, additions last."""
    graph, made = module.graph, {}
    modules = dict(module.named_modules())

    def target(node: object) -> nn.Module | None:
        return modules.get(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None

    for node in list(graph.nodes):
        if isinstance(target(node), nn.Identity | nn.Dropout | nn.Dropout2d) and _is_plain(target(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    for node in list(graph.nodes):
        conv = target(node)
        if not _is_conv(conv) or len(node.args) != 1:
            continue
        norm = after = None
        relu, source, last = False, node.args[0], node
        users = list(node.users)
        if len(users) == 1 and _is_norm(target(users[0])) and not _writes(node, users[0], target):
            last, after = users[0], target(users[0])
        removed = [node] if last is node else [last, node]
        if _fits_winograd(conv) and _is_relu(source, target) and len(source.users) == 1:
            before = source.args[0]
            # The input is read and kept in place of the activation's result: nobody may write into it, the activation included.
            end = next(reversed(graph.nodes))
            if isinstance(before, fx.Node) and (len(before.users) == 1 or not _writes(source, end, target)):
                removed.append(source)
                relu, source = True, before
                if (
                    _is_norm(target(source))
                    and len(source.users) == 1
                    and not _writes(source, last, target, but=removed)
                ):
                    removed.append(source)
                    norm, source = target(source), source.args[0]
        key = (id(conv), id(norm), relu, id(after))
        if key not in made:
            made[key] = f"frozen_{len(made)}"
            module.add_submodule(made[key], FrozenConv(conv, norm=norm, relu=relu, after=after))
        with graph.inserting_after(last):
            new = graph.call_module(made[key], (source,))
        last.replace_all_uses_with(new)
        for old in removed:
            graph.erase_node(old)

    modules = dict(module.named_modules())
    for node in list(graph.nodes):
        if not _is_addition(node):
            continue
        for mine, other in (node.args, node.args[::-1]):
            layer = target(mine)
            alone = isinstance(layer, FrozenConv) and len(mine.args) == 1 and len(mine.users) == 1
            if alone and layer.may_transform and other is not mine and not _writes(mine, node, target):
                with graph.inserting_after(node):
                    new = graph.call_module(mine.target, (mine.args[0], other))
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                graph.erase_node(mine)
                break
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _writes(first: fx.Node, last: fx.Node, target, but: Sequence[fx.Node] = ()) -> bool:
    """Whether an operation from ``first`` to before ``last`` may write into a tensor, so that what one of them reads cannot be
    read later; those in ``but`` aside."""
    node = first
    while node is not last:
        if node not in but and _is_in_place(node, target):
            return True
        node = node.next
    return False


def _is_relu(node: object, target) -> bool:
    if not isinstance(node, fx.Node) or len(node.args) < 1:
        return False
    if node.op == "call_module":
        return type(target(node)) is nn.ReLU and _is_plain(target(node))
    if node.op == "call_function":
        return node.target in (F.relu, F.relu_, torch.relu, torch.relu_)
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _is_in_place(node: fx.Node, target) -> bool:
    """As its name or an argument says; True in doubt."""
    if node.op == "call_module":
        return bool(getattr(target(node), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return name.endswith("_") or any(value is True for value in (*node.args, node.kwargs.get("inplace")))


def _is_addition(node: fx.Node) -> bool:
    """Of two tensors; fx traces ``a += b`` as ``a + b``. Numbers and broadcast tensors are caught by the layer, which looks at
    the shapes."""
    known = (node.op == "call_function" and node.target in (operator.add, torch.add)) or (
        node.op == "call_method" and node.target == "add"
    )
    return known and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
