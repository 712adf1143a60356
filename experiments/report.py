"""The report: one HTML file that holds everything and fetches nothing."""

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
from experiments.store import flat

TEMPLATE = Path(__file__).with_name("report.html")
PACKAGES = ("kfactk", "torch", "torchvision", "numpy", "scikit-learn", "mlflow", "matplotlib")


def write(
    path: Path, results: Results, figures: Mapping[str, str], commands: Sequence[tuple[str, str]]
) -> None:
    """Write the report.

    Args:
        path: Where to.
        results: The runs.
        figures: SVG text by metric.
        commands: What to type: what it does, and the command.
    """
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    text = template.substitute(
        title=escape(results.study.title),
        data=escape(
            f"{results.dataset}; network {results.study.model.name}; {len(results.runs)} runs on {results.device}"
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
    """Versions of what the numbers depend on."""
    found = [f"Python {platform.python_version()}", platform.platform()]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} (not installed)")
    return found


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _claim(claim: claims.Claim) -> str:
    kind = {claims.HOLDS: "yes", claims.FAILS: "no", claims.OPEN: "open"}[claim.verdict]
    return f'<li><span class="{kind}">{claim.verdict}</span> {escape(claim.text)}: <em>{escape(claim.evidence)}</em>.</li>'


def _figure(title: str, svg: str) -> str:
    svg = svg[svg.index("<svg") :]  # without the XML head, whose document type is an address
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W", "_", title)  # names must differ among figures that share a page
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
    return "<h3>What the study reports</h3>" + _table(
        ("algorithm", "training acc. (%)", "test acc. (%)"), rows
    )


def _settings(results: Results) -> str:
    columns = {
        algorithm.label: dict(flat(results.of(algorithm.name)[0].settings))
        for algorithm in results.algorithms
    }
    keys = list(dict.fromkeys(key for settings in columns.values() for key in settings))
    rows = [(key, *(str(settings.get(key, "")) for settings in columns.values())) for key in keys]
    study = {**attrs.asdict(results.study.data), **attrs.asdict(results.study.training)}
    shared = _table(
        ("all runs", ""), [(key, str(value)) for key, value in study.items() if value is not None]
    )
    return shared + _table(("first seed's", *columns), rows)


def _runs(results: Results) -> str:
    rows = []
    for run in results.runs:
        last = run.history[-1]
        values = (f"{value:.4f}" for value in last.metrics.values())
        label = results.study.algorithms[run.algorithm].label
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
    heading = "<h2>Inside the preconditioners</h2><p>Means over the last epoch, first seed; all epochs are in MLflow.</p>"
    return (
        heading
        + "<details><summary>Figures</summary>"
        + _table(("algorithm", "figure", "value"), rows)
        + "</details>"
    )
