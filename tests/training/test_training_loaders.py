"""Every loader trains the same network, and one goes on where another was interrupted."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast.artifacts import load_checkpoint
from synthfast.data import ShardFolder, ShardSet, open_images
from synthfast.data.loaders import stream
from synthfast.data.selection import write_selection
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.training import classifier, mixture

LOADERS = {"device": {}, "dali": {"workers": 1}, "torch": {"workers": 0}, "workers": {"loader": "torch", "workers": 1}}


class Stopped(Exception):
    pass


def options_of(name):
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    return {"loader": name, **LOADERS[name]}


def stop_at(step):
    def report(progress):
        if progress.step >= step:
            raise Stopped

    return report


def write_tars(path, images, labels, classes=10):
    request = {
        "n": len(images),
        "shape": [8, 8, 1],
        "classes": classes,
        "shard_size": 90,
        "format": "wds",
        "codec": "png",
    }
    with ShardFolder.create_or_resume(path, request) as folder:
        for span in folder.pending():
            with folder.writer(span.index) as writer:
                part = slice(span.first, span.first + span.count)
                writer.append(images[part], None if labels is None else labels[part])
                writer.commit()
        folder.finish()
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Digits as tars with labels and without, as image files, and a selection of the first."""
    path, digits = tmp_path_factory.mktemp("sets"), open_images("digits:test")
    pixels, labels = digits.read(np.arange(300)), digits.labels[:300]
    tars = write_tars(path / "tars", pixels[:200], labels[:200])
    bare = write_tars(path / "bare", pixels[200:], None, None)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (path / "files" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path / "files" / str(label) / f"{number:03d}.png")
    write_selection(
        path / "some.npy", ShardSet(tars), np.arange(0, 200, 2), np.linspace(0.5, 1.5, 100, dtype=np.float32), {}
    )
    return {"tars": tars, "bare": bare, "files": f"folder:{path / 'files'}", "selection": str(path / "some.npy")}


def everything(sets):
    """A run with all that has to do with images."""
    return {
        "dataset": sets["files"],
        "synthetic": (sets["tars"], sets["tars"]),
        "selection": (sets["selection"], "all"),
        "synthetic_weight": (1.0, 2.0),
        "fraction": 0.6,
        "validation": 40,
        "cutmix": 0.5,
        "crop": 1,
        "flip": True,
        "steps": 4,
        "checkpoint_every": 2,
        "seed": 3,
    }


@pytest.fixture(scope="module")
def straight(sets, tmp_path_factory):
    """The run by the device loader, which has not stopped."""
    from synthfast.config import ClassifierConfig
    from synthfast.distributed import Ranks
    from synthfast.training import train_classifier

    out = tmp_path_factory.mktemp("straight")
    config = ClassifierConfig(
        **everything(sets), out=str(out), loader="device", device="cpu", batch_size=32, attack_steps=2
    )
    with Ranks("cpu") as ranks:
        assert train_classifier(config, ranks).loader == "device"
    return out


@pytest.mark.parametrize(
    ("first", "second"), [("device", "dali"), ("dali", "workers"), ("workers", "torch"), ("torch", "device")]
)
def test_a_run_interrupted_under_one_loader_goes_on_under_another(
    fit, sets, straight, same_results, tmp_path, first, second
):
    with pytest.raises(Stopped):
        fit(tmp_path, stop_at(2), **everything(sets), **options_of(first))
    result = fit(tmp_path, **everything(sets), **options_of(second))
    assert (result.made, result.loader) == (2, second.replace("workers", "torch"))
    assert same_results(tmp_path, straight)
    # Nothing tells the runs apart, but for where they lie.
    config, other = (load_checkpoint(folder, "classifier")[0] for folder in (tmp_path, straight))
    assert config["training"].pop("out") != other["training"].pop("out")
    assert config == other and not {"loader", "workers", "synthetic_weight"} & config["training"].keys()


@pytest.mark.parametrize("name", ["dali", "workers"])
def test_pseudo_labels(fit, sets, same_results, tmp_path, name):
    fit(tmp_path / "labeller", steps=20, batch_size=64)
    options = {"synthetic": (sets["bare"],), "pseudo_labels": str(tmp_path / "labeller"), "steps": 2}
    for loader in ("device", name):
        fit(tmp_path / loader, **options, **options_of(loader))
    assert same_results(tmp_path / "device", tmp_path / name)


def test_pseudo_labels_come_by_the_loader_that_was_named_and_failures_leave_no_process(
    fit, sets, tmp_path, monkeypatch
):
    fit(tmp_path / "labeller", steps=1)
    kinds = []

    def watched(*args, **kwargs):
        kinds.append((kwargs.get("kind"), kwargs.get("workers")))
        return stream(*args, **kwargs)

    def broken(_):
        model = load_classifier(tmp_path / "labeller", torch.device("cpu"))[0]
        return lambda x: model(x) * float("nan")

    monkeypatch.setattr(mixture, "stream", watched)
    monkeypatch.setattr(mixture, "freeze", broken)
    options = {"synthetic": (sets["bare"],), "pseudo_labels": str(tmp_path / "labeller"), **options_of("workers")}
    with pytest.raises(SynthfastError, match="expected finite logits, found NaN") as caught:
        fit(tmp_path / "run", **options)
    assert kinds == [("torch", 1)] and not multiprocessing.active_children() and caught


def test_a_validation_that_fails_leaves_no_process(fit, sets, tmp_path, monkeypatch):
    def fail(*_):
        raise Stopped

    monkeypatch.setattr(classifier.PGD, "run", fail)
    options = {"dataset": sets["files"], "method": "pgd", "validation": 40, "steps": 1, **options_of("workers")}
    with pytest.raises(Stopped) as caught:
        fit(tmp_path / "run", **options)
    assert len(caught.traceback) and not multiprocessing.active_children()


@pytest.mark.parametrize("name", ["dali", "torch", "workers"])
@pytest.mark.parametrize(
    "options", [{}, {"arch": "gan", "d_steps": 3, "latent": 4, "width": 16}], ids=["diffusion", "gan"]
)
def test_generators(train, tiny, sets, same_results, tmp_path, options, name):
    common = {"dataset": sets["tars"], "steps": 4, "checkpoint_every": 2, "flip": True, **options}
    assert train(tmp_path / "straight", **common, loader="device").loader == "device"
    with pytest.raises(Stopped):
        train(tmp_path / "cut", stop_at(2), **common, **options_of(name))
    assert train(tmp_path / "cut", **common, loader="device").made == 2
    assert same_results(tmp_path / "straight", tmp_path / "cut")


@pytest.mark.parametrize(("dataset", "expected"), [("digits", "device"), ("tars", "torch"), ("files", "dali")])
def test_auto_says_which_loader_ran(fit, sets, tmp_path, dataset, expected):
    if expected == "dali":
        pytest.importorskip("nvidia.dali")
    assert fit(tmp_path, dataset=sets.get(dataset, dataset), steps=1).loader == expected


def test_a_loader_that_cannot_be_had_leaves_no_folder(fit, train, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("synthfast.data.loaders.device.free_memory", lambda device: 1000)
    for run in (fit, train):
        with pytest.raises(
            UsageError, match=r"^--loader device: the images take 0\.0 GB, .*; take --loader dali or torch$"
        ):
            run(tmp_path / "run", dataset=sets["tars"], loader="device")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_image_ends_a_run_in_one_line(fit, sets, tmp_path, name):
    whole = open_images(sets["files"])
    for number, image in enumerate(whole.read(np.arange(40))):
        (tmp_path / "files" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "files" / str(number % 3) / f"{number:03d}.png")
    broken = tmp_path / "files" / "1" / "034.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(SynthfastError, match=rf"^{broken}: not a readable image") as caught:
        fit(tmp_path / "run", dataset=f"folder:{tmp_path / 'files'}", **options_of(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [-1, -3])
def test_workers_that_are_none(fit, train, tmp_path, workers):
    for run in (fit, train):
        with pytest.raises(UsageError, match=rf"^--workers {workers}: expected a whole number of at least 0$"):
            run(tmp_path, workers=workers)
