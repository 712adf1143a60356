import io

import attrs
import pytest
from rich.console import Console

from experiments import progress
from experiments.data import Dataset
from experiments.progress import Progress, say
from experiments.settings import Study
from tests.experiments.studies import ended, epoch, job


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def shown(
    study: Study, dataset: Dataset, clock: list[float], seconds: list[float], **options: object
) -> str:
    """What is shown of a run whose epochs took so long, after one that was finished before."""
    history = options.pop("history", 0)
    console = Console(file=io.StringIO(), force_terminal=options["terminal"], width=100)
    jobs = [job(study, dataset, seed=seed) for seed in (0, 1)]
    epochs = [epoch(i + 1, seconds=value) for i, value in enumerate(seconds)]
    with Progress(console, jobs) as all_:
        all_.begin(jobs[0], epochs)
        all_.end(jobs[0], ended(jobs[0], epochs))
        all_.begin(jobs[1], epochs[:history])
        for done in epochs[history:]:
            clock[0] += done.seconds
            all_.epoch(jobs[1], done, [])
        all_.end(jobs[1], ended(jobs[1], epochs))
    return console.file.getvalue()


def test_an_epoch_without_accuracies_names_none():
    done = attrs.evolve(epoch(2), train_accuracy=None, test_accuracy=None)
    assert progress.summary(done) == "epoch 2: training loss 0.5000; test loss 1.0000"
    assert "loss 0.5000, accuracy 90.00 %; test" in progress.summary(epoch(2))


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [([0.1, 0.1, 0.1], []), ([40.0, 0.1, 40.0], [1]), ([16.0, 16.0, 1.0], [2]), ([1, 40, 1], [2])],
)
def test_slow_epochs_get_lines_without_bars(
    study: Study, dataset: Dataset, clock: list[float], seconds: list[float], lines: list[int]
):
    text = shown(study, dataset, clock, seconds, terminal=False).splitlines()
    assert text[0].startswith("[1/2] SGD, seed 0: epoch 3: training loss 0.3333")
    assert [line.split(": training")[0] for line in text[1:-1]] == [
        f"SGD, seed 1: epoch {i}" for i in lines
    ]
    assert text[-1] == (
        "[2/2] SGD, seed 1: epoch 3: training loss 0.3333, accuracy 90.00 %; "
        f"test loss 0.6667, accuracy 80.00 % ({sum(seconds):.1f} s)"
    )


def test_remaining_time_follows_from_the_steps(study: Study, dataset: Dataset, clock: list[float]):
    text = shown(study, dataset, clock, [40.0, 0.1, 40.0], terminal=False)
    assert "accuracy 80.00 %; about 80 s left" in text  # of three equal epochs
    assert [progress.duration(value) for value in (89, 91, 5400, 9060)] == [
        *("89 s", "2 min", "1 h 30 min", "2 h 31 min")
    ]


def test_steps_of_diverged_runs_are_not_waited_for(
    study: Study, dataset: Dataset, clock: list[float]
):
    console = Console(file=io.StringIO(), width=200)
    jobs = [job(study, dataset, seed=seed) for seed in (0, 1)]
    with Progress(console, jobs) as all_:
        all_.begin(jobs[0], [])
        clock[0] += 24
        all_.epoch(jobs[0], epoch(1), [])
        all_.end(jobs[0], ended(jobs[0], [epoch(1)], "diverged"))
    assert "about 72 s left" in console.file.getvalue()


def test_resumed_runs_say_so(study: Study, dataset: Dataset, clock: list[float]):
    text = shown(study, dataset, clock, [0.1, 0.1, 0.1], terminal=False, history=2)
    assert text.count("continues after") == 1
    assert "SGD, seed 1: continues after epoch 2" in text


def test_terminals_have_bars(study: Study, dataset: Dataset, clock: list[float]):
    text = shown(study, dataset, clock, [40.0, 0.1, 0.1], terminal=True)
    assert "all" in text
    assert "100%" in text
    assert "[2/2] SGD, seed 1: epoch 3" in text
    assert "SGD, seed 1: epoch 1" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_and_bars_show_text_as_it_is(study: Study, dataset: Dataset, terminal: bool):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    odd = attrs.evolve(study.algorithms["sgd"], label="[/b] $x$")
    one = job(attrs.evolve(study, algorithms={"sgd": odd}), dataset)
    with Progress(console, [one]) as all_:
        say(console, "[/x] :smile: http://me:hunter2@host")
        all_.begin(one, [])
        all_.epoch(one, epoch(1), [])
        all_.end(one, ended(one, [epoch(1)]))
    text = console.file.getvalue()
    assert "[/x] :smile: http://***@host" in text
    assert "[/b] $x$" in text
