"""The sampling loop: one network call and one fused solver step per stage, the same for every solver."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from synthfast import ops
from synthfast.diffusion.guidance import GuidedModel, Model
from synthfast.diffusion.solvers import SolverTable


def sample(
    model: Model,
    table: SolverTable,
    index: Tensor,
    *,
    shape: tuple[int, int, int],
    seed: int,
    labels: Tensor | None = None,
    null_label: int | None = None,
    guidance: float | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw N images.

    Image i depends on the seed, its index and its label alone, as far as the network treats the images of a batch
    separately. Its initial noise is stream ``NOISE``, step 0; stage k = 0, 1, ... draws step k + 1; churn before the
    first stage draws the step after those of all stages.

    Args:
        model: the network, see :data:`synthfast.diffusion.guidance.Model`. It is called as it
            is (so in evaluation mode, if it has one) and must leave its input unchanged.
        table: from :func:`synthfast.diffusion.solvers.make_table`.
        index: int64 [N], the index of each image in its run.
        shape: (C, H, W) of an image.
        seed: key of the run.
        labels: int64 [N], class of each image; None for an unconditional model.
        null_label, guidance: see :class:`synthfast.diffusion.guidance.GuidedModel`.
        device: where the model is; None for the device of ``index``.
        autocast: run the network under ``torch.autocast`` with this type; the state stays float32.
        callback: called after stage k with (k, x), x being the live state [N, C, H, W]: alpha * x0 + sigma * n with
            alpha ``table.scales[k + 1]``.

    Returns:
        float32 [N, C, H, W], channels_last, about in [-1, 1].

    Raises UsageError for guidance with a model that has no null label, SynthfastError for a network output of another
    shape.
    """
    device = torch.device(device) if device is not None else index.device
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        index = index.to(device)
        labels = None if labels is None else labels.to(device)
        network = GuidedModel(model, (len(index), *shape), labels, null_label, guidance, device)
        x = _initial_state(network.state, table, index, seed)
        history = torch.empty_like(x) if table.uses_history else None
        rows = table.rows(device, 1.0 if guidance is None else guidance).unbind()
        times = torch.from_numpy(table.conditioning).to(device, torch.float32).unbind()
        for k, (t, row) in enumerate(zip(times, rows, strict=True)):
            m, mu = network(t)
            ops.solver_step_(x, m, row, index, seed=seed, step=k + 1, unconditional=mu, history=history)
            if callback is not None:
                callback(k, x)
    return x.clone()  # an ordinary tensor, outside inference mode, that does not hold on to the doubled batch


def _initial_state(x: Tensor, table: SolverTable, index: Tensor, seed: int) -> Tensor:
    ops.philox_normal_(x, index, seed, ops.Stream.NOISE, 0).mul_(table.initial_std)
    if table.initial_churn:
        noise = ops.philox_normal_(torch.empty_like(x), index, seed, ops.Stream.NOISE, table.evaluations + 1)
        x.add_(noise, alpha=table.initial_churn)
    return x
