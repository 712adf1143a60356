"""Settings of a study: TOML files, with changes of the command line, as typed values."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import cattrs
from attrs import validators as v

from experiments.errors import ExperimentError, near_names, system_reason

FOLDER = Path(__file__).parent / "presets"
"""Folder of the presets, one TOML file each."""
PROTOCOLS = ("thesis", "fair")
"""The ways to search for settings; each has a table `[search.NAME]`."""
DEFAULT = "mnist1d"
"""The preset of `nox -s experiments`."""
METRICS = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}
"""What every epoch measures: key to name. Training metrics are means over the steps of the epoch;
test metrics are measured after it. A reconstruction has no accuracies."""
LOSSES = {
    "cross_entropy": "nats",
    "reconstruction": "squared error of an image",
}
"""What runs minimise: key to the unit of the measured losses; `tasks.py` has the formulas."""
MOST = 2**31 - 1
LARGEST = 1e30
"""The largest number of a setting: its square is finite in float64."""
NAME = re.compile(r"(?=.{1,60}$)\w[\w.,+()=-]*(?: [\w.,+()=-]+)*")
"""Names of presets and algorithms: they become names of folders and of experiments in MLflow."""
NAMING = (
    "must begin with a letter or digit, hold only these and spaces between them and "
    ". , _ + - ( ) =, and have at most 60 characters"
)


def _whole(least: int, most: int = MOST) -> list[Any]:
    return [v.instance_of(int), v.ge(least), v.le(most)]


def _number(least: float = 0.0, most: float = LARGEST) -> list[Any]:
    return [v.instance_of((int, float)), v.ge(least), v.le(most)]


def _seeds(_: Any, attribute: Any, value: Any) -> None:
    if not value or len(set(value)) != len(value) or not all(0 <= seed <= MOST for seed in value):
        raise ValueError(
            f"{attribute.name!r} must be different whole numbers from 0 to {MOST}, not {value}"
        )


def _line(_: Any, attribute: Any, value: Any) -> None:
    if not (isinstance(value, str) and value.strip() and value.isprintable()):
        raise ValueError(f"{attribute.name!r} must be text on one line, not {value!r}")


@attrs.frozen(kw_only=True)
class Data:
    """The examples.

    Args:
        source: A name of `data.SOURCES`, or the import path `module:function` of one like them.
        train: Number of training examples; 0 for all.
        test: Number of test examples; 0 for all.
        augment: Whether to shift training images by up to four pixels, and mirror them.
        length: Bytes of an example of text.
        seed: Seed of the split or subset; the same for every run.
    """

    source: str = attrs.field(validator=_line)
    train: int = attrs.field(default=0, validator=_whole(0))
    test: int = attrs.field(default=0, validator=_whole(0))
    augment: bool = False
    length: int = attrs.field(default=128, validator=_whole(1))
    seed: int = attrs.field(default=0, validator=_whole(0))


@attrs.frozen(kw_only=True)
class Model:
    """The network.

    Args:
        name: A name of `models.MODELS`, or the import path `module:function` of one like them.
        options: Further arguments of that function.
    """

    name: str = attrs.field(validator=_line)
    options: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Training:
    """How long to train, and in what batches.

    Args:
        epochs: Passes over the training examples, or parts of one; after each there is a test.
        parts: Parts of a pass; an epoch is one of them.
        batch_size: Examples in one step.
        test_batch_size: Examples in one evaluation step.
        seeds: Every algorithm runs with each. A seed sets initial weights, order of examples and
            draws of the Fisher pass.
        loss: A key of `LOSSES`: "cross_entropy" of classes, or "reconstruction" of the inputs.
        schedule: Learning rate over the steps: "constant", or "cosine" down to zero.
        threads: CPU threads of torch in one process; 0 leaves it to torch.
        alternate: Whether the algorithms of a seed train in turn, an epoch each. Their seconds
            then are measured under equal conditions.
        max_steps: Stop each run, and its evaluation, after this many steps; 0 for no limit.
        target: A value of the training loss; the report has the steps and seconds to reach it.
        overview: Algorithms of a figure for the first page; none for no such figure.
        rivals: Algorithms that the report compares all others with, besides the first one.
    """

    epochs: int = attrs.field(validator=_whole(1))
    parts: int = attrs.field(default=1, validator=_whole(1))
    batch_size: int = attrs.field(default=64, validator=_whole(2))
    test_batch_size: int = attrs.field(default=256, validator=_whole(1))
    seeds: tuple[int, ...] = attrs.field(default=(0, 1, 2, 3, 4, 5, 6, 7), validator=_seeds)
    loss: str = attrs.field(default="cross_entropy", validator=v.in_(tuple(LOSSES)))
    schedule: str = attrs.field(default="constant", validator=v.in_(("constant", "cosine")))
    threads: int = attrs.field(default=0, validator=_whole(0, 1024))
    alternate: bool = True
    max_steps: int = attrs.field(default=0, validator=_whole(0))
    target: float | None = attrs.field(default=None, validator=v.optional(_number()))
    overview: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Grid:
    """A grid of one family of algorithms in the thesis' search.

    Args:
        epochs: Passes over the training examples in one trial.
        values: Values of each option; the grid is their product.
    """

    epochs: int = attrs.field(validator=_whole(1))
    values: Mapping[str, tuple[float, ...]]

    def __attrs_post_init__(self) -> None:
        if not self.values or not all(self.values.values()):
            raise ValueError("'values' must name options, each with at least one value")


@attrs.frozen(kw_only=True)
class ThesisSearch:
    """The thesis' search: a grid for each family, chosen by training loss, with one seed.

    Args:
        first_order: The grid of algorithms that are not kfactk's.
        second_order: The grid of those that are.
        train: Number of training examples of a trial; 0 for all of `data.train`.
        seed: Seed of every trial; the compared runs do not use it.
        algorithms: Names of those that take part; none for all.
    """

    first_order: Grid
    second_order: Grid
    train: int = attrs.field(default=0, validator=_whole(0))
    seed: int = attrs.field(default=100, validator=_whole(0))
    algorithms: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class FairSearch:
    """A search with the same number of trials and the same budget for every algorithm.

    Trials are quasi-random points of each algorithm's `search` ranges, on log scales. The trials
    with the lowest validation loss train again with other seeds; the lowest median loss decides.

    Args:
        trials: Trials of each algorithm.
        epochs: Passes over the training examples in one trial.
        train: Number of training examples of a trial, validation included; 0 for all.
        validation: Part of the training examples that is held out, and decides.
        confirm: How many of the best trials train again.
        seed: Seed of every trial, and of the points.
        confirm_seeds: Seeds of the confirmation.
    """

    trials: int = attrs.field(validator=_whole(1))
    epochs: int = attrs.field(validator=_whole(1))
    train: int = attrs.field(default=0, validator=_whole(0))
    validation: float = attrs.field(default=0.2, validator=_number(0.01, 0.9))
    confirm: int = attrs.field(default=3, validator=_whole(1))
    seed: int = attrs.field(default=100, validator=_whole(0))
    confirm_seeds: tuple[int, ...] = attrs.field(default=(101, 102), validator=_seeds)


@attrs.frozen(kw_only=True)
class Algorithm:
    """One of the compared algorithms.

    Args:
        name: Its name on the command line.
        label: Its name in figures and tables.
        optimizer: "kfactk", the name of a class of torch.optim, or an import path
            `package:Class` or `module:function`.
        options: Arguments of `kfactk.build` (and `preset`), or of that class or function.
        reference: Final accuracies in per cent that the thesis states for this preset, if any.
        search: Range of each option in the fair search, `[low, high]`. The option of a stage given
            as a table is named with it: "controller.model_damping".
        trusted: Whether import paths may be imported, which runs code.
    """

    name: str
    label: str = attrs.field(validator=_line)
    optimizer: str = attrs.field(default="kfactk", validator=_line)
    options: Mapping[str, Any] = attrs.field(factory=dict)
    reference: Mapping[str, float] = attrs.field(factory=dict)
    search: Mapping[str, tuple[float, float]] = attrs.field(factory=dict)
    trusted: bool = False

    def __attrs_post_init__(self) -> None:
        for key in self.reference:
            if key not in METRICS:
                raise ValueError(f"'reference.{key}' is not one of {', '.join(METRICS)}")
        for key, range_ in self.search.items():
            if not 0 < range_[0] < range_[1] <= LARGEST:
                raise ValueError(f"'search.{key}' must be [low, high], both positive, low < high")
            stage, dot, _ = key.partition(".")
            if dot and not isinstance(self.options.get(stage), Mapping):
                raise ValueError(f"'search.{key}' needs {stage} = {{ name = ... }} beside it")
        for key, value in self.options.items():
            if isinstance(value, int | float) and not abs(value) <= LARGEST:
                raise ValueError(f"'{key}' must be at most {LARGEST:g}, not {str(value)[:20]}")

    @property
    def second_order(self) -> bool:
        """Whether it is one of kfactk."""
        return self.optimizer == "kfactk"

    def with_options(self, **options: Any) -> Algorithm:
        """Return it with changed options; "stage.option" changes one of a stage."""
        changed = dict(self.options)
        for name, value in options.items():
            stage, dot, option = name.partition(".")
            changed[stage] = {**changed[stage], option: value} if dot else value
        return attrs.evolve(self, options=changed)


@attrs.frozen(kw_only=True)
class Search:
    """Both searches of a preset."""

    thesis: ThesisSearch | None = None
    fair: FairSearch | None = None


@attrs.frozen(kw_only=True)
class Study:
    """All settings of a study: the compared algorithms, and what they share.

    `trusted` says whether import paths may be imported, which runs code.
    """

    preset: str
    title: str = attrs.field(validator=_line)
    data: Data
    model: Model
    training: Training
    algorithms: Mapping[str, Algorithm]
    search: Search = Search()
    trusted: bool = False

    def only(self, names: Iterable[str]) -> Study:
        """Return the study of some of its algorithms."""
        names = list(names)
        for name in names:
            if name not in self.algorithms:
                raise ExperimentError(
                    f"there is no algorithm {name!r}.{near_names(name, self.algorithms)} "
                    f"Algorithms: {', '.join(self.algorithms)}"
                )
        return attrs.evolve(self, algorithms={name: self.algorithms[name] for name in names})


HIDDEN = ("preset", "trusted")
"""Fields of `Study` that no file sets."""
NESTED = ("search", "algorithms")
"""Tables of tables."""


def presets() -> dict[str, Path]:
    """Return the presets by name, the default first."""
    found = sorted(FOLDER.glob("*.toml"), key=lambda path: (path.stem != DEFAULT, path.stem))
    return {path.stem: path for path in found}


def title(path: Path) -> str:
    """Return the title of a preset."""
    return str(tomllib.loads(path.read_text(encoding="utf-8"))["title"])


def load(preset: str, changes: Iterable[str] = ()) -> Study:
    """Read a preset by name, with changes such as `training.epochs=3`."""
    known = presets()
    if preset not in known:
        raise ExperimentError(
            f"there is no preset {preset!r}.{near_names(preset, known)} Presets: {', '.join(known)}"
        )
    return read(known[preset], changes, trusted=True)


def read(path: Path, changes: Iterable[str] = (), *, trusted: bool = False) -> Study:
    """Read the settings of a study from a TOML file; its stem is the preset's name.

    Where the file says `extends = "PRESET"`, what it leaves out is that preset's: in its tables,
    and in those of `[algorithms]` and `[search]`. A table below them, such as the options of a
    stage, is replaced as a whole. The title is not taken over.

    Args:
        path: The file.
        changes: Changes of its values, such as `algorithms.sgd.lr=0.1`.
        trusted: Whether import paths in it may be imported, which runs code.
    """
    table = _parsed(path)
    if not NAME.fullmatch(path.stem):
        raise ExperimentError(f"{path}: the name of the file {NAMING}: rename it")
    for change in changes:
        _change(table, change)
    return structure({"title": path.stem, **table}, str(path), path.stem, trusted=trusted)


def _parsed(path: Path) -> dict[str, Any]:
    """Return the table of a file, laid over that of the preset which it extends."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({system_reason(error)})") from error
    # TOMLDecodeError and UnicodeDecodeError are ValueErrors; so are numbers with too many digits.
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"{path}: is not valid TOML: {error}") from error
    if "extends" not in table:
        return table
    base, known = table.pop("extends"), presets()
    if not isinstance(base, str) or base not in known or known[base] == path:
        near = near_names(str(base), known)
        raise ExperimentError(
            f"{path}: extends = {base!r}: there is no such preset.{near} Presets: "
            f"{', '.join(known)}"
        )
    found = _parsed(known[base])
    del found["title"]
    laid = {
        name: _laid_over(found.get(name), value, 2 if name in NESTED else 1)
        for name, value in table.items()
    }
    return found | laid


def _laid_over(base: Any, given: Any, levels: int) -> Any:
    """Return `given`, with what its tables of so many levels leave out of `base`."""
    if not levels or not isinstance(base, dict) or not isinstance(given, dict):
        return given
    return base | {name: _laid_over(base.get(name), v, levels - 1) for name, v in given.items()}


def structure(table: Mapping[str, Any], where: str, preset: str, *, trusted: bool) -> Study:
    """Return the study that a table of TOML describes; errors begin with `where`."""
    try:
        study: Study = _converter().structure(_arranged(table, preset, trusted), Study)
    except cattrs.BaseValidationError as error:
        raise ExperimentError(f"{where}: {_first(error, Study)}") from error
    except ValueError as error:
        raise ExperimentError(f"{where}: {error}") from error
    thesis, training = study.search.thesis, study.training
    named = {
        "search.thesis.algorithms": () if thesis is None else thesis.algorithms,
        "training.overview": training.overview,
        "training.rivals": training.rivals,
    }
    for setting, names in named.items():
        try:
            study.only(names)
        except ExperimentError as error:
            raise ExperimentError(f"{where}: {setting}: {error}") from error
    return study


def from_plain(values: Mapping[str, Any]) -> Study:
    """Return the study of which `attrs.asdict` made these values; import paths are not trusted."""
    study: Study = _converter().structure(values, Study)
    algorithms = {
        name: attrs.evolve(each, trusted=False) for name, each in study.algorithms.items()
    }
    return attrs.evolve(study, algorithms=algorithms, trusted=False)


def _change(table: dict[str, Any], change: str) -> None:
    key, sign, text = change.partition("=")
    names = key.split(".")
    if not sign or not all(names):
        raise ExperimentError(f"--set {change}: write it as KEY=VALUE, as training.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a name without quotation marks
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"--set {change}: {name} is a value, and no table of settings")
    table[names[-1]] = value


def _arranged(table: Mapping[str, Any], preset: str, trusted: bool) -> dict[str, Any]:
    """Return the table in the form of `Study`: options of algorithms in a table of their own."""
    table = dict(table)
    algorithms, shared = table.get("algorithms"), table.pop("second_order", {})
    if not isinstance(algorithms, dict) or not algorithms:
        raise ValueError("[algorithms.NAME] is missing: there is nothing to compare")
    for name in HIDDEN:
        if name in table:
            raise ValueError(f"there is no setting {name}")
    for name in ("data", "model", "training", "search"):
        if not isinstance(table.get(name, {}), dict):
            raise ValueError(f"{name} must be a table of settings, not {table[name]!r}")
    own = {field.name for field in attrs.fields(Algorithm)} - {"name", "options", "trusted"}
    arranged: dict[str, Any] = {}
    for name, given in algorithms.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"algorithms.{name}: the name of an algorithm {NAMING}")
        if twin := next((each for each in arranged if each.lower() == name.lower()), None):
            raise ValueError(
                f"algorithms.{name} and algorithms.{twin} differ only in capitals, and so would "
                "their folders: give another name"
            )
        if not isinstance(given, dict) or not isinstance(shared, dict):
            raise ValueError(f"algorithms.{name} must be a table of settings")
        own_kind = given.get("optimizer", "kfactk") != "kfactk" or "preset" in given
        common = {} if own_kind else shared
        options = {k: value for k, value in {**common, **given}.items() if k not in own}
        kept = {k: value for k, value in given.items() if k in own}
        arranged[name] = {
            **{"name": name, "label": name, "options": options, "trusted": trusted},
            **kept,
        }
    return {**table, "preset": preset, "algorithms": arranged, "trusted": trusted}


def _exactly(kind: type, words: str) -> Callable[[Any, Any], Any]:
    """Return a hook that takes values of one kind only; cattrs would turn "3" and 2.7 into 3."""

    def check(value: Any, _: Any) -> Any:
        if kind is float and type(value) is int:
            return value
        if type(value) is not kind:
            raise ValueError(f"must be {words}, not {value!r}")
        return value

    return check


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, words in (
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "text"),
    ):
        converter.register_structure_hook(kind, _exactly(kind, words))
    return converter


def _first(error: BaseException, kind: Any, where: str = "") -> str:
    """Return the first problem of a group in words, with the name of the setting."""
    if isinstance(error, cattrs.ClassValidationError):
        known = [field.name for field in attrs.fields(error.cl)]
        if error.cl is Study:
            known = [*(name for name in known if name not in HIDDEN), "second_order"]
        noted, others = error.group_exceptions()
        for inner in others:  # first, since a misspelt setting also is a missing one
            if isinstance(inner, cattrs.ForbiddenExtraKeysError):
                name = min(inner.extra_fields)
                return (
                    f"there is no setting {where}{name}.{near_names(name, known)} "
                    f"Settings here: {', '.join(known)}"
                )
        for inner, note in noted:
            return _first(inner, note.type, f"{where}{note.name}.")
        return _first(others[0], kind, where)
    if isinstance(error, cattrs.IterableValidationError):
        noted, others = error.group_exceptions()
        for inner, note in noted:
            return _first(inner, note.type, f"{where}{note.index}.")
        return _first(others[0], kind, where)
    if isinstance(error, KeyError):
        return f"{where.rstrip('.')} is missing"
    words = str(error.args[0]) if error.args else type(error).__name__
    if found := re.match(r"'([\w.]+)' (.*)", words):  # a validator's
        return f"{where}{found[1]} {found[2]}"
    return f"{where.rstrip('.')} {words}".strip()
