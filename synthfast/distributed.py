"""Ranks of a torchrun launch, and the device of this one. Without torchrun everything is a single rank."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from synthfast.errors import SynthfastError, UsageError

Value = TypeVar("Value")


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu", "cuda" (one GPU a rank) or "cuda:N"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number) if number else local_rank
    if index >= count:
        raise UsageError(f"--device {name}: GPU {index} is wanted, found {count} usable GPUs; use --device cpu")
    return torch.device("cuda", index)


@contextlib.contextmanager
def _others(only: bool = True) -> Iterator[None]:
    """Around what needs the other ranks: gloo and NCCL report one that has ended as a RuntimeError of many words.

    ``only``: whether nothing else can raise one here.
    """
    try:
        yield
    except RuntimeError as error:
        if not (only or isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).partition("\n")[0]
        raise SynthfastError(f"another rank has ended or cannot be reached; look for its message ({reason})") from error


# A rank may wait at a barrier for as long as another takes over its last shard.
_WORKING = datetime.timedelta(days=7)


def _joining() -> datetime.timedelta:
    """How long to look for the place where ranks meet.

    torchrun makes it before it starts them: where it is gone, so is torchrun, and its ranks must not wait for it.
    """
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return datetime.timedelta(minutes=1 if has_agent else 30)


class Ranks:
    """The processes that share one job; a context manager that joins them and leaves them.

    Attributes:
        rank, world_size: this process among all; 0 and 1 without torchrun.
        device: where this rank computes.
    """

    def __init__(self, device: str = "auto") -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.world_size > 1 else 0
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        self._counts: dict[str, int] = {}
        self._names: dict[str, int] = {}

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            try:
                with _others():
                    store, rank, size = next(dist.rendezvous("env://", timeout=_joining()))
                    store.set_timeout(_WORKING)
                    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_WORKING)
            except ValueError as error:  # an environment variable that torchrun sets is missing
                raise UsageError(
                    f"WORLD_SIZE={self.world_size}: expected a launch by torchrun ({error}); use it, or unset WORLD_SIZE"
                ) from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for every rank (on the CPU)."""
        if self.world_size > 1:
            with _others():
                dist.all_reduce(torch.zeros(1))

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Around work in which tensors go from rank to rank, such as a backward pass: a rank that has ended is a SynthfastError,
        other errors stay what they are."""
        return _others(only=False) if self.world_size > 1 else contextlib.nullcontext()

    def broadcast(self, value: Value) -> Value:
        """Rank 0's ``value``, a small picklable object of our own, on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        with _others():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def on_first(self, do: Callable[[], Value]) -> Value | None:
        """``do()`` on rank 0, None on the others. A SynthfastError that it raises is raised on every rank."""
        value: Value | None = None
        failure: SynthfastError | None = None
        if self.is_first:
            try:
                value = do()
            except SynthfastError as error:
                failure = error
        failure = self.broadcast(failure)
        if failure is not None:
            raise failure
        return value

    def from_first(self, do: Callable[[], Value]) -> Value:
        """``do()`` on rank 0, its value, a small picklable object of our own, on every rank; errors as :meth:`on_first`."""
        return cast(Value, self.broadcast(self.on_first(do)))

    def mean(self, value: float) -> float:
        """The mean of a number over all ranks."""
        if self.world_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        with _others():
            dist.all_reduce(total)
        return float(total) / self.world_size

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """Element by element the largest over all ranks: an integer CPU tensor, changed in place and returned."""
        if self.world_size > 1:
            with _others():
                dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def unique(self, name: str) -> str:
        """``name`` with a number that no earlier call has had; the same on all ranks, which make the same calls."""
        self._names[name] = self._names.get(name, 0) + 1
        return f"{name} {self._names[name]}"

    def add(self, name: str, amount: int) -> int:
        """Add to a counter that all ranks share and return its value; no rank waits for another."""
        if self.world_size > 1:
            with _others():
                return dist.distributed_c10d._get_default_store().add(f"synthfast/{name}", amount)
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]
