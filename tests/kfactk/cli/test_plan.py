"""`python -m kfactk plan`: its table, its advice, its JSON and its errors; and that the documentation shows what it prints."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfactk.__main__ import main
from kfactk.cli.plan import model_on_meta
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import A100, H100
from kfactk.recipe import build

ROOT = Path(__file__).parents[3]


class Small(nn.Module):
    """Named by the command; it refuses to hold numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        assert all(parameter.is_meta for parameter in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Elsewhere(nn.Module):
    """Some of it is put on the processor whatever the default is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def nothing() -> None:
    """Makes no model."""


SMALL = f"{__name__}:Small"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Small.__module__])


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                "--model",
                SMALL,
                "--input",
                "64",
                "--ranks",
                "1,4",
                "--basis",
                "kfac",
                "--factor-every",
                "5",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == f"{SMALL}: 2,410 parameters, 2 layers preconditioned, 32 examples a rank; h100, tf32"
    )
    assert lines[1] == "kfactk.build(basis='kfac', factor_every=5)"
    assert (
        " ".join(lines[3].split())
        == "ranks placement compute messages step worst step moved curvature memory fits"
    )
    body = [line for line in lines[4:] if re.match(r"\*? +[14]  ", line)]
    names = [re.match(r"\*? +\d  (\w+)", line)[1] for line in body]  # type: ignore[index]
    assert names == ["auto", "comm_opt", "hybrid", "mem_opt", "replicated"] * 2
    assert sum(line.startswith("*") for line in body) == 2
    assert any(line.startswith("1 rank: ") for line in lines)
    assert any(line.startswith("4 ranks: ") for line in lines)
    assert max(map(len, lines)) <= 110


def test_json_holds_what_the_table_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(
        capsys,
        "--model",
        SMALL,
        "--input",
        "64",
        "--ranks",
        "2",
        "--batch",
        "8",
        "--placement",
        "mem_opt",
    )
    assert (found["machine"]["name"], found["precision"]) == ("h100", "tf32")
    (row,) = found["rows"]
    assert (row["ranks"], row["placement"], row["strategy"], row["fits"], row["recommended"]) == (
        2,
        "mem_opt",
        "mem_opt",
        True,
        True,
    )
    parts = {**row["compute"], **row["communication"]}
    assert row["seconds"] == pytest.approx(sum(part["mean"] for part in parts.values()))
    assert row["worst_seconds"] == pytest.approx(sum(part["worst"] for part in parts.values()))
    # by hand: layers of A 65^2, G 32^2 and A 33^2, G 10^2, each of one rank, in float32
    big = 65**2 + 32**2 + 65 * 65 + 65 + 32 * 32 + 32 + 32 * 65
    small = 33**2 + 10**2 + 33 * 33 + 33 + 10 * 10 + 10 + 10 * 33
    assert sorted(row["held"]) == [4 * small, 4 * big]
    assert row["moved"]["gradients"] == 4 * (32 * 65 + 10 * 33)
    assert (
        row["memory"]["model"] == 4 * (32 * 65 + 10 * 33) * 4
    )  # weights, gradients, and two of Adam


def test_the_fastest_that_fits_is_recommended(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, "--model", SMALL, "--input", "64", "--ranks", "4,16")["rows"]
    for ranks in (4, 16):
        mine = [row for row in rows if row["ranks"] == ranks]
        (best,) = [row for row in mine if row["recommended"]]
        assert (
            best["seconds"]
            == min(row["seconds"] for row in mine)
            < max(row["seconds"] for row in mine)
        )


def test_options_reach_recipe_and_placement(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        SMALL,
        "--input",
        "64",
        "--ranks",
        "4",
        "--update",
        "sgd",
        "--fisher",
        '{"name": "mc", "samples": 3}',
    ]
    half, whole = (
        planned(
            capsys,
            *arguments,
            "--placement",
            f'{{"name": "hybrid", "fraction": 0.5, "wire_dtype": {wire}}}',
        )["rows"][0]
        for wire in ('"bfloat16"', "null")
    )
    assert sum(half["moved"].values()) == pytest.approx(sum(whole["moved"].values()) / 2)
    assert whole["placement"].endswith("2 hold")
    assert whole["memory"]["model"] == 4 * (32 * 65 + 10 * 33) * 2
    once = planned(capsys, *arguments[:-2], "--placement", "replicated")["rows"][0]
    thrice = planned(capsys, *arguments, "--placement", "replicated")["rows"][0]
    assert thrice["compute"]["Fisher pass"]["worst"] == pytest.approx(
        3 * once["compute"]["Fisher pass"]["worst"]
    )


def test_layers_can_be_left_alone_and_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", SMALL, "--input", "64", "--placement", "replicated"]
    plain = planned(capsys, *arguments)["rows"][0]
    without = planned(capsys, *arguments, "--exclude", "net.0")["rows"][0]
    turns = planned(capsys, *arguments, "--stagger")["rows"][0]
    assert without["held"][0] < plain["held"][0]
    assert turns["compute"]["decomposition"]["mean"] == pytest.approx(
        plain["compute"]["decomposition"]["mean"]
    )
    assert turns["compute"]["decomposition"]["worst"] < plain["compute"]["decomposition"]["worst"]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                "--model",
                SMALL,
                "--input",
                "64",
                "--batch",
                "100000000",
                "--placement",
                "replicated",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert re.search(r"\n +1  replicated .* no\n", out)
    assert re.search(
        r"1 rank: nothing fits into 80 GB; replicated comes nearest with [\d.]+ [GT]B,\s+of\s+which",
        out,
    )
    assert "Take a smaller batch, or more ranks." in out


def test_this_machine_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(
        capsys, "--model", SMALL, "--input", "64", "--calibrate", "--placement", "replicated"
    )
    assert (found["machine"]["name"], found["machine"]["kind"], found["precision"]) == (
        "this machine",
        "cpu",
        "float32",
    )


def test_nothing_is_allocated() -> None:
    for name in (SMALL, f"{__name__}:Elsewhere", "resnet18"):
        assert all(
            tensor.is_meta
            for tensor in (*model_on_meta(name).parameters(), *model_on_meta(name).buffers())
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", SMALL],
            r"plan needs the shape of one example for a model of your own: give --input 3x224x224",
        ),
        (["--model", "resnet51"], r"torchvision has no model 'resnet51'\. Did you mean 'resnet50'"),
        (["--model", f"{__name__}:Smal", "--input", "64"], "Smal"),
        (
            ["--model", f"{__name__}:nothing", "--input", "64"],
            "nothing' gave NoneType; name a function or class that gives a torch.nn.Module",
        ),
        (
            ["--model", SMALL, "--input", "64", "--device", "h1000"],
            "there is no machine profile 'h1000'",
        ),
        (
            ["--model", SMALL, "--input", "64", "--precision", "int8"],
            "has no rate for the precision 'int8'",
        ),
        (["--model", SMALL, "--input", "64", "--placement", "mem_op"], "mem_op"),
        (
            ["--model", SMALL, "--input", "64", "--basis", '{"name": '],
            r"is no JSON \(.*\); write a stage with options as",
        ),
        (
            ["--model", SMALL, "--input", "63"],
            r"could not be run without data, .* shape \(32, 63\)",
        ),
    ],
)
def test_arguments_that_cannot_be_used(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(said, refused(capsys, *arguments))


def test_torchvision_may_be_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    said = refused(capsys, "--model", "resnet50")
    assert "the model 'resnet50' would be torchvision's, which cannot be imported" in said
    assert "name a model of your own as package.module:callable" in said


@pytest.mark.parametrize("ranks", ["0", "1,x", "", "-2"])
def test_ranks_are_counts(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--model", SMALL, "--ranks", ranks])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_resnet50_is_what_its_paper_and_nvidia_say() -> None:
    """4.1 GFLOP multiply-adds a forward (torchvision's figure is 4.09), 25.6 million parameters; on an A100, NVIDIA measured 938 images a
    second in TF32 and 2470 in mixed precision, with kernels of another memory layout: the model is to be within a third."""
    job = training_load(model_on_meta("resnet50"), build(), meta_batch("3x224x224", 256))
    assert job.parameters == 25_557_032
    forward = 4.09e9 * 2
    images_want_no_gradient = 2 * 112 * 112 * 64 * 147
    assert (job.step.products + job.step.convolutions) / 256 == pytest.approx(
        3 * forward - images_want_no_gradient, rel=0.01
    )
    for precision, measured in (("tf32", 938), ("bfloat16", 2470)):
        assert 256 / job.step.seconds(A100, precision) == pytest.approx(measured, rel=1 / 3)
    assert job.step.seconds(H100, "tf32") < job.step.seconds(A100, "tf32")


def shown() -> list[tuple[str, str]]:
    """Commands of docs/scaling.md, each with the block of text that follows it."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = re.findall(
        r"```console\n(python -m kfactk plan [^\n]*(?:\\\n[^\n]*)*)\n```\n\n```text\n(.*?)```",
        page,
        re.DOTALL,
    )
    return [(command, text) for command, text in found]


def test_the_documentation_shows_tables() -> None:
    assert len(shown()) >= 2


@pytest.mark.parametrize(("command", "text"), shown())
def test_tables_of_the_documentation_are_what_the_command_prints(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    assert main(shlex.split(command.replace("\\\n", " "))[3:]) == 0
    assert capsys.readouterr().out == text
