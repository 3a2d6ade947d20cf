"""Training state on disk: everything that a run needs to go on as if it had never stopped, in one atomic file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthfast.artifacts import Lock, load_kept, require_file, save_tensors
from synthfast.data.shards.manifest import require_same
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError

STATE_FILE = "training-state.safetensors"


@contextlib.contextmanager
def exclusive(folder: Path, step: int, ranks: Ranks) -> Iterator[None]:
    """Around a run that goes on from ``step``, as :func:`load_state` gave it: no other process writes the folder meanwhile.

    Raises SynthfastError, on every rank, where one does or has done since the state was loaded.
    """

    def take() -> Lock:
        path = folder / STATE_FILE
        with contextlib.ExitStack() as until_checked:
            lock = until_checked.enter_context(Lock(folder))
            if (found := _metadata(path)["step"] if path.exists() else 0) != step:
                raise SynthfastError(
                    f"{folder}: another process has trained here since step {step} was loaded, found step {found}; run the "
                    "same command again to go on"
                )
            until_checked.pop_all()
        return lock

    lock = ranks.on_first(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def save_state(
    folder: Path,
    step: int,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of ``modules``, the optimizer's tensors, the step, the configuration, and notes (JSON values)."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"optimizer.{number}.{key}"] = torch.as_tensor(value)
    metadata = {"step": str(step), "config": json.dumps(dict(config)), "notes": json.dumps(dict(notes or {}))}
    save_tensors(folder / STATE_FILE, tensors, metadata)


def load_state(
    folder: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    may_differ: tuple[str, ...] = (),
    options: Mapping[str, str] | None = None,
) -> int:
    """Restore what :func:`save_state` wrote and return its step; 0 where the folder has no state yet.

    A state of another configuration is refused with the first difference, keys in ``may_differ`` aside. ``options`` says
    what a key is called in that message, where that is not its name with dashes.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return 0
    metadata = _metadata(path)
    old = {key: value for key, value in metadata["config"].items() if key not in may_differ}
    new = {key: value for key, value in json.loads(json.dumps(dict(config))).items() if key not in may_differ}
    require_same(folder, old, new, lambda key: (options or {}).get(key, "--" + key.replace("_", "-")))
    try:
        tensors, _ = load_kept(path)
    except SynthfastError as error:
        raise SynthfastError(f"{error}, or remove it to start again") from error
    try:
        for name, module in modules.items():
            module.load_state_dict(_under(tensors, name))
        state = _optimizer_state(_under(tensors, "optimizer"), optimizer)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SynthfastError(f"{path}: does not fit this model ({reason}); choose another --out") from error
    return metadata["step"]


def load_notes(folder: Path) -> dict[str, Any]:
    """The notes that :func:`save_state` wrote; none where the folder has no state yet."""
    path = folder / STATE_FILE
    return _metadata(path)["notes"] if path.exists() else {}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def _optimizer_state(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The tensors of an optimizer by the number of their parameter and by name; ValueError if they are not its own.

    Those of a parameter's shape get its memory layout back: an optimizer that mixes layouts is slower and may round
    differently.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(parameters))}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)] if number.isdecimal() and int(number) < len(parameters) else None
        if parameter is None or value.shape not in (parameter.shape, ()):
            raise ValueError(f"optimizer.{key} {list(value.shape)} belongs to no parameter")
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, device="cpu", requires_grad=False).copy_(value)
        state[int(number)][name] = value
    if any(values.keys() != state[0].keys() for values in state.values()) or not state[0]:
        raise ValueError("tensors of the optimizer are missing")
    return state


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        require_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        step, config = int(metadata["step"]), json.loads(metadata["config"])
        notes = json.loads(metadata.get("notes", "{}"))
        if step < 0 or not isinstance(config, dict) or not isinstance(notes, dict):
            raise ValueError(f"step {step}")
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise SynthfastError(f"{path}: not a readable training state ({error}); remove it to start again") from error
    return {"step": step, "config": config, "notes": notes}
