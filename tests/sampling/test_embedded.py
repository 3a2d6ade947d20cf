"""The generator that ships with the package: small, trained on the 500 alone, and its digits are digits."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from synthfast import assets, ops
from synthfast.artifacts import load_checkpoint, read_checkpoint_config
from synthfast.config import SampleConfig
from synthfast.data import open_images
from synthfast.sampling import load_generator

CPU = torch.device("cpu")


def sampled(count: int, **options: object) -> np.ndarray:
    """Digits with label i mod 10."""
    generator, index = load_generator(SampleConfig(**options), CPU), torch.arange(count)
    return ops.quantize_uint8(generator.sample(index, index % 10, 0)).numpy()


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return sampled(200)


def agreement(images: np.ndarray) -> float:
    """The share of images whose nearest real digit has their label."""
    return float((nearest_label(images) == np.arange(len(images)) % 10).mean())


def nearest_label(images: np.ndarray) -> np.ndarray:
    """The label of the nearest real test digit, pixel by pixel."""
    real = open_images("digits:test")
    references = real.read(np.arange(len(real))).reshape(len(real), -1).astype(np.float32)
    flat = images.reshape(len(images), -1).astype(np.float32)
    distances = (flat**2).sum(1)[:, None] - 2 * flat @ references.T + (references**2).sum(1)
    return real.labels[distances.argmin(1)]


def test_it_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in assets.DIGITS_GENERATOR.iterdir()}
    assert set(files) == {"config.json", "model.safetensors"} and sum(files.values()) < 5_000_000
    config, weights = load_checkpoint(assets.DIGITS_GENERATOR, "diffusion")
    assert 500_000 < sum(tensor.numel() for tensor in weights.values()) < 1_000_000
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert (config["shape"], config["classes"], config["null_label"]) == ([8, 8, 1], 10, 10)


def test_it_saw_the_500_training_digits_alone():
    training = read_checkpoint_config(assets.DIGITS_GENERATOR, "diffusion")["training"]
    real = open_images("digits")
    assert len(real) == 500
    assert (training["dataset"], training["data"]) == ("digits", real.fingerprint())


def test_nothing_about_the_machine_that_trained_it_is_in_it():
    text = json.dumps(read_checkpoint_config(assets.DIGITS_GENERATOR, "diffusion"))
    assert not any(word in text for word in ("/home", "/root", "/tmp", "/work", os.uname().nodename))


def test_its_digits_are_digits_of_the_class_asked_for_and_all_different(digits):
    assert agreement(digits) > 0.9
    assert len(np.unique(digits, axis=0)) == 200


def test_it_does_not_repeat_its_training_images(digits):
    real = open_images("digits").read(np.arange(500)).reshape(1, 500, -1).astype(int)
    differences = digits.reshape(200, 1, -1).astype(int) - real
    nearest = np.sqrt((differences**2).mean(2)).min(1)  # root mean square difference of a pixel, of 255
    assert np.median(nearest) > 10


def test_the_class_counts_more_with_more_guidance():
    assert agreement(sampled(60, guidance=2.0)) > 0.9
    assert agreement(sampled(60, guidance=0.0)) < 0.5  # with weight 0 the class is not looked at
