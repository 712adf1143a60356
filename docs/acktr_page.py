"""Write `docs/acktr.md`: ACKTR beside Adam and RMSprop in the same A2C, over seeds.

    python -m docs.acktr_page          # the page and its figure, from results/acktr/runs.json
    python -m docs.acktr_page --run    # first the runs that the file lacks

Every contestant has the same number of trials, on other seeds than those that the page compares.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import STYLES, svg_text

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "results" / "acktr" / "runs.json"
PAGE = ROOT / "docs" / "acktr.md"
FIGURE = ROOT / "docs" / "assets" / "acktr.svg"

Settings = dict[str, float]
Curve = list[list[float]]
Key = tuple[str, str, str, int]
"""Task, optimizer, settings as JSON, seed."""

TASKS = {"cartpole": "CartPole-v1", "pendulum": "Pendulum-v1"}
STEPS = {"cartpole": 40_960, "pendulum": 61_440}
NORMALIZE = (False, True)
TRIALS: dict[str, tuple[Settings, ...]] = {
    "acktr": tuple(
        {"lr": longest, "radius": radius, "normalize": normalize}
        for normalize in NORMALIZE
        for longest in (0.25, 1.0)
        for radius in (0.001, 0.01)
    )
}
TRIALS |= {
    rival: tuple(
        {"lr": rate, "normalize": normalize}
        for normalize in NORMALIZE
        for rate in (0.001, 0.003, 0.01, 0.03)
    )
    for rival in ("adam", "rmsprop")
}
TRIAL_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
LABELS = {"acktr": "ACKTR", "adam": "Adam", "rmsprop": "RMSprop"}
LOOKS = {"acktr": STYLES["kfac"], "adam": STYLES["adamw"], "rmsprop": STYLES["sgd"]}
FOUND = """\
On CartPole every setting of ACKTR did worse with normalized advantages, while the best of Adam uses
them; on Pendulum they harmed ACKTR with the large radius. A likely cause: late in training
advantages are small and mostly noise. The division by their deviation makes them large again, and
the step stays at the radius. Without it the longest step, `lr`, takes over from the radius as the
gradients become small.

No rate let Adam learn Pendulum within these steps. Some settings of RMSprop failed there with one
seed of the trials and rose with the other. Longer runs may change these numbers.

## Predicted and real divergence

The radius bounds what F predicts. A first try, one seed and not among the runs of this page,
measured policy and value before and after each of the first 100 updates, with lr 1 and radius 0.01.
Medians of ten updates reached 37 times the radius on CartPole, and 142 times on Pendulum. With an F
of the last batch alone and a new inverse each time (`factor_decay=0.0`, `basis_every=1`) they were
at most 2.3 and 3.9 times. So most of the excess comes from a running mean and an inverse that lag
behind a policy that changes quickly. Whether the fresh F also learns sooner was not measured.

## The loop

- 16 environments, 8 steps in each, one update from these 128 states. Advantages are generalized
  with 0.95. The loss has half of the squared error of the value with weight 0.5. The entropy has
  weight 0.01 for CartPole, 0 for Pendulum. The discount is 0.99, and 0.9 for Pendulum.
- An episode that a time limit cuts goes on in its target, by the value of its last observation. One
  that ends does not.
- The learning rate falls linearly to zero: for ACKTR it is the longest step. Adam and RMSprop clip
  the norm of the gradient at 0.5.
- The spread of Pendulum's Gaussian is the same in all states: the weight of a layer whose input is
  1, so that K-FAC has it too.
"""
MEASURES = {"end": "at the end", "course": "mean of the curve"}


@attrs.frozen
class Study:
    """The runs of the study: curves of steps in the environments and mean returns.

    Args:
        found: The curves of the runs.
    """

    found: dict[Key, Curve]

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read the file, or begin without one."""
        rows = json.loads(path.read_text()) if path.exists() else []
        return cls({(task, name, key_of(kind), seed): c for task, name, kind, seed, c in rows})

    def write(self, path: Path) -> None:
        """Write the file, one run a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [[t, n, json.loads(kind), seed, c] for (t, n, kind, seed), c in self.found.items()]
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")

    def curve(self, task: str, name: str, settings: Settings, seed: int) -> Curve:
        """Return one curve."""
        return self.found[task, name, key_of(settings), seed]

    def score(self, task: str, name: str, settings: Settings) -> float:
        """Return what the choice of settings goes by: the mean of the curves of the trials."""
        curves = [self.curve(task, name, settings, seed) for seed in TRIAL_SEEDS]
        return float(np.mean([course(each) for each in curves]))

    def chosen(self, task: str, name: str) -> Settings:
        """Return the settings with the best trials."""
        return max(TRIALS[name], key=lambda settings: self.score(task, name, settings))

    def compared(self, task: str, name: str) -> list[Curve]:
        """Return the curves over the seeds that the page compares."""
        settings = self.chosen(task, name)
        return [self.curve(task, name, settings, seed) for seed in SEEDS]


def key_of(settings: Settings) -> str:
    """Return settings as text."""
    return json.dumps(settings, sort_keys=True)


def course(curve: Curve) -> float:
    """Return the mean of the returns of a curve: how soon and how far it rises."""
    return float(np.mean([mean for _, mean in curve]))


def measured(curve: Curve, measure: str) -> float:
    """Return one of `MEASURES`."""
    return curve[-1][1] if measure == "end" else course(curve)


def needed(study: Study, task: str, name: str) -> Iterator[Key]:
    """Yield the runs of an optimizer: its trials, then the seeds of what these choose."""
    for settings, seed in itertools.product(TRIALS[name], TRIAL_SEEDS):
        yield task, name, key_of(settings), seed
    chosen = key_of(study.chosen(task, name))  # known when the trials are made
    for seed in SEEDS:
        yield task, name, chosen, seed


def measure(path: Path) -> None:
    """Make the runs that the file lacks, write it after each, and leave out runs without use."""
    from docs.examples.acktr import train  # needs gymnasium

    study, used = Study.read(path), []
    for task, name in itertools.product(TASKS, TRIALS):
        for key in needed(study, task, name):
            used.append(key)
            if key in study.found:
                continue
            _, _, settings, seed = key
            curve = train(task, name, json.loads(settings), seed, STEPS[task])
            study.found[key] = [[at, round(mean, 1)] for at, mean in curve]
            study.write(path)
            sys.stdout.write(f"{task}, {name}, {settings}, seed {seed}: {curve[-1][1]:.1f}\n")
            sys.stdout.flush()
    Study({key: study.found[key] for key in used}).write(path)


def spread(curves: Sequence[Curve], measure: str) -> tuple[float, float, float]:
    """Return median, smallest and largest value over seeds."""
    values = [measured(curve, measure) for curve in curves]
    return float(np.median(values)), min(values), max(values)


def verdict(study: Study, task: str, rival: str, measure: str) -> str:
    """Say whether ACKTR is higher than a rival: only where the ranges over seeds are apart."""
    _, low, high = spread(study.compared(task, "acktr"), measure)
    _, rival_low, rival_high = spread(study.compared(task, rival), measure)
    return "higher" if low > rival_high else "lower" if high < rival_low else "undecided"


def draw(study: Study) -> Figure:
    """Draw mean return against steps: median over seeds, and a shade from lowest to highest."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained", facecolor="white")
    for axes, (task, title) in zip(figure.subplots(1, 2), TASKS.items(), strict=True):
        for name, (colour, line, marker) in LOOKS.items():
            curves = study.compared(task, name)
            x = [at for at, _ in curves[0]]
            y = np.array([[mean for _, mean in curve] for curve in curves])
            [drawn] = axes.plot(
                x,
                np.median(y, axis=0),
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                markevery=3,
                lw=1.5,
                label=LABELS[name],
            )
            drawn.set_gid(f"{task}-{name}")
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
        axes.set_title(title)
        axes.set_xlabel("steps in all environments")
        axes.set_ylabel("mean return of the last 50 episodes")
        axes.grid(which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def number(value: float) -> str:
    """Return a return without decimals."""
    return f"{math.floor(value + 0.5):d}"


def alt(study: Study) -> str:
    """Say what the figure shows: medians at the end."""
    parts = []
    for task, title in TASKS.items():
        ends = [
            f"{LABELS[name]} {number(spread(study.compared(task, name), 'end')[0])}"
            for name in LOOKS
        ]
        parts.append(f"{title} {', '.join(ends)}")
    return f"Mean return against steps. Medians over seeds at the end: {'; '.join(parts)}."


def said(settings: Settings) -> str:
    """Return settings in words."""
    numbers = ", ".join(f"{name} {settings[name]:g}" for name in settings if name != "normalize")
    return numbers + (", normalized" if settings["normalize"] else "")


def table(study: Study) -> str:
    """Return the rows that compare: for each measure the median and the range over seeds."""
    lines = [
        f"| task | optimizer | settings | {' | '.join(MEASURES.values())} |",
        "|---|---|---|---|---|",
    ]
    for task, title in TASKS.items():
        for name, label in LABELS.items():
            cells = []
            for measure in MEASURES:
                middle, low, high = spread(study.compared(task, name), measure)
                cells.append(f"{number(middle)} [{number(low)}, {number(high)}]")
            kind = said(study.chosen(task, name))
            lines.append(f"| {title} | {label} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(study: Study) -> str:
    """Return the rows that say what is decided."""
    lines = [
        f"| task | ACKTR beside | {' | '.join(MEASURES.values())} |",
        "|---|---|---|---|",
    ]
    for task, title in TASKS.items():
        for rival in LABELS:
            if rival != "acktr":
                cells = " | ".join(verdict(study, task, rival, each) for each in MEASURES)
                lines.append(f"| {title} | {LABELS[rival]} | {cells} |")
    return "\n".join(lines)


def trials(study: Study) -> str:
    """Return the rows of all trials."""
    lines = [
        f"| optimizer | settings | {' | '.join(TASKS.values())} |",
        "|---|---|---|---|",
    ]
    for name, kinds in TRIALS.items():
        for kind in kinds:
            cells = []
            for task in TASKS:
                cell = number(study.score(task, name, kind))
                cells.append(f"**{cell}**" if kind == study.chosen(task, name) else cell)
            lines.append(f"| {LABELS[name]} | {said(kind)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(study: Study) -> str:
    """Return the page."""
    return f"""\
# ACKTR, measured

[ACKTR](recipes.md#acktr) beside Adam and RMSprop: one A2C loop, of which only the optimizer
differs. The curves count steps in the environments, not seconds: a step of ACKTR takes longer.

![{alt(study)}](assets/acktr.svg)

A line is the median over {len(SEEDS)} seeds, a shade reaches from the lowest to the highest.

{table(study)}

Mean return of the last 50 episodes: median over seeds, and in brackets the lowest and the highest.
The mean of the curve says how early it rises.

{verdicts(study)}

A word other than *undecided* says that the ranges over seeds do not overlap. It speaks of these two
small tasks only, at {STEPS["cartpole"]:,} and {STEPS["pendulum"]:,} steps. The tasks of the paper,
Atari and MuJoCo, were not run.

## The trials

Each optimizer had {len(TRIALS["adam"])} trials for each task, with {len(TRIAL_SEEDS)} seeds that
are not among those above.
The highest mean of the curve, printed bold, chose the settings. Numbers are means over these seeds.
*Normalized* advantages have mean 0 and deviation 1 in each update.

{trials(study)}

{FOUND}
## Make it again

`python -m docs.acktr_page` draws the figure and writes this page from `results/acktr/runs.json`.
With `--run` it first makes the runs that the file lacks: remove the file to make all
{len(study.found)}. It needs `pip install gymnasium` and the packages of `nox -s experiments`.
"""


def main() -> None:
    """Write the page and its figure; with `--run`, make the runs first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="store_true", help="make the runs that the file lacks")
    if parser.parse_args().run:
        measure(RUNS)
    study = Study.read(RUNS)
    FIGURE.write_text(svg_text(draw(study), "acktr"))
    PAGE.write_text(page(study))
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
