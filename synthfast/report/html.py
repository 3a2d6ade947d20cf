"""Results as one self-contained HTML file: tables, figures as embedded PNG, and what is needed to repeat them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthfast.artifacts import read_json
from synthfast.errors import SynthfastError
from synthfast.evaluation.result import RESULT_FORMAT
from synthfast.report import figures
from synthfast.scoring.names import METRICS

_TEMPLATE = Path(__file__).parent / "report.html.j2"
# Command to the function that draws its figure as PNG.
_FIGURES: dict[str, Callable[[Mapping[str, Any], io.BytesIO], None]] = {
    "inflection": lambda result, png: figures.inflection_figure(result["curves"], png),
    "rank": lambda result, png: figures.rank_figure(result["generators"], result["correlations"], png),
    "score arc": lambda result, png: figures.arc_figure(result["curves"]["arc"], result["metrics"], png),
}
_LOWER_BETTER = {name for name, (_, more_is_better, _) in METRICS.items() if not more_is_better}


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file of this or an earlier version; one-line SynthfastError for anything else."""
    result = read_json(path, "result")
    version, command = result.get("format"), result.get("command")
    if type(version) is not int or version < 1 or not isinstance(command, str):
        raise SynthfastError(
            f"{path}: not a result of synthfast, expected 'format' and 'command'; give what a command wrote with --out"
        )
    if version > RESULT_FORMAT:
        raise SynthfastError(
            f"{path}: format {version} is newer than this synthfast reads ({RESULT_FORMAT}); upgrade synthfast"
        )
    return result


def report_html(results: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> str:
    """The page.

    Args:
        results: path, for the reader, and content of each result file, in the order of the page.
        title: of the page.

    Raises SynthfastError in one line for a result that lacks what its command writes, or where jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise SynthfastError(f"reports need jinja2 ({error}); install it with: pip install jinja2") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    sections = []
    for number, (path, result) in enumerate(results, start=1):
        try:
            sections.append(_section(number, path, result))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            raise SynthfastError(
                f"{path}: incomplete or damaged result of '{result['command']}' ({error!r}); make it again"
            ) from error
    return template.render(title=title, sections=sections)


def _section(number: int, path: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"result-{number}",
        "heading": result["command"],
        "path": path,
        "inputs": [
            {"role": role, "path": each["path"], "count": each["count"], "sha256": each["sha256"]}
            for role, each in result["inputs"].items()
        ],
        "metrics": [_row(name, value) for name, value in result["metrics"].items()],
        "tables": [*_group_tables(result.get("groups", {})), *_rank_tables(result)],
        "warnings": [str(line) for line in result.get("warnings", [])],
        "figure": _figure(result),
        "config": list(_flat(result["config"])),
        "environment": list(_flat(result["environment"])),
        "seconds": float(result["seconds"]),
    }


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [_title(name), _number(entry["value"]), _interval(entry), _count(entry.get("count"))]


def _title(name: str) -> str:
    return METRICS[name][0] if name in METRICS else name.replace("_", " ")


def _number(value: float | None) -> str:
    return "not scored" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _interval(entry: Mapping[str, Any]) -> str:
    if entry.get("ci") is None:
        return ""
    low, high = entry["ci"]
    return f"{low:.4g} to {high:.4g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _group_tables(groups: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table a kind of group: a row a group, a column a metric."""
    tables = []
    for kind, members in groups.items():
        names = list(dict.fromkeys(name for member in members.values() for name in member))
        rows = [
            [label, *(_with_interval(member[name]) if name in member else "" for name in names)]
            for label, member in members.items()
        ]
        tables.append({"caption": f"By {kind}", "columns": [kind, *map(_title, names)], "rows": rows})
    return tables


def _with_interval(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return _number(entry) if isinstance(entry, (int, float)) else str(entry)
    interval = _interval(entry)
    return _number(entry["value"]) + (f" ({interval})" if interval else "")


def _rank_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The generators of ``synthfast rank`` and the correlations of the scores."""
    if result["command"] != "rank":
        return []
    generators, found = result["generators"], result["correlations"]
    names = [name for name in METRICS if all(name in row for row in generators.values())]
    order = sorted(generators, key=lambda name: -generators[name]["robust_accuracy"]["value"])
    rows = [[name, *(_with_interval(generators[name][metric]) for metric in names)] for name in order]
    arrows = [f"{METRICS[name][0]} {'↓' if name in _LOWER_BETTER else '↑'}" for name in names]
    rho = [[_title(name), *(_row(name, entry)[1:3]), f"{entry['p']:.3g}"] for name, entry in found.items()]
    return [
        {"caption": "Generators, by robust accuracy", "columns": ["generator", *arrows], "rows": rows},
        {
            "caption": "Rank correlation with robust accuracy",
            "columns": ["score", "Spearman's rho", "95% interval", "p"],
            "rows": rho,
        },
    ]


def _figure(result: Mapping[str, Any]) -> str | None:
    """The figure as a data URI; None where the command has none or nothing was scored."""
    draw = _FIGURES.get(result["command"])
    if draw is None:
        return None
    png = io.BytesIO()
    draw(result, png)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (name.name, text)."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append((f"{prefix}{name}", text))
    return rows
