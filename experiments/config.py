"""Settings of an experiment, read from TOML and checked; errors name the file and the key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from experiments.errors import ExperimentError, near_names, system_reason

FOLDER = Path(__file__).parent / "configs"
"""Folder of the presets, one TOML file each."""

SOURCES = ("digits", "cifar10")
MODELS = ("digits_resnet", "resnet8", "resnet50")
SCHEDULES = ("constant", "cosine")
FIRST_ORDER = ("optimizer", "lr", "momentum", "weight_decay", "nesterov")
SECOND_ORDER = (
    *("curvature", "basis", "fisher", "likelihood", "clip", "update", "placement"),
    *(
        "lr",
        "damping",
        "weight_decay",
        "factor_decay",
        "factor_every",
        "scale_every",
        "basis_every",
    ),
)
REFERENCE = ("train_accuracy", "test_accuracy")


MOST = 2**31 - 1
"""The largest whole number of a setting."""
LARGEST = 1e30
"""The largest number of a setting: its square is finite in float64."""
NAME = re.compile(r"\w[\w.,+()=-]*(?: [\w.,+()=-]+)*")
LONGEST = 60
"""Characters of a name, so that it is a file name everywhere."""


def _whole(least: int, most: int = MOST) -> Callable[[Any], str | None]:
    return lambda value: (
        None
        if type(value) is int and least <= value <= most
        else f"must be a whole number from {least} to {most}"
    )


def _number(value: Any) -> str | None:
    good = type(value) in (int, float) and 0 <= value <= LARGEST
    return None if good else f"must be a number from 0 to {LARGEST:g}"


def _flag(value: Any) -> str | None:
    return None if type(value) is bool else "must be true or false"


def _text(value: Any) -> str | None:
    good = isinstance(value, str) and value.strip() and value.isprintable()
    return None if good else "must be text on one line, without control characters"


def _name(value: str) -> str | None:
    """Names become names of folders and of experiments in MLflow."""
    good = NAME.fullmatch(value) and len(value) <= LONGEST
    return (
        None
        if good
        else "must begin with a letter or digit, hold only these and spaces between them and "
        f". , _ + - ( ) =, and have at most {LONGEST} characters"
    )


def _seeds(value: Any) -> str | None:
    good = (
        isinstance(value, list | tuple)
        and value
        and all(type(seed) is int and 0 <= seed < 2**31 for seed in value)
    )
    return (
        None
        if good and len(set(value)) == len(value)
        else "must be a list of different whole numbers from 0 to 2147483647"
    )


def _one_of(names: tuple[str, ...]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return (
            None
            if isinstance(value, str) and value in names
            else f"must be one of {', '.join(names)}.{near_names(str(value), names)}"
        )

    return check


def _field(check: Callable[[Any], str | None], **options: Any) -> Any:
    return attrs.field(metadata={"check": check}, **options)


@attrs.frozen
class Data:
    """The images.

    Args:
        source: "digits" (scikit-learn) or "cifar10" (torchvision, or a folder of images).
        train: Number of training images; 0 for all.
        test: Number of test images; 0 for all.
        augment: Whether to shift training images by up to four pixels, and mirror them.
        seed: Seed of the split or subset; the same for every run.
    """

    source: str = _field(_one_of(SOURCES))
    train: int = _field(_whole(0), default=0)
    test: int = _field(_whole(0), default=0)
    augment: bool = _field(_flag, default=False)
    seed: int = _field(_whole(0), default=0)


@attrs.frozen
class Model:
    """The network."""

    name: str = _field(_one_of(MODELS))


@attrs.frozen
class Training:
    """How long to train, and in what batches.

    Args:
        epochs: Passes over the training images.
        batch_size: Images in one step.
        test_batch_size: Images in one evaluation step.
        seeds: Every algorithm runs with each. A seed sets initial weights, order of images and
            draws of the Fisher pass.
        schedule: Learning rate over the steps: "constant", or "cosine" down to zero.
        threads: CPU threads of torch; 0 leaves it to torch. More do not help small networks.
        max_steps: Stop each run, and its evaluation, after this many steps; `None` for no limit.
    """

    epochs: int = _field(_whole(1))
    batch_size: int = _field(_whole(2))
    test_batch_size: int = _field(_whole(1))
    seeds: tuple[int, ...] = _field(_seeds)
    schedule: str = _field(_one_of(SCHEDULES), default="constant")
    threads: int = _field(_whole(0, 1024), default=0)  # torch crashes with very many
    max_steps: int | None = attrs.field(default=None)  # an option of the command line only


@attrs.frozen
class Algorithm:
    """One of the compared algorithms.

    Args:
        name: Its name on the command line.
        label: Its name in figures and tables.
        settings: Arguments of `kfactk.build`, or of the torch.optim class that
            `settings["optimizer"]` names.
        reference: Final accuracies in per cent that the thesis states for this preset, if any.
        trusted: Whether import paths in the settings may be imported, which runs code.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    reference: Mapping[str, float]
    trusted: bool = False


@attrs.frozen
class Experiment:
    """All settings of an experiment."""

    preset: str
    title: str
    data: Data
    model: Model
    training: Training
    algorithms: Mapping[str, Algorithm]


def presets() -> dict[str, Path]:
    """Return the presets by name, the smallest first."""
    return {
        path.stem: path
        for path in sorted(
            FOLDER.glob("*.toml"), key=lambda path: (path.stem != "digits", "resnet50" in path.stem)
        )
    }


def load(preset: str) -> Experiment:
    """Read a preset by name."""
    known = presets()
    if preset not in known:
        raise ExperimentError(
            f"there is no preset {preset!r}.{near_names(preset, known)} Presets: {', '.join(known)}"
        )
    return read(known[preset])


def read(path: Path, *, trusted: bool = False) -> Experiment:
    """Read the settings of an experiment from a TOML file; its stem is the preset's name.

    Args:
        path: The file.
        trusted: Whether import paths in it may be imported, which runs code.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({system_reason(error)})") from error
    # TOMLDecodeError and UnicodeDecodeError are ValueErrors; so are numbers with too many digits.
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"{path}: is not valid TOML: {error}") from error
    if problem := _name(path.stem):
        raise ExperimentError(f"{path}: the name of the file {problem}: rename it")
    _known(path, "", table, ("title", "data", "model", "training", "second_order", "algorithms"))
    title = table.get("title", path.stem)
    if problem := _text(title):
        raise ExperimentError(f"{path}: title {problem}, not {title!r}")
    return Experiment(
        preset=path.stem,
        title=title,
        data=_section(path, table, "data", Data),
        model=_section(path, table, "model", Model),
        training=_section(path, table, "training", Training),
        algorithms=_algorithms(path, table, trusted),
    )


def _known(path: Path, where: str, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for key in table:
        if key not in names:
            raise ExperimentError(
                f"{path}: there is no setting {where}{key}.{near_names(key, names)} "
                f"Settings here: {', '.join(names)}"
            )


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = "missing" if value is None else repr(value)
        raise ExperimentError(f"{path}: [{where}] must be a table of settings, but is {found}")
    return value


def _section(path: Path, table: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    section = _table(path, name, table.get(name))
    fields = {field.name: field for field in attrs.fields(kind) if "check" in field.metadata}
    _known(path, f"{name}.", section, tuple(fields))
    for key, field in fields.items():
        if key not in section:
            if field.default is attrs.NOTHING:
                raise ExperimentError(f"{path}: {name}.{key} is missing")
        elif problem := field.metadata["check"](section[key]):
            raise ExperimentError(f"{path}: {name}.{key} {problem}, not {section[key]!r}")
    return kind(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in section.items()
        }
    )


def _algorithms(path: Path, table: Mapping[str, Any], trusted: bool) -> dict[str, Algorithm]:
    shared = _table(path, "second_order", table.get("second_order", {}))
    _known(path, "second_order.", shared, SECOND_ORDER)
    algorithms = {}
    for name, value in _table(path, "algorithms", table.get("algorithms")).items():
        where = f"algorithms.{name}"
        if problem := _name(name):
            raise ExperimentError(f"{path}: {where}: the name of an algorithm {problem}")
        if twin := next((each for each in algorithms if each.lower() == name.lower()), None):
            raise ExperimentError(
                f"{path}: {where} and algorithms.{twin} differ only in capitals, and so would "
                "their folders: give another name"
            )
        own = dict(_table(path, where, value))
        label = own.pop("label", name)
        if problem := _text(label):
            raise ExperimentError(f"{path}: {where}.label {problem}, not {label!r}")
        reference = _table(path, f"{where}.reference", own.pop("reference", {}))
        _known(path, f"{where}.reference.", reference, REFERENCE)
        first_order = "optimizer" in own
        _known(path, f"{where}.", own, FIRST_ORDER if first_order else SECOND_ORDER)
        settings = own if first_order else {**shared, **own}
        for key in (
            ("optimizer", "lr", "weight_decay")
            if first_order
            else ("curvature", "basis", "update", "lr", "damping")
        ):
            if key not in settings:
                raise ExperimentError(f"{path}: {where}.{key} is missing")
        for key in REFERENCE:
            if key in reference and (problem := _number(reference[key])):
                raise ExperimentError(f"{path}: {where}.reference.{key} {problem}")
        for key in ("lr", "momentum", "weight_decay", "damping", "factor_decay"):
            if key in settings and (problem := _number(settings[key])):
                raise ExperimentError(f"{path}: {where}.{key} {problem}, not {settings[key]!r}")
        algorithms[name] = Algorithm(name, label, settings, reference, trusted)
    if not algorithms:
        raise ExperimentError(f"{path}: [algorithms] names none")
    return algorithms


def with_options(experiment: Experiment, **options: Any) -> Experiment:
    """Return the experiment with options of the command line; `None` changes nothing.

    Args:
        experiment: The settings.
        **options: `algorithms` (names), and fields of `Training`.
    """
    names = options.pop("algorithms", None)
    training = {key: value for key, value in options.items() if value is not None}
    for key, value in training.items():
        check = attrs.fields_dict(Training)[key].metadata.get("check", _whole(1))
        if problem := check(value):
            raise ExperimentError(f"--{key.replace('_', '-')} {problem}, not {value!r}")
    for name in names or ():
        if name not in experiment.algorithms:
            raise ExperimentError(
                f"there is no algorithm {name!r}.{near_names(name, experiment.algorithms)} "
                f"Algorithms: {', '.join(experiment.algorithms)}"
            )
    known = experiment.algorithms
    algorithms = {name: known[name] for name in names} if names else known
    return attrs.evolve(
        experiment, training=attrs.evolve(experiment.training, **training), algorithms=algorithms
    )
