"""Models with known answers, a small network that is trained here, and what every result must satisfy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from synthfast.attacks import pgd_maximize
from synthfast.data import open_images


class Linear:
    """z = W x + b, image by image in float64: the same numbers in any batch. W is [K, D], b [K]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.double(), bias.double()

    def __call__(self, x: Tensor) -> Tensor:
        return (x.double().flatten(1)[:, None] * self.weight).sum(2) + self.bias

    def distance(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """float64 [N]: how far the nearest misclassified point is where there is no box; 0 at or beyond it.

        For class j it is the margin (w_y - w_j) x + b_y - b_j over the dual norm of w_y - w_j.
        """
        z = self(x)
        margins = z.gather(1, y[:, None]) - z
        lengths = (self.weight[y][:, None] - self.weight).norm(p=1 if norm == "linf" else 2, dim=2)
        others = torch.ones_like(margins, dtype=torch.bool).scatter(1, y[:, None], False)
        return torch.where(others, margins / lengths, math.inf).amin(1).clamp(min=0)


@dataclass
class Images:
    x: Tensor
    y: Tensor

    def first(self, count: int) -> Images:
        return Images(self.x[:count], self.y[:count])


@pytest.fixture
def draw_linear(generator: torch.Generator) -> Callable[..., tuple[Linear, Images]]:
    """draw_linear(count, classes=5, spread=0.2, shape=(3, 4, 4)): a linear model and images that it is right about, whose
    pixels lie within spread / 2 of grey: there the ball of radius (1 - spread) / 2 does not meet the box."""

    def draw(
        count: int, classes: int = 5, spread: float = 0.2, shape: tuple[int, ...] = (3, 4, 4)
    ) -> tuple[Linear, Images]:
        weight = torch.randn(classes, math.prod(shape), generator=generator)
        model = Linear(weight, -0.5 * weight.double().sum(1))
        x = 0.5 + spread * (torch.rand(count, *shape, generator=generator) - 0.5)
        return model, Images(x, model(x).argmax(1))

    return draw


@pytest.fixture
def assert_inside() -> Callable[[Tensor, Tensor, str, float], None]:
    """In the ball and in [0, 1], the stored values in float64 arithmetic: exactly, but for the rounding of the l2 sum."""

    def check(images: Tensor, x: Tensor, norm: str, eps: float) -> None:
        assert images.shape == x.shape and images.dtype == x.dtype
        moved = images.double() - x.double()
        if norm == "linf":
            assert moved.abs().max() <= eps
        else:
            assert moved.flatten(1).norm(dim=1).max() <= eps * (1 + 1e-12)
        assert images.min() >= 0 and images.max() <= 1

    return check


class SmallNetwork(nn.Sequential):
    """Two convolutions and a linear layer on digits [N, 1, 8, 8]; images in [0, 1] in, 10 logits out.

    SiLU, because at the kinks of ReLU the last digit of an image decides about its gradient.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.3) / 0.4)


def _digits(split: str) -> Images:
    source = open_images(f"digits:{split}")
    images = source.read(np.arange(len(source)))
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.as_tensor(source.labels).long())


@pytest.fixture(scope="session")
def digits() -> Images:
    """The 1,297 test images of the embedded digits."""
    return _digits("test")


@pytest.fixture(scope="session")
def network() -> Iterator[nn.Module]:
    """A network trained adversarially (PGD, l-infinity, eps 0.1) on the digits for a few seconds, in evaluation mode."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train = _digits("train")
    cross_entropy = nn.CrossEntropyLoss(reduction="none")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallNetwork()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(40):
            for rows in torch.randperm(len(train.x)).split(100):
                x, y = train.x[rows], train.y[rows]

                def loss_of(images: Tensor, y: Tensor = y) -> Tensor:
                    return cross_entropy(model(images), y)

                start = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
                adversarial = pgd_maximize(loss_of, start, x, norm="linf", eps=0.1, step_size=0.04, steps=5)
                optimizer.zero_grad()
                loss_of(adversarial).mean().backward()
                optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(before)
    yield model.eval()
