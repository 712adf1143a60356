import json
from pathlib import Path

import attrs
import pytest

from experiments import settings
from experiments.errors import ExperimentError

SIX = ["sgd", "kfac", "ekfac", "ekfacnag", "ekfacadam", "ekfacradam"]


def test_resnet50_has_the_settings_of_the_thesis():
    study = settings.load("cifar10-resnet50")
    table = {
        "sgd": (0.03, 0.0001, None),
        "kfac": (0.01, 0.0003, 0.03),
        "ekfac": (0.01, 0.0003, 0.03),
        "ekfacnag": (0.01, 0.0001, 0.03),
        "ekfacadam": (0.003, 0.001, 0.001),
        "ekfacradam": (0.01, 0.0003, 0.001),
    }
    assert {
        name: tuple(a.options.get(key) for key in ("lr", "weight_decay", "damping"))
        for name, a in study.algorithms.items()
    } == table
    stages = {
        name: (a.optimizer, a.options.get("basis"), a.options.get("update"))
        for name, a in study.algorithms.items()
    }
    assert stages == {
        "sgd": ("SGD", None, None),
        "kfac": ("kfactk", "kfac", "momentum"),
        "ekfac": ("kfactk", "ekfac", "momentum"),
        "ekfacnag": ("kfactk", "ekfac", "nag"),
        "ekfacadam": ("kfactk", "ekfac", "adam"),
        "ekfacradam": ("kfactk", "ekfac", "radam"),
    }
    training = study.training
    assert (training.epochs, training.batch_size, training.test_batch_size) == (100, 64, 256)
    assert training.schedule == "constant"
    shared = study.algorithms["kfac"].options
    keys = ("factor_decay", "factor_every", "scale_every", "basis_every")
    assert [shared[key] for key in keys] == [0.95, 10, 10, 100]
    assert shared["clip"] == {"name": "kl", "limit": 0.01}


@pytest.mark.parametrize("preset", settings.presets())
def test_presets_have_the_six_algorithms_and_seeds(preset: str):
    study = settings.load(preset)
    others = ("reference", "transformer", "autoencoder", "methods", "recurrent")
    if not preset.startswith(others):
        assert list(study.algorithms)[:6] == SIX
    fewer = {"transformer": 3, "autoencoder": 5, "autoencoder-cifar10": 2, "recurrent": 5}
    assert len(study.training.seeds) == fewer.get(preset, 8)
    assert settings.presets()[preset].stem == study.preset == preset
    assert study.trusted


def test_presets_of_kfactk_take_no_shared_options(tiny: Path):
    changes = ["algorithms.mine.preset=short", "algorithms.mine.lr=0.1"]
    assert settings.read(tiny, changes).algorithms["mine"].options == {"preset": "short", "lr": 0.1}


def test_settings_of_an_algorithm_replace_shared_ones(tiny: Path):
    tiny.write_text(tiny.read_text() + "factor_every = 7\n")
    algorithms = settings.read(tiny).algorithms
    options = algorithms["ekfacadam"].options
    assert (options["factor_every"], options["scale_every"]) == (7, 2)
    assert "factor_every" not in algorithms["sgd"].options


SEARCH = "[search.fair]\ntrials = 2\nepochs = 1\n"
GRIDS = (
    "[search.thesis]\nfirst_order = { epochs = 1, values = { lr = [1, 2] } }\n"
    "second_order = { epochs = 1, values = { lr = [1, 2] } }\n"
)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs = 3", "epochs = 0", ["training.epochs", ">= 1", "0"]),
        ("epochs = 3", "epochs = true", ["training.epochs", "whole number", "True"]),
        ("epochs = 3", 'epochs = "3"', ["training.epochs", "whole number", "'3'"]),
        ("epochs = 3", "epochs = 2.7", ["training.epochs", "whole number", "2.7"]),
        ("epochs = 3", "epochs = 3.0", ["training.epochs", "whole number", "3.0"]),
        ("epochs = 3", "epochs = [3]", ["training.epochs", "whole number"]),
        ("epochs = 3", "epoch = 3", ["training.epoch.", "'epochs'"]),
        ("epochs = 3", "", ["training.epochs is missing"]),
        ("epochs = 3", "epochs = 1" + "0" * 30, ["training.epochs", "2147483647"]),
        ("epochs = 3", "epochs = 1" + "0" * 5000, ["not valid TOML"]),
        ("epochs = 3", "epochs = 3" + "\nx = " + "[" * 100_000, ["not valid TOML"]),
        ("epochs = 3", "epochs = 3\nalternate = 1", ["training.alternate", "true or false"]),
        ("epochs = 3", 'epochs = 3\ntarget = "1"', ["training.target"]),
        ("seeds = [0]", "seeds = [0, 0]", ["training.seeds", "different"]),
        ("seeds = [0]", "seeds = []", ["training.seeds", "different"]),
        ("seeds = [0]", "seeds = [true]", ["training.seeds.0", "whole number"]),
        ("seeds = [0]", "seeds = [-1]", ["training.seeds", "different whole numbers from 0"]),
        ("seeds = [0]", "seeds = 0", ["training.seeds"]),
        ("threads = 1", "threads = 99999999", ["training.threads", "1024"]),
        ("threads = 1", 'schedule = "cosin"', ["TOML"]),
        ('schedule = "cosine"', 'schedule = "cosin"', ["training.schedule", "cosine"]),
        ("train = 150", "train = 1" + "0" * 30, ["data.train"]),
        ("train = 150", "trian = 150", ["data.trian.", "'train'"]),
        ('source = "digits"', 'source = ["digits"]', ["data.source", "text"]),
        ('name = "digits_resnet"', "name = 3", ["model.name", "text"]),
        ('name = "digits_resnet"', 'nam = "digits_resnet"', ["model.nam.", "'name'"]),
        ('name = "digits_resnet"', 'name = "x"\noptions = 3', ["model.options"]),
        ("[model]", "[modle]", ["no setting modle.", "'model'"]),
        ("[model]", "[model", ["not valid TOML"]),
        ("[data]", "preset = 'x'\n[data]", ["no setting preset"]),
        ("[data]", "trusted = true\n[data]", ["no setting trusted"]),
        ('title = "A tiny experiment"', 'model = "x"', ["TOML"]),
        ('title = "A tiny experiment"', "title = 3", ["title", "text"]),
        ('title = "A tiny experiment"', r'title = "a\u0000b"', ["title", "text on one line"]),
        ('label = "SGD"', r'label = "S\nGD"', ["algorithms.sgd.label", "one line"]),
        ('label = "SGD"', 'label = " "', ["algorithms.sgd.label"]),
        ('label = "SGD"', "label = 3", ["algorithms.sgd.label", "text"]),
        ('optimizer = "SGD"', "optimizer = [1]", ["algorithms.sgd.optimizer", "text"]),
        ("momentum = 0.9", "momentum = inf", ["algorithms.sgd.momentum", "not inf"]),
        ("momentum = 0.9", "momentum = nan", ["algorithms.sgd.momentum", "not nan"]),
        ("damping = 0.03", "damping = 1e300", ["algorithms.ekfacadam.damping"]),
        ("lr = 0.01", "lr = 1" + "0" * 400, ["algorithms.ekfacadam.lr"]),
        ("momentum = 0.9", "reference.tset = 9", ["algorithms.sgd.reference.tset"]),
        ("momentum = 0.9", "search.lr = [2, 1]", ["algorithms.sgd.search.lr", "low < high"]),
        ("momentum = 0.9", "search.lr = [0, 1]", ["algorithms.sgd.search.lr", "positive"]),
        ("momentum = 0.9", "search.lr = [1]", ["algorithms.sgd.search.lr"]),
        ("momentum = 0.9", 'search."clip.limit" = [1, 2]', ["search.clip.limit", "clip = {"]),
        ("[algorithms.sgd]", '[algorithms."../../escaped"]', ["begin with a letter"]),
        ("[algorithms.sgd]", '[algorithms.".."]', ["begin with a letter"]),
        ("[algorithms.sgd]", '[algorithms."a/b"]', ["begin with a letter"]),
        ("[algorithms.sgd]", r'[algorithms."a\\b"]', ["begin with a letter"]),
        ("[algorithms.sgd]", r'[algorithms."a\u0000"]', ["begin with a letter"]),
        ("[algorithms.sgd]", r'[algorithms."a\n"]', ["begin with a letter"]),
        ("[algorithms.sgd]", '[algorithms."a "]', ["begin with a letter"]),
        ("[algorithms.sgd]", '[algorithms.""]', ["begin with a letter"]),
        ("[algorithms.sgd]", f"[algorithms.{'a' * 300}]", ["at most 60"]),
        ("[algorithms.sgd]", "[algorithms.EKFACadam]", ["differ only in capitals"]),
        ("[second_order]", "[second]", ["no setting second.", "second_order"]),
        ("[data]", "search = 3\n[data]", ["search must be a table"]),
        ("[second_order]", f"{SEARCH}trails = 3\n[second_order]", ["fair.trails.", "'trials'"]),
        ("[second_order]", f"{SEARCH}train = true\n[second_order]", ["search.fair.train"]),
        ("[second_order]", f"{SEARCH}validation = 2\n[second_order]", ["fair.validation"]),
        ("[second_order]", f"{GRIDS}x = 3\n[second_order]", ["no setting search.thesis.x."]),
        ("[second_order]", GRIDS.replace("[1, 2]", "[]") + "[second_order]", ["order.values"]),
        (
            "[second_order]",
            GRIDS.replace("[1,", "['1',") + "[second_order]",
            ["values.lr.0", "'1'"],
        ),
        ("[second_order]", f"{GRIDS}algorithms = ['sdg']\n[second_order]", ["'sdg'", "'sgd'"]),
        ("[training]", "[training]\nrivals = ['sdg']", ["rivals", "'sgd'"]),
        ("[second_order]", "[search.fiar]\n[second_order]", ["no setting search.fiar.", "'fair'"]),
    ],
)
def test_errors_are_one_line_with_file_and_key(tiny: Path, old: str, new: str, words: list[str]):
    assert old in tiny.read_text()
    tiny.write_text(tiny.read_text().replace(old, new))
    with pytest.raises(ExperimentError) as caught:
        settings.read(tiny)
    message = str(caught.value)
    assert message.isprintable()
    for word in [str(tiny), *words]:
        assert word in message


def test_a_file_may_extend_a_preset(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'extends = "autoencoder"\n[training]\nepochs = 3\n[algorithms.kfac]\nlr = 0.5\n'
        'basis = { name = "ekfac" }\n[algorithms.controlled]\ncontroller = { name = "quadratic" }\n'
        "[algorithms.mine]\nbasis = 'kfac'\n[search.fair]\ntrials = 3\n"
        "[model]\noptions = { widths = [8, 4] }\n"
    )
    base, study = settings.load("autoencoder"), settings.read(path)
    assert (study.title, study.preset) == ("mine", "mine")
    assert study.data == base.data
    assert study.training == attrs.evolve(base.training, epochs=3)
    assert (study.model.name, study.model.options) == ("autoencoder", {"widths": [8, 4]})
    assert list(study.algorithms) == [*base.algorithms, "mine"]
    kfac, before = study.algorithms["kfac"], base.algorithms["kfac"]
    changed = {"lr": 0.5, "basis": {"name": "ekfac"}}
    assert kfac.options == before.options | changed
    assert (kfac.label, kfac.search) == (before.label, before.search)
    assert study.algorithms["controlled"].options["controller"] == {"name": "quadratic"}
    assert study.algorithms["mine"].options["likelihood"] == "bernoulli"  # of [second_order]
    assert base.search.fair is not None
    assert study.search.fair == attrs.evolve(base.search.fair, trials=3)
    assert not study.trusted
    assert base == settings.load("autoencoder")
    changes = ["training.epochs=2"]
    assert settings.read(path, changes).training == attrs.evolve(base.training, epochs=2)


@pytest.mark.parametrize("base", ["'autoencodr'", "3", "['autoencoder']"])
def test_only_presets_can_be_extended(tiny: Path, base: str):
    tiny.write_text(f"extends = {base}\n{tiny.read_text()}")
    with pytest.raises(ExperimentError, match=r"tiny.toml: extends = .*Presets: mnist1d, .*"):
        settings.read(tiny)


@pytest.mark.parametrize("text", ["", "algorithms = 3", "[algorithms]", "[algorithms]\nx = 3"])
def test_studies_compare_algorithms(tiny: Path, text: str):
    tiny.write_text(text)
    with pytest.raises(ExperimentError, match="algorithms"):
        settings.read(tiny)


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(ExperimentError, match=r"none\.toml: cannot be read"):
        settings.read(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["...toml", ".x.toml", "a\udcff.toml", "a\n.toml", "a .toml"])
def test_names_of_files_become_names_of_folders(tmp_path: Path, tiny_text: str, name: str):
    path = tmp_path / name
    path.write_text(tiny_text)
    with pytest.raises(ExperimentError, match="the name of the file must begin") as told:
        settings.read(path)
    assert str(told.value).isprintable()


def test_ordinary_names_are_kept(tmp_path: Path, tiny_text: str):
    path = tmp_path / "my settings (2), é=3.toml"
    path.write_text(tiny_text.replace("[algorithms.sgd]", '[algorithms."SGD lr=0.1"]'))
    study = settings.read(path)
    assert study.preset == path.stem
    assert study.algorithms["SGD lr=0.1"].name == "SGD lr=0.1"


def test_some_algorithms_can_be_chosen(study: settings.Study):
    assert list(study.only(["ekfacadam"]).algorithms) == ["ekfacadam"]
    with pytest.raises(ExperimentError, match="'ekfacadam'"):
        study.only(["ekfcadam"])


def test_a_search_can_change_the_option_of_a_stage():
    study = settings.load("autoencoder")
    controlled = study.algorithms["controlled"]
    assert set(controlled.search) == {"controller.model_damping"}
    changed = controlled.with_options(**{"controller.model_damping": 7.0, "weight_decay": 0.5})
    assert changed.options["controller"] == {"name": "quadratic", "model_damping": 7.0}
    assert changed.options["weight_decay"] == 0.5
    assert changed.options["basis"] == controlled.options["basis"]
    assert controlled.options["controller"]["model_damping"] != 7.0  # the first one stays


def test_changes_are_values_of_toml_or_bare_words(tiny: Path):
    changes = [
        *("training.epochs=9", "training.seeds=[4, 5]", "training.schedule=constant"),
        *("data.augment=true", "title=a = b", "model.options.width=3"),
        *("algorithms.mine.optimizer=AdamW", "algorithms.mine.lr=0.1", "second_order.clip=none"),
        'algorithms.ekfacadam.fisher={name = "mc", samples = 2}',
        *("algorithms.sgd.search.lr=[0.1, 1]", "training.epochs=8"),
    ]
    study = settings.read(tiny, changes)
    training, algorithms = study.training, study.algorithms
    assert (training.epochs, training.seeds, training.schedule) == (8, (4, 5), "constant")
    assert (study.data.augment, study.title, study.model.options) == (True, "a = b", {"width": 3})
    assert list(algorithms) == ["sgd", "ekfacadam", "mine"]
    mine = algorithms["mine"]
    assert (mine.optimizer, mine.options, mine.label) == ("AdamW", {"lr": 0.1}, "mine")
    assert algorithms["ekfacadam"].options["fisher"] == {"name": "mc", "samples": 2}
    assert algorithms["ekfacadam"].options["clip"] == "none"
    assert algorithms["sgd"].search == {"lr": (0.1, 1)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.epoch=3", "no setting training.epoch. Did you mean 'epochs'"),
        ("training.epochs=3.5", "training.epochs must be a whole number, not 3.5"),
        ("training.epochs=three", "training.epochs must be a whole number, not 'three'"),
        ("training.epochs", "write it as KEY=VALUE"),
        ("=3", "write it as KEY=VALUE"),
        ("training..epochs=3", "write it as KEY=VALUE"),
        ("title.x=3", "title is a value"),
        ("training=3", "training must be a table"),
        ("algorithms.../x.lr=3", "write it as KEY=VALUE"),
        ("algorithms.a/b.lr=3", "must begin with a letter"),
        ("algorithms=3", "nothing to compare"),
        ("training.epochs=" + "[" * 100_000, "training.epochs must be a whole number"),
        ("title=a\nb", "title must be text on one line"),
    ],
)
def test_changes_that_cannot_be_are_one_line(tiny: Path, change: str, words: str):
    with pytest.raises(ExperimentError) as told:
        settings.read(tiny, [change])
    assert words in str(told.value)
    assert str(told.value).isprintable()


def test_plain_values_become_the_same_study(tiny: Path):
    assert settings.from_plain(attrs.asdict(settings.read(tiny))) == settings.read(tiny)
    study = settings.load("mnist1d")
    algorithms = {
        name: attrs.evolve(each, trusted=False) for name, each in study.algorithms.items()
    }
    found = settings.from_plain(json.loads(json.dumps(attrs.asdict(study))))
    assert found == attrs.evolve(study, algorithms=algorithms, trusted=False)
