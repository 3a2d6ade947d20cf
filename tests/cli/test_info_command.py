"""``synthfast info``."""

from __future__ import annotations

import json
import platform

import numpy as np
import torch

from synthfast import __version__, ops


def test_json_has_versions_device_build_and_capability(cli):
    ran = cli("info", "--json")
    assert (ran.status, ran.err) == (0, "")
    facts = json.loads(ran.out)
    assert (facts["synthfast"], facts["torch"], facts["numpy"]) == (__version__, torch.__version__, np.__version__)
    assert facts["python"] == platform.python_version()
    assert facts["cpu_capability"] == ops.cpu_capability()
    assert facts["build"] == ops.build_facts() and {"compiler", "torch", "cuda"} <= set(facts["build"])
    assert facts["cuda_kernels"] == "loaded" or facts["cuda_kernels"].startswith("not loaded: ")
    assert facts["threads"] == torch.get_num_threads() and facts["cores"] >= 1
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert facts["dali"] is None or isinstance(facts["dali"], str)


def test_the_table_says_the_same(cli):
    facts, table = json.loads(cli("info", "--json").out), cli("info").out
    for value in (facts["synthfast"], facts["torch"], facts["cpu"], facts["cpu_capability"], facts["build"]["cuda"]):
        assert value in table
    assert ("not installed" in table) == (facts["dali"] is None)


def test_an_installed_dali_is_shown(cli, monkeypatch):
    monkeypatch.setattr("synthfast.environment.dali_version", lambda: "2.4.0")
    assert json.loads(cli("info", "--json").out)["dali"] == "2.4.0"
    assert "dali          2.4.0" in cli("info").out
