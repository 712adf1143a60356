"""The report: one HTML file that contains everything and loads nothing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import attrs

from experiments import claims, table
from experiments.files import write_text
from experiments.results import METRICS, Results
from experiments.store import flatten

TEMPLATE = Path(__file__).with_name("report.html")
PACKAGES = ("kfactk", "torch", "torchvision", "numpy", "scikit-learn", "mlflow", "matplotlib")


def write(
    path: Path, results: Results, figures: Mapping[str, str], commands: Sequence[tuple[str, str]]
) -> None:
    """Write the report.

    Args:
        path: The file.
        results: The runs.
        figures: SVG text by metric.
        commands: Pairs of what a command does and the command.
    """
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    text = template.substitute(
        title=escape(results.experiment.title),
        data=escape(
            f"{results.dataset}; network {results.experiment.model.name}; "
            f"{len(results.runs)} runs on {results.device}"
        ),
        claims="\n".join(_claim(claim) for claim in claims.check(results)),
        table=_table(table.HEADINGS, table.rows(results)),
        caption=escape(table.caption(results)),
        figures="\n".join(_figure(METRICS[metric], svg) for metric, svg in figures.items()),
        reference=_reference(results),
        settings=_settings(results),
        runs=_runs(results),
        curvature=_curvature(results),
        commands="\n".join(
            f"<dt>{escape(what)}</dt><dd><code>{escape(command)}</code></dd>"
            for what, command in commands
        ),
        versions=escape(", ".join(versions())),
    )
    write_text(path, text)


def versions() -> list[str]:
    """Return the versions of everything that the numbers depend on."""
    found = [f"Python {platform.python_version()}", platform.platform()]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} (not installed)")
    return found


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(_row(*row) for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(first: str, *rest: str) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    return f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'


def _claim(claim: claims.Claim) -> str:
    kind = {claims.HOLDS: "yes", claims.FAILS: "no", claims.OPEN: "open"}[claim.verdict]
    return (
        f'<li><span class="{kind}">{claim.verdict}</span> {escape(claim.text)}: '
        f"<em>{escape(claim.evidence)}</em>.</li>"
    )


def _figure(title: str, svg: str) -> str:
    svg = svg[svg.index("<svg") :]  # without the XML head, whose document type is a URL
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W", "_", title)  # names must differ among the figures of a page
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('xlink:href="#', f'xlink:href="#{prefix}-').replace(
        "url(#", f"url(#{prefix}-"
    )
    return (
        f"<figure>{svg}<figcaption>{escape(title.capitalize())} against epoch</figcaption></figure>"
    )


def _reference(results: Results) -> str:
    rows = [
        (
            algorithm.label,
            *(
                f"{algorithm.reference[key]:g}" if key in algorithm.reference else "-"
                for key in ("train_accuracy", "test_accuracy")
            ),
        )
        for algorithm in results.algorithms
        if algorithm.reference
    ]
    if not rows:
        return ""
    return "<h3>What the thesis reports</h3>" + _table(
        ("algorithm", "training acc. (%)", "test acc. (%)"), rows
    )


def _settings(results: Results) -> str:
    columns = {
        algorithm.label: dict(flatten(results.of(algorithm.name)[0].settings))
        for algorithm in results.algorithms
    }
    keys = list(dict.fromkeys(key for settings in columns.values() for key in settings))
    rows = [(key, *(str(settings.get(key, "")) for settings in columns.values())) for key in keys]
    experiment = {
        **attrs.asdict(results.experiment.data),
        **attrs.asdict(results.experiment.training),
    }
    shared = _table(
        ("all runs", ""),
        [(key, str(value)) for key, value in experiment.items() if value is not None],
    )
    return shared + _table(("first seed's", *columns), rows)


def _runs(results: Results) -> str:
    rows = []
    for run in results.runs:
        last = run.history[-1]
        values = (f"{value:.4f}" for value in last.metrics.values())
        label = results.experiment.algorithms[run.algorithm].label
        rows.append(
            (
                label,
                str(run.seed),
                run.status,
                str(last.epoch),
                *values,
                f"{sum(epoch.seconds for epoch in run.history):.1f}",
            )
        )
    return _table(
        ("algorithm", "seed", "state", "epochs", *METRICS.values(), "training seconds"), rows
    )


def _curvature(results: Results) -> str:
    rows = []
    for algorithm in results.algorithms:
        last = results.of(algorithm.name)[0].history[-1].curvature
        rows += [(algorithm.label, key, f"{value:.4g}") for key, value in last.items()]
    if not rows:
        return ""
    return (
        "<h2>Metrics of the preconditioners</h2>"
        "<p>Means over the last epoch, first seed; all epochs are in MLflow.</p>"
        "<details><summary>Metrics</summary>"
        + _table(("algorithm", "metric", "value"), rows)
        + "</details>"
    )
