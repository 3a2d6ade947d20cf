"""The sampling run: what the files hold, and what they depend on."""

from __future__ import annotations

import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast import __version__, diffusion, ops
from synthfast.artifacts import sha256_file
from synthfast.config import SampleConfig
from synthfast.data import ShardFolder, ShardSet
from synthfast.data.grids import grid
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.sampling import generate, load_generator

# Another batch size may round differently in the last bit, which the quantization to 256 levels shows now and then.
MOST_PIXELS_OFF = 0.01


def pixels(folder) -> np.ndarray:
    shards = ShardSet(folder)
    return shards.read(np.arange(len(shards)))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 1 and (off > 0).mean() < MOST_PIXELS_OFF


def drawn(generator: diffusion.Model, kind: str, index: torch.Tensor, seed: int = 0, **options) -> np.ndarray:
    """Images by the library's parts: a table and ``diffusion.sample``."""
    config = diffusion.SolverConfig(**{"name": "dpmpp-2m", "steps": 4, **options.pop("solver", {})})
    parameterization = {"edm": diffusion.EDM(), "vp": diffusion.VP()}[kind]
    table = diffusion.make_table(parameterization, config)
    images = diffusion.sample(generator, table, index, shape=(1, 8, 8), seed=seed, **options)
    return ops.quantize_uint8(images).numpy()


def unet_of(folder):
    return load_generator(SampleConfig(generator=str(folder)), torch.device("cpu")).unet


def test_the_same_command_leaves_the_same_bytes(run, contents):
    first, second = contents(run()), contents(run())
    assert first == second
    assert list(first) == ["manifest.json", "preview.png", "shard-000000.images.npy", "shard-000000.labels.npy"]


@pytest.mark.parametrize("kind", ["edm", "vp"])
def test_image_i_is_that_of_the_library(run, checkpoints, kind):
    folder = run(generator=str(checkpoints(kind)), n=23, shard_size=10, batch_size=4, seed=7)
    index = torch.arange(23)
    assert_close(pixels(folder), drawn(unet_of(checkpoints(kind)), kind, index, 7, labels=index % 10))
    assert ShardSet(folder).labels.tolist() == (index % 10).tolist()
    sizes = [np.load(folder / f"shard-{k:06d}.images.npy").shape for k in range(3)]
    assert sizes == [(10, 8, 8, 1), (10, 8, 8, 1), (3, 8, 8, 1)]


@pytest.mark.parametrize("batch_size", [1, 5, 23, 1000])
def test_images_do_not_depend_on_the_batch_size(run, batch_size):
    found, expected = run(batch_size=batch_size), run(batch_size=8)
    assert_close(pixels(found), pixels(expected))
    assert np.array_equal(ShardSet(found).labels, ShardSet(expected).labels)


def test_images_do_not_depend_on_n_or_the_shard_size(run):
    assert_close(pixels(run(n=40, shard_size=16))[:23], pixels(run(n=23)))


@pytest.mark.parametrize("batch_size", [5, 7])
def test_files_do_not_depend_on_the_number_of_threads(run, contents, batch_size):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(contents(run(n=50, batch_size=batch_size, shard_size=20)))
            assert torch.get_num_threads() == threads
            assert default_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def default_threads() -> int:
    """What a thread that starts now would use."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_another_seed_changes_every_image(run):
    first, second = pixels(run(seed=0)), pixels(run(seed=1))
    assert (first != second).any((1, 2, 3)).all()
    negative = pixels(run(seed=-(2**63)))
    assert (negative != first).any((1, 2, 3)).all()


def test_images_of_one_class_differ_from_each_other_and_by_class(run):
    same = pixels(run(labels="3"))
    assert len(np.unique(same, axis=0)) == len(same)
    other = pixels(run(labels="4"))
    assert (same != other).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("kind", ["edm", "vp"])
@pytest.mark.parametrize("solver", list(diffusion.solvers.SOLVERS))
def test_every_solver_by_name(run, checkpoints, solver, kind):
    folder = run(generator=str(checkpoints(kind)), n=6, solver=solver, steps=3)
    index = torch.arange(6)
    expected = drawn(unet_of(checkpoints(kind)), kind, index, labels=index, solver={"name": solver, "steps": 3})
    assert_close(pixels(folder), expected)
    recorded = json.loads((folder / "manifest.json").read_text())["request"]["solver"]
    assert recorded["name"] == solver and recorded["steps"] == 3


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddim", {"eta": 0.7}),
        ("heun", {"churn": 2.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.01}),
        ("euler", {"rho": 3.0, "sigma_min": 0.01, "sigma_max": 20.0}),
        ("dpmpp-2m", {"clip": 0.5}),
    ],
)
def test_solver_options_reach_the_solver(run, checkpoints, solver, options):
    folder, index = run(n=6, solver=solver, steps=3, **options), torch.arange(6)
    wanted = {"name": solver, "steps": 3, **options}
    assert_close(pixels(folder), drawn(unet_of(checkpoints()), "edm", index, labels=index, solver=wanted))
    assert (pixels(folder) != pixels(run(n=6, solver=solver, steps=3))).any()
    recorded = json.loads((folder / "manifest.json").read_text())["request"]["solver"]
    assert {key: recorded[key] for key in options} == options


def test_what_is_not_given_comes_from_the_checkpoint(run):
    def solver(**options):
        return json.loads((run(n=1, **options) / "manifest.json").read_text())["request"]["solver"]

    assert (solver()["name"], solver()["steps"]) == ("dpmpp-2m", 4)
    assert (solver(solver="euler")["name"], solver(solver="euler")["steps"]) == ("euler", 4)
    assert (solver(steps=2)["name"], solver(steps=2)["steps"]) == ("dpmpp-2m", 2)


def test_a_variance_and_a_spacing_reach_the_solver(run, checkpoints):
    generator, index = str(checkpoints("vp")), torch.arange(6)
    options = {"solver": "ddpm", "steps": 3, "variance": "fixed_large", "spacing": "leading"}
    wanted = {"name" if key == "solver" else key: value for key, value in options.items()}
    expected = drawn(unet_of(generator), "vp", index, labels=index, solver=wanted)
    assert_close(pixels(run(generator=generator, n=6, **options)), expected)


def test_guidance_mixes_in_the_prediction_without_a_label(run, checkpoints):
    index = torch.arange(23)
    expected = drawn(unet_of(checkpoints()), "edm", index, labels=index % 10, null_label=10, guidance=3.0)
    guided, plain = pixels(run(guidance=3.0)), pixels(run())
    assert_close(guided, expected)
    assert np.array_equal(pixels(run(guidance=1.0)), plain)
    assert (guided != plain).any((1, 2, 3)).mean() > 0.5


@pytest.mark.parametrize("options", [{"null_label": False}, {"classes": None, "null_label": False}])
def test_guidance_without_a_null_label_is_refused_before_a_folder_is_made(run, checkpoints, tmp_path, options):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"^--guidance 2: expected a class-conditional model trained with label drop"):
        run(generator=str(checkpoints("edm", **options)), guidance=2.0, out=str(out))
    assert not out.exists()
    run(generator=str(checkpoints("edm", **options)), guidance=1.0, out=str(out))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_gives_nearly_the_same_images(run, precision):
    found, expected = pixels(run(precision=precision)).astype(int), pixels(run()).astype(int)
    assert 0 < np.abs(found - expected).mean() < 5


def test_labels_are_those_asked_for(run):
    assert ShardSet(run(labels="7,2")).labels.tolist() == [7, 2] * 11 + [7]
    weights = "weights:" + ",".join(["0"] * 8 + ["1", "3"])
    drawn_labels = ShardSet(run(n=200, batch_size=64, labels=weights, steps=1)).labels
    assert set(drawn_labels) == {8, 9} and 130 < (drawn_labels == 9).sum() < 170
    assert not np.array_equal(
        ShardSet(run(labels="uniform", seed=1)).labels, ShardSet(run(labels="uniform", seed=2)).labels
    )


def test_a_generator_without_classes_leaves_no_labels(run, checkpoints):
    generator = str(checkpoints("edm", classes=None, null_label=False))
    folder = run(generator=generator)
    assert ShardSet(folder).labels is None and not list(folder.glob("*.labels.npy"))
    index = torch.arange(23)
    assert_close(pixels(folder), drawn(unet_of(generator), "edm", index))
    with pytest.raises(UsageError, match=r"^--labels 3: tiny edm has no classes, expected no labels; leave it out$"):
        run(generator=generator, labels="3")


def test_the_manifest_says_what_was_done(run, checkpoints):
    folder = run(n=23, shard_size=10, seed=5, guidance=2.0, labels="uniform", solver="heun", churn=0.5)
    manifest = json.loads((folder / "manifest.json").read_text())
    request = manifest.pop("request")
    assert list(request) == [
        *("n", "shape", "classes", "shard_size", "generator", "seed", "labels", "solver", "guidance"),
        *("batch_size", "precision", "compile", "device", "synthfast"),
    ]
    weights = sha256_file(checkpoints() / "model.safetensors")
    assert request["generator"] == {"name": "tiny edm", "sha256": weights}
    assert (request["n"], request["shape"], request["classes"]) == (23, [8, 8, 1], 10)
    assert (request["shard_size"], request["batch_size"], request["seed"]) == (10, 8, 5)
    assert (request["labels"], request["guidance"]) == ("uniform", 2.0)
    assert request["solver"]["churn"] == 0.5 and request["solver"]["s_tmax"] == "inf"
    assert (request["precision"], request["compile"], request["device"]) == ("fp32", False, "cpu")
    assert request["synthfast"] == __version__
    assert list(manifest) == ["format", "complete", "shards"] and manifest["complete"] is True
    for shard in manifest["shards"]:
        for part in ("images", "labels"):
            assert shard[part]["sha256"] == sha256_file(folder / shard[part]["file"])


@pytest.mark.parametrize(("labels", "columns"), [("balanced", 10), ("3,5", 2), ("3", 10), ("uniform", 10)])
def test_the_preview_is_a_picture_of_the_first_images(run, labels, columns):
    folder = run(n=120, labels=labels, steps=1, batch_size=60)
    picture = Image.open(io.BytesIO((folder / "preview.png").read_bytes()))
    picture.load()
    assert picture.format == "PNG"
    assert np.array_equal(np.asarray(picture), grid(pixels(folder)[: 8 * columns], columns)[:, :, 0])


def test_lost_shards_are_made_again_and_no_other(run, contents, tmp_path, checkpoints):
    folder = run(n=40, shard_size=10)
    expected = contents(folder)
    for name in ("shard-000001.images.npy", "shard-000003.labels.npy"):
        (folder / name).unlink()
    kept = (folder / "shard-000000.images.npy").stat().st_mtime_ns
    reports = []
    config = SampleConfig(
        n=40, shard_size=10, batch_size=8, generator=str(checkpoints()), out=str(folder), device="cpu"
    )
    with Ranks("cpu") as ranks:
        result = generate(config, ranks, reports.append)
        again = generate(config, ranks)
    assert contents(folder) == expected
    assert (folder / "shard-000000.images.npy").stat().st_mtime_ns == kept
    assert (result.kept, result.made, again.kept, again.made) == (20, 20, 40, 0)
    assert [report.done for report in reports] == [28, 30, 38, 40]
    assert all(report.total == 40 and report.images_per_second > 0 and report.seconds_left >= 0 for report in reports)
    assert reports[-1].seconds_left == 0


def test_another_command_into_the_same_folder_is_refused_with_the_difference(run, contents, checkpoints):
    folder = run()
    before = contents(folder)
    for options, difference in (
        ({"n": 24}, "--n: OUT was made with 23, this command says 24"),
        ({"seed": 1}, "--seed: OUT was made with 0, this command says 1"),
        ({"steps": 5}, "--steps: OUT was made with 4, this command says 5"),
        ({"solver": "heun"}, '--solver: OUT was made with "dpmpp-2m", this command says "heun"'),
        ({"clip": 2.0}, "--clip: OUT was made with nothing, this command says 2.0"),
        ({"rho": 6.0}, "--rho: OUT was made with 7.0, this command says 6.0"),
        ({"sigma_max": 50.0}, "--sigma-max: OUT was made with nothing, this command says 50.0"),
        ({"guidance": 2.0}, "--guidance: OUT was made with nothing, this command says 2.0"),
        ({"labels": "uniform"}, '--labels: OUT was made with "balanced", this command says "uniform"'),
        ({"batch_size": 9}, "--batch-size: OUT was made with 8, this command says 9"),
        ({"shard_size": 9}, "--shard-size: OUT was made with 10000, this command says 9"),
        ({"precision": "bf16"}, '--precision: OUT was made with "fp32", this command says "bf16"'),
        (
            {"generator": str(checkpoints("vp"))},
            '--generator: OUT was made with "tiny edm", this command says "tiny vp"',
        ),
        ({"generator": str(checkpoints("edm", seed=1))}, "--generator (its weights): OUT was made with "),
    ):
        with pytest.raises(UsageError) as caught:
            run(out=str(folder), **options)
        message = str(caught.value)
        assert message.startswith(difference.replace("OUT", str(folder)))
        assert message.endswith("; repeat the command that made it, or choose another --out") and "\n" not in message
    assert contents(folder) == before


def test_a_folder_of_other_files_is_refused_and_left_alone(run, tmp_path, contents):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"holds files \(thesis\.tex\) but no manifest\.json"):
        run(out=str(out))
    assert contents(out) == {"thesis.tex": b"precious"}


def test_a_folder_that_another_run_is_writing_is_refused(run, contents):
    folder = run(n=40, shard_size=10)
    expected = contents(folder)
    (folder / "shard-000001.images.npy").unlink()
    request = json.loads((folder / "manifest.json").read_text())["request"]
    with (
        ShardFolder.create_or_resume(folder, request),
        pytest.raises(SynthfastError, match="another process is writing this folder"),
    ):
        run(n=40, shard_size=10, out=str(folder))
    run(n=40, shard_size=10, out=str(folder))
    assert contents(folder) == expected
