"""ACKTR's page is what its runs say, and its A2C loop learns from what it should."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from docs import acktr_page
from docs.acktr_page import FIGURE, PAGE, RUNS, Study
from experiments.figures import svg_text

NUMBER = r"-?[\d.]+"


def shapes(svg: str) -> dict[str, np.ndarray]:
    """The lines of a figure, each scaled to its own height and width.

    So versions of matplotlib may place and size the axes differently.
    """
    found = {}
    for name in itertools.product(acktr_page.TASKS, acktr_page.LABELS):
        [path] = re.findall(rf'<g id="{"-".join(name)}">\s*<path d="([^"]+)"', svg)
        points = np.array([float(each) for each in re.findall(NUMBER, path)]).reshape(-1, 2)
        sides = np.ptp(points, axis=0)
        found["-".join(name)] = (points - points.min(0)) / sides
    return found


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == acktr_page.page(Study.read(RUNS)), "run: python -m docs.acktr_page"


def test_methods_has_the_medians_of_the_page() -> None:
    study = Study.read(RUNS)
    [row] = re.findall("^.*ACKTR.*$", (PAGE.parent / "methods.md").read_text(), re.MULTILINE)
    for task, name in itertools.product(acktr_page.TASKS, acktr_page.LABELS):
        middle = acktr_page.spread(study.compared(task, name), "end")[0]
        assert re.search(rf"(?<![\d.]){acktr_page.number(middle)}(?![\d.])", row), (task, name)


def test_the_figure_shows_the_runs() -> None:
    study, written = Study.read(RUNS), shapes(FIGURE.read_text())
    drawn = shapes(svg_text(acktr_page.draw(study), "acktr"))
    for (task, name), line in zip(
        itertools.product(acktr_page.TASKS, acktr_page.LABELS), written.values(), strict=True
    ):
        middle = np.median([[r for _, r in c] for c in study.compared(task, name)], axis=0)
        height = (middle.max() - middle) / np.ptp(middle)  # downwards, as in SVG
        np.testing.assert_allclose(line[:, 1], height, atol=0.01)
        np.testing.assert_allclose(line, drawn[f"{task}-{name}"], atol=0.01)


def test_all_runs_and_no_others_are_there() -> None:
    study = Study.read(RUNS)
    assert set(study.found) == {
        key
        for task, name in itertools.product(acktr_page.TASKS, acktr_page.TRIALS)
        for key in acktr_page.needed(study, task, name)
    }
    assert not set(acktr_page.SEEDS) & set(acktr_page.TRIAL_SEEDS)
    assert len({len(kinds) for kinds in acktr_page.TRIALS.values()}) == 1, "equal numbers of trials"
    for (task, *_), curve in study.found.items():
        assert curve[-1][0] == acktr_page.STEPS[task]
    assert RUNS.stat().st_size < 100_000


def test_the_example_has_the_chosen_settings() -> None:
    pytest.importorskip("gymnasium")
    from docs.examples import acktr

    study = Study.read(RUNS)
    for task, settings in acktr.SETTINGS.items():
        assert settings == {name: study.chosen(task, name) for name in settings}


def test_overlapping_ranges_are_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"acktr": [5, 6, 7], "adam": [1, 2, 4], "rmsprop": [7, 8, 9]}
    monkeypatch.setattr(
        Study, "compared", lambda _, __, name: [[[1, end - 1], [2, end]] for end in ends[name]]
    )
    study = Study({})

    def verdict(rival: str) -> str:
        return acktr_page.verdict(study, "cartpole", rival, "end")

    assert (verdict("adam"), verdict("rmsprop")) == ("higher", "undecided")
    ends["rmsprop"] = [7.5, 8, 9]
    assert verdict("rmsprop") == "lower"
    assert acktr_page.spread(study.compared("", "adam"), "course") == (1.5, 0.5, 3.5)


def test_the_study_makes_the_runs_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(acktr_page, "TASKS", {"cartpole": "CartPole-v1"})
    monkeypatch.setattr(acktr_page, "STEPS", {"cartpole": 1280})
    kinds = {name: kinds[:1] for name, kinds in acktr_page.TRIALS.items()}
    monkeypatch.setattr(acktr_page, "TRIALS", kinds)
    monkeypatch.setattr(acktr_page, "TRIAL_SEEDS", (7,))
    monkeypatch.setattr(acktr_page, "SEEDS", (0,))
    path = tmp_path / "there" / "runs.json"
    acktr_page.measure(path)
    whole = path.read_text()
    assert capsys.readouterr().out.count("seed") == len(json.loads(whole)) == 6
    rows = json.loads(whole)
    rows[2][3] = 99  # a run that nothing needs, in place of one that is needed
    path.write_text(json.dumps(rows))
    acktr_page.measure(path)
    assert capsys.readouterr().out.count("seed") == 1
    assert sorted(json.loads(path.read_text())) == sorted(json.loads(whole)), "runs repeat"


class Scripted:
    """Games whose observations, rewards and ends are drawn beforehand."""

    def __init__(self, steps: int, games: int) -> None:
        draw = np.random.default_rng(0)
        self.observations = draw.normal(size=(steps, games, 4))
        self.rewards = draw.normal(size=(steps, games))
        self.finals = draw.normal(size=(steps, games, 4))
        kinds = draw.choice(3, size=(steps, games), p=[0.6, 0.2, 0.2])
        self.ended, self.stopped = kinds == 1, kinds == 2
        self.ended[0, 0] = self.stopped[0, 0] = True  # both at once is an end
        self.now = 0

    def step(self, _: np.ndarray) -> tuple[object, ...]:
        t = self.now
        self.now += 1
        more = {"final_obs": self.finals[t]}
        return self.observations[t], self.rewards[t], self.ended[t], self.stopped[t], more


def test_targets_go_on_after_a_time_limit_and_not_after_an_end() -> None:
    """Each target is the lambda return, by its recursion: no generalized advantages."""
    pytest.importorskip("gymnasium")
    from docs.examples import acktr

    torch.manual_seed(0)
    rollout, model = acktr.Rollout("cartpole", 0), acktr.ActorCritic(4, 2, False)
    steps, games = acktr.ROLLOUT, acktr.ENVIRONMENTS
    rollout.games = script = Scripted(steps, games)
    first = rollout.observed
    states, _, advantages, targets = rollout.collect(model)

    def value(observation: np.ndarray) -> float:
        with torch.no_grad():
            return float(model(torch.as_tensor(observation[None], dtype=torch.float32))["value"])

    wanted, values = np.zeros((steps, games)), np.zeros((steps, games))
    for k in range(games):
        for t in reversed(range(steps)):
            following = value(script.observations[t, k])
            later = wanted[t + 1, k] if t + 1 < steps else following
            if script.ended[t, k]:
                ahead = 0.0
            elif script.stopped[t, k]:
                ahead = value(script.finals[t, k])
            else:
                ahead = (1 - acktr.GAE) * following + acktr.GAE * later
            wanted[t, k] = 0.05 * script.rewards[t, k] + 0.99 * ahead
            values[t, k] = value(script.observations[t - 1, k] if t else first[k])
    torch.testing.assert_close(targets, torch.tensor(wanted.flatten()).float())
    torch.testing.assert_close(advantages, torch.tensor((wanted - values).flatten()).float())
    assert torch.equal(states[:games], torch.as_tensor(first))


def test_spread_is_the_same_in_all_states_and_preconditioned() -> None:
    pytest.importorskip("gymnasium")
    from docs.examples import acktr

    model = acktr.ActorCritic(3, 1, True)
    settings = {"lr": 1.0, "radius": 0.01, "normalize": False}
    optimizer = acktr.make_optimizer(model, "acktr", settings)
    assert "spread" in optimizer.layers
    policy = model(torch.randn(8, 3))["policy"]
    assert len(policy[:, 1].unique()) == 1 < len(policy[:, 0].unique())
