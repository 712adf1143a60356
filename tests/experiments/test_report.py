import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments import figures, report
from experiments.results import METRICS

VOID = {"meta", "br", "hr", "img", "link"}
ALL = ("sgd", "kfac", "ekfac", "ekfacnag", "ekfacadam", "ekfacradam")


class Page(HTMLParser):
    """Checks that elements are closed in order, and gathers addresses, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
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
        self.addresses += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "data", "action", "srcset")
        ]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def text(made_up, tmp_path: Path) -> str:
    results = made_up({name: [[3.0, 0.5 + i / 10], [2.0, 0.4]] for i, name in enumerate(ALL)})
    report.write(
        tmp_path / "report.html",
        results,
        figures.save_all(results, tmp_path / "figures"),
        [("Again", "run <this> & that")],
    )
    return (tmp_path / "report.html").read_text()


def test_report_loads_nothing(text: str):
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
    assert page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)


def test_report_contains_everything(text: str):
    page = Page(text)
    for label in ("SGD", "K-FAC", "EKFAC", "EKFACnag", "EKFACadam", "EKFACradam"):
        assert label in page.text
    assert page.text.count("against epoch") == len(METRICS)
    for word in (
        "<adam & co>",
        "run <this> & that",
        "made-up images",
        "0.4500±0.0500",
        "kfactk ",
        "torch ",
        "Python 3",
        "slows in the middle",
    ):
        assert word in page.text
    assert "$" not in page.text


def test_report_shows_the_numbers_of_the_thesis(made_up, tmp_path: Path):
    import attrs

    from experiments import config

    results = made_up({"ekfacadam": [[3.0, 0.5]]})
    results = attrs.evolve(
        results,
        experiment=attrs.evolve(
            results.experiment, algorithms=config.load("cifar10-resnet50").algorithms
        ),
    )
    report.write(tmp_path / "report.html", results, {}, [])
    assert "98.31" in Page((tmp_path / "report.html").read_text()).text
