"""The moving average of weights against its formula."""

from __future__ import annotations

import torch
from torch import nn

from synthfast.training.ema import EMA


def test_the_average_follows_the_formula():
    module, decay = nn.Linear(3, 2), 0.6
    average = EMA(module, decay)
    expected = module.weight.detach().double().clone()
    decays = []
    for step in range(1, 30):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        average.update(module, step)
        decays.append(min(decay, (1 + step) / (10 + step)))
        expected = decays[-1] * expected + (1 - decays[-1]) * module.weight.detach().double()
        torch.testing.assert_close(average.module.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert decays[0] == 2 / 11 and decays[-1] == decay


def test_a_decay_of_0_is_the_weights_themselves():
    module = nn.Linear(3, 2)
    average = EMA(module, 0.0)
    with torch.no_grad():
        module.bias.add_(1)
    average.update(module, 1)
    assert torch.equal(average.module.bias, module.bias)


def test_buffers_are_copied_and_the_module_is_left_alone():
    module = nn.BatchNorm1d(2).train()
    average = EMA(module, 0.9)
    module(torch.randn(8, 2) + 5)
    average.update(module, 1)
    assert torch.equal(average.module.running_mean, module.running_mean) and module.running_mean.abs().max() > 0.1
    assert average.module.num_batches_tracked == 1
    assert module.training and module.weight.requires_grad
    assert not average.module.training and not average.module.weight.requires_grad
    module(torch.randn(8, 2) - 5)
    assert not torch.equal(average.module.running_mean, module.running_mean)  # a copy, not the same memory
