"""The table of results as text cells, for the terminal and the report."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from experiments.results import Results

HEADINGS = (
    "algorithm",
    "training loss",
    "training acc. %",
    "test loss",
    "test acc. %",
    "s/epoch",
    "vs SGD",
)


def rows(results: Results) -> list[tuple[str, ...]]:
    """Return a row for each algorithm: the values of the last epoch, and the cost of an epoch."""
    return [_row(results, algorithm.name, algorithm.label) for algorithm in results.algorithms]


def _row(results: Results, name: str, label: str) -> tuple[str, ...]:
    relative = results.relative_seconds(name)
    return (
        label,
        results.final(name, "train_loss").text(4),
        results.final(name, "train_accuracy").text(2),
        results.final(name, "test_loss").text(4),
        results.final(name, "test_accuracy").text(2),
        f"{results.seconds(name):.2f}",
        "-" if relative is None else f"{relative:.2f}x",
    )


def caption(results: Results) -> str:
    """Describe the numbers."""
    seeds = list(dict.fromkeys(run.seed for run in results.runs))
    over = (
        f"seed {seeds[0]}"
        if len(seeds) == 1
        else f"mean ± half the range over seeds {', '.join(map(str, seeds))}"
    )
    text = (
        f"After {results.epochs} epoch{'s' * (results.epochs > 1)}: {over}. Training metrics are "
        "means over the steps of the last epoch. The seconds of an epoch are the median time of "
        "its training steps."
    )
    limit = results.experiment.training.max_steps
    if limit:
        text += f" Every run was stopped after {limit} steps, and tested on {limit} batches."
    return text


def for_terminal(results: Results) -> Table:
    """Return the table for rich."""
    table = Table(
        title=Text(results.experiment.title, style="table.title"),
        caption=Text(caption(results), style="table.caption"),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for heading in HEADINGS:  # narrow enough for 80 columns
        table.add_column(
            heading.replace(" ", "\n", 1),
            justify="left" if heading == "algorithm" else "right",
            no_wrap=True,
        )
    for row in rows(results):
        table.add_row(*map(Text, row))
    return table
