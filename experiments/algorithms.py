"""Make the optimizers of a study: any recipe of kfactk, any of torch.optim, any other."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import kfactk
from experiments.errors import ExperimentError, check_options, named
from experiments.settings import Algorithm

TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
"""The optimizers of torch.optim, by name."""


@attrs.frozen
class Point:
    """The metrics of one step."""

    step: int
    metrics: dict[str, float]


class Collector:
    """A kfactk tracker, passed to `kfactk.build` as an instance.

    Args:
        every: Record one step in so many.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps: list[tuple[int, dict[str, Tensor | float]]] = []

    @property
    def every(self) -> int:
        """Record one step in so many."""
        return self._every

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Do nothing."""

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep the metrics of one step; tensors stay on their device."""
        self._steps.append((step, dict(metrics)))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def take(self) -> list[Point]:
        """Return all metrics, and forget them."""
        steps, self._steps = self._steps, []
        return [
            Point(step, {name: float(value) for name, value in metrics.items()})
            for step, metrics in steps
        ]


def means(points: list[Point]) -> dict[str, float]:
    """Return the mean of each metric over the points where it is finite."""
    values: dict[str, list[float]] = {}
    for point in points:
        for name, value in point.metrics.items():
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
    return {name: sum(known) / len(known) for name, known in values.items()}


def make(
    algorithm: Algorithm, model: nn.Module, *, seed: int, collector: Collector
) -> torch.optim.Optimizer:
    """Make the optimizer of one run.

    Args:
        algorithm: Its settings.
        model: The model to train.
        seed: Seed of the Fisher pass.
        collector: Takes the metrics of a recipe of kfactk.
    """
    if algorithm.second_order:
        return recipe(algorithm, seed=seed).evolve(tracker=collector).bind(model)
    kind = named(
        f"algorithms.{algorithm.name}.optimizer",
        algorithm.optimizer,
        TORCH,
        trusted=algorithm.trusted,
    )
    first = next(iter(inspect.signature(kind).parameters), "params")
    check_options(kind, algorithm.options, given=[first])
    made = kind(model if first == "model" else model.parameters(), **algorithm.options)
    if not isinstance(made, torch.optim.Optimizer):
        raise ExperimentError(f"{algorithm.optimizer} makes no torch.optim.Optimizer")
    return made


def muon(model: nn.Module, lr: float = 0.02, adamw_lr: float = 0.001, **options: Any) -> Any:
    """Return pytorch_optimizer's Muon for hidden matrices and kernels; the rest goes to AdamW.

    The rest is what its authors leave out: the first and the last layer, embeddings, biases and
    norms.
    """
    from pytorch_optimizer import Muon

    parameters = [each for each in model.parameters() if each.requires_grad]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [each for each in parameters if each.ndim > 1]
    hidden = {id(each) for each in matrices[1:-1]} - tables
    groups = [
        {"params": [p for p in parameters if id(p) in hidden], "lr": lr, "use_muon": True},
        {"params": [p for p in parameters if id(p) not in hidden], "lr": adamw_lr}
        | {"use_muon": False},
    ]
    return Muon([group for group in groups if group["params"]], lr=lr, **options)


def heavyball(model: nn.Module, name: str, **options: Any) -> Any:
    """Return an optimizer of heavyball, not compiled: on a CPU compiled steps are no faster."""
    import heavyball

    heavyball.utils.compile_mode = None
    return getattr(heavyball, name)(model.parameters(), **options)


def recipe(algorithm: Algorithm, *, seed: int) -> kfactk.Recipe:
    """Return the recipe of an algorithm of kfactk; `seed` draws the targets of its Fisher pass.

    Algorithms share settings that not all of them read: that these have no effect is not told.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* ha(s|ve) no effect: ", kfactk.KfactkWarning)
        return _recipe(algorithm, seed)


def _recipe(algorithm: Algorithm, seed: int) -> kfactk.Recipe:
    options = dict(algorithm.options)
    preset = options.pop("preset", None)
    made = kfactk.Recipe.from_dict(options, trusted=algorithm.trusted)
    if preset is not None:
        made = kfactk.preset(preset, **options)
    draws = getattr(made.fisher, "draw", None) is None
    if "seed" not in attrs.fields_dict(type(made.fisher)) or not draws:
        return made
    given = algorithm.options.get("fisher")
    chosen = {"seed": seed, **given} if isinstance(given, Mapping) else {"seed": seed}
    return made.evolve(fisher={**made.to_dict()["fisher"], **chosen})


def covered(algorithm: Algorithm, model: nn.Module) -> set[str]:
    """Return the names of the parameters that an algorithm preconditions."""
    if not algorithm.second_order:
        return set()
    return set(recipe(algorithm, seed=0).coverage(model).covered)


def describe(algorithm: Algorithm, *, seed: int) -> dict[str, Any]:
    """Return the effective settings, with defaults, as nested plain values."""
    if algorithm.second_order:
        return {"optimizer": "kfactk", **recipe(algorithm, seed=seed).to_dict()}
    optimizer = make(algorithm, _small_model(), seed=seed, collector=Collector(1))
    options = {**optimizer.defaults, **algorithm.options}
    plain = {key: value for key, value in options.items() if _plain(value)}
    return {"optimizer": algorithm.optimizer, **plain}


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def full_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of the optimizer; on the first process, with the curvature of all processes.

    All processes must call it.
    """
    if isinstance(optimizer, kfactk.Optimizer):
        optimizer.consolidate_state_dict()
    return optimizer.state_dict()


def close(optimizer: torch.optim.Optimizer) -> None:
    """Remove the optimizer's hooks from its model, if it has any."""
    if isinstance(optimizer, kfactk.Optimizer):
        optimizer.close()


def check(algorithms: Iterable[Algorithm]) -> None:
    """Check settings before any run starts: errors come now, and not after hours of other runs."""
    for algorithm in algorithms:
        try:
            describe(algorithm, seed=0)
            if algorithm.second_order and _names_layers(recipe(algorithm, seed=0)):
                continue  # the small model has none of these names
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said again by the run itself
                model = _small_model()
                optimizer = make(algorithm, model, seed=0, collector=Collector(1))
                if not algorithm.second_order:  # those that need a closure refuse a step
                    for parameter in model.parameters():
                        parameter.grad = torch.zeros_like(parameter)
                    optimizer.step()
                close(optimizer)
        except Exception as error:  # optimizers may raise anything for options that they refuse
            text = str(error) or type(error).__name__
            where = "" if text.startswith("algorithms.") else f"algorithm {algorithm.name}: "
            raise ExperimentError(where + text) from error


def _names_layers(made: kfactk.Recipe) -> bool:
    """Return whether a recipe holds names of layers of one model."""
    return bool(made.exclude) or any(spec.layers for spec in made.curvature)


def _small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2))
