"""Ranking generators: names of sources, correlations from made values, and what is told."""

from __future__ import annotations

import copy

import pytest

from synthfast.config import RankConfig
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.scoring.names import METRICS, SCORES
from synthfast.scoring.rank import Source, correlations, parse_sources, rank_result, table, verdict


def entry(value, half=0.001):
    return {"value": value, "ci": None if value is None else [value - half, value + half], "count": 10}


def generators():
    """Six: ARC falls as robust accuracy grows, FID does so with one swap, precision grows, recall is without order."""
    robust = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    values = {
        "arc": [6, 5, 4, 3, 2, 1],
        "plain_accuracy": [1, 1, 1, 1, 1, 1],
        "fid": [6, 5, 3, 4, 1, 2],
        "kid": [6, 5, 4, 3, 2, 1],
        "precision": [1, 2, 3, 4, 5, 6],
        "recall": [2, 5, 1, 6, 3, 4],
        "density": [1, 2, 3, 4, 5, 6],
        "coverage": [1, 2, 3, 4, 5, 6],
        "accuracy": [0.8, 0.7, 0.9, 0.95, 0.96, 0.97],
    }
    rows = {}
    for k, accuracy in enumerate(robust):
        rows[f"g{k}"] = {name: entry(column[k]) for name, column in values.items()} | {
            "robust_accuracy": entry(accuracy)
        }
    return rows


def result(rows):
    return {"generators": rows, **correlations(rows)}


def test_names_of_sources(tmp_path):
    folder = tmp_path / "my=shards"
    folder.mkdir()
    texts = ["digits", "runs/gan/", "py:module:function", "x.y=runs/gan", str(folder), "b=py:a:c=d"]
    assert parse_sources(texts) == [
        Source("digits", "digits"),
        Source("gan", "runs/gan/"),
        Source("function", "py:module:function"),
        Source("x.y", "runs/gan"),
        Source("my=shards", str(folder)),
        Source("b", "py:a:c=d"),
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a/x", "b/x"], "b/x: a second source with the name x; write NAME=b/x"),
        (["n=a", "n=b"], "n=b: a second source with the name n"),
        ([".."], "..: expected a name, found none; write NAME=.."),
        (["..=digits"], "..=digits: expected a name, found none"),
    ],
)
def test_sources_without_a_name_of_their_own(texts, message):
    with pytest.raises(UsageError) as caught:
        parse_sources(texts)
    assert str(caught.value).startswith(message)


def test_correlations():
    found = correlations(generators())
    rho = {name: found["correlations"][name]["value"] for name in found["correlations"]}
    assert rho["arc"] == -1 and rho["precision"] == 1 and rho["plain_accuracy"] == 0
    assert rho["fid"] == pytest.approx(-1 + 6 * 4 / 210)
    assert abs(rho["recall"]) < 0.3
    assert found["metrics"]["arc_rho"]["value"] == -1 and found["metrics"]["arc_rho"]["count"] == 6
    assert found["correlations"]["arc"]["magnitude_minus"]["fid"]["value"] == pytest.approx(6 * 4 / 210)
    assert set(rho) == {*SCORES, "accuracy"}


def test_a_score_that_one_generator_lacks_is_left_out():
    rows = generators()
    rows["g2"]["arc"] = entry(None)
    found = result(rows)
    assert "arc" not in found["correlations"] and "fid" in found["correlations"]
    rows_of_text = table(found)
    arc = rows_of_text[0].index("ARC")
    assert [row[arc] for row in rows_of_text if row[0] == "g2"] == ["-"] and rows_of_text[-1][arc] == ""
    assert not any("ARC" in line for line in verdict(found))


def test_the_table_is_sorted_by_robust_accuracy():
    rows = table(result(copy.deepcopy(generators())))
    assert [row[0] for row in rows] == ["generator", "g5", "g4", "g3", "g2", "g1", "g0", "rho"]
    assert rows[0][1:] == [title for title, _, _ in METRICS.values()]
    assert rows[1][1] == "1.0000" and rows[1][-1] == "0.700" and rows[-1][1] == "-1.00"
    assert len({len(row) for row in rows}) == 1


def test_the_verdict_begins_with_the_strongest():
    lines = verdict(result(generators()))
    assert lines[0].startswith("ARC: rank correlation with robust accuracy -1.00 [")
    assert lines[-2].startswith("plain discriminator: rank correlation with robust accuracy +0.00")
    assert lines[-1].startswith("ARC's |rho| minus FID's: +0.11 [")


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"arc": "FILE"}, "seed = 3", "FILE: seed: is set by synthfast rank; remove it"),
        ({"arc": "FILE"}, "radius = 3", "FILE: unknown key 'radius'"),
        ({"arc": "FILE"}, "radii = 1", "FILE: --radii 1: expected a whole number of at least 2"),
        (
            {"train": "FILE"},
            "validation = 50",
            "FILE: validation: no real images are trained on that could be held out",
        ),
        ({"train": "FILE"}, "seed = 1", "FILE: seed: is set by the comparison"),
        ({"test": "folder:FLAT"}, "", "--test folder:FLAT: has no labels, expected some"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path, options, text, message):
    from PIL import Image

    file, flat = tmp_path / "settings.toml", tmp_path / "flat"
    file.write_text(text)
    flat.mkdir()
    Image.new("L", (8, 8)).save(flat / "a.png")
    places = {"FILE": str(file), "FLAT": str(flat)}

    def placed(words: str) -> str:
        for name, place in places.items():
            words = words.replace(name, place)
        return words

    given = {name: placed(value) for name, value in options.items()}
    config = RankConfig(sources=("digits", "x=digits"), out=str(tmp_path / "out"), device="cpu", **given)
    with Ranks("cpu") as ranks, pytest.raises(UsageError) as caught:
        rank_result(config, ranks)
    assert str(caught.value).startswith(placed(message))
    assert not (tmp_path / "out").exists()
