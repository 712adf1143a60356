"""The claims of the thesis, checked on our own runs."""

from __future__ import annotations

import attrs
import numpy as np

from experiments.results import Results

NEW = ("ekfacnag", "ekfacadam", "ekfacradam")
"""The methods that the thesis introduces."""
OLD = ("sgd", "kfac", "ekfac")
"""The methods that it compares them with."""
EARLY = 10
"""Number of first epochs, as in the thesis."""

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be judged"


@attrs.frozen
class Claim:
    """A claim of the thesis.

    Args:
        text: The claim.
        verdict: "holds", "does not hold" or "cannot be judged".
        evidence: The numbers behind the verdict.
    """

    text: str
    verdict: str
    evidence: str


def check(results: Results) -> list[Claim]:
    """Judge every claim, on means over seeds."""
    have = {algorithm.name for algorithm in results.algorithms}
    curves = {name: _mean(results, name) for name in (*NEW, *OLD) if name in have}
    claims = (
        (
            "EKFACadam's training loss ends below SGD's after equal epochs",
            ("ekfacadam", "sgd"),
            _below_sgd,
        ),
        (
            f"All three new methods lead in training loss in the first {EARLY} epochs",
            (*NEW, *OLD),
            _early_lead,
        ),
        (
            "EKFACadam and EKFACradam keep the lead in training loss",
            ("ekfacadam", "ekfacradam", *OLD),
            _kept_lead,
        ),
        ("EKFACnag slows in the middle", (*NEW, *OLD), _nag_slows),
        ("EKFACadam ends best on training and on test", (*NEW, *OLD), _adam_best),
    )
    judged = []
    for text, needed, judge in claims:
        if missing := [name for name in needed if name not in have]:
            judged.append(Claim(text, OPEN, f"not among the runs: {', '.join(missing)}"))
        elif judge is not _below_sgd and results.epochs < 2:
            judged.append(Claim(text, OPEN, "one epoch is too little"))
        else:
            holds, evidence = judge(results, curves)
            judged.append(Claim(text, HOLDS if holds else FAILS, evidence))
    return judged


def _mean(results: Results, name: str) -> np.ndarray:
    """Return the mean training loss over seeds; infinite from where a seed diverged."""
    return np.nan_to_num(results.curves(name, "train_loss").mean(0), nan=np.inf)


def _label(results: Results, name: str) -> str:
    return results.experiment.algorithms[name].label


def _below_sgd(results: Results, curves: dict[str, np.ndarray]) -> tuple[bool, str]:
    adam, sgd = (
        np.nan_to_num(results.curves(name, "train_loss")[:, -1], nan=np.inf)
        for name in ("ekfacadam", "sgd")
    )
    evidence = f"{adam.mean():.4g} against {sgd.mean():.4g} after {results.epochs} epochs"
    if len(adam) == len(sgd):
        evidence += f"; lower for {int((adam < sgd).sum())} of {len(adam)} seeds"
    return bool(adam.mean() < sgd.mean()), evidence


def _early_lead(results: Results, curves: dict[str, np.ndarray]) -> tuple[bool, str]:
    early = min(EARLY, results.epochs)
    new, old = (np.stack([curves[name][:early] for name in names]) for names in (NEW, OLD))
    led = new.max(0) < old.min(0)
    each = ", ".join(
        f"{_label(results, name)} {int((curves[name][:early] < old.min(0)).sum())}" for name in NEW
    )
    evidence = f"all three below all of the others in {int(led.sum())} of {early} epochs"
    return bool(led.all()), f"{evidence} (each alone: {each})"


def _kept_lead(results: Results, curves: dict[str, np.ndarray]) -> tuple[bool, str]:
    names = ("ekfacadam", "ekfacradam")
    best = min(OLD, key=lambda name: curves[name][-1])
    values = ", ".join(f"{_label(results, name)} {curves[name][-1]:.4g}" for name in (*names, best))
    holds = all(curves[name][-1] < curves[best][-1] for name in names)
    return holds, f"final training loss: {values} (best of the others)"


def _nag_slows(results: Results, curves: dict[str, np.ndarray]) -> tuple[bool, str]:
    first, middle = max(1, results.epochs // 10), (results.epochs + 1) // 2

    def rank(epoch: int) -> int:
        return 1 + sum(
            curve[epoch - 1] < curves["ekfacnag"][epoch - 1] for curve in curves.values()
        )

    evidence = (
        f"its rank by training loss is {rank(first)} after epoch {first} and {rank(middle)} after "
        f"epoch {middle} of {results.epochs}"
    )
    return rank(middle) > rank(first), evidence


def _adam_best(results: Results, curves: dict[str, np.ndarray]) -> tuple[bool, str]:
    best = []
    for metric, sign in (
        ("train_loss", 1),
        ("train_accuracy", -1),
        ("test_loss", 1),
        ("test_accuracy", -1),
    ):
        finals = {name: results.final(name, metric).mean for name in curves}
        finals = {
            name: sign * value if np.isfinite(value) else np.inf for name, value in finals.items()
        }
        best.append(min(finals, key=finals.__getitem__))
    words = ("training loss", "training accuracy", "test loss", "test accuracy")
    evidence = "; ".join(
        f"best {word}: {_label(results, name)}" for word, name in zip(words, best, strict=True)
    )
    return best[0] == best[1] == best[3] == "ekfacadam", evidence
