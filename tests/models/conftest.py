"""RobustBench's modules, and networks with statistics that are not those of a fresh one."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch
from torch import nn


def _architectures(name: str) -> types.ModuleType:
    """One file of RobustBench's architectures. The package itself is not imported: it would need all that it requires."""
    package = importlib.util.find_spec("robustbench")
    if package is None or not package.submodule_search_locations:
        pytest.fail("robustbench is not installed; make test does it, or: pip install --no-deps robustbench==1.1.1")
    path = Path(package.submodule_search_locations[0], "model_zoo", "architectures", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"robustbench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def robustbench() -> types.SimpleNamespace:
    """RobustBench's files of ResNets, Wide ResNets and DeepMind's networks."""
    names = ("resnet", "wide_resnet", "dm_wide_resnet")
    return types.SimpleNamespace(**{name: _architectures(name) for name in names})


@pytest.fixture
def randomize(generator: torch.Generator):
    """Gives every tensor of a network random values, running statistics included, and puts it in evaluation mode."""

    def apply(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.3, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                scale = 1 / module.weight[0].numel() ** 0.5
                for parameter in module.parameters(recurse=False):
                    nn.init.normal_(parameter, 0, scale, generator=generator)
        return model.eval()

    return apply
