import io

import pytest
from rich.console import Console

from experiments.progress import Progress, say
from experiments.results import Epoch


def epoch(number: int, seconds: float) -> Epoch:
    return Epoch(number, 10, seconds, 0.5, 90.0, 0.6, 80.0)


def shown(seconds: list[float], *, terminal: bool, history: int = 0) -> str:
    """What is shown of a run whose epochs took so long."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
    epochs = [epoch(i + 1, value) for i, value in enumerate(seconds)]
    with Progress(console, 2) as progress:
        progress.skip("SGD, seed 0", 3)
        with progress.run("SGD, seed 1", 10 * len(epochs), epochs[:history]) as run:
            for done in epochs[history:]:
                for _ in range(done.steps):
                    run.step()
                run.epoch(done)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "lines"), [([0.1, 0.1, 0.1], []), ([9.0, 0.1, 9.0], [1, 2]), ([0.1, 9.0, 0.1], [2])]
)
def test_slow_epochs_get_lines_without_bars(seconds: list[float], lines: list[int]):
    text = shown(seconds, terminal=False).splitlines()
    assert text[0] == "[1/2] SGD, seed 0: finished earlier, 3 epochs"
    assert [line.split(": training")[0] for line in text[1:-1]] == [
        f"SGD, seed 1: epoch {i}" for i in lines
    ]
    assert text[-1].startswith(
        "[2/2] SGD, seed 1: epoch 3: training loss 0.5000, accuracy 90.00 %; "
        "test loss 0.6000, accuracy 80.00 % ("
    )


def test_resumed_runs_say_so():
    text = shown([0.1, 0.1, 0.1], terminal=False, history=2)
    assert "SGD, seed 1: continues after epoch 2" in text


def test_terminals_have_bars():
    text = shown([0.1, 0.1], terminal=True)
    assert "all runs" in text
    assert "2/2\x1b" in text
    assert "[2/2] SGD, seed 1: epoch 2" in text


def test_lines_and_bars_show_text_as_it_is():
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with Progress(console, 1) as progress:
            say(console, "[/x] :smile: http://me:hunter2@host")
            with progress.run("[/b] $x$", 10, []) as run:
                run.epoch(epoch(1, 0.1))
        text = console.file.getvalue()
        assert "[/x] :smile: http://***@host" in text
        assert "[/b] $x$" in text
