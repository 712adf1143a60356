import math
import random
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import assume, given, settings as effort, strategies as st
from torch import Tensor
from torch.nn import functional

from experiments import algorithms, data, models, settings, training
from experiments.data import Dataset, Examples
from experiments.errors import ExperimentError
from experiments.ranks import Communicator
from experiments.settings import Algorithm, Study
from experiments.training import Trainer, steps
from tests.experiments.studies import plain, with_training

CPU = torch.device("cpu")


def trained(study: Study, algorithm: Algorithm, dataset: Dataset, seed: int = 0) -> Trainer:
    trainer = Trainer(study, algorithm, seed, dataset, CPU)
    while not trainer.finished:
        trainer.run_epoch()
    trainer.close()
    return trainer


def test_metrics_are_those_of_the_model(study: Study, dataset: Dataset):
    """With a learning rate of zero the weights stay, and all figures can be computed apart."""
    trainer = Trainer(study, study.algorithms["sgd"].with_options(lr=0.0), 4, dataset, CPU)
    epoch = trainer.run_epoch()
    model = models.make(study.model, channels=1, classes=10, seed=4, trusted=False)
    pixels = dataset.train.inputs.double()

    def normalised(x: Tensor) -> Tensor:
        return ((x.double() - pixels.mean()) / pixels.std(correction=0)).float()

    losses, right = [], 0
    for x, y in training.shuffled(dataset.train, 50, seed=4, epoch=0, augment=False):
        logits = model(normalised(x))
        losses.append(functional.cross_entropy(logits, y).item())
        right += (logits.argmax(1) == y).sum().item()
    assert epoch.losses == pytest.approx(losses, rel=1e-4)
    assert epoch.train_loss == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert epoch.train_accuracy == pytest.approx(100 * right / 150)
    model.eval()
    logits = model(normalised(dataset.test.inputs))
    labels = dataset.test.labels
    assert epoch.test_loss == pytest.approx(
        functional.cross_entropy(logits, labels).item(), rel=1e-4
    )
    assert epoch.test_accuracy == pytest.approx(
        100 * (logits.argmax(1) == labels).double().mean().item()
    )
    assert (epoch.epoch, epoch.steps) == (1, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"lr": 0.05, "momentum": 0.9}), ("AdamW", {"lr": 0.01, "weight_decay": 0.1})],
)
def test_losses_are_those_of_a_plain_loop(
    name: str, options: dict[str, float], study: Study, dataset: Dataset
):
    study = attrs.evolve(with_training(study, epochs=2, schedule="constant"))
    chosen = Algorithm(name="x", label="x", optimizer=name, options=options)
    trainer = trained(study, chosen, dataset, seed=4)
    model = models.make(study.model, channels=1, classes=10, seed=4, trusted=False)
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    mean, deviation = dataset.normalisation()
    for epoch in range(2):
        losses = []
        for x, y in training.shuffled(dataset.train, 50, seed=4, epoch=epoch, augment=False):
            loss = functional.cross_entropy(model((x.float() - mean) / deviation), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert trainer.history[epoch].losses == tuple(losses)
    for key, value in model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key])


def test_times_are_positive_and_one_for_each_step(study: Study, dataset: Dataset):
    study = with_training(study, max_steps=4)
    for algorithm in study.algorithms.values():
        for epoch in trained(study, algorithm, dataset).history:
            assert len(epoch.times) == len(epoch.losses) == epoch.steps
            assert all(0 < seconds < 60 for seconds in epoch.times)
            assert epoch.seconds == pytest.approx(sum(epoch.times))


def test_times_are_those_of_each_step(study: Study, dataset: Dataset, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    step, test = Trainer._step, Trainer._test

    def second(*args: object) -> object:
        now[0] += 1.0
        return step(*args)

    def late(*args: object) -> object:
        now[0] += 100.0
        return test(*args)

    monkeypatch.setattr(Trainer, "_step", second)
    monkeypatch.setattr(Trainer, "_test", late)
    trainer = Trainer(study, study.algorithms["sgd"], 0, dataset, CPU)
    assert trainer.run_epoch().times == (1.0, 1.0, 1.0)
    assert trainer.run_epoch().times == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("algorithm", ["adamw", "ekfac"])
def test_runs_that_take_turns_equal_runs_alone(own: Path, algorithm: str):
    """The network has dropout, which draws from the random state of the process."""
    study = settings.read(own, trusted=True)
    dataset = data.load(study.data, None, own.parent, print, trusted=True)
    chosen = study.algorithms[algorithm]
    alone = [trained(study, chosen, dataset, seed) for seed in (0, 1)]
    turns = [Trainer(study, chosen, seed, dataset, CPU) for seed in (0, 1)]
    for _ in range(2):
        for trainer in turns:
            trainer.run_epoch()
            random.random()
            torch.rand(3)
    for one, other in zip(alone, turns, strict=True):
        assert plain(one.history) == plain(other.history)
        assert one.history[0].losses != alone[one is alone[0]].history[0].losses
        weights = other.model.state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in one.model.state_dict().items())
    without = Study(**{**vars_of(study), "model": attrs.evolve(study.model, options={"rate": 0})})
    assert trained(without, chosen, dataset).history[0].losses != alone[0].history[0].losses


def vars_of(study: Study) -> dict[str, object]:
    return {field.name: getattr(study, field.name) for field in attrs.fields(Study)}


def test_epochs_of_a_pass_share_no_example(dataset: Dataset):
    count = len(dataset.train) // 3
    seen = []
    for epoch in range(6):
        batches = list(
            training.shuffled(dataset.train, 4, seed=1, epoch=epoch, augment=False, parts=3)
        )
        seen.append(torch.cat([inputs for inputs, _ in batches]).flatten(1))
        assert len(seen[-1]) == count // 4 * 4 + count % 4 * (count % 4 > 1)
    one, other = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert len(one.unique(dim=0)) == len(one)
    assert not torch.equal(one, other)


def test_losses_of_text_are_means_over_tokens():
    study = settings.load(
        "transformer",
        [
            *("data.length=6", "data.train=24", "data.test=8", "training.batch_size=8"),
            *("training.epochs=2", "training.parts=3"),
            "model.options={width=8,depth=1,heads=2}",
        ],
    )
    dataset = data.load(study.data, None, Path("unused"), print)
    still = study.algorithms["adamw"].with_options(lr=0.0, weight_decay=0.0)
    trainer = Trainer(study, still, 3, dataset, CPU)
    epoch = trainer.run_epoch()
    assert epoch.steps == 1
    assert training.steps(study, dataset) == 2
    logits = trainer.model(dataset.test.inputs).log_softmax(-1)
    expected = -logits.gather(-1, dataset.test.labels[..., None]).mean().item()
    assert epoch.test_loss == pytest.approx(expected, rel=1e-6)
    right = (logits.argmax(-1) == dataset.test.labels).double().mean().item()
    assert epoch.test_accuracy == pytest.approx(100 * right)
    assert epoch.train_loss == pytest.approx(math.log(256), rel=0.02)
    ours = trained(study, study.algorithms["transformer"], dataset)
    assert ours.history[-1].train_loss < epoch.train_loss


@pytest.mark.parametrize("algorithm", ["adamw", "ekfac"])
def test_states_continue_bit_for_bit(own: Path, algorithm: str):
    study = with_training(settings.read(own, trusted=True), epochs=3, schedule="cosine")
    dataset = data.load(study.data, None, own.parent, print, trusted=True)
    chosen = study.algorithms[algorithm]
    whole, first = trained(study, chosen, dataset), Trainer(study, chosen, 0, dataset, CPU)
    first.run_epoch()
    second = Trainer(study, chosen, 0, dataset, CPU)
    second.load_state_dict(first.state_dict())
    assert second.history == first.history
    random.random()
    torch.rand(2)
    while not second.finished:
        second.run_epoch()
    assert plain(second.history) == plain(whole.history)


def test_learning_lowers_the_loss(study: Study, dataset: Dataset):
    for algorithm in study.algorithms.values():
        trainer = trained(study, algorithm, dataset)
        assert trainer.history[-1].train_loss < 0.95 * trainer.history[0].train_loss
        assert not trainer.diverged


def test_cosine_schedule_ends_at_zero(study: Study, dataset: Dataset):
    trainer = Trainer(study, study.algorithms["sgd"], 0, dataset, CPU)
    rates = []
    trainer.optimizer.register_step_post_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    while not trainer.finished:
        trainer.run_epoch()
    rates.append(trainer.optimizer.param_groups[0]["lr"])
    expected = [0.03 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(10)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_runs_stop_after_max_steps(study: Study, dataset: Dataset):
    study = with_training(study, max_steps=4)
    trainer = trained(study, study.algorithms["sgd"], dataset)
    assert [epoch.steps for epoch in trainer.history] == [3, 1]
    assert steps(study, dataset) == 4


def test_a_stopped_run_is_tested_on_all_classes(study: Study, dataset: Dataset):
    """Also where the examples are in the order of their classes, as in image folders."""

    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10).float()

    labels = torch.arange(10).repeat_interleave(20)
    sorted_by_class = Examples(dataset.test.inputs[:1].expand(200, *[-1] * 3), labels)
    dataset = attrs.evolve(dataset, test=sorted_by_class)
    study = with_training(study, max_steps=1, test_batch_size=20)
    trainer = Trainer(study, study.algorithms["sgd"], 0, dataset, CPU)
    trainer.model = First()
    _, accuracy = trainer._test()
    assert accuracy == 10


@pytest.mark.parametrize("name", ["sgd", "ekfacadam"])
@pytest.mark.parametrize("rate", [1e30, 1e6])
def test_divergence_ends_runs_without_an_error(
    name: str, rate: float, study: Study, dataset: Dataset
):
    study = with_training(study, epochs=30, schedule="constant")
    chosen = study.algorithms[name].with_options(lr=rate)
    if name == "ekfacadam":
        chosen = chosen.with_options(clip="none", update="momentum", max_skipped=1)
    trainer = trained(study, chosen, dataset)
    assert trainer.diverged
    assert len(trainer.history) < 30
    assert not math.isfinite(trainer.history[-1].train_loss)
    last = trainer.history[-1]
    assert len(last.losses) == len(last.times) == last.steps <= 3


def test_errors_of_healthy_runs_are_errors(study: Study, dataset: Dataset, monkeypatch):
    """Only a lost run ends by itself."""
    chosen = study.algorithms["ekfacadam"]
    trainer = Trainer(study, chosen, 0, dataset, CPU)

    def fail(*_: object) -> None:
        raise training.kfactk.KfactkError("a bug")

    monkeypatch.setattr(trainer.optimizer, "step", fail)
    with pytest.raises(training.kfactk.KfactkError, match="a bug"):
        trainer.run_epoch()


def test_close_removes_hooks(study: Study, dataset: Dataset):
    trainer = Trainer(study, study.algorithms["ekfacadam"], 0, dataset, CPU)
    trainer.close()
    modules = trainer.model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_too_few_examples_and_other_than_images_are_told(study: Study, dataset: Dataset):
    chosen = study.algorithms["sgd"]
    with pytest.raises(ExperimentError, match="1 training examples make no batch"):
        Trainer(study, chosen, 0, attrs.evolve(dataset, train=dataset.train[:1]), CPU)
    flat = Examples(dataset.train.inputs.flatten(2), dataset.train.labels)
    shifted = attrs.evolve(study, data=attrs.evolve(study.data, augment=True))
    with pytest.raises(ExperimentError, match=r"data.augment shifts and mirrors images"):
        Trainer(shifted, chosen, 0, attrs.evolve(dataset, train=flat), CPU)


def test_processes_refuse_what_they_would_leave_out():
    study = settings.load("digits", ["data.train=64", "data.test=32"])
    digits, two = data.load(study.data, None, Path("unused"), print), Communicator(0, 2)
    norms = study.algorithms["kfac"].with_options(curvature=["conv_kfac", "norm"])
    Trainer(study, norms, 0, digits, CPU).close()
    with pytest.raises(
        ExperimentError, match=r"algorithms.kfac: .* 12 parameters .* blocks.0.norm1"
    ):
        Trainer(study, norms, 0, digits, CPU, two)
    with pytest.raises(ValueError, match="process group"):  # it goes on to form one
        Trainer(study, study.algorithms["kfac"], 0, digits, CPU, two)


def numbered(count: int) -> Examples:
    return Examples(
        torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8),
        torch.arange(count),
    )


def batches(study: Study, count: int, size: int, ranks: int = 1) -> int:
    """The number of steps of one epoch."""
    dataset = Dataset("x", numbered(count), numbered(1), ())
    return steps(with_training(study, epochs=1, batch_size=size), dataset, ranks)


@given(
    count=st.integers(2, 60),
    batch_size=st.integers(2, 20),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
@effort(deadline=None, max_examples=40)
def test_epochs_have_every_image_once(
    study: Study, count: int, batch_size: int, seed: int, epoch: int
):
    images = numbered(count)
    found = list(training.shuffled(images, batch_size, seed=seed, epoch=epoch, augment=False))
    labels = torch.cat([labels for _, labels in found])
    assert len(found) == batches(study, count, batch_size)
    assert min(len(labels) for _, labels in found) > 1
    assert len(labels) == len(labels.unique()) == count - (count % batch_size == 1)
    assert all((pixels[:, 0, 0, 0] == labels).all() for pixels, labels in found)


@given(
    count=st.integers(2, 60), each=st.integers(1, 6), ranks=st.integers(1, 4), augment=st.booleans()
)
@effort(deadline=None, max_examples=40)
def test_processes_share_the_batches_of_one(
    study: Study, count: int, each: int, ranks: int, augment: bool
):
    """Parts are equal, and augmented as in one process; only the last batch may lose images."""
    assume(each * ranks > 1)
    images, size = numbered(count), each * ranks

    def epoch(rank: int, of: int) -> list[tuple[Tensor, Tensor]]:
        return list(
            training.shuffled(images, size, seed=1, epoch=2, augment=augment, rank=rank, ranks=of)
        )

    whole, parts = epoch(0, 1), [epoch(rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {batches(study, count, size, ranks)}
    for number, shares in enumerate(zip(*parts, strict=True)):
        assert len({len(labels) for _, labels in shares}) == 1
        for k in range(2):  # pixels, labels
            joined = torch.cat([share[k] for share in shares])
            assert torch.equal(joined, whole[number][k][: len(joined)])
            assert len(whole[number][k]) - len(joined) < (
                ranks if len(whole[number][k]) < size else 1
            )


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(1)  # the global state has no say
        found = training.shuffled(numbered(50), 16, seed=seed, epoch=epoch, augment=False)
        return torch.cat([labels for _, labels in found]).tolist()

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_augmentation_shifts_and_mirrors():
    pixels = torch.randint(1, 256, (40, 3, 8, 6), dtype=torch.uint8)
    draws = training.draw_moves(len(pixels), torch.Generator().manual_seed(1))
    changed = training.apply_moves(pixels, *draws)
    shift, seen = training.SHIFT, set()
    for before, after in zip(pixels, changed, strict=True):
        framed = torch.zeros(3, 8 + 2 * shift, 6 + 2 * shift, dtype=torch.uint8)
        framed[:, shift:-shift, shift:-shift] = before
        views = {
            (dy, dx, mirrored): framed[:, dy : dy + 8, dx : dx + 6].flip(2)
            if mirrored
            else framed[:, dy : dy + 8, dx : dx + 6]
            for dy in range(2 * shift + 1)
            for dx in range(2 * shift + 1)
            for mirrored in (False, True)
        }
        matching = [key for key, view in views.items() if torch.equal(view, after)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len({dy for dy, _, _ in seen}) > 5
    assert len({dx for _, dx, _ in seen}) > 5
    assert len({mirrored for _, _, mirrored in seen}) == 2
    assert len({(dy, dx) for dy, dx, _ in seen}) > 2 * shift + 1  # each way on its own


def test_a_controller_evaluates_the_loss_and_the_first_one_counts(study: Study, dataset: Dataset):
    """It takes the steps that it chooses; each loss is that before its step, once an example."""
    study = with_training(study, schedule="constant", epochs=1)
    options = {
        "curvature": "conv_kfac",
        "basis": {"name": "kfac", "solver": "eigh"},
        "update": "velocity",
        "controller": {"name": "quadratic", "model_damping": 1.0, "adapt_every": 1},
        **dict.fromkeys(("factor_every", "basis_every"), 1),
    }
    chosen = Algorithm(name="controlled", label="controlled", options=options)
    algorithms.check([chosen])
    trainer = Trainer(study, chosen, 4, dataset, CPU)
    epoch = trainer.run_epoch()
    still = Trainer(study, study.algorithms["sgd"].with_options(lr=0.0), 4, dataset, CPU)
    assert epoch.losses[0] == pytest.approx(still.run_epoch().losses[0], rel=1e-5)
    assert (epoch.steps, len(epoch.losses)) == (3, 3)
    assert trainer.optimizer.param_groups[0]["model_damping"] != 1.0
    assert all(map(math.isfinite, epoch.losses))
    trainer.close()
