"""``synthfast train generator --arch gan``: a class-conditional GAN on any image source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from synthfast import ops
from synthfast.config.generator import AUGMENTATIONS
from synthfast.data.loaders import Batch, Wanted
from synthfast.errors import UsageError
from synthfast.models.gan import Discriminator, Generator, draw_images, latents, small_gan_config
from synthfast.models.spectral_norm import power_iteration
from synthfast.training.batches import flip_half, to_model
from synthfast.training.diffaugment import diff_augment
from synthfast.training.ema import EMA
from synthfast.training.generator import GeneratorJob
from synthfast.training.loop import Progress, Trained

_BETAS = (0.0, 0.99)  # of Adam, for both networks
# Steps of diff_augment, so that the discriminator and the generator see other draws for the same images.
_FOR_DISCRIMINATOR, _FOR_GENERATOR = 1, 2


class GANJob(GeneratorJob):
    """Training of a GAN with the hinge loss (Lim and Ye 2017; Miyato and Koyama 2018).

    A step is ``d_steps`` discriminator steps, each with real images and as many generated ones of the same classes, then a
    generator step with the last of the generated ones, judged anew. A real and a generated image at the same position of the run
    are augmented alike. The loss that is reported is the discriminator's: 2 where it tells nothing apart, 0 where it tells all.

    Neither network looks at more than one image at a time, so that ranks that share a batch train what one would.
    """

    kind = "gan"

    def _build(self) -> None:
        config, device = self.config, self.ranks.device
        size, _, channels = self.images.shape
        network = small_gan_config(size, channels, self.classes, latent=config.latent, width=config.width)
        self.policy = _policy(config.augment, self.images.shape)
        self.config = dataclasses.replace(config, width=network.width, augment=",".join(self.policy) or "none")
        random = torch.Generator().manual_seed(config.seed)
        self.generator = Generator(network).init_weights(random).to(device).train()
        self.discriminator = Discriminator(network).init_weights(random).to(device).train()
        self.model = nn.ModuleDict({"generator": self.generator, "discriminator": self.discriminator})
        self.average = EMA(self.generator, config.ema)
        # One optimizer of two groups: a step moves the network that has gradients.
        groups = [
            {"params": list(self.generator.parameters()), "lr": config.lr},
            {"params": list(self.discriminator.parameters()), "lr": config.d_lr},
        ]
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)

        # As the generator's steps call them.
        self.make: nn.Module = torch.compile(self.generator) if config.compile else self.generator
        self.judge: nn.Module = torch.compile(self.discriminator) if config.compile else self.discriminator

    def run(self, report: Callable[[Progress], None] | None) -> Trained:
        # The loop prepares the discriminator for ranks that share a batch; the generator's gradients are averaged here.
        return self._trained(self._run(self.discriminator, report))

    def _wanted(self, step: int) -> Wanted:
        """The real images of all the discriminator steps, one after the other."""
        firsts = [self._first(step * self.config.d_steps + k) for k in range(self.config.d_steps)]
        parts = [self.order[first : first + self.share] for first in firsts]
        return Wanted((np.concatenate(parts),))

    def _step(self, network: nn.Module, step: int, batch: Batch) -> Tensor:
        config, device = self.config, self.ranks.device
        real = to_model(batch.images, device).split(self.share)
        labels: list[Tensor | None] = [None] * config.d_steps
        if self.classes is not None and batch.labels is not None:
            labels = list(batch.labels.split(self.share))
        losses = []
        for k in range(config.d_steps):
            first = self._first(step * config.d_steps + k)
            index = torch.arange(first, first + self.share, device=device)
            x = flip_half(real[k], index, config.seed) if self.flip else real[k]
            with torch.set_grad_enabled(k == config.d_steps - 1), self._autocast():
                z = latents(self.generator.config, index, config.seed, ops.Stream.TRAINING_NOISE)
                fake = self.make(z, labels[k])
            losses.append(self._discriminator_step(network, x, fake.detach(), labels[k], index))
        self._generator_step(fake, labels[-1], index)
        self.average.update(self.generator, step + 1)
        return torch.stack(losses).mean()

    def _discriminator_step(
        self, network: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None, index: Tensor
    ) -> Tensor:
        power_iteration(self.discriminator)
        images, index = torch.cat([real, fake]), index.repeat(2)
        images = diff_augment(images, index, self.config.seed, self.policy, step=_FOR_DISCRIMINATOR)
        with self._autocast():
            on_real, on_fake = network(images, None if labels is None else labels.repeat(2)).chunk(2)
        loss = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _generator_step(self, fake: Tensor, labels: Tensor | None, index: Tensor) -> None:
        images = diff_augment(fake, index, self.config.seed, self.policy, step=_FOR_GENERATOR)
        with self._autocast():
            loss = -self.judge(images, labels).mean()
        self.optimizer.zero_grad(set_to_none=True)
        parameters = list(self.generator.parameters())
        loss.backward(inputs=parameters)  # none for the discriminator
        if self.ranks.world_size > 1:
            _average_gradients(parameters, self.ranks.world_size)
        self.optimizer.step()

    def _network_description(self) -> dict[str, object]:
        return {"network": self.generator.config.to_dict()}

    def _draw(self, index: Tensor, labels: Tensor | None) -> Tensor:
        with self._autocast():
            return draw_images(self.average.module, index, labels, self.config.seed)


def _policy(text: str | None, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The augmentations that ``--augment`` names; where it is not given those that suit the images.

    A hole of half the side leaves too little of a digit of 8x8 pixels: after 800 steps, samples were worth 5 points less to a
    classifier.
    """
    side, _, channels = shape
    if text is None:
        unsuitable = {"colour"} if channels != 3 else set()
        unsuitable |= {"cutout"} if side <= 16 else set()
        return tuple(name for name in AUGMENTATIONS if name not in unsuitable)
    names = () if text == "none" else tuple(text.split(","))
    if not set(names) <= set(AUGMENTATIONS):
        raise UsageError(f"--augment {text}: expected none, or some of {','.join(AUGMENTATIONS)}")
    if "colour" in names and channels != 3:
        raise UsageError(f"--augment {text}: colour needs RGB images, found {channels} channels; leave it out")
    return names


def _average_gradients(parameters: list[nn.Parameter], ranks: int) -> None:
    """Give every rank the mean of all ranks' gradients, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(ranks)
    dist.all_reduce(total)
    parts = total.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(g.shape) for g, part in zip(gradients, parts, strict=True)])
