"""What every command does alike: help, wrong usage, --debug, one line for an error."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synthfast import __version__
from synthfast.config import (
    AccuracyConfig,
    ArcConfig,
    ClassifierConfig,
    ExportConfig,
    FidConfig,
    GeneratorConfig,
    ImportConfig,
    InflectionConfig,
    MergeConfig,
    PrdcConfig,
    RankConfig,
    ReportConfig,
    RobustConfig,
    SampleConfig,
    SamplesConfig,
    SelectConfig,
    SplitConfig,
    StatsConfig,
)

GROUPS = {"": "sample, train", "train": "generator", "score": "accuracy", "shards": "ls"}
COMMANDS = {
    "sample": SampleConfig,
    "train generator": GeneratorConfig,
    "train classifier": ClassifierConfig,
    "score accuracy": AccuracyConfig,
    "score robust": RobustConfig,
    "score arc": ArcConfig,
    "score fid": FidConfig,
    "score prdc": PrdcConfig,
    "score samples": SamplesConfig,
    "select": SelectConfig,
    "inflection": InflectionConfig,
    "rank": RankConfig,
    "report": ReportConfig,
    "shards ls": None,
    "shards verify": None,
    "shards stats": StatsConfig,
    "shards export": ExportConfig,
    "shards import": ImportConfig,
    "shards merge": MergeConfig,
    "shards split": SplitConfig,
    "info": None,
}


def words(text: str) -> str:
    """Text as one line, so that it can be compared whatever its line breaks, which may also follow a hyphen in a word."""
    return re.sub(r"(?<=\w-) (?=\w)", "", " ".join(text.split()))


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", [*GROUPS, *COMMANDS])
def test_help_is_short_of_nothing(cli, command, flag):
    ran = cli(*command.split(), flag)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: {' '.join(['synthfast', *command.split()])} ")
    options = ran.out.partition("Options:\n")[2]
    assert options and all(len(line) <= 80 for line in ran.out.splitlines())
    described = re.findall(r"^  (-\S.*?)$\n?((?:^ {10,}\S.*$\n?)*)", options, re.MULTILINE)
    for option, more in described:
        assert re.search(r"\S {2,}\S", option) or more.strip(), f"{option} has no help"


@pytest.mark.parametrize("command", [name for name, config in COMMANDS.items() if config])
def test_help_has_every_option_and_its_default(cli, command):
    text = words(cli(*command.split(), "--help").out)
    for field in dataclasses.fields(COMMANDS[command]):
        if field.metadata.get("positional"):
            assert field.metadata["metavar"] in text
            continue
        flag = "--" + field.name.replace("_", "-")
        entry = re.search(rf"{flag}(?![\w-]).*?(?= --\w|$)", text)
        assert entry, f"{flag} is not in the help"
        assert words(field.metadata["help"]) in text
        if isinstance(field.default, bool):
            assert f"[default: {'on' if field.default else 'off'}]" in text
        elif field.default not in (None, ()):
            assert f"{words(field.metadata['help'])} [default: {field.default}]" in text


def test_no_arguments_show_the_help(cli):
    assert cli().out == cli("--help").out


def test_version(cli):
    ran = cli("--version")
    assert ran.status == 0 and __version__ in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "Missing command."),
        ("score", "Missing command."),
        ("shards", "Missing command."),
        ("--debug", "Missing command."),
        ("sampel", "No such command 'sampel'."),
        ("train generato", "No such command 'generato'."),
        ("score acuracy", "No such command 'acuracy'."),
        ("shards lss", "No such command 'lss'."),
        ("--verbose", "No such option '--verbose'"),
        ("sample --colour", "No such option '--colour'"),
        ("train generator --colour", "No such option '--colour'"),
        ("train classifier --colour", "No such option '--colour'"),
        ("score accuracy --colour", "No such option '--colour'"),
        ("shards ls --colour", "No such option '--colour'"),
        ("shards verify --colour", "No such option '--colour'"),
        ("shards export --colour", "No such option '--colour'"),
        ("info --colour", "No such option '--colour'"),
        ("sample 100", "Got unexpected extra argument (100)"),
        ("train generator digits", "Got unexpected extra argument (digits)"),
        ("train classifier digits", "Got unexpected extra argument (digits)"),
        ("score accuracy --classifier a b", "Got unexpected extra argument (b)"),
        ("shards ls a b", "Got unexpected extra argument (b)"),
        ("shards verify a b", "Got unexpected extra argument (b)"),
        ("info here", "Got unexpected extra argument (here)"),
        ("shards ls", "Missing argument 'DIR'."),
        ("shards verify", "Missing argument 'DIR'."),
        ("sample --out", "Option '--out' requires an argument."),
        ("sample --compile=3", "Option '--compile' does not take a value."),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(cli, arguments, message):
    ran = cli(*arguments.split())
    assert ran.status == 2 and ran.out == ""
    assert ran.error.replace('"', "'").replace("option: ", "option '").startswith(message)
    assert "--help" in ran.error or "--compile" in arguments or "--out" in arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train generator --steps 0", "--steps 0: expected a whole number of at least 1"),
        ("train generator --dataset didgits", "didgits: no such image source; expected digits, mnist"),
        ("train generator --lr 0", "--lr 0.0: expected a positive number"),
        ("train generator --ema 1", "--ema 1.0: expected a number from 0 to below 1"),
        ("train generator --prediction sample", "--prediction sample: the edm loss has its own"),
        ("train generator --image-size 9", "digits:train: images are 8x8x1 and are not resized, image size 9"),
        ("train classifier --fraction 1", "--fraction 1.0: expected --synthetic DIR beside it"),
        ("train classifier --batch-size -3", "--batch-size -3: expected "),
        ("train classifier --crop 8", "--crop 8: expected less than the images' side of 8; lower it"),
        ("train classifier --dataset digits:valid", "digits:valid: no such split; digits has train, test"),
        (
            "train classifier --eps 8/255",
            "--eps 0.03137254901960784: method standard does not use it; add --method pgd",
        ),
        ("train classifier --method pgd --beta 5", "--beta 5.0: method pgd does not use it; add --method trades"),
        ("train classifier --method trade", "Invalid value for '--method': 'trade' is not one of 'standard', 'pgd'"),
        ("train classifier --model wrn-28", "'wrn-28': no classifier has this name; expected small-cnn, "),
        (
            "train classifier --validation 500",
            "--validation 500: 500 of the 500 images of digits:train would be held out",
        ),
        ("train classifier --pseudo-labels x", "--pseudo-labels x: expected --synthetic DIR beside it, found none"),
        ("train classifier --recipe none.toml", "--recipe none.toml: no such file; check the path, or take one of edm"),
        ("train classifier --image-size 9", "digits:train: images are 8x8x1 and are not resized, image size 9"),
        ("train classifier --device gpu", "--device gpu: expected auto, cpu, cuda or cuda:N"),
        ("score accuracy", "--classifier: expected a checkpoint folder or a file of weights, found none"),
        ("score robust --classifier a --eps -1", "--eps -1.0: expected a number of at least 0, such as 8/255"),
        ("score robust --classifier a --step-size 0", "--step-size 0.0: expected a positive number"),
        ("score robust --classifier a --restarts 0", "--restarts 0: expected a whole number of at least 1"),
        ("score robust --classifier a -n 0", "--n 0: expected a whole number of at least 1"),
        ("score robust --classifier a.pt", "a.pt: a file of weights needs the name of its network; pass --model"),
        ("inflection", "--synthetic: expected a folder of synthetic shards, found none"),
        ("rank", "expected two generators or shard folders or more, found none; name them"),
        ("rank digits", "expected two generators or shard folders or more, found one; name them"),
        ("rank digits a --samples 1", "--samples 1: expected a whole number of at least 2"),
        ("report", "expected result files, found none; name what commands wrote with --out"),
        ("inflection --synthetic a --seeds 0", "--seeds 0: expected a whole number of at least 1"),
    ],
)
def test_a_bad_value_is_one_line_and_status_2(cli, tmp_path, arguments, message):
    ran = cli(*arguments.split(), "--out", tmp_path / "out")
    assert ran.status == 2 and ran.error.startswith(message)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_debug_shows_where_an_error_came_from():
    command = [sys.executable, "-m", "synthfast", "shards", "ls", "/nowhere"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr == "synthfast: /nowhere/manifest.json: no shard manifest here; check the path\n"
    debug = subprocess.run(
        [*command, "--debug"], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert debug.returncode == 1 and debug.stderr.startswith("Traceback (most recent call last):")
    assert debug.stderr.endswith("SynthfastError: /nowhere/manifest.json: no shard manifest here; check the path\n")


def test_the_rank_is_named_where_there_are_several(cli, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        from synthfast.cli.main import main

        main(["shards", "ls", "/nowhere"])
    assert capsys.readouterr().err.startswith("synthfast (rank 3): /nowhere/manifest.json")


def test_an_interruption_is_one_line(cli, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("synthfast.data.summary", interrupt)
    ran = cli("shards", "ls", "/nowhere")
    # An empty line first, because the terminal has just written ^C.
    assert (ran.status, ran.err) == (130, "\nsynthfast: interrupted; run the same command again to go on\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; lower --batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out of GPU memory; lower --batch-size"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory; lower --batch-size",
        ),
        (OSError(5, "Input/output error", "disk.npy"), "disk.npy: Input/output error"),
        (OSError("two\nlines"), "two lines"),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_status_1(cli, monkeypatch, error, message):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("synthfast.data.summary", fail)
    ran = cli("shards", "ls", "/nowhere")
    assert ran.status == 1 and ran.error == message
    with pytest.raises(type(error)):
        __import__("synthfast.cli.main", fromlist=["main"]).main(["--debug", "shards", "ls", "/nowhere"])


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch):
    from synthfast.cli.main import main

    def fail(*arguments: object) -> None:
        raise RuntimeError("an unforeseen state")

    monkeypatch.setattr("synthfast.data.summary", fail)
    with pytest.raises(RuntimeError, match="an unforeseen state"):
        main(["shards", "ls", "/nowhere"])
