"""Running commands in this process, as a shell would start them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from synthfast.cli.main import main

# The embedded generator, as quick as it can be.
QUICK = ("--batch-size", "16", "--steps", "1", "--device", "cpu")


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on standard error of a command that failed, without the program's name."""
        assert self.status != 0, self.out
        assert self.err.startswith("synthfast: ") and self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        return self.err[len("synthfast: ") : -1]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """``cli("sample", "--n", 3)`` runs the command line; an exception that it lets through fails the test."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Ran(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def sample(cli: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    """``synthfast sample`` of 23 digits with one solver step into tmp_path / "out"; options replace these."""

    def run(*arguments: object) -> Ran:
        return cli("sample", "--n", 23, "--out", tmp_path / "out", *QUICK, *arguments)

    return run


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder by name."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
