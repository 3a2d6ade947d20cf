"""Every JSON file that we read, altered: it is read, or refused in one line, without much memory or time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthfast.artifacts import load_tensors
from synthfast.assets import DIGITS
from synthfast.config import SampleConfig
from synthfast.data import ShardSet, summary, verify
from synthfast.data.selection import read_selection
from synthfast.data.transfer.export_folder import RECORD, _open_record
from synthfast.evaluation.progress import open_progress
from synthfast.models.classifiers import load_classifier
from synthfast.report.html import read_result, report_html
from synthfast.sampling import load_generator
from synthfast.selection.score_files import ScoreFolder

ASSETS = DIGITS.parent
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Reader:
    """A JSON file, what it holds when nothing is wrong with it, and what reads it."""

    file: Path
    whole: Any
    read: Callable[[], object]

    def write(self, value: object) -> None:
        self.file.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Given:
    """Where a reader finds its files, and files of undisturbed commands."""

    copy: Path
    reference: Callable[[str], Any]

    def reader(self, file: Path, read: Callable[[], object]) -> Reader:
        return Reader(file, json.loads(file.read_text()), read)

    def put(self, command: str) -> None:
        for name, content in self.reference(command).left.items():
            (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
            (self.copy / name).write_bytes(content)


def look_into_shards(folder: Path) -> None:
    for look in (ShardSet, summary, verify):
        attempt(look, folder)


def attempt(function: Callable[..., object], *arguments: object) -> None:
    """So that what comes next is tried as well; other errors go on to the test."""
    from synthfast.errors import SynthfastError

    try:
        function(*arguments)
    except SynthfastError as error:
        assert str(error) and "\n" not in str(error)


def manifest(given: Given) -> Reader:
    folder = given.copy / "shards"
    return given.reader(folder / "manifest.json", lambda: look_into_shards(folder))


def manifest_of_tars(given: Given) -> Reader:
    given.put("sample-wds")
    return given.reader(given.copy / "out" / "manifest.json", lambda: look_into_shards(given.copy / "out"))


def sidecar(given: Given) -> Reader:
    """Of a finished shard in a folder that is not complete."""
    folder = given.copy / "shards"
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, "complete": False, "shards": []}))
    file = folder / "shard-000000.json"
    file.write_text(json.dumps(values["shards"][0]))
    return given.reader(file, lambda: look_into_shards(folder))


def selection(given: Given) -> Reader:
    given.put("select")
    images = ShardSet(given.copy / "shards")
    return given.reader(given.copy / "out.json", lambda: read_selection(given.copy / "out.npy", images))


def scores(given: Given) -> Reader:
    images = ShardSet(given.copy / "shards")

    def read() -> None:
        folder = ScoreFolder(images)
        attempt(folder.read, "density", "density_distance")
        attempt(folder.made, "density", {"k": 5})
        attempt(folder.notes, "density")
        attempt(folder.null_share)

    return given.reader(given.copy / "shards" / "scores" / "scores.json", read)


def facts(given: Given) -> Reader:
    folder = given.copy / "progress"
    folder.mkdir()
    values = {"settings": {"lr": 0.1, "radii": [0, 1]}, "real": "ab", "count": 3}
    return Reader(folder / "facts.json", values, lambda: open_progress(folder, values, "a test").close())


def report(command: str) -> Callable[[Given], Reader]:
    def prepare(given: Given) -> Reader:
        given.put(command)
        path = given.copy / "out.json"
        return given.reader(
            path, lambda: report_html([(str(path), read_result(path))], "title").encode("utf-8", "replace")
        )

    return prepare


def embedded_generator(given: Given) -> Reader:
    folder = Path(shutil.copytree(ASSETS / "digits", given.copy / "generator"))
    return given.reader(folder / "config.json", lambda: load_generator(SampleConfig(generator=str(folder)), CPU))


def gan(given: Given) -> Reader:
    given.put("gan")
    folder = given.copy / "out"
    return given.reader(folder / "config.json", lambda: load_generator(SampleConfig(generator=str(folder)), CPU))


def classifier(given: Given) -> Reader:
    folder = given.copy / "classifier"
    return given.reader(folder / "config.json", lambda: load_classifier(folder, CPU))


def export_record(given: Given) -> Reader:
    given.put("export-folder")
    folder = given.copy / "out"
    record = json.loads((folder / RECORD).read_text())["request"]
    return given.reader(folder / RECORD, lambda: _open_record(folder, record, {}))


def diffusers_folder(file: str) -> Callable[[Given], Reader]:
    """The embedded generator as diffusers keeps such models, its weights behind an index."""

    def prepare(given: Given) -> Reader:
        folder, weights = given.copy / "unet", "diffusion_pytorch_model-00001-of-00001.safetensors"
        folder.mkdir()
        shutil.copyfile(ASSETS / "digits" / "model.safetensors", folder / weights)
        names = load_tensors(folder / weights)
        unet = json.loads((ASSETS / "digits" / "config.json").read_text())["unet"]
        schedule = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
        schedule |= {"beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon", "clip_sample": True}
        contents = {
            "config.json": {"_class_name": "UNet2DModel", **unet},
            "scheduler_config.json": schedule,
            "diffusion_pytorch_model.safetensors.index.json": {"weight_map": dict.fromkeys(names, weights)},
        }
        for name, values in contents.items():
            (folder / name).write_text(json.dumps(values))
        return given.reader(folder / file, lambda: load_generator(SampleConfig(generator=str(folder)), CPU))

    return prepare


# Each with the number of changes that are swept, of some thousands. SYNTHFAST_SOAK=20 makes it twenty times as many.
READERS = {
    "manifest": (manifest, 3000),
    "manifest of tars": (manifest_of_tars, 150),
    "sidecar": (sidecar, 600),
    "selection": (selection, 800),
    "scores": (scores, 600),
    "facts": (facts, 300),
    "report of arc": (report("arc"), 40),
    "report of samples": (report("samples"), 120),
    "report of robust": (report("robust"), 120),
    "generator": (embedded_generator, 250),
    "gan": (gan, 200),
    "classifier": (classifier, 400),
    "export's record": (export_record, 300),
    "diffusers' model": (diffusers_folder("config.json"), 200),
    "diffusers' schedule": (diffusers_folder("scheduler_config.json"), 120),
    "diffusers' index": (diffusers_folder("diffusion_pytorch_model.safetensors.index.json"), 60),
}


@pytest.mark.parametrize("name", READERS)
def test_any_part_may_be_replaced_or_missing(fuzz, harmless, copy, reference, name):
    prepare, most = READERS[name]
    reader = prepare(Given(copy, reference))
    for value in fuzz.every_part(reader.whole, most * int(os.environ.get("SYNTHFAST_SOAK", "1"))):
        reader.write(value)
        harmless(reader.read)
    reader.write(reader.whole)
    reader.read()


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(
    max_examples=25,
    deadline=10_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_several_parts_may_be_altered_at_once(fuzz, harmless, tmp_path_factory, world, reference, readers, name, data):
    if name not in readers:
        copy = Path(shutil.copytree(world, tmp_path_factory.mktemp("altered") / "copy"))
        readers[name] = READERS[name][0](Given(copy, reference))
    readers[name].write(data.draw(fuzz.altered_json(readers[name].whole)))
    harmless(readers[name].read)


@pytest.fixture(scope="module")
def readers() -> dict[str, Reader]:
    return {}


def test_the_weights_stay_as_they_are_while_their_configuration_is_altered(world):
    """Else every example above would end at the digest."""
    for folder in (world / "classifier", ASSETS / "digits"):
        weights = (folder / "model.safetensors").read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert config["sha256"] == hashlib.sha256(weights).hexdigest()
