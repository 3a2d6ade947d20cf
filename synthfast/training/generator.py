"""``synthfast train generator``: a diffusion model on any image source."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from synthfast import diffusion, ops
from synthfast.artifacts import make_checkpoint_folder, save_checkpoint
from synthfast.config import GeneratorConfig
from synthfast.data import ImageSet, open_images
from synthfast.data.grids import write_grid
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.unet import UNet2D
from synthfast.models.unet_config import small_unet_config
from synthfast.training.batches import EpochOrder, flip_half, prefetch, read_batch, to_model
from synthfast.training.ema import EMA
from synthfast.training.state import load_state, save_state

# What does not change the result, or may grow: not part of what a resumed run must repeat.
_FREE = ("steps", "out", "dataset", "data_dir", "download", "device", "checkpoint_every")
_OPTIONS = {"data": "--dataset (its images)"}
_FLIPPED = ("cifar10", "cifar100", "celeba", "imagenet")
_GRID_ROWS = 8


@dataclass(frozen=True)
class Progress:
    """Where a training run is. ``loss`` is the mean since the last report, over all ranks at a checkpoint, else of rank 0."""

    step: int
    steps: int
    loss: float
    images_per_step: int
    images_per_second: float


@dataclass(frozen=True)
class Trained:
    """What a run left: steps done in all and by this call, the last mean loss (NaN if none was made), the last picture."""

    steps: int
    made: int
    loss: float
    picture: Path | None = None


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
    job = _Job(config, ranks)
    return job.run(report)


class _Job:
    def __init__(self, config: GeneratorConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        if config.batch_size % ranks.world_size:
            raise UsageError(
                f"--batch-size {config.batch_size}: expected a multiple of the {ranks.world_size} ranks; change one of them"
            )
        self.images = _open_in_turn(config, ranks)
        height, width, channels = self.images.shape
        if height != width:
            hint = "give --image-size" if config.dataset.startswith("folder:") else "cut or resize them"
            raise UsageError(f"--dataset {config.dataset}: expected square images, found {height}x{width}; {hint}")
        self.classes = self.images.classes if config.conditional else None
        self.precision = _precision(config.precision, ranks.device)
        self.parameterization, self.loss = _objective(config, self.classes)
        unet = UNet2D(small_unet_config(height, channels, self.classes)).init_weights(config.seed)
        self.model = unet.to(ranks.device).train()
        self.average = EMA(self.model, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999)
        )
        self.folder = Path(config.out)
        make_checkpoint_folder(self.folder, "diffusion")
        self.flip = config.flip if config.flip is not None else config.dataset.partition(":")[0] in _FLIPPED
        # The content of the data, not its path, decides whether a run may go on.
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.precision]
        self.facts = {
            **dataclasses.asdict(config),
            "data": self.images.fingerprint(),
            "precision": precision,
            "flip": self.flip,
        }
        modules = {"model": self.model, "ema": self.average.module}
        self.first_step = load_state(
            self.folder, self.facts, modules, self.optimizer, may_differ=_FREE, options=_OPTIONS
        )

    def run(self, report: Callable[[Progress], None] | None) -> Trained:
        config, ranks = self.config, self.ranks
        network = self._network()
        order = EpochOrder(len(self.images), config.seed)
        share = config.batch_size // ranks.world_size
        dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())

        def batch(step: int) -> tuple[Tensor, Tensor | None]:
            first = step * config.batch_size + ranks.rank * share
            return read_batch(self.images, order[first : first + share])

        losses: list[Tensor] = []
        last_loss = math.nan
        clock, seen = time.perf_counter(), 0
        for step, (images, labels) in enumerate(prefetch(batch, self.first_step, config.steps), start=self.first_step):
            first = step * config.batch_size + ranks.rank * share
            index = torch.arange(first, first + share, device=ranks.device)
            pixels = to_model(images, ranks.device)
            if self.flip:
                pixels = flip_half(pixels, index, config.seed)
            targets = labels.to(ranks.device) if self.classes is not None and labels is not None else None
            if dropout:  # its masks come from the global generator: a seed a step makes them a function of the step
                state = np.random.SeedSequence([config.seed % 2**64, step, ranks.rank]).generate_state(1, np.uint64)
                torch.manual_seed(int(state[0]))
            losses.append(self._step(network, step, pixels, targets, index))
            seen += config.batch_size
            done = step + 1
            at_checkpoint = done % config.checkpoint_every == 0 or done == config.steps
            # Between checkpoints rank 0 reports its own loss, so that no rank waits for another.
            if at_checkpoint or (ranks.is_first and time.perf_counter() - clock > 1.0):
                last_loss = float(torch.stack(losses).mean())
                if at_checkpoint:
                    last_loss = ranks.mean(last_loss)
                losses.clear()
                problem = not_finite(last_loss, self.model if at_checkpoint else None)
                if problem is not None:
                    raise SynthfastError(
                        f"step {done}: {problem}, expected finite numbers; the last checkpoint is kept, "
                        "lower --lr and choose another --out"
                    )
                rate = seen / (time.perf_counter() - clock)
                if at_checkpoint:
                    self._checkpoint(done)
                if report is not None and ranks.is_first:
                    report(Progress(done, config.steps, last_loss, config.batch_size, rate))
                clock, seen = time.perf_counter(), 0
        done = max(self.first_step, config.steps)
        return Trained(done, done - self.first_step, last_loss, self._picture(done))

    def _network(self) -> nn.Module:
        network: nn.Module = self.model
        if self.config.compile:
            network = torch.compile(network)
        if self.ranks.world_size > 1:
            devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, device_ids=devices)
        return network

    def _step(self, network: nn.Module, step: int, pixels: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
        """One optimizer step; the loss of this rank's part of the batch, still on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * _lr_factor(step, config)
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = self.loss(network, pixels, labels, index, config.seed).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.average.update(self.model, step + 1)
        return loss.detach()

    def _picture(self, step: int) -> Path:
        return self.folder / f"samples-{step:06d}.png"

    def _checkpoint(self, step: int) -> None:
        """Samples, weights and state, by rank 0; the state last, so that a kill in between repeats this checkpoint."""
        self.ranks.barrier()
        if self.ranks.is_first:
            self._write_samples(self._picture(step))
            save_checkpoint(self.folder, "diffusion", self._description(step), self.average.module.state_dict())
            modules = {"model": self.model, "ema": self.average.module}
            save_state(self.folder, step, self.facts, modules, self.optimizer)
        self.ranks.barrier()

    def _description(self, step: int) -> dict[str, object]:
        null_label = self.classes if self.classes is not None and self.config.label_dropout > 0 else None
        return {
            "name": f"{self.config.dataset} {self.config.loss} {step} steps",
            "shape": list(self.images.shape),
            "classes": self.classes,
            "class_names": None if self.images.class_names is None else list(self.images.class_names),
            "null_label": null_label,
            "parameterization": diffusion.to_dict(self.parameterization),
            "sampler": {"name": "dpmpp-2m", "steps": 16 if self.config.loss == "edm" else 25},
            "unet": self.average.module.config.to_dict(),
            "training": {**self.facts, "steps_done": step},
        }

    def _write_samples(self, path: Path) -> None:
        columns = min(self.classes or _GRID_ROWS, 10)
        index = torch.arange(_GRID_ROWS * columns, device=self.ranks.device)
        labels = None if self.classes is None else index % columns
        table = diffusion.make_table(self.parameterization, diffusion.SolverConfig("dpmpp-2m", steps=16))
        height, width, channels = self.images.shape
        pixels = diffusion.sample(
            self.average.module,
            table,
            index,
            shape=(channels, height, width),
            seed=self.config.seed,
            labels=labels,
            autocast=None if self.precision == torch.float32 else self.precision,
        )
        write_grid(path, ops.quantize_uint8(pixels).cpu().numpy(), columns)


def not_finite(loss: float, model: nn.Module | None) -> str | None:
    """What is not finite, the loss or (where a model is given) a weight or buffer, in words; None if all are finite.

    The loss of a step was computed before the step, so that the last step needs a look at the weights.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if model is not None and not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        return "a weight is not finite"
    return None


def _open_in_turn(config: GeneratorConfig, ranks: Ranks) -> ImageSet:
    """The data set; with --download rank 0 fetches it before the others look."""

    def open_set() -> ImageSet:
        return open_images(
            config.dataset,
            data_dir=Path(config.data_dir),
            download=config.download and ranks.is_first,
            image_size=config.image_size,
        )

    if ranks.is_first:
        images = open_set()
        ranks.barrier()
        return images
    ranks.barrier()
    return open_set()


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


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
