"""The report of a study, one HTML file that loads nothing, and the page of all results.

    python -m experiments.report [results/PRESET ...]

draws the figures and writes the report of every study in these folders anew, then writes the page
of the documentation from all studies in `results/`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import attrs
import jinja2
from markupsafe import Markup

from experiments import claims, figures, results as stored, statistics, tables
from experiments.errors import ExperimentError
from experiments.figures import Drawn
from experiments.results import Results
from experiments.store import write_text

HERE = Path(__file__).parent
KINDS = {
    statistics.HOLDS: "yes",
    statistics.FAILS: "no",
    statistics.UNDECIDED: "open",
    claims.OPEN: "open",
}
"""The style of each verdict."""
OVERVIEW = "overview"
"""The figure of the first page."""
SIZES = "batch-sizes"
"""The end of the names of the figures of batch-size studies."""


@attrs.frozen
class Written:
    """Where a report and its figures are."""

    report: Path
    figures: Path


@attrs.frozen
class Section:
    """One study of the page.

    Args:
        name: Its folder within `results/`, as `cifar10-small/fair`.
        results: Its results.
    """

    name: str
    results: Results

    @property
    def slug(self) -> str:
        """The beginning of the names of its figures."""
        return _slug(self.name)

    @property
    def title(self) -> str:
        """Its heading: the title of the study, and the variant where there are several."""
        _, slash, variant = self.name.partition("/")
        return f"{self.results.study.title} ({variant})" if slash else self.results.study.title


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def write(folder: Path, results: Results) -> Written:
    """Write `report.html`, and the figures into `figures/`.

    Raises:
        ExperimentError: There is nothing to report, or a file cannot be written.
    """
    if not results.algorithms:
        raise ExperimentError(f"{folder} has no run that has ended: there is nothing to report")
    drawn = figures.save_all(results, folder / "figures")
    text = _template("report.html", None).render(
        **_view(results),
        figures=[(each, _inline(name, each)) for name, each in drawn.items()],
        settings=tables.settings(results),
    )
    write_text(folder / "report.html", text)
    return Written(folder / "report.html", folder / "figures")


def write_page(root: Path, sections: Sequence[Section]) -> Path:
    """Write `docs/results.md`, and its figures into `docs/assets/results/`.

    Args:
        root: The folder that has `docs/`.
        sections: The studies.
    """
    svgs: dict[str, str] = {}
    views, sweeps = [], _sweeps(sections)
    for section in sections:
        if section.results.study.training.overview:
            figure = figures.overview(section.results, section.results.study.training.overview)
            svgs[OVERVIEW] = figures.svg_text(figure, OVERVIEW)
        if any(section.results in sizes.values() for sizes in sweeps.values()):
            continue  # the figure of all sizes shows it
        drawn = {
            name: figures.drawn(section.results, name) for name in figures.names(section.results)
        }
        svgs |= {f"{section.slug}-{name}": each.svg for name, each in drawn.items()}
        view = {"section": section, "figures": drawn, "given": tables.given(section.results)}
        views.append({**_view(section.results), **view})
    for name, sizes in sweeps.items():
        svgs[name] = figures.svg_text(figures.versus(sizes), name)
    _replace(root / "docs" / "assets" / "results", svgs)
    text = _template("results.md.j2", _markdown).render(
        views=views,
        sweeps=[
            (name, figures.versus_alt(sizes), tables.sizes(sizes), next(iter(sizes.values())))
            for name, sizes in sweeps.items()
        ],
    )
    write_text(root / "docs" / "results.md", text)
    return root / "docs" / "results.md"


def _replace(folder: Path, svgs: Mapping[str, str]) -> None:
    """Write the figures of the page, and remove those that it had before; others stay."""
    kinds = "|".join([*figures.TITLES, SIZES])
    for path in folder.glob("*.svg"):
        if re.fullmatch(rf".+-({kinds})|{OVERVIEW}", path.stem) and path.stem not in svgs:
            path.unlink()
    for name, svg in svgs.items():
        write_text(folder / f"{name}.svg", svg)


def _sweeps(sections: Sequence[Section]) -> dict[str, dict[int, Results]]:
    """Return the studies side by side that differ in batch size, by the folder they are in."""
    found: dict[str, dict[int, Results]] = {}
    for section in sections:
        parent, slash, _ = section.name.rpartition("/")
        training = section.results.study.training
        if slash and training.target is not None:
            name = f"{_slug(parent)}-{SIZES}"
            found.setdefault(name, {}).setdefault(training.batch_size, section.results)
    return {name: sizes for name, sizes in found.items() if len(sizes) > 1}


def _view(results: Results) -> dict[str, Any]:
    """Return what both templates show."""
    judged = claims.check(results)
    return {
        "results": results,
        "study": results.study,
        "seeds": sorted({run.seed for run in results.runs}),
        "table": tables.summary(results),
        "caption": tables.caption(results),
        "claims": [each for each in judged if each.verdict != claims.OPEN],
        "open": [each for each in judged if each.verdict == claims.OPEN],
        "kinds": KINDS,
        "distances": tables.distances(results),
        "equal_time": tables.equal_time(results),
        "comparisons": list(tables.comparisons(results)),
        "searches": list(tables.searches(results)),
        "environment": tables.environment(results),
    }


def _template(name: str, finalize: Any) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    environment.filters["md"] = _markdown
    return environment.get_template(name)


def _markdown(value: Any) -> Markup:
    r"""Return text with the signs of Markdown and HTML escaped; what is marked as safe stays.

    Example:
        >>> str(_markdown("Adam's a*b < [c]")), str(_markdown(Markup("a*b")))
        ("Adam's a\\*b &lt; \\[c\\]", 'a*b')
    """
    if isinstance(value, Markup):
        return value
    return Markup(escape(re.sub(r"([\\`*_\[\]|$])", r"\\\1", str(value)), quote=False))


def _inline(name: str, drawn: Drawn) -> Markup:
    """Return an SVG for a page with others: names in it are its own."""
    svg = drawn.svg[drawn.svg.index("<svg") :]  # without the XML head: its document type is a URL
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('xlink:href="#', f'xlink:href="#{name}-').replace("url(#", f"url(#{name}-")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(drawn.alt)}"', 1))


def studies(folder: Path) -> list[Path]:
    """Return the folders of all studies in a folder.

    Raises:
        ExperimentError: There are none.
    """
    found = sorted(path.parent for path in folder.rglob(stored.STUDY))
    if not found:
        raise ExperimentError(
            f"{folder} holds no {stored.STUDY}: give a folder of results, such as results/mnist1d"
        )
    return found


def rebuild(folders: Sequence[Path], root: Path) -> list[Path]:
    """Write the reports of all studies in some folders, then the page of all in `root/results`.

    Returns:
        The written files. The page is not among them where `root/results` has no studies.
    """
    all_ = root / "results"
    chosen = dict.fromkeys(path for folder in folders or [all_] for path in studies(folder))
    written = [write(folder, stored.read(folder)).report for folder in chosen]
    if any(all_.rglob(stored.STUDY)):
        named = {path.relative_to(all_).as_posix(): path for path in studies(all_)}
        sections = [Section(name, stored.read(path)) for name, path in named.items()]
        written.append(write_page(root, sections))
    return written


def main(arguments: Sequence[str] | None = None, root: Path = HERE.parent) -> int:
    """Rebuild reports and the page; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "folders", nargs="*", type=Path, help="folders with studies (default: all of results/)"
    )
    try:
        for path in rebuild(parser.parse_args(arguments).folders, root):
            print(path)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
