"""Scores refuse to compare images with traces of lossy coding with images without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthfast.config import ArcConfig, FidConfig, PrdcConfig, RankConfig, SamplesConfig
from synthfast.data import Chosen, ShardFolder, ShardSet, open_images
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.scoring.arc import arc_result
from synthfast.scoring.coding import require_same_coding
from synthfast.scoring.metrics import fid_result, prdc_result
from synthfast.scoring.rank import rank_result
from synthfast.scoring.samples import samples_result

SETS = {"npy": {}, "png": {"format": "wds", "codec": "png"}, "jpg": {"format": "wds", "codec": "jpg", "quality": 95}}
REFUSED = (
    r"jpg: stored as jpg or webp, whose traces scores see, and \S+ is lossless; expected .* or pass --allow-lossy$"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Training digits as shards of each kind."""
    digits = open_images("digits:train")
    count, made = 60, {}
    for name, storage in SETS.items():
        made[name] = str(tmp_path_factory.mktemp("coding") / name)
        request = {"n": count, "shape": [8, 8, 1], "classes": 10, "shard_size": 40, **storage}
        with ShardFolder.create_or_resume(made[name], request) as folder:
            for span in folder.pending():
                items = np.arange(span.first, span.first + span.count)
                with folder.writer(span.index) as writer:
                    writer.append(digits.read(items), digits.labels[items])
                    writer.commit()
            folder.finish()
    return made


def save(folder: Path, suffix: str, side: int, count: int = 3) -> str:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{number}{suffix}")
    return f"folder:{folder}"


def test_which_sets_are_lossy(folders, tmp_path):
    assert [ShardSet(folders[name]).lossy for name in SETS] == [False, False, True]
    chosen = np.arange(3)
    assert Chosen(ShardSet(folders["jpg"]), chosen).lossy and not Chosen(ShardSet(folders["png"]), chosen).lossy
    for suffix, lossy in ((".png", False), (".bmp", False), (".jpg", True), (".JPEG", True), (".webp", True)):
        assert open_images(save(tmp_path / suffix[1:], suffix, 16)).lossy is lossy
    mixed = tmp_path / "mixed"
    save(mixed, ".png", 16)
    Image.new("RGB", (16, 16)).save(mixed / "zzz.jpg")
    assert open_images(f"folder:{mixed}").lossy
    # Made smaller by half, the blocks of jpg are gone.
    assert [open_images(f"folder:{tmp_path / 'jpg'}", image_size=size).lossy for size in (32, 16, 9, 8, 4)] == [
        *(True, True, True, False, False)
    ]


def test_one_lossy_side_is_refused_and_two_are_not(folders):
    sets = {name: ShardSet(folder) for name, folder in folders.items()}
    for real in SETS:
        for synthetic in SETS:
            if (real == "jpg") == (synthetic == "jpg"):
                require_same_coding(sets[real], sets[synthetic], allow=False)
                continue
            with pytest.raises(UsageError, match=REFUSED):
                require_same_coding(sets[real], sets[synthetic], allow=False)
            require_same_coding(sets[real], sets[synthetic], allow=True)
    require_same_coding(sets["png"], "digits", allow=False)
    with pytest.raises(UsageError, match=f"{REFUSED[:-1]}"):
        require_same_coding(sets["jpg"], "digits", allow=False)


def test_every_score_refuses_and_takes_the_option(folders, tmp_path):
    lossy = {"synthetic": folders["jpg"], "device": "cpu"}

    def arc(**more: object) -> None:
        arc_result(ArcConfig(**lossy, eps="0,0.1", steps=25, measure_steps=2, restarts=1, **more), ranks)

    def fid(**more: object) -> None:
        fid_result(FidConfig(**lossy, features="pixels", n=60, **more), ranks)

    def prdc(**more: object) -> None:
        prdc_result(PrdcConfig(**lossy, features="pixels", n=60, **more), ranks)

    def samples(**more: object) -> None:
        samples_result(
            SamplesConfig(**lossy, scores="density", features="pixels", scores_folder=str(tmp_path / "s"), **more),
            ranks,
        )

    with Ranks("cpu") as ranks:
        for score in (arc, fid, prdc, samples):
            with pytest.raises(UsageError, match=REFUSED):
                score()
            score(allow_lossy=True)


def test_rank_refuses_before_anything_is_done(folders, tmp_path, monkeypatch):
    out = tmp_path / "rank"
    monkeypatch.setattr("synthfast.scoring.rank._shards", lambda *_: pytest.fail("begun"))
    with Ranks("cpu") as ranks:
        for sources, name in (((folders["png"], folders["jpg"]), "jpg"), (("digits", folders["jpg"]), "jpg")):
            with pytest.raises(UsageError, match=rf"{name}: stored as jpg"):
                rank_result(RankConfig(sources=sources, samples=60, out=str(out), device="cpu"), ranks)
    assert not out.exists()
