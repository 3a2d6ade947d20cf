"""Options of ``synthfast report``."""

from __future__ import annotations

from dataclasses import dataclass

from synthfast.config.fields import option
from synthfast.errors import UsageError


@dataclass(frozen=True)
class ReportConfig:
    """``synthfast report``: result files as one HTML file."""

    results: tuple[str, ...] = option(
        (), "Result files that commands wrote with --out.", metavar="RESULT...", positional=True
    )
    title: str = option("synthfast report", "Title of the page.")
    out: str = option("report.html", "The file to write.", metavar="FILE")

    def __post_init__(self) -> None:
        if not self.results:
            raise UsageError("expected result files, found none; name what commands wrote with --out")
