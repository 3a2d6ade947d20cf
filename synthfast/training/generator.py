"""``synthfast train generator``: what generators of every kind leave, and the diffusion model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from synthfast import diffusion, ops
from synthfast.artifacts import make_checkpoint_folder, save_checkpoint
from synthfast.config import GeneratorConfig
from synthfast.config.generator import settings, settled
from synthfast.data.grids import write_grid
from synthfast.data.loaders import Batch, Wanted, open_loader
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.models.unet import UNet2D
from synthfast.models.unet_config import small_unet_config
from synthfast.training.batches import EpochOrder, flip_half, to_model
from synthfast.training.ema import EMA
from synthfast.training.loop import PRECISION_NAMES, Job, Progress, Trained, flips, open_in_turn, pick_precision
from synthfast.training.state import load_state, save_state

# What does not change the result, or may grow: not part of what a resumed run must repeat.
_FREE = ("steps", "out", "dataset", "data_dir", "download", "device", "checkpoint_every")
_OPTIONS = {"data": "--dataset (its images)"}
_GRID_ROWS = 8


def train_generator(config: GeneratorConfig, ranks: Ranks, report: Callable[[Progress], None] | None = None) -> Trained:
    """Train, or go on training, and leave a checkpoint folder.

    The folder then holds ``config.json`` and ``model.safetensors`` (the averaged weights), ``training-state.safetensors``
    (from which the same command goes on exactly where it stopped) and ``samples-STEP.png``.

    Args:
        config: see :class:`synthfast.config.GeneratorConfig`.
        ranks: entered; every rank calls this with the same configuration.
        report: called on rank 0 about once a second and at checkpoints.

    Raises:
        UsageError: options that do not fit the data, the device or an existing run in the folder.
        SynthfastError: unreadable data, a loss that is not finite, a disk that refuses.
    """
    config = settled(config)
    if config.arch == "gan":
        from synthfast.training.gan import GANJob  # it builds upon this module

        return GANJob(config, ranks).run(report)
    return _Job(config, ranks).run(report)


class GeneratorJob(Job):
    """What training runs of all generators share: data, ranks, checkpoints.

    A subclass makes its networks in :meth:`_build` and says how they are drawn from and described.

    Attributes:
        kind: of the checkpoint.
        average: of the network that is saved and sampled from.
    """

    kind: ClassVar[str]
    average: EMA
    optimizer: torch.optim.Optimizer

    def __init__(self, config: GeneratorConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.share = self._share()
        self.images = open_in_turn(config, ranks)
        height, width, _ = self.images.shape
        if height != width:
            hint = "give --image-size" if config.dataset.startswith("folder:") else "cut or resize them"
            raise UsageError(f"--dataset {config.dataset}: expected square images, found {height}x{width}; {hint}")
        # Bytes: they become numbers in [-1, 1], and are mirrored, in the steps.
        self.loader = open_loader(config.loader, [self.images], ranks.device, workers=config.workers)
        self.classes = self.images.classes if config.conditional else None
        self.precision = pick_precision(config.precision, ranks.device)
        self._build()
        self.folder = Path(config.out)
        make_checkpoint_folder(self.folder, self.kind)
        self.flip = flips(config)
        self.order = EpochOrder(len(self.images), config.seed)
        # The content of the data, not its path, decides whether a run may go on.
        self.facts = {
            **settings(self.config),
            "data": self.images.fingerprint(),
            "precision": PRECISION_NAMES[self.precision],
            "flip": self.flip,
        }
        self.modules = {"model": self.model, "ema": self.average.module}
        self.first_step = load_state(
            self.folder, self.facts, self.modules, self.optimizer, may_differ=_FREE, options=_OPTIONS
        )

    @abstractmethod
    def _build(self) -> None:
        """Set ``model``, ``average`` and ``optimizer``, on the device, and what the steps need besides."""

    @abstractmethod
    def _draw(self, index: Tensor, labels: Tensor | None) -> Tensor:
        """Samples of the averaged network, float [N, C, H, W] in [-1, 1]."""

    @abstractmethod
    def _network_description(self) -> dict[str, object]:
        """What the checkpoint says of the network, besides what it says for every kind."""

    def _name(self) -> str:
        """What the generator is, in a word."""
        return self.kind

    def _trained(self, loss: float) -> Trained:
        done = max(self.first_step, self.config.steps)
        return Trained(done, done - self.first_step, loss, self._picture(done), loader=self.loader.kind)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32)

    def _first(self, batch: int) -> int:
        """Position in the run of this rank's first image of a batch."""
        return batch * self.config.batch_size + self.ranks.rank * self.share

    def _picture(self, step: int) -> Path:
        return self.folder / f"samples-{step:06d}.png"

    def _checkpoint(self, step: int) -> None:
        """Samples, weights and state, by rank 0; the state last, so that a kill in between repeats this checkpoint."""
        self.ranks.barrier()
        if self.ranks.is_first:
            self._write_samples(self._picture(step))
            save_checkpoint(self.folder, self.kind, self._description(step), self.average.module.state_dict())
            save_state(self.folder, step, self.facts, self.modules, self.optimizer)
        self.ranks.barrier()

    def _description(self, step: int) -> dict[str, object]:
        return {
            "name": f"{self.config.dataset} {self._name()} {step} steps",
            "shape": list(self.images.shape),
            "classes": self.classes,
            "class_names": None if self.images.class_names is None else list(self.images.class_names),
            **self._network_description(),
            "training": {**self.facts, "steps_done": step},
        }

    def _write_samples(self, path: Path) -> None:
        columns = min(self.classes or _GRID_ROWS, 10)
        index = torch.arange(_GRID_ROWS * columns, device=self.ranks.device)
        labels = None if self.classes is None else index % columns
        write_grid(path, ops.quantize_uint8(self._draw(index, labels)).cpu().numpy(), columns)


class _Job(GeneratorJob):
    kind = "diffusion"

    def _build(self) -> None:
        config, device = self.config, self.ranks.device
        size, _, channels = self.images.shape
        self.parameterization, self.loss = _objective(config, self.classes)
        unet = UNet2D(small_unet_config(size, channels, self.classes)).init_weights(config.seed)
        self.model = unet.to(device).train()
        self.average = EMA(self.model, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999)
        )

    def run(self, report: Callable[[Progress], None] | None) -> Trained:
        return self._trained(self._run(self.model, report))

    def _wanted(self, step: int) -> Wanted:
        first = self._first(step)
        return Wanted((self.order[first : first + self.share],))

    def _step(self, network: nn.Module, step: int, batch: Batch) -> Tensor:
        config, device = self.config, self.ranks.device
        images, targets = batch
        first = self._first(step)
        index = torch.arange(first, first + self.share, device=device)
        pixels = to_model(images, device)
        if self.flip:
            pixels = flip_half(pixels, index, config.seed)
        labels = None if self.classes is None else targets
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * _lr_factor(step, config)
        with self._autocast():
            loss = self.loss(network, pixels, labels, index, config.seed).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.average.update(self.model, step + 1)
        return loss.detach()

    def _name(self) -> str:
        return self.config.loss

    def _network_description(self) -> dict[str, object]:
        return {
            "null_label": self.classes if self.classes is not None and self.config.label_dropout > 0 else None,
            "parameterization": diffusion.to_dict(self.parameterization),
            "sampler": {"name": "dpmpp-2m", "steps": 16 if self.config.loss == "edm" else 25},
            "unet": self.average.module.config.to_dict(),
        }

    def _draw(self, index: Tensor, labels: Tensor | None) -> Tensor:
        height, width, channels = self.images.shape
        return diffusion.sample(
            self.average.module,
            diffusion.make_table(self.parameterization, diffusion.SolverConfig("dpmpp-2m", steps=16)),
            index,
            shape=(channels, height, width),
            seed=self.config.seed,
            labels=labels,
            autocast=None if self.precision == torch.float32 else self.precision,
        )


def _objective(
    config: GeneratorConfig, classes: int | None
) -> tuple[diffusion.Parameterization, diffusion.EDMLoss | diffusion.VPLoss]:
    drop = None
    if classes is not None and config.label_dropout > 0:
        drop = diffusion.LabelDrop(config.label_dropout, classes)
    if config.loss == "edm":
        if config.prediction != "epsilon":
            raise UsageError(
                f"--prediction {config.prediction}: the edm loss has its own; leave it out or take a ddpm loss"
            )
        edm = diffusion.EDM(sigma_data=config.sigma_data)
        return edm, diffusion.EDMLoss(edm, label_drop=drop)
    schedule = {"ddpm-linear": "linear", "ddpm-cosine": "squaredcos_cap_v2"}[config.loss]
    vp = diffusion.from_scheduler_config({"beta_schedule": schedule, "prediction_type": config.prediction})
    return vp, diffusion.VPLoss(vp, label_drop=drop)


def _lr_factor(step: int, config: GeneratorConfig) -> float:
    """Linear warm-up, then constant: the averaged weights do what a falling rate would, and a run can be made longer."""
    return min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
