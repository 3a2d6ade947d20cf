"""Groups of images and what is said about each."""

from __future__ import annotations

import numpy as np
import pytest

from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation.interval import mean_interval, wilson_interval
from synthfast.scoring.groups import Grouping, read_groups, summarize


def test_summaries_of_all_and_of_groups():
    random = np.random.default_rng(0)
    number, flag, group = (
        random.normal(size=90).astype(np.float32),
        random.random(90) < 0.3,
        random.integers(0, 4, 90) * 7,
    )
    metrics, groups = summarize({"number": number, "flag": flag}, {"class": Grouping.of(group)})
    expected = mean_interval(number.astype(np.float64))
    assert metrics["number"].items() >= expected.items()
    assert metrics["number"]["quantiles"]["0.25"] == pytest.approx(np.quantile(number, 0.25))
    assert metrics["flag"] == {"value": flag.mean(), "ci": wilson_interval(int(flag.sum()), 90), "count": 90}
    assert list(groups) == ["class"] and list(groups["class"]) == ["0", "7", "14", "21"]
    for name, found in groups["class"].items():
        here = group == int(name)
        interval = wilson_interval(int(flag[here].sum()), int(here.sum()))
        assert found["flag"] == {"value": flag[here].mean(), "ci": interval, "count": here.sum()}
        assert found["number"]["value"] == pytest.approx(number[here].astype(np.float64).mean())
        assert found["number"]["quantiles"]["0.5"] == pytest.approx(np.median(number[here]))


def test_a_group_of_one_has_no_interval():
    _, groups = summarize({"number": np.array([3.0, 4.0, 5.0])}, {"group": Grouping.of(np.array([1, 1, 0]))})
    assert groups["group"]["0"]["number"]["ci"] is None and groups["group"]["0"]["number"]["value"] == 5.0


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint16])
def test_groups_from_npy(tmp_path, dtype):
    np.save(tmp_path / "g.npy", np.array([5, 1, 5, 100, 1], dtype))
    grouping = read_groups(tmp_path / "g.npy", 5)
    assert grouping.names == ("1", "5", "100")
    assert [part.tolist() for part in grouping.parts(np.arange(5))] == [[1, 4], [0, 2], [3]]


@pytest.mark.parametrize("heading", ["", "group\n"])
def test_groups_from_csv(tmp_path, heading):
    (tmp_path / "g.csv").write_text(f'{heading}old\n"young, tall"\nold \ngroup\n', encoding="utf-8")
    grouping = read_groups(tmp_path / "g.csv", 4)
    assert grouping.names == ("group", "old", "young, tall")
    assert [part.tolist() for part in grouping.parts(np.arange(4))] == [[3], [0, 2], [1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("g.npy", np.zeros(4), r"expected whole numbers \[5\], one for each image, found float64 \[4\]; correct it"),
        ("g.npy", np.zeros(4, np.int64), r"expected whole numbers \[5\], .* found int64 \[4\]"),
        ("g.npy", np.zeros((5, 1), np.int64), r".* found int64 \[5, 1\]"),
        ("g.csv", b"a\nb\n", "expected 5 names, one for each image, found 2; correct it"),
        ("g.csv", b"a,b\n", "line 1: expected one name, found 2 cells; leave one column"),
        ("g.csv", b"a\n\nb\n", "line 2: expected one name, found 0 cells"),
        ("g.csv", b"\xff\xfe", "not a readable csv file in UTF-8"),
        ("g.txt", b"1\n", "expected a .npy of whole numbers or a .csv of names; convert it"),
    ],
)
def test_groups_that_do_not_fit(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(SynthfastError, match=rf"^--groups {path}: {message}"):
        read_groups(path, 5)


def test_groups_that_are_no_file(tmp_path):
    for name in ("g.npy", "g.csv"):
        with pytest.raises(SynthfastError, match=rf"^{tmp_path}/{name}: no such file or folder$"):
            read_groups(tmp_path / name, 5)
    (tmp_path / "g.npy").write_bytes(b"not npy")
    with pytest.raises(SynthfastError, match="not a valid npy file"):
        read_groups(tmp_path / "g.npy", 5)


def test_too_many_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("synthfast.scoring.groups.MOST_GROUPS", 3)
    np.save(tmp_path / "g.npy", np.arange(4))
    with pytest.raises(UsageError, match="expected at most 3 groups, found 4; merge some"):
        read_groups(tmp_path / "g.npy", 4)
