"""What a result says of the machine it was made on."""

from __future__ import annotations

import builtins
import json
import os

import pytest
import torch

from synthfast import __version__, environment


def test_facts_are_json_and_true():
    facts = json.loads(json.dumps(environment.environment()))
    assert set(facts) == {
        "synthfast", "python", "torch", "numpy", "platform", "cpu", "cores", "threads", "cuda", "gpus",
    }  # fmt: skip
    assert (facts["synthfast"], facts["torch"]) == (__version__, torch.__version__)
    assert facts["threads"] == torch.get_num_threads() and facts["cpu"]
    assert 1 <= facts["cores"] <= os.cpu_count()
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_cpu_has_a_name_on_every_system(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", missing)
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "riscv64")
    assert environment.cpu_name() == "riscv64"


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({}, None),
        ({"nvidia-dali-cuda120": "1.9"}, "1.9"),
        ({"nvidia-dali-cuda130": "2", "nvidia-dali-cuda110": "1"}, "2"),
    ],
)
def test_dali_is_found_whatever_cuda_it_was_built_for(monkeypatch, installed, expected):
    monkeypatch.setattr(environment, "package_version", installed.get)
    assert environment.dali_version() == expected


def test_versions_of_packages():
    assert environment.package_version("numpy") and environment.package_version("no such package") is None
