from pathlib import Path

import pytest

from experiments import config
from experiments.errors import ExperimentError


def test_resnet50_has_the_settings_of_the_thesis():
    experiment = config.load("cifar10-resnet50")
    table = {
        "sgd": (0.03, 0.0001, None),
        "kfac": (0.01, 0.0003, 0.03),
        "ekfac": (0.01, 0.0003, 0.03),
        "ekfacnag": (0.01, 0.0001, 0.03),
        "ekfacadam": (0.003, 0.001, 0.001),
        "ekfacradam": (0.01, 0.0003, 0.001),
    }
    assert {
        name: tuple(a.settings.get(key) for key in ("lr", "weight_decay", "damping"))
        for name, a in experiment.algorithms.items()
    } == table
    stages = {
        name: (a.settings.get("basis"), a.settings.get("update"))
        for name, a in experiment.algorithms.items()
    }
    assert stages == {
        "sgd": (None, None),
        "kfac": ("kfac", "momentum"),
        "ekfac": ("ekfac", "momentum"),
        "ekfacnag": ("ekfac", "nag"),
        "ekfacadam": ("ekfac", "adam"),
        "ekfacradam": ("ekfac", "radam"),
    }
    assert (
        experiment.training.epochs,
        experiment.training.batch_size,
        experiment.training.test_batch_size,
    ) == (
        100,
        64,
        256,
    )
    assert experiment.training.schedule == "constant"
    shared = experiment.algorithms["kfac"].settings
    assert [
        shared[key] for key in ("factor_decay", "factor_every", "scale_every", "basis_every")
    ] == [0.95, 10, 10, 100]
    assert shared["clip"] == {"name": "kl", "limit": 0.01}


@pytest.mark.parametrize("preset", ["digits", "cifar10-small", "cifar10-resnet50"])
def test_presets_have_six_algorithms_and_three_seeds(preset):
    experiment = config.load(preset)
    assert list(experiment.algorithms) == [
        "sgd",
        "kfac",
        "ekfac",
        "ekfacnag",
        "ekfacadam",
        "ekfacradam",
    ]
    assert len(experiment.training.seeds) >= 3
    assert config.presets()[preset].stem == preset


def test_settings_of_an_algorithm_replace_shared_ones(tiny: Path):
    tiny.write_text(tiny.read_text() + "factor_every = 7\n")
    settings = config.read(tiny).algorithms["ekfacadam"].settings
    assert (settings["factor_every"], settings["scale_every"]) == (7, 2)
    assert "factor_every" not in config.read(tiny).algorithms["sgd"].settings


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs = 3", "epochs = 0", ["training.epochs", "from 1", "not 0"]),
        ("epochs = 3", "epochs = true", ["training.epochs", "whole number"]),
        ("epochs = 3", "epoch = 3", ["training.epoch", "'epochs'"]),
        ("epochs = 3", "", ["training.epochs", "missing"]),
        ("seeds = [0]", "seeds = [0, 0]", ["training.seeds", "different"]),
        ('source = "digits"', 'source = "digit"', ["data.source", "'digits'"]),
        ('name = "digits_resnet"', 'name = "resnet5"', ["model.name", "'resnet50'"]),
        ("damping = 0.03", "dampning = 0.03", ["algorithms.ekfacadam.dampning", "'damping'"]),
        ("damping = 0.03", "", ["algorithms.ekfacadam.damping", "missing"]),
        ("damping = 0.03", "damping = -1", ["algorithms.ekfacadam.damping", "not -1"]),
        ("momentum = 0.9", 'momentum = "much"', ["algorithms.sgd.momentum", "number"]),
        ("[model]", "[modle]", ["modle", "'model'"]),
        ("[model]", "[model", ["not valid TOML"]),
        ('title = "A tiny experiment"', 'model = "x"', ["TOML"]),
        ('title = "A tiny experiment"', "title = 3", ["title"]),
        ('title = "A tiny experiment"', r'title = "a\u0000b"', ["title", "control characters"]),
        ('label = "SGD"', r'label = "S\nGD"', ["algorithms.sgd.label", "one line"]),
        ('label = "SGD"', 'label = " "', ["algorithms.sgd.label"]),
        ('label = "SGD"', "label = 3", ["algorithms.sgd.label"]),
        ("momentum = 0.9", "momentum = inf", ["algorithms.sgd.momentum", "not inf"]),
        ("momentum = 0.9", "momentum = nan", ["algorithms.sgd.momentum", "not nan"]),
        ("damping = 0.03", "damping = 1e300", ["algorithms.ekfacadam.damping"]),
        ("lr = 0.01", "lr = 1" + "0" * 400, ["algorithms.ekfacadam.lr"]),
        ("epochs = 3", "epochs = 1" + "0" * 30, ["training.epochs", "2147483647"]),
        ("epochs = 3", "epochs = 1" + "0" * 5000, ["not valid TOML"]),
        ("epochs = 3", "epochs = 3" + "\nx = " + "[" * 100_000, ["not valid TOML"]),
        ("threads = 1", "threads = 99999999", ["training.threads", "1024"]),
        ("train = 150", "train = 1" + "0" * 30, ["data.train"]),
        ('source = "digits"', 'source = ["digits"]', ["data.source"]),
        ("[algorithms.sgd]", '[algorithms."../../escaped"]', ["begin with a letter"]),
        ("[algorithms.sgd]", '[algorithms.".."]', ["begin with a letter"]),
        ("[algorithms.sgd]", '[algorithms."a/b"]', ["begin with a letter"]),
        ("[algorithms.sgd]", r'[algorithms."a\\b"]', ["begin with a letter"]),
        ("[algorithms.sgd]", r'[algorithms."a\u0000"]', ["begin with a letter"]),
        ("[algorithms.sgd]", '[algorithms.""]', ["begin with a letter"]),
        ("[algorithms.sgd]", f"[algorithms.{'a' * 300}]", ["at most 60"]),
        ("[algorithms.sgd]", "[algorithms.EKFACadam]", ["differ only in capitals"]),
    ],
)
def test_errors_are_one_line_with_file_and_key(tiny: Path, old: str, new: str, words: list[str]):
    assert old in tiny.read_text()
    tiny.write_text(tiny.read_text().replace(old, new))
    with pytest.raises(ExperimentError) as caught:
        config.read(tiny)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(tiny), *words]:
        assert word in message


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(ExperimentError, match=r"none\.toml: cannot be read"):
        config.read(tmp_path / "none.toml")


def test_command_line_replaces_settings(tiny: Path):
    experiment = config.with_options(
        config.read(tiny),
        algorithms=["ekfacadam"],
        epochs=9,
        seeds=(4, 5),
        batch_size=None,
        max_steps=2,
    )
    assert list(experiment.algorithms) == ["ekfacadam"]
    assert (
        experiment.training.epochs,
        experiment.training.seeds,
        experiment.training.batch_size,
        experiment.training.max_steps,
    ) == (9, (4, 5), 50, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithms": ["ekfcadam"]}, "'ekfacadam'"),
        ({"epochs": 0}, "--epochs must be"),
        ({"max_steps": 0}, "--max-steps must be"),
        ({"batch_size": 1}, "--batch-size must be"),
        ({"seeds": (-1,)}, "--seeds must be"),
        ({"seeds": ()}, "--seeds must be"),
    ],
)
def test_command_line_options_are_checked(tiny: Path, options: dict, words: str):
    with pytest.raises(ExperimentError, match=words):
        config.with_options(config.read(tiny), **options)


@pytest.mark.parametrize("name", ["...toml", ".x.toml", "a\udcff.toml", "a\n.toml"])
def test_names_of_files_become_names_of_folders(tmp_path: Path, tiny_text: str, name: str):
    path = tmp_path / name
    path.write_text(tiny_text)
    with pytest.raises(ExperimentError, match="the name of the file must begin") as told:
        config.read(path)
    assert str(told.value).isprintable()


def test_ordinary_names_are_kept(tmp_path: Path, tiny_text: str):
    path = tmp_path / "my settings (2), é=3.toml"
    path.write_text(tiny_text.replace("[algorithms.sgd]", '[algorithms."SGD lr=0.1"]'))
    assert config.read(path).preset == path.stem
    assert "SGD lr=0.1" in config.read(path).algorithms
