import io
import re
from html.parser import HTMLParser
from pathlib import Path

import attrs
import pytest
from rich.console import Console

from experiments import figures, report, tables
from experiments.results import Results
from tests.experiments import made_up

VOID = {"meta", "br", "hr", "img", "link"}
NAN = float("nan")


class Page(HTMLParser):
    """Checks that elements are closed in order, and gathers addresses, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.handle_attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self.handle_attributes(attrs)

    def handle_attributes(self, attrs):
        loading = ("src", "href", "xlink:href", "data", "action", "srcset")
        self.addresses += [value for name, value in attrs if name in loading]
        self.ids += [value for name, value in attrs if name == "id"]
        self.alts += [value for name, value in attrs if name == "aria-label"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def everything():
    """Results of all algorithms, five seeds, with a search and numbers of the thesis."""
    results = made_up.results(
        {
            name: [[3.0, 1.0 - i / 10]] * 4 + [[3.0, NAN if name == "sgd" else 0.9]]
            for i, name in enumerate(made_up.ALL)
        },
        target=0.7,
    )
    trial = {"algorithm": "sgd", "options": {"lr": 0.2}, "seed": 9, "seconds": 30.0, "stage": "1"}
    search = {
        "trials": [{**trial, "value": 0.5}, {**trial, "value": None}],
        "chosen": {"sgd": {"lr": 0.2}},
        "criterion": "the training loss",
    }
    algorithms = dict(results.study.algorithms)
    algorithms["ekfacadam"] = attrs.evolve(
        algorithms["ekfacadam"], reference={"train_accuracy": 98.31}
    )
    study = attrs.evolve(results.study, algorithms=algorithms)
    return attrs.evolve(results, study=study, searches={"thesis": search})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    written = report.write(tmp_path_factory.mktemp("report"), everything())
    assert sorted(path.suffix for path in written.figures.iterdir()) == [".png"] * 6 + [".svg"] * 6
    return written.report.read_text()


def test_the_report_loads_nothing(text: str):
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]+)", text))
    assert set(re.findall(r"""["'](https?://[^"']+)""", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # namespaces


def test_figures_of_the_report_share_no_names(text: str):
    page = Page(text)
    assert page.tags.count("svg") == 6
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert page.alts == [figures.alt(everything(), name) for name in figures.TITLES]


def test_the_report_contains_everything(text: str):
    page = Page(text)
    words = " ".join(page.text.split())
    for label in made_up.LABELS.values():
        assert label in words
    for word in (
        "<sgd & co>",
        "python -m experiments --set 'a<b'",
        "made-up images",
        "1.00 [1.00, diverged]",
        "1 of 5",
        "4 of 5",
        "0.500 [0.00, 0.500]",
        "98.31",
        "-4.31",
        "The thesis search",
        "lr=0.2",
        "versions.torch2.9",
        "c0ffee",
        "training.target0.7",
        "does not hold EKFACnag slows",
        "Test error against epochs, as figure 4 of the thesis",
    ):
        assert word in words, word
    assert "seeds 0, 1, 2, 3, 4" in words


def test_a_study_of_other_algorithms_has_no_list_of_claims(tmp_path: Path):
    results = made_up.results({"adam": [[1.0, 0.5]]})
    words = Page(report.write(tmp_path, results).report.read_text()).text
    assert "None can be judged: there are no runs of" in words
    assert "Late in training" not in words


def terminal(results, width: int) -> str:
    """What a terminal of this width shows."""
    console = Console(width=width, file=io.StringIO())
    console.print(tables.for_terminal(results))
    return console.file.getvalue()


def test_the_table_of_the_terminal_fits_80_columns():
    text = terminal(everything(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for word in ("EKFACradam", "1.00x", "1.50x", "95.0", "not reached", "4 of 5"):
        assert word in text
    assert "SGD: 1 of 5 seeds diverged" in text
    assert "over 5 seeds" in " ".join(text.split())
    # A range stands below its median, also where there is room.
    wide = [line for line in terminal(everything(), 200).splitlines() if line.startswith("EKFAC ")]
    assert "[" not in wide[0]


def test_costs_and_steps_to_the_target_are_in_the_summary():
    table = tables.summary(made_up.results({"sgd": [[1.0, 0.5]], "kfac": [[1.0, 0.9]]}))
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert rows[0]["steps to loss 0.5"] == "8"
    assert rows[0]["s to loss 0.5"] == "4.00"
    assert rows[1]["steps to loss 0.5"] == "not reached"
    assert rows[1]["reached it"] == "0 of 1"
    assert rows[1]["vs SGD"] == "1.50x"
    assert rows[1]["test acc. %"] == "82.0"


def test_runs_without_accuracies_show_none(tmp_path: Path):
    losses = {"sgd": [[3.0, 1.0]] * 5, "kfac": [[2.0, 0.4]] * 4 + [[2.0, NAN]]}
    results = made_up.results(losses, loss="reconstruction", rivals=("kfac",))
    root = root_with(tmp_path, ae=results)
    assert report.main([], root) == 0
    words = Page((root / "results" / "ae" / "report.html").read_text()).text
    page = (root / "docs" / "results.md").read_text()
    page = page[page.index("## Made-up runs") : page.index("## What a step costs")]
    for text in (words, page, terminal(results, 80)):
        assert not re.search(
            r"accurac|acc\.|nats|nan|None(?! can)|of the thesis$", text, re.MULTILINE
        )
        assert "the squared error of an image, summed over its pixels" in " ".join(text.split())
    assert "training loss (squared error of an image, log axis)" in words
    assert "these runs do not classify" in words
    assert len(re.findall(r"^!\[", page, re.MULTILINE)) == 4
    table = tables.summary(results)
    assert table.headings[1:4] == ["training loss", "test loss", "s/epoch"]
    assert table.rows[1][1:3] == ["0.400 [0.400, diverged]", "0.800 [0.800, diverged]"]
    (compared,) = tables.comparisons(results)
    assert compared.headings == ["against SGD", "training loss", "test loss", "common seeds"]


def test_half_of_the_seeds_diverged():
    table = tables.summary(made_up.results({"sgd": [[1.0, 0.5], [1.0, NAN]]}))
    assert table.rows[0][1:5] == ["diverged"] * 4


def test_environments_that_differ_are_all_named():
    results = made_up.results({"sgd": [[1.0]] * 3})
    runs = [attrs.evolve(results.runs[0], environment={"commit": "beef"}), *results.runs[1:]]
    rows = dict(tables.environment(attrs.evolve(results, runs=runs)).rows)
    assert rows["commit"] == "beef (1 runs); c0ffee (2 runs)"


def test_settings_that_all_share_are_named_once():
    shared, own = tables.settings(made_up.results({"sgd": [[1.0]], "kfac": [[1.0]]}))
    assert ["training.batch_size", "64"] in [list(row) for row in shared.rows]
    assert [list(row) for row in own.rows] == [
        ["algorithm.update.name", "<sgd & co>", "<kfac & co>"]
    ]


def root_with(tmp_path: Path, **studies) -> Path:
    for name, results in studies.items():
        results.write(tmp_path / "results" / name.replace("__", "/"))
    return tmp_path


def test_the_page_has_every_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = made_up.results({"sgd": [[1.0, 0.5]]})
    root = root_with(tmp_path, small=everything(), small__fair=small)
    (root / "docs" / "assets" / "results").mkdir(parents=True)
    old = root / "docs" / "assets" / "results" / "gone-train_loss.svg"
    old.write_text("")
    other = old.with_name("mine.svg")
    other.write_text("")
    assert report.main([str(root / "results" / "small" / "fair")], root) == 0
    assert capsys.readouterr().out.split() == [
        str(root / "results" / "small" / "fair" / "report.html"),
        str(root / "docs" / "results.md"),
    ]
    page = (root / "docs" / "results.md").read_text()
    assert re.findall("^## .*", page, re.MULTILINE) == [
        "## Made-up runs",
        "## Made-up runs (fair)",
        "## What a step costs",
    ]
    linked = re.findall(r"^!\[.+\]\((.+)\)$", page, re.MULTILINE)
    assert len(linked) == 12
    assert all((root / "docs" / path).is_file() for path in linked)
    assert not old.exists()
    assert other.exists()
    assert page.count("as figure 4 of the thesis") == 2
    assert "python -m experiments --set 'a<b'" in page
    assert "| commit | c0ffee |" in page
    assert "- **Does not hold**: EKFACnag slows" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    svgs = {path: path.read_text() for path in (root / "docs" / "assets" / "results").iterdir()}
    studies = [report.Section("small", everything()), report.Section("small/fair", small)]
    assert report.write_page(root, studies).read_text() == page  # the same each time
    assert {path: path.read_text() for path in svgs} == svgs


def test_text_of_a_study_is_no_markup_of_the_page(tmp_path: Path):
    results = made_up.results({"sgd": [[1.0, 0.5]]})
    results = attrs.evolve(results, study=attrs.evolve(results.study, title="a*b* | <b> [c](d)"))
    page = report.write_page(tmp_path, [report.Section("small", results)]).read_text()
    assert r"## a\*b\* \| &lt;b&gt; \[c\](d)" in page


def test_studies_side_by_side_with_other_batch_sizes_are_one_figure(tmp_path: Path):
    results = {size: made_up.results({"sgd": [[1.0, 0.5]]}, batch_size=size) for size in (16, 64)}
    sections = [report.Section(f"sizes/{size}", each) for size, each in results.items()]
    page = report.write_page(tmp_path, sections).read_text()
    assert (tmp_path / "docs/assets/results/sizes-batch-sizes.svg").is_file()
    assert "SGD 8 at 16, 8 at 64" in page
    assert "## Batch sizes" in page
    page = report.write_page(tmp_path, sections[:1]).read_text()
    assert not (tmp_path / "docs/assets/results/sizes-batch-sizes.svg").exists()
    assert "## Batch sizes" not in page


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main([], tmp_path) == 2
    assert "holds no study.json" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study.json").write_text("{")
    assert report.main([str(tmp_path / "results")], tmp_path) == 2
    error = capsys.readouterr().err
    assert "cannot be read" in error
    assert error.count("\n") == 1
    results = attrs.evolve(made_up.results({"sgd": [[1.0]]}), runs=[])
    root = root_with(tmp_path, empty=results)
    assert report.main([str(root / "results" / "empty")], root) == 2
    assert "there is nothing to report" in capsys.readouterr().err


def test_comparisons_are_with_the_first_algorithm_and_with_rivals():
    losses = {name: [[1.0, 0.5]] for name in ("sgd", "kfac", "ekfac")}
    whole = made_up.results(losses)
    rivals = attrs.evolve(whole.study.training, rivals=("kfac", "sgd", "gone"))
    found = list(
        tables.comparisons(attrs.evolve(whole, study=attrs.evolve(whole.study, training=rivals)))
    )
    assert [[table.headings[0], *(row[0] for row in table.rows)] for table in found] == [
        ["against SGD", "K-FAC", "EKFAC"],
        ["against K-FAC", "EKFAC"],
    ]


def test_an_overview_and_sizes_are_figures_and_no_sections(tmp_path: Path):
    whole = made_up.results({"sgd": [[1.0, 0.2]], "kfac": [[1.0, 0.4]]})

    def with_training(**changes: object) -> Results:
        training = attrs.evolve(whole.study.training, **changes)
        return attrs.evolve(whole, study=attrs.evolve(whole.study, training=training))

    root = root_with(tmp_path, a=with_training(overview=("sgd",)))
    for size in (8, 32):
        with_training(batch_size=size, target=0.5).write(root / "results" / "b" / f"batch-{size}")
    assert report.main([], root) == 0
    page = (root / "docs" / "results.md").read_text()
    assert (root / "docs" / "assets" / "results" / "overview.svg").is_file()
    assert re.findall("^## .*", page, re.MULTILINE) == [
        "## Made-up runs",
        "## Batch sizes",
        "## What a step costs",
    ]
    assert "| algorithm | batches of 8 | batches of 32 |" in page
    assert "| K-FAC | 8 steps, 6.00 s | 8 steps, 6.00 s |" in page
