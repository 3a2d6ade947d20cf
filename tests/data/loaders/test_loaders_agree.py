"""All loaders give the same batches: those of ``read`` and of the plain augmentation, bit for bit."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages, open_images
from synthfast.data.loaders import Augment, Wanted, open_loader

CPU = torch.device("cpu")
LOADERS = {"device": ("device", None), "dali": ("dali", 1), "torch": ("torch", 0), "workers": ("torch", 2)}
# Sets, and how many images of each a batch has.
SETS = {
    "memory": (("memory",), (7,)),
    "shards": (("shards",), (7,)),
    "planar": (("planar",), (7,)),
    "png": (("png",), (7,)),
    "jpg": (("jpg",), (7,)),
    "folder": (("folder",), (7,)),
    "tars": (("tars",), (7,)),
    "grey": (("grey memory",), (7,)),
    "grey png": (("grey png",), (7,)),
    "grey folder": (("grey folder",), (7,)),
    "part": (("chosen memory",), (7,)),
    "part of png": (("chosen png",), (7,)),
    "real and synthetic": (("memory", "shards"), (5, 3)),
    "part and tars": (("chosen memory", "png"), (6, 3)),
    "all kinds": (("folder", "shards", "jpg", "chosen png", "planar"), (3, 1, 2, 4, 2)),
}


def loader_of(name, sets, augment):
    kind, workers = LOADERS[name]
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    return open_loader(kind, sets, CPU, augment, workers=workers)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("case", SETS)
def test_batches_are_those_of_read_and_the_plain_operation(made, check, plan_of, case, name):
    kinds, counts = SETS[case]
    sets = [made(kind) for kind in kinds]
    check(loader_of(name, sets, Augment(-3, crop=2, flip=True)), plan_of(sets, counts), 0, 10)  # more than a pass


@pytest.mark.parametrize("name", ["device", "dali", "torch"])
@pytest.mark.parametrize(
    "augment", [None, Augment(), Augment(5, crop=4), Augment(5, flip=True), Augment(2**62, crop=30, flip=True)]
)
@pytest.mark.parametrize("case", ["memory", "real and synthetic", "part and tars"])
def test_every_augmentation(made, check, plan_of, case, augment, name):
    kinds, counts = SETS[case]
    sets = [made(kind) for kind in kinds]
    check(loader_of(name, sets, augment), plan_of(sets, counts), 0, 3)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("case", ["shards", "all kinds"])
def test_two_ranks_share_batches_from_the_middle_of_a_pass_on(made, check, plan_of, case, name):
    kinds, counts = SETS[case]
    sets = [made(kind) for kind in kinds]
    for rank in range(2):
        check(loader_of(name, sets, Augment(1, 2, True)), plan_of(sets, counts, rank, 2), 5, 12)


@pytest.mark.parametrize("name", LOADERS)
def test_the_digits(check, plan_of, name):
    sets = [open_images("digits"), open_images("digits:test")]
    check(loader_of(name, sets, Augment(0, 1, False)), plan_of(sets, (40, 24)), 3, 6)


@pytest.mark.parametrize("name", LOADERS)
def test_batches_of_any_size(made, check, name):
    """Also larger than the first, and without images of a set."""
    sets = [made("memory"), made("png")]
    sizes = [(2, 0), (1, 5), (0, 9), (3, 2), (20, 11), (0, 1)]

    def plan(step):
        return Wanted(tuple(np.arange(step, step + size) for size in sizes[step]), np.arange(sum(sizes[step])))

    check(loader_of(name, sets, Augment(1, 2, True)), plan, 0, len(sizes))


@pytest.mark.parametrize("name", LOADERS)
def test_nothing_to_read_and_one_batch_by_itself(made, plan_of, name):
    sets = [made("png")]
    loader, plan = loader_of(name, sets, Augment(1, 2, True)), plan_of(sets, (7,))
    assert list(loader.batches(plan, 4, 4)) == []
    (expected,) = loader.batches(plan, 4, 5)
    assert torch.equal(loader.batch(plan(4)).images, expected.images)


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_can_be_left_early_and_used_again(made, check, plan_of, name):
    sets = [made("png")]
    loader, plan = loader_of(name, sets, Augment(1, 2, True)), plan_of(sets, (7,))
    batches = loader.batches(plan, 0, 1000)
    next(batches), next(batches)
    batches.close()
    assert not multiprocessing.active_children()
    check(loader, plan, 2, 4)


@pytest.mark.parametrize("name", LOADERS)
def test_sets_without_labels(made, name):
    labelled = made("memory")
    bare = ArrayImages("bare", [labelled.read(np.arange(20))])
    wanted = Wanted((np.arange(3), np.arange(4)))
    assert loader_of(name, [labelled, bare], None).batch(wanted).labels is None


@pytest.mark.parametrize("name", LOADERS)
def test_the_global_random_state_stays_as_it_is(made, name):
    before = torch.get_rng_state()
    loader_of(name, [made("memory")], None).batch(Wanted((np.arange(3),)))
    assert torch.equal(torch.get_rng_state(), before)
