"""Every JSON file that we read, altered at random: it is read, or refused in one line, without much memory or time."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthfast.config import SampleConfig
from synthfast.data import ShardSet, summary, verify
from synthfast.data.published import DIGITS
from synthfast.data.selection import read_selection
from synthfast.evaluation.progress import open_progress
from synthfast.models.classifiers import load_classifier
from synthfast.report.html import read_result, report_html
from synthfast.sampling import load_generator
from synthfast.selection.score_files import ScoreFolder

ASSETS = DIGITS.parent
CPU = torch.device("cpu")
# The fixtures are files that each example writes anew.
FUZZED = settings(
    max_examples=120, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def write(path: Path, value: object) -> None:
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@given(data=st.data())
@FUZZED
def test_shard_manifest(fuzz, harmless, copy, data):
    folder = copy / "shards"
    if not (copy / "whole.json").exists():
        shutil.copyfile(folder / "manifest.json", copy / "whole.json")
    write(folder / "manifest.json", data.draw(fuzz.altered_json(read(copy / "whole.json"))))
    for look in (ShardSet, summary, verify):
        harmless(look, folder)


@given(data=st.data())
@FUZZED
def test_sidecar_of_a_shard(fuzz, harmless, copy, data):
    folder = copy / "shards"
    values = read(copy / "whole.json") if (copy / "whole.json").exists() else read(folder / "manifest.json")
    write(copy / "whole.json", values)
    write(folder / "manifest.json", {**values, "complete": False, "shards": []})
    write(folder / "shard-000000.json", data.draw(fuzz.altered_json(values["shards"][0])))
    for look in (summary, verify):
        harmless(look, folder)


@given(data=st.data())
@FUZZED
def test_selection(fuzz, harmless, run, commands, reference, copy, data):
    if not (copy / "whole.json").exists():
        for name, content in reference("select").left.items():
            (copy / name).write_bytes(content)
        shutil.copyfile(copy / "out.json", copy / "whole.json")
    write(copy / "out.json", data.draw(fuzz.altered_json(read(copy / "whole.json"))))
    harmless(read_selection, copy / "out.npy", ShardSet(copy / "shards"))


@given(data=st.data())
@FUZZED
def test_manifest_of_scores(fuzz, harmless, copy, data):
    file = copy / "shards" / "scores" / "scores.json"
    if not (copy / "whole.json").exists():
        shutil.copyfile(file, copy / "whole.json")
    write(file, data.draw(fuzz.altered_json(read(copy / "whole.json"))))
    scores = ScoreFolder(ShardSet(copy / "shards"))
    harmless(scores.read, "density", "density_distance")
    harmless(scores.made, "density", {"k": 5})
    harmless(scores.notes, "density")
    harmless(scores.null_share)


@given(data=st.data())
@FUZZED
def test_facts_of_progress(fuzz, harmless, tmp_path, data):
    facts = {"settings": {"lr": 0.1, "radii": [0, 1]}, "real": "ab", "count": 3}
    write(tmp_path / "facts.json", data.draw(fuzz.altered_json(facts)))

    def open_and_close() -> None:
        open_progress(tmp_path, facts, "a test").close()

    harmless(open_and_close)


@pytest.mark.parametrize("name", ["arc", "samples", "robust", "fid"])
@given(data=st.data())
@settings(FUZZED, max_examples=60)
def test_report(fuzz, harmless, reference, tmp_path, name, data):
    write(tmp_path / "result.json", data.draw(fuzz.altered_json(json.loads(reference(name).left["out.json"]))))

    def page() -> None:
        path = str(tmp_path / "result.json")
        report_html([(path, read_result(path))], "title").encode("utf-8", "replace")

    harmless(page)


@pytest.mark.parametrize("kind", ["digits", "gan"])
@given(data=st.data())
@FUZZED
def test_configuration_of_a_generator(fuzz, harmless, reference, tmp_path, kind, data):
    if not (tmp_path / "whole.json").exists():
        if kind == "digits":
            shutil.copytree(ASSETS / "digits", tmp_path, dirs_exist_ok=True)
        else:
            for name in ("config.json", "model.safetensors"):
                (tmp_path / name).write_bytes(reference("gan").left[f"out/{name}"])
        shutil.copyfile(tmp_path / "config.json", tmp_path / "whole.json")
    write(tmp_path / "config.json", data.draw(fuzz.altered_json(read(tmp_path / "whole.json"))))
    harmless(load_generator, SampleConfig(generator=str(tmp_path)), CPU)


@given(data=st.data())
@FUZZED
def test_configuration_of_a_classifier(fuzz, harmless, world, tmp_path, data):
    if not (tmp_path / "whole.json").exists():
        shutil.copytree(world / "classifier", tmp_path, dirs_exist_ok=True)
        shutil.copyfile(tmp_path / "config.json", tmp_path / "whole.json")
    write(tmp_path / "config.json", data.draw(fuzz.altered_json(read(tmp_path / "whole.json"))))
    harmless(load_classifier, tmp_path, CPU)


def test_the_weights_stay_as_they_are_while_their_configuration_is_altered(world):
    """Else every example above would end at the digest."""
    for folder in (world / "classifier", ASSETS / "digits"):
        weights = (folder / "model.safetensors").read_bytes()
        assert read(folder / "config.json")["sha256"] == hashlib.sha256(weights).hexdigest()
