"""A bank of networks against the same networks apart: gradients for images, as attacks take them, and training.

    python -m bench.pipeline.bank [--device cuda] [--threads 2]

- one after the other: each network by itself, all threads on it.
- a thread a network (CPU): each network by itself, as `synthfast.parallel.in_order` shares them out.
- frozen: the same as attacks see them (`synthfast.models.freeze`), for gradients only; training needs the networks themselves.
- vmap: torch.func.vmap over the stacked networks, what a bank does with networks that it does not know.

The check: all give the same gradients, of images or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import harness
from synthfast.models import bank as bank_module
from synthfast.models.bank import Bank
from synthfast.models.classifiers import make_classifier
from synthfast.models.frozen import freeze
from synthfast.parallel import in_order

# Network, shape of the images, number of networks, images for each.
CASES = {
    "cpu": [
        ("small-cnn", (8, 8, 1), 8, 16),
        ("small-cnn", (8, 8, 1), 8, 64),
        ("preact-resnet-18", (32, 32, 3), 2, 16),
    ],
    "cuda": [
        ("small-cnn", (8, 8, 1), 8, 64),
        ("small-cnn", (8, 8, 1), 8, 512),
        ("resnet-18", (32, 32, 3), 8, 64),
        ("resnet-18", (32, 32, 3), 8, 256),
    ],
}

Network = Callable[[Tensor], Tensor]


def gradient(network: Network, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(network(leaf), y, reduction="sum"), leaf)[0]


def train(network: nn.Module, x: Tensor, y: Tensor) -> None:
    network.zero_grad(set_to_none=True)
    F.cross_entropy(network(x), y, reduction="sum").backward()


def by_vmap(networks: Sequence[nn.Module]) -> Bank:
    """A bank that does not know its networks."""
    known = bank_module._works_in_groups
    bank_module._works_in_groups = lambda network: False
    try:
        return Bank(networks)
    finally:
        bank_module._works_in_groups = known


def make_cases(
    device: torch.device, name: str, shape: tuple[int, int, int], count: int, batch: int
) -> list[harness.Case]:
    torch.manual_seed(0)
    networks = [make_classifier(name, shape, 2).to(device) for _ in range(count)]
    x = torch.rand(count * batch, shape[2], *shape[:2], device=device).contiguous(memory_format=torch.channels_last)
    y = torch.arange(len(x), device=device) % 2
    parts = list(zip(x.chunk(count), y.chunk(count), strict=True))
    bank, vmapped = Bank(networks), by_vmap(networks)
    banks = {"bank": bank, "bank, channels_last": Bank(networks).to(memory_format=torch.channels_last)}
    threads = torch.get_num_threads() if device.type == "cpu" else 1

    def apart(work: Callable[[Network, Tensor, Tensor], Tensor | None], of: Sequence[Network]) -> list[Tensor | None]:
        return [work(network, *part) for network, part in zip(of, parts, strict=True)]

    def threaded(
        work: Callable[[Network, Tensor, Tensor], Tensor | None], of: Sequence[Network]
    ) -> list[Tensor | None]:
        jobs = list(zip(of, parts, strict=True))
        return list(in_order(lambda job: work(job[0], *job[1]), jobs, threads))

    frozen = [freeze(network) for network in networks]
    every = (*networks, *banks.values(), vmapped)
    for network in every:
        network.eval()
    frozen_banks = {f"{key}, frozen": freeze(network) for key, network in banks.items()}
    gradients: dict[str, Callable[[], Tensor]] = {
        key: lambda network=network: gradient(network, x, y) for key, network in {**banks, **frozen_banks}.items()
    }
    gradients["vmap"] = lambda: gradient(vmapped, x, y)
    gradients["one after the other"] = lambda: torch.cat(apart(gradient, networks))
    gradients["frozen, one after the other"] = lambda: torch.cat(apart(gradient, frozen))
    training: dict[str, Callable[[], object]] = {
        key: lambda network=network: train(network, x, y) for key, network in banks.items()
    }
    training["vmap"] = lambda: train(vmapped, x, y)
    training["one after the other"] = lambda: apart(train, networks)
    if threads > 1:
        gradients["a thread a network"] = lambda: torch.cat(threaded(gradient, networks))
        gradients["frozen, a thread a network"] = lambda: torch.cat(threaded(gradient, frozen))
        training["a thread a network"] = lambda: threaded(train, networks)

    def mode(training_mode: bool) -> None:
        for network in every:
            network.train(training_mode)
            network.requires_grad_(training_mode)

    def check_gradients() -> None:
        mode(False)
        expected = gradients["one after the other"]()
        for key, function in gradients.items():
            # A ReLU whose input is nearly 0 may open or close, which shows in that image.
            error = (function() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
            off = (error > 0.01).float().mean().item()
            assert off < 0.05, f"{key}: {off:.1%} of the images have another gradient"

    def check_training() -> None:
        mode(True)
        names = [key for key, _ in networks[0].named_parameters()]
        training["one after the other"]()
        expected = {key: torch.stack([network.get_parameter(key).grad for network in networks]) for key in names}
        for key, network in {**banks, "vmap": vmapped}.items():
            training[key]()
            for parameter in names:
                found = network.part(network.network.get_parameter(parameter).grad, parameter)
                error = (found - expected[parameter]).norm() / expected[parameter].norm()
                assert error < 0.02, f"{key}: the gradient of {parameter} is off by {error:.2%}"

    what = f"{count} x {name}, {harness.describe((batch, shape[2], *shape[:2]), (x.dtype,))} each"
    return [
        harness.Case(f"gradients of {what}", "bank", gradients, check_gradients, items=len(x)),
        harness.Case(f"training, {what}", "bank", training, check_training, items=len(x)),
    ]


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=9)
    options = parser.parse_args()
    device = harness.prepare(options)
    cases = (case for sizes in CASES[device.type] for case in make_cases(device, *sizes))
    harness.run("bank", cases, options)


if __name__ == "__main__":
    main()
