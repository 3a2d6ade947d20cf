"""One PGD-10 adversarial training step against the two ways it is commonly written.

    python -m bench.pipeline.pgd_training_step [--device cuda] [--threads 2] [--batch-size 128]

PreActResNet-18, 32x32 colour images, float32, ten steps of 2/255 in the l-infinity ball of 8/255 from a random start, then one
step of SGD with Nesterov momentum at the images found. The network is in evaluation mode for the attack, as torchattacks has it.

- torchattacks: `torchattacks.PGD(model, eps, alpha, steps)(images, labels)`, as its documentation trains, then the step.
- backward into the weights: the attack calls `loss.backward()` and reads `x.grad`, so that every step of the attack also computes
  gradients of the weights; the common habit of research repositories.

Both also with the network and images in channels_last. The check, without random starts: one step of the attack gives the same
image but for a few pixels whose gradient is nearly 0; after ten steps the losses at the images agree, and so do the weights
after training on the same images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import harness
from synthfast.attacks.pgd import pgd_maximize
from synthfast.models.classifiers import make_classifier
from synthfast.models.frozen import freeze
from synthfast.training.objectives import Ball, pgd_images

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10


@dataclass
class Side:
    """A way to train: ``attack(x, y, steps, start)`` gives images, from ``start`` or (None) a random start."""

    model: nn.Module
    attack: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def train(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def step(self, x: Tensor, y: Tensor) -> None:
        self.train(self.attack(x, y, STEPS, None), y)


def ours(model: nn.Module) -> Side:
    frozen, ball = freeze(model), Ball("linf", EPS, ALPHA, STEPS)

    def attack(x: Tensor, y: Tensor, steps: int, start: Tensor | None) -> Tensor:
        frozen.refresh()
        if start is None:
            return pgd_images(frozen, x, y, torch.arange(len(x), device=x.device), 0, ball)

        def loss(images: Tensor) -> Tensor:
            return F.cross_entropy(frozen(images), y, reduction="none")

        return pgd_maximize(loss, start, x, norm="linf", eps=EPS, step_size=ALPHA, steps=steps)

    return Side(model, attack)


def theirs(model: nn.Module) -> Side:
    import torchattacks

    def attack(x: Tensor, y: Tensor, steps: int, start: Tensor | None) -> Tensor:
        return torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=steps, random_start=start is None)(x, y)

    return Side(model, attack)


def habit(model: nn.Module) -> Side:
    def attack(x: Tensor, y: Tensor, steps: int, start: Tensor | None) -> Tensor:
        model.eval()
        adversarial = x + torch.empty_like(x).uniform_(-EPS, EPS) if start is None else start
        adversarial = adversarial.clamp(0, 1)
        for _ in range(steps):
            adversarial = adversarial.detach().requires_grad_()
            F.cross_entropy(model(adversarial), y).backward()
            assert adversarial.grad is not None
            moved = adversarial.detach() + ALPHA * adversarial.grad.sign()
            adversarial = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
        return adversarial.detach()

    return Side(model, attack)


def make_case(device: torch.device, batch_size: int) -> harness.Case:
    torch.manual_seed(0)
    reference = make_classifier("preact-resnet-18", (32, 32, 3), 10, mean=(0.0,) * 3, std=(1.0,) * 3).to(device)
    x = torch.rand(batch_size, 3, 32, 32, device=device)
    fast_x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch_size,), device=device)
    sides = {
        "synthfast": (ours(copy.deepcopy(reference)), fast_x),
        "torchattacks": (theirs(contiguous(copy.deepcopy(reference))), x),
        "torchattacks channels_last": (theirs(copy.deepcopy(reference)), fast_x),
        "backward into the weights": (habit(contiguous(copy.deepcopy(reference))), x),
        "backward into the weights channels_last": (habit(copy.deepcopy(reference)), fast_x),
    }

    def check() -> None:
        found = {}
        for name, (side, images) in sides.items():
            one = side.attack(images, y, 1, images)
            ten = side.attack(images, y, STEPS, images)
            side.model.eval()
            with torch.no_grad():
                found[name] = one, F.cross_entropy(side.model(ten), y)
            assert (ten - images).abs().max() <= EPS + 1e-6 and ten.min() >= 0 and ten.max() <= 1, name
        one, loss = found["synthfast"]
        for name, (other, other_loss) in found.items():
            differing = ((one - other).abs() > 1e-6).float().mean().item()
            assert differing < 2e-3, f"{name}: {differing:.2%} of the pixels differ after one step"
            harness.close(loss, other_loss, 0.01 * other_loss.item(), f"{name}, loss after {STEPS} steps")
        weights = {}
        for name, (side, images) in sides.items():
            side.train(images, y)
            weights[name] = torch.cat([parameter.detach().flatten() for parameter in side.model.parameters()])
        for name, other in weights.items():
            harness.close(weights["synthfast"], other, 1e-3, f"{name}, weights after a step")

    variants = {name: (lambda side=side, images=images: side.step(images, y)) for name, (side, images) in sides.items()}
    return harness.Case(
        f"PGD-10 training step, preact-resnet-18, {harness.describe(tuple(x.shape), (x.dtype,))}",
        "synthfast",
        variants,
        check,
        items=batch_size,
        warm=True,
    )


def contiguous(model: nn.Module) -> nn.Module:
    """The network with contiguous weights and activations, as it is written without a thought for layouts."""
    assert model.normalize.is_identity  # its other work is to bring images to channels_last
    model.normalize = nn.Identity()
    return model.to(memory_format=torch.contiguous_format)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.set_defaults(rounds=5)
    options = parser.parse_args()
    device = harness.prepare(options)
    harness.run("pgd_training_step", [make_case(device, options.batch_size)], options)


if __name__ == "__main__":
    main()
