"""``synthfast report``."""

from __future__ import annotations

import click
from synthfast.cli.options import config_options

from synthfast.config import ReportConfig


@click.command()
@config_options(ReportConfig)
def report(config: ReportConfig) -> None:
    """Result files as one HTML page that needs nothing else: metrics with intervals, tables, figures, settings."""
    from synthfast.artifacts import atomic_write_bytes
    from synthfast.report.html import read_result, report_html

    page = report_html([(path, read_result(path)) for path in config.results], config.title)
    atomic_write_bytes(config.out, page.encode("utf-8", "replace"))
    click.echo(f"{config.out}: {len(config.results)} result{'s' if len(config.results) > 1 else ''}")
