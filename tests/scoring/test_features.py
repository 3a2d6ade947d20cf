"""Features: what each kind computes, against the networks themselves and torch-fidelity, and what is refused."""

from __future__ import annotations

import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from synthfast.artifacts import save_checkpoint, save_tensors
from synthfast.data import ArrayImages, open_images
from synthfast.errors import SynthfastError, UsageError
from synthfast.models import load_classifier, make_classifier
from synthfast.scoring import features as module
from synthfast.scoring.features import Features, default_features, load_features, random_inception_weights

CPU = torch.device("cpu")


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> ArrayImages:
    """Smooth ones: a few random colours, blown up."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (count, 4, 4, shape[2]), np.uint8)
    rows, columns = np.arange(shape[0]) * 4 // shape[0], np.arange(shape[1]) * 4 // shape[1]
    return ArrayImages("toy", [small[:, rows][:, :, columns]])


def pixels(of: ArrayImages) -> torch.Tensor:
    return torch.from_numpy(of.read(np.arange(len(of))))


def test_pixels():
    toy = images(30, (5, 6, 3))
    found = load_features("pixels", toy.shape, CPU)
    assert (found.name, found.dim, found.shape) == ("pixels", 90, (5, 6, 3))
    assert torch.equal(found.compute(toy), pixels(toy).reshape(30, 90).float() / 255)


def test_defaults():
    assert default_features((8, 8, 1)) == "classifier"
    assert {default_features(shape) for shape in ((8, 8, 3), (28, 28, 1), (32, 32, 3))} == {"inception"}


def test_the_embedded_classifier_is_the_default_for_digits():
    digits = open_images("digits:test")
    found = load_features(None, digits.shape, CPU)
    assert (found.name, found.dim) == ("classifier", 128)
    model, _ = load_classifier(module.DIGITS_CLASSIFIER, CPU)
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(pixels(digits).permute(0, 3, 1, 2).float() / 255)
    computed = found.compute(digits)
    torch.testing.assert_close(computed, seen[0], rtol=1e-4, atol=1e-5)
    right = (model.head(computed).argmax(1).numpy() == digits.labels).mean()
    assert right > 0.98 and abs((logits.argmax(1).numpy() == digits.labels).mean() - right) < 0.002


@pytest.mark.parametrize("name", ["small-cnn", "resnet-18", "preact-resnet-18-swish", "wrn-10-1", "timm:resnet10t"])
def test_what_the_last_layer_takes_in(tmp_path, name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = make_classifier(name, (16, 16, 3), 5).eval()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    config = {"name": name, "shape": [16, 16, 3], "classes": 5, "class_names": None, "model": model.description}
    save_checkpoint(tmp_path / "net", "classifier", config, model.state_dict())
    toy, seen = images(6, (16, 16, 3)), []
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(pixels(toy).permute(0, 3, 1, 2).float() / 255)
    found = load_features(f"classifier:{tmp_path / 'net'}", toy.shape, CPU)
    assert found.dim == linear.in_features
    torch.testing.assert_close(found.compute(toy), seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_batches_nor_threads_change_anything(batch_size, threads):
    digits = open_images("digits:test")
    toy = ArrayImages("some", [digits.read(np.arange(30))])
    found = load_features("classifier", toy.shape, CPU)
    torch.set_num_threads(threads)
    try:
        seen: list[int] = []
        computed = found.compute(toy, batch_size=batch_size, report=seen.append)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(computed, found(pixels(toy)), rtol=1e-5, atol=1e-6)
    assert sum(seen) == 30 and not computed.requires_grad and not computed.is_inference()


def test_fingerprints_tell_functions_apart(tmp_path):
    shape, prints = (8, 8, 1), set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make_classifier("small-cnn", shape, 3)
        config = {"name": "small-cnn", "shape": list(shape), "classes": 3, "class_names": None}
        save_checkpoint(tmp_path / str(seed), "classifier", config | {"model": model.description}, model.state_dict())
        prints.add(load_features(f"classifier:{tmp_path / str(seed)}", shape, CPU).fingerprint)
    prints |= {load_features(spec, shape, CPU).fingerprint for spec in ("pixels", "classifier", None)}
    assert len(prints) == 4  # the default is the classifier
    assert load_features("pixels", (4, 4, 3), CPU).fingerprint in prints


def test_features_that_are_not_numbers_are_reported():
    toy = images(10, (4, 4, 1))

    def function(batch: torch.Tensor) -> torch.Tensor:
        found = batch.flatten(1).float()
        found[0, 0] = torch.nan
        return found

    found = Features("broken", toy.shape, 16, "", CPU, function, batch_size=4)
    with pytest.raises(SynthfastError, match=r"^images 0 to 3 of toy: expected finite features broken, found NaN"):
        found.compute(toy)


def test_images_of_another_shape_are_refused():
    found = load_features("pixels", (8, 8, 1), CPU)
    message = "^toy: expected images 8x8x1 for the features pixels, found 8x8x3; choose a source that fits$"
    with pytest.raises(UsageError, match=message):
        found.compute(images(3, (8, 8, 3)))


@pytest.mark.parametrize(
    ("spec", "shape", "error", "message"),
    [
        ("inceptoin", (8, 8, 1), UsageError, "--features inceptoin: no such features; expected pixels, classifier, "),
        ("pixels:3", (8, 8, 1), UsageError, "--features pixels:3: no such features"),
        ("timm", (8, 8, 1), UsageError, "--features timm: no such features"),
        ("", (8, 8, 1), UsageError, "--features : no such features"),
        ("classifier", (8, 8, 3), UsageError, "--features classifier: expected images 8x8x1 as the classifier was"),
        ("classifier:/nowhere", (8, 8, 1), SynthfastError, "/nowhere/config.json: no checkpoint here; check the path"),
        ("inception", (8, 8, 2), UsageError, "--features inception: expected grey or RGB images, found 8x8x2"),
        ("inception:/none.pth", (8, 8, 3), SynthfastError, "/none.pth: no weights here"),
        ("timm:no_such_net", (8, 8, 3), UsageError, "timm:no_such_net: timm .* has no network of this name"),
        ("timm:resnet18:/none.pth", (8, 8, 3), SynthfastError, "/none.pth: no weights here"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(spec, shape, error, message):
    if spec.startswith("timm:"):
        pytest.importorskip("timm")
    if spec.startswith("inception"):
        pytest.importorskip("torch_fidelity")
    with pytest.raises(error, match=f"^{message}") as caught:
        load_features(spec, shape, CPU)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of Inception in the published format: torch-fidelity's names in a .pth file."""
    pytest.importorskip("torch_fidelity")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_inception_weights(), path)
    return str(path)


class TestInception:
    def test_equal_to_torch_fidelity(self, weights):
        """KID of its own calculate_metrics on the same images. (FID of the same features: see test_frechet and
        bench.pipeline.frechet; its matrix step takes torch-fidelity 20 seconds for images this few.)"""
        import torch_fidelity

        from synthfast.scoring.kid import kid_subsets

        toys = images(6, (32, 32, 3), 1), images(5, (32, 32, 3), 2)
        found = load_features(f"inception:{weights}", (32, 32, 3), CPU, allow_pickle=True)
        ours = [found.compute(toy) for toy in toys]
        assert found.dim == 2048 and ours[0].std() > 1e-3
        sets = [list(pixels(toy).permute(0, 3, 1, 2)) for toy in toys]
        settings = {"kid_subset_size": 4, "kid_subsets": 5, "rng_seed": 3}
        theirs = torch_fidelity.calculate_metrics(
            input1=_Listed(sets[0]),
            input2=_Listed(sets[1]),
            kid=True,
            cuda=False,
            batch_size=4,
            save_cpu_ram=True,  # no processes that load
            cache=False,
            verbose=False,
            feature_extractor_weights_path=weights,
            **settings,
        )
        kid = kid_subsets(*ours, size=4, count=5, seed=3)
        assert kid.mean() == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)

    def test_grey_images_are_repeated(self, weights):
        found = load_features(f"inception:{weights}", (8, 8, 1), CPU, allow_pickle=True)
        grey = pixels(images(2, (8, 8, 1)))
        torch.testing.assert_close(found(grey), found(grey.repeat(1, 1, 1, 3)), rtol=1e-5, atol=1e-6)

    def test_pickles_need_leave(self, weights):
        with pytest.raises(SynthfastError, match=r"weights of kind '.pth' are pickles, which are refused"):
            load_features(f"inception:{weights}", (8, 8, 1), CPU)

    def test_other_weights_are_refused(self, tmp_path):
        pytest.importorskip("torch_fidelity")
        path = tmp_path / "other.safetensors"
        save_tensors(path, {"weight": torch.zeros(3)})
        with pytest.raises(SynthfastError, match=f"^{path}: expected the weights of torch-fidelity's Inception-v3"):
            load_features(f"inception:{path}", (8, 8, 1), CPU)

    def test_without_a_network_it_is_one_line(self, monkeypatch, capfd):
        pytest.importorskip("torch_fidelity")

        def refuse(*arguments: object, **options: object) -> None:
            assert options["check_hash"] and options["weights_only"]
            raise urllib.error.URLError("no route")

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
        message = r"^--features inception: cannot get the weights from https://.*pth \(.*no route.*\); fetch them where"
        with pytest.raises(SynthfastError, match=message):
            load_features("inception", (8, 8, 1), CPU)
        assert capfd.readouterr() == ("", "")

    def test_without_the_package_it_is_one_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        message = "^--features inception: needs the package torch-fidelity, which is not installed; pip install"
        with pytest.raises(UsageError, match=message):
            load_features("inception", (8, 8, 1), CPU)


class _Listed(torch.utils.data.Dataset):
    def __init__(self, items: list[torch.Tensor]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.items[index]


class TestTimm:
    @pytest.fixture(autouse=True)
    def needs_timm(self) -> None:
        pytest.importorskip("timm")

    @pytest.mark.parametrize("shape", [(40, 40, 3), (30, 50, 3), (8, 8, 1)])
    def test_prepared_as_timm_says(self, shape):
        """Against timm's own transform of PIL images."""
        import timm
        from timm.data import create_transform, resolve_data_config

        model = timm.create_model("test_resnet", pretrained=False, num_classes=0)  # 160 pixels, crop 0.95
        data = resolve_data_config({}, model=model)
        transform = create_transform(**data)
        toy = images(3, shape)
        expected = torch.stack([transform(Image.fromarray(x.squeeze()).convert("RGB")) for x in toy.read(np.arange(3))])
        found = module._timm_preparation(data, CPU)(module._colour(pixels(toy)).permute(0, 3, 1, 2))
        assert found.shape == expected.shape
        # Two levels of 255 in units of the standard deviation.
        assert (found - expected).abs().max() < 2.5 / 255 / 0.22

    def test_features_before_the_classifier(self):
        found = load_features("timm:resnet10t", (40, 40, 3), CPU, pretrained=False)
        again = load_features("timm:resnet10t", (40, 40, 3), CPU, pretrained=False)
        toy = images(2, (40, 40, 3))
        assert found.dim == 512 and found.compute(toy).shape == (2, 512)
        assert found.fingerprint == again.fingerprint and torch.equal(found.compute(toy), again.compute(toy))

    def test_dinov2(self):
        found = load_features("dinov2", (8, 8, 1), CPU, pretrained=False)
        assert found.dim == 384 and found.name == "dinov2"
        assert found(pixels(images(1, (8, 8, 1)))).shape == (1, 384)

    def test_weights_from_a_file(self, tmp_path):
        import timm

        torch.manual_seed(7)
        model = timm.create_model("test_resnet", num_classes=11).eval()
        path = tmp_path / "net.safetensors"
        save_tensors(path, model.state_dict())
        found = load_features(f"timm:test_resnet:{path}", (40, 40, 3), CPU)
        toy = pixels(images(2, (40, 40, 3)))
        prepared = module._timm_preparation(timm.data.resolve_data_config({}, model=model), CPU)(
            toy.permute(0, 3, 1, 2)
        )
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(prepared), pre_logits=True)
        torch.testing.assert_close(found(toy), expected)
        save_tensors(path, {"conv1.weight": torch.zeros(3)})
        with pytest.raises(SynthfastError, match=f"^{path}: expected the weights of timm's test_resnet, found others"):
            load_features(f"timm:test_resnet:{path}", (40, 40, 3), CPU)

    def test_without_a_network_it_is_one_line(self, monkeypatch):
        import timm

        create = timm.create_model

        def refuse(name: str, **options: object) -> nn.Module:
            if options["pretrained"]:
                raise RuntimeError("An error happened\nwhile trying")
            return create(name, **options)

        monkeypatch.setattr(timm, "create_model", refuse)
        message = (
            r"^--features timm:resnet10t: cannot get the weights of resnet10t \(An error happened while trying\); "
        )
        with pytest.raises(SynthfastError, match=message):
            load_features("timm:resnet10t", (8, 8, 3), CPU)

    def test_the_global_generator_is_left_alone(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        load_features("timm:test_resnet", (40, 40, 3), CPU, pretrained=False)
        load_features("classifier", (8, 8, 1), CPU)
        assert torch.equal(before, torch.get_rng_state())
