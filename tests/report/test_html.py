"""The HTML report: everything of a result is in it, nothing from outside, and nothing that a file says becomes markup."""

from __future__ import annotations

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthfast.cli.main import main

from synthfast.errors import SynthfastError
from synthfast.report.html import read_result, report_html

RESULTS = Path(__file__).parents[2] / "bench" / "results"
ACCURACY = {
    "format": 1,
    "command": "score accuracy",
    "config": {"classifier": "runs/x", "n": None, "nested": {"a": 1, "list": [1, 2]}},
    "environment": {"torch": "2.14"},
    "inputs": {"dataset": {"path": "digits:test", "sha256": "abc", "count": 1297}},
    "metrics": {"accuracy": {"value": 0.98123, "ci": [0.97, 0.99], "count": 1297}},
    "groups": {
        "class": {
            "0": {"accuracy": {"value": 1.0, "ci": [0.9, 1.0], "count": 10}},
            "1": {"accuracy": {"value": 0.5, "ci": None, "count": 4}},
        }
    },
    "warnings": ["look here"],
    "seconds": 1.25,
}


class Page(HTMLParser):
    """Texts of the page, its tags, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.tags, self.open, self.sources = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def test_everything_is_there():
    page = Page(report_html([("a.json", ACCURACY)], "My run"))
    assert page.open == []
    for text in ("My run", "score accuracy", "0.9812", "0.97 to 0.99", "1,297", "By class", "0.5", "look here", "abc"):
        assert text in page.texts, text
    assert "1 (0.9 to 1)" in page.texts
    assert page.texts[page.texts.index("nested.list") + 1] == "1, 2"
    assert "n" not in page.texts  # what is None is not told


def test_what_a_file_says_is_text():
    evil = copy.deepcopy(ACCURACY)
    evil["inputs"]["dataset"]["path"] = "<script>alert(1)</script>"
    evil["warnings"] = ["<img src=x onerror=alert(1)>"]
    evil["metrics"]["<b>"] = evil["metrics"].pop("accuracy")
    page = Page(report_html([("<i>", evil)], "<u>"))
    assert not {"script", "img", "b", "i", "u"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.texts


def test_figures_are_inside_and_nothing_else_is_loaded():
    path = RESULTS / "inflection-digits.json"
    page = Page(report_html([(str(path), read_result(path)), ("a.json", ACCURACY)], "t"))
    images = [source for source in page.sources if not source.startswith("#")]
    assert len(images) == 1
    kind, _, data = images[0].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data)[:4] == b"\x89PNG"
    assert {source for source in page.sources if source.startswith("#")} == {"#result-1", "#result-2"}
    assert page.open == []


def test_a_missing_value_is_told():
    result = copy.deepcopy(ACCURACY)
    result["metrics"]["arc"] = {"value": None, "ci": None, "count": 5}
    assert "not scored" in Page(report_html([("a.json", result)], "t")).texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.pop("format"), "not a result of synthfast"),
        (lambda result: result.pop("command"), "not a result of synthfast"),
        (lambda result: result.update(format=99), "format 99 is newer than this synthfast reads"),
        (lambda result: result.update(format=True), "not a result of synthfast"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    result = copy.deepcopy(ACCURACY)
    change(result)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result))
    with pytest.raises(SynthfastError, match=re.escape(message)):
        read_result(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.pop("metrics"),
        lambda result: result.update(metrics=3),
        lambda result: result["metrics"].update(accuracy={"value": "x", "ci": [1], "count": 1}),
        lambda result: result.update(seconds=None),
        lambda result: result.update(warnings=3),
        lambda result: result.update(command="rank", generators={}, correlations={}),
        lambda result: result.update(command="inflection"),
        lambda result: result.update(command="rank"),
    ],
)
def test_a_damaged_result_is_one_line(change):
    result = copy.deepcopy(ACCURACY)
    change(result)
    with pytest.raises(SynthfastError, match=r"a\.json: incomplete or damaged result of"):
        report_html([("a.json", result)], "t")


def test_the_command(tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(ACCURACY))
    with pytest.raises(SystemExit) as caught:
        main(["report", str(path), "--out", str(tmp_path / "page.html"), "--title", "Title"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}: 1 result\n"
    assert "<title>Title</title>" in (tmp_path / "page.html").read_text()
