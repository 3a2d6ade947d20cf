from __future__ import annotations

import torch
from torch import nn

from synthfast.training.ema import EMA


def test_the_average_follows_its_formula():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = EMA(module, decay=0.5)
    expected = module[0].weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            module[0].weight.copy_(torch.randn(2, 3))
            module[1].running_mean.fill_(step)
        average.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
        torch.testing.assert_close(average.module[0].weight, expected)
        assert torch.equal(average.module[1].running_mean, module[1].running_mean)
    assert not average.module[0].weight.requires_grad
    assert not average.module.training


def test_a_decay_of_zero_is_the_network_itself():
    module = nn.Linear(2, 2)
    average = EMA(module, decay=0.0)
    with torch.no_grad():
        module.weight.add_(1)
    average.update(module, 1)
    assert torch.equal(average.module.weight, module.weight)
