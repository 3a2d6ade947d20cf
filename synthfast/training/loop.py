"""What training runs have in common: steps with batches read ahead, reports, checkpoints, ranks, precision."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from synthfast.config import ClassifierConfig, GeneratorConfig
from synthfast.data import ImageSet, open_images
from synthfast.data.loaders import Batch, Loader, Wanted
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.training.state import exclusive

_FLIPPED = ("cifar10", "cifar100", "celeba", "imagenet")
_REPORT_EVERY = 1.0  # seconds
_MEAN_OF = 20  # steps, at most, behind a loss or an accuracy that is told


@dataclass(frozen=True)
class Progress:
    """Where a training run is. Means since the last report, over all ranks at a checkpoint, else of rank 0.

    accuracy, robust_accuracy: of a classifier on its training batches, as it is while training (batch statistics), on clean
        and on attacked images; None where the method does not compute them.
    """

    step: int
    steps: int
    loss: float
    images_per_step: int
    images_per_second: float
    accuracy: float | None = None
    robust_accuracy: float | None = None


@dataclass(frozen=True)
class Trained:
    """What a run left.

    steps, made: steps done in all, and by this call.
    loss: mean over the last 20 steps, or those since the checkpoint before the last; NaN if no step was made.
    picture: the last picture of samples (generators).
    validation, best_step: accuracy on the held-out images of the checkpoint that was kept, and its step (classifiers).
    loader: which one brought the images.
    """

    steps: int
    made: int
    loss: float
    picture: Path | None = None
    validation: float | None = None
    best_step: int | None = None
    loader: str | None = None


class Job(ABC):
    """A training run. A subclass says what a batch, a step and a checkpoint are; :meth:`_run` repeats them.

    Attributes:
        config: steps, batch_size, checkpoint_every, seed and compile count here.
        model: what is trained.
        folder: where checkpoints lie; there from the beginning.
        loader: of the batches.
        first_step: steps that an earlier run has done.
        measures: fields of :class:`Progress` that a step returns, in order.
    """

    config: GeneratorConfig | ClassifierConfig
    ranks: Ranks
    model: nn.Module
    folder: Path
    loader: Loader
    first_step: int
    measures: ClassVar[tuple[str, ...]] = ("loss",)

    @abstractmethod
    def _wanted(self, step: int) -> Wanted:
        """The images that this rank needs for a step; may be called by another thread."""

    @abstractmethod
    def _step(self, network: nn.Module, step: int, batch: Batch) -> Tensor:
        """One optimizer step. Returns its measures of this rank's part of the batch, still on the device."""

    @abstractmethod
    def _checkpoint(self, step: int) -> None:
        """Leave what a later run needs after ``step`` steps; called on every rank."""

    def _share(self) -> int:
        """This rank's images in a step."""
        size, ranks = self.config.batch_size, self.ranks.world_size
        if size % ranks:
            raise UsageError(f"--batch-size {size}: expected a multiple of the {ranks} ranks; change one of them")
        return size // ranks

    def _run(self, network: nn.Module, report: Callable[[Progress], None] | None) -> float:
        """The steps that are left; returns the mean loss of the last ones (NaN if none is left)."""
        with exclusive(self.folder, self.first_step, self.ranks):
            batches = self.loader.batches(self._wanted, self.first_step, self.config.steps)
            with contextlib.closing(batches), self.ranks.together():
                return self._steps(network, batches, report)

    def _steps(self, network: nn.Module, batches: Iterable[Batch], report: Callable[[Progress], None] | None) -> float:
        config, ranks = self.config, self.ranks
        network = _prepared(network, config.compile, ranks)
        drops = _drops(self.model)
        taken: list[Tensor] = []
        values = [math.nan]
        clock, seen = time.perf_counter(), 0
        for step, batch in enumerate(batches, start=self.first_step):
            if drops:  # masks come from the global generator: a seed a step makes them a function of the step
                state = np.random.SeedSequence([config.seed % 2**64, step, ranks.rank]).generate_state(1, np.uint64)
                torch.manual_seed(int(state[0]))
            taken.append(self._step(network, step, batch))
            seen += config.batch_size
            done = step + 1
            at_checkpoint = done % config.checkpoint_every == 0 or done == config.steps
            # Between checkpoints rank 0 reports its own values, so that no rank waits for another.
            if at_checkpoint or (ranks.is_first and time.perf_counter() - clock > _REPORT_EVERY):
                table = torch.stack(taken).reshape(len(taken), -1)
                # The last one is of all steps, so that no loss that is not finite is missed.
                means = [*table[-_MEAN_OF:].mean(0).tolist(), float(table[:, 0].mean())]
                if at_checkpoint:
                    means = [ranks.mean(value) for value in means]
                *values, loss = means
                # What is told at a checkpoint depends on the steps since the last one, not on the time or an interruption.
                del taken[: None if at_checkpoint else -_MEAN_OF]
                problem = _not_finite(loss, self.model if at_checkpoint else None)
                if problem is not None:
                    raise SynthfastError(
                        f"step {done}: {problem}, expected finite numbers; the last checkpoint is kept, "
                        "lower --lr and choose another --out"
                    )
                rate = seen / (time.perf_counter() - clock)
                if at_checkpoint:
                    self._checkpoint(done)
                if report is not None and ranks.is_first:
                    told: dict[str, Any] = dict(zip(self.measures, values, strict=True))
                    report(Progress(done, config.steps, told.pop("loss"), config.batch_size, rate, **told))
                clock, seen = time.perf_counter(), 0
        return values[0]


def _prepared(network: nn.Module, compile: bool, ranks: Ranks) -> nn.Module:
    """The network compiled if wanted, its gradients averaged over the ranks if there are several.

    Buffers stay with each rank: see :func:`average_statistics`.
    """
    if compile:
        network = torch.compile(network)
    if ranks.world_size > 1:
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters  # the name from torch 2.14 on
        network = parallel(
            network, device_ids=devices, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        )
    return network


def _drops(model: nn.Module) -> bool:
    """Whether a network draws random numbers while it trains: dropout, or timm's stochastic depth."""
    rates = (getattr(module, name, 0) for module in model.modules() for name in ("p", "drop_prob"))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _not_finite(loss: float, model: nn.Module | None) -> str | None:
    """What is not finite, the loss or (where a model is given) a weight or buffer, in words; None if all are finite.

    The loss of a step was computed before the step, so that the last step needs a look at the weights.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if model is not None and not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        return "a weight is not finite"
    return None


@torch.no_grad()
def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the mean of all ranks' running statistics of batch norm.

    Each rank normalizes by its own share of the batch. The mean of the running means is that of the whole batch; the variances
    lack what the shares' means differ by.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if ranks.world_size == 1 or not buffers:
        return
    total = torch.cat(buffers)
    dist.all_reduce(total)
    for buffer, part in zip(buffers, total.split([len(b) for b in buffers]), strict=True):
        torch.div(part, ranks.world_size, out=buffer)


def open_in_turn(config: GeneratorConfig | ClassifierConfig, ranks: Ranks) -> ImageSet:
    """The data set of ``config``; with --download rank 0 fetches it before the others look."""

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


def flips(config: GeneratorConfig | ClassifierConfig) -> bool:
    """Whether half of the images are mirrored: as the option says, else for sets of photographs."""
    return config.flip if config.flip is not None else config.dataset.partition(":")[0] in _FLIPPED


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type for "auto" (bfloat16 where the GPU has it), "bf16" or "fp32"."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
