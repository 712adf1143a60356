"""`python -m kfactk plan` prints a table, advice and JSON; the documentation shows its output."""

import json
import re
import shlex
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfactk import Prepared
from kfactk.cli.main import main
from kfactk.cli.plan import model_on_meta
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import A100, H100
from kfactk.recipe import build
from kfactk_stages.link.two_level import TwoLevel

ROOT = Path(__file__).parents[3]


class Small(nn.Module):
    """A model that refuses to have numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        assert all(parameter.is_meta for parameter in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OnCpu(nn.Module):
    """A model with a layer on the CPU, whatever the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def nothing() -> None:
    """Return no model."""


SMALL = f"{__name__}:Small"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Small.__module__])


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def plan_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_plan_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_plan_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(
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
    # By hand: layers with A 65^2, G 32^2 and A 33^2, G 10^2, each on one rank, in float32.
    big = 65**2 + 32**2 + 65 * 65 + 65 + 32 * 32 + 32 + 32 * 65
    small = 33**2 + 10**2 + 33 * 33 + 33 + 10 * 10 + 10 + 10 * 33
    assert sorted(row["held"]) == [4 * small, 4 * big]
    assert row["moved"]["gradients"] == 4 * (32 * 65 + 10 * 33)
    # Weights, gradients, and two numbers of Adam for each.
    assert row["memory"]["model"] == 4 * (32 * 65 + 10 * 33) * 4


def test_plan_recommends_the_fastest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan_json(capsys, "--model", SMALL, "--input", "64", "--ranks", "4,16")["rows"]
    for ranks in (4, 16):
        seconds = [row["seconds"] for row in rows if row["ranks"] == ranks]
        (best,) = [row for row in rows if row["ranks"] == ranks and row["recommended"]]
        assert best["seconds"] == min(seconds) < max(seconds)


def test_plan_passes_options_to_recipe_and_placement(capsys: pytest.CaptureFixture[str]) -> None:
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
        plan_json(
            capsys,
            *arguments,
            "--placement",
            f'{{"name": "hybrid", "fraction": 0.5, "wire_dtype": {wire}}}',
        )["rows"][0]
        for wire in ('"bfloat16"', "null")
    )
    assert sum(half["moved"].values()) == pytest.approx(sum(whole["moved"].values()) / 2)
    assert whole["placement"].endswith("rows of 2")
    assert whole["memory"]["model"] == 4 * (32 * 65 + 10 * 33) * 2
    once = plan_json(capsys, *arguments[:-2], "--placement", "replicated")["rows"][0]
    thrice = plan_json(capsys, *arguments, "--placement", "replicated")["rows"][0]
    assert thrice["compute"]["Fisher pass"]["worst"] == pytest.approx(
        3 * once["compute"]["Fisher pass"]["worst"]
    )


def test_plan_takes_exclude_and_stagger(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", SMALL, "--input", "64", "--placement", "replicated"]
    plain = plan_json(capsys, *arguments)["rows"][0]
    without = plan_json(capsys, *arguments, "--exclude", "net.0")["rows"][0]
    staggered = plan_json(capsys, *arguments, "--stagger")["rows"][0]
    assert without["held"][0] < plain["held"][0]
    one, other = (row["compute"]["decomposition"] for row in (plain, staggered))
    assert other["mean"] == pytest.approx(one["mean"])
    assert other["worst"] < one["worst"]


class Numbered(nn.Module):
    """A numbered block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64))])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](x).relu())


def test_plan_begins_with_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", f"{__name__}:Numbered", "--input", "64", "--placement", "replicated"]
    plain = plan_json(capsys, *arguments)["rows"][0]
    muon = plan_json(capsys, *arguments, "--preset", "transformer")["rows"][0]
    assert muon["held"][0] < plain["held"][0]
    assert main(["plan", *arguments, "--preset", "transformer"]) == 0
    assert "'basis': {'name': 'muon'" in capsys.readouterr().out
    assert "There is no preset 'transfomer'. Did you mean 'transformer'" in plan_error(
        capsys, *arguments, "--preset", "transfomer"
    )


def test_plan_counts_what_a_pace_compares_with(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--model", SMALL, "--input", "64", "--placement", "replicated")
    held = [
        plan_json(capsys, *command, *pace)["rows"][0]["held"][0]
        for pace in ((), ("--pace", "similar"))
    ]
    factors = 65**2 + 32**2 + 33**2 + 10**2  # by hand, in float32; two more sets are kept
    assert held[1] - held[0] == 2 * 4 * factors


def test_plan_bounds_what_a_pace_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """The least is a step without a refresh; with a longest interval it is that of its period."""
    command = ("--model", SMALL, "--input", "64", "--placement", "replicated")
    paces = ('{"name": "similar", "longest": 7}', "similar")
    [bounded], [free] = (plan_json(capsys, *command, "--pace", each)["rows"] for each in paces)
    periods = [f"--{each}-every" for each in ("factor", "scale", "basis")]
    [fixed] = plan_json(capsys, *command, *(arg for each in periods for arg in (each, "70")))[
        "rows"
    ]
    assert bounded["least_seconds"] == pytest.approx(fixed["seconds"])
    steps = ("forward and backward", "update", "preconditioning")
    alone = sum(free["compute"][name]["mean"] for name in steps)
    assert free["least_seconds"] == pytest.approx(alone, rel=1e-6)
    assert free["least_seconds"] < bounded["least_seconds"] < bounded["seconds"]
    assert fixed["least_seconds"] is None
    for pace, words in zip(paces, ("intervals end at 7", "grow without a limit"), strict=True):
        assert main(["plan", *command, "--pace", pace]) == 0
        out = capsys.readouterr().out
        assert words in " ".join(out.split())
        assert re.search(r" us \(\d+ us\) ", out)


class Untold(TwoLevel):
    """A link that prepares something, and tells nothing of it."""

    def prepare(self, layers: Any, statistics: Any) -> Prepared:
        return Prepared({"half": statistics["coarse"] / 2})


def test_plan_says_what_a_link_does_not_tell(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--model", SMALL, "--input", "64", "--placement", "replicated")
    path = f"{Untold.__module__}:Untold"
    found = plan_json(capsys, *command, "--link", path)
    assert len(found["untold"]) == 2
    assert all(path.partition(":")[2] in each for each in found["untold"])
    assert main(["plan", *command, "--link", path]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not told: what it prepares of" in told
    assert "all of these are more" in told
    assert plan_json(capsys, *command, "--link", "two_level")["untold"] == []


def test_plan_refuses_placements_that_a_link_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--model", SMALL, "--input", "64", "--ranks", "2", "--curvature", "kfac")
    chain = ("--basis", "kfac", "--link", "block_tridiagonal")
    rows = plan_json(capsys, *command, *chain)["rows"]
    assert [row["strategy"] for row in rows if not row["refused"]] == ["replicated"]
    assert [row["strategy"] for row in rows if row["recommended"]] == ["replicated"]
    assert main(["plan", *command, *chain]) == 0
    assert "would be refused, as the link joins layers" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *command, *chain, "--placement", "mem_opt"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no: link" in out
    assert "Add --placement replicated" in out
    both = plan_json(capsys, *command, "--link", "two_level")["rows"]
    kept = {row["strategy"] for row in both if not row["refused"]}
    assert kept == {"replicated", "comm_opt"}


def test_plan_counts_controllers_and_lags(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", SMALL, "--input", "64", "--placement", "replicated", "--device", "cpu"]
    command += ["--basis", '{"name": "kfac", "solver": "eigh"}', "--update", "velocity"]
    [plain], [controlled], [lagged] = (
        plan_json(capsys, *command, *more)["rows"]
        for more in ((), ("--controller", "quadratic"), ("--lag", "4"))
    )
    added = controlled["compute"].keys() - plain["compute"].keys()
    assert added == {"quadratic model", "trials of damping", "loss again"}
    assert controlled["memory"]["temporary"] > plain["memory"]["temporary"]
    assert controlled["memory"]["curvature"] == plain["memory"]["curvature"]
    parts = [row["compute"]["decomposition"] for row in (plain, lagged)]
    assert parts[0]["mean"] == parts[1]["mean"]
    assert parts[1]["worst"] < parts[0]["worst"]
    for more, words in (
        (("--controller", "quadratic"), "in a mean step 2.1 forwards with derivatives"),
        (("--lag", "4"), "decompositions run beside 4 steps"),
    ):
        assert main(["plan", *command, *more]) == 0
        assert words in " ".join(capsys.readouterr().out.split())


def test_plan_says_if_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
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
        r"1 rank: nothing fits into 80 GB; replicated comes near.* with [\d.]+ [GT]B,\s+of\s+which",
        out,
    )
    assert "Take a smaller batch, or more ranks." in out


def wide_model() -> nn.Module:
    return nn.Sequential(OrderedDict(fc=nn.Linear(64, 8000), head=nn.Linear(8000, 4)))


def test_plan_says_no_where_a_worst_step_takes_minutes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "--model", f"{__name__}:wide_model", "--input", "64", "--device", "cpu"]
    arguments += ["--placement", "replicated"]
    assert main(arguments) == 0
    assert " no" not in capsys.readouterr().out.split("compute, messages")[0]
    arguments += ["--curvature", '{"name": "conv_kfac", "max_side": 8192}']
    assert main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " no: slow " in out
    assert re.search(r"1 rank: no: a worst step of \d+(\.\d)? min: \w of layer \w+ \(800\d x", out)
    pasted = re.search(r"--curvature '({.*?})'", out)
    assert pasted is not None
    assert "--exclude" in out
    assert "--stagger" in out
    assert main([*arguments, "--curvature", pasted[1]]) == 0
    assert " no" not in capsys.readouterr().out.split("compute, messages")[0]
    assert main([*arguments, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert (row["fits"], row["recommended"]) == (True, False)
    assert "8000" in row["slow"] or "8001" in row["slow"]


def test_plan_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(
        capsys, "--model", SMALL, "--input", "64", "--calibrate", "--placement", "replicated"
    )
    assert (found["machine"]["name"], found["machine"]["kind"], found["precision"]) == (
        "this machine",
        "cpu",
        "float32",
    )


def test_model_on_meta_allocates_nothing() -> None:
    for name in (SMALL, f"{__name__}:OnCpu", "resnet18"):
        assert all(
            tensor.is_meta
            for tensor in (*model_on_meta(name).parameters(), *model_on_meta(name).buffers())
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
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
            r"is no JSON \(.*\); write a stage with options as '\{\"name\"",
        ),
        (
            ["--model", SMALL, "--input", "63"],
            r"could not run without data, .* shape \(32, 63\)",
        ),
    ],
)
def test_plan_refuses_arguments_that_cannot_be_used(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, plan_error(capsys, *arguments))


def test_plan_names_the_remedy_for_missing_torchvision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    message = plan_error(capsys, "--model", "resnet50")
    assert "the model 'resnet50' is one of torchvision, which cannot be imported" in message
    assert "name a model of your own as package.module:callable" in message


@pytest.mark.parametrize("ranks", ["0", "1,x", "", "-2", "99999999999", "1" * 5000])
def test_plan_refuses_ranks_that_are_no_counts(
    ranks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", SMALL, "--ranks", ranks])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "is not a whole number from 1 to 100000" in told
    assert told.count("\n") == 1


ODD_MODELS = """
import torch

def raising(): raise KeyError("x")
def leaving(): raise SystemExit(5)
def needs(argument): return torch.nn.Linear(2, 2)
def fine(): return torch.nn.Linear(4, 3)

class Odd(torch.nn.Module):
    def forward(self, x): raise IndexError("odd")

def odd(): return torch.nn.Sequential(torch.nn.Linear(4, 3), Odd())
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("odd_models:raising", "cannot be made (KeyError: 'x')"),
        ("odd_models:leaving", "cannot be made (SystemExit: 5)"),
        ("odd_models:needs", "missing 1 required positional argument"),
        ("odd_models:odd", "could not run without data"),
        ("odd_models:fine --input 4x99999999999999999999", "more than a tensor can hold"),
        ("odd_models:fine --input 4x9223372036854775807", "more than a tensor can hold"),
        ("odd_models:fine --input " + "9" * 5000, "more than a tensor can hold"),
    ],
)
def test_plan_refuses_what_models_and_sizes_raise(
    arguments: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "odd_models.py").write_text(ODD_MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "--input", "4", "--model", *arguments.split()]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_training_load_of_resnet50_is_close_to_published_numbers() -> None:
    """A forward takes 4.09e9 multiply-adds (torchvision).

    NVIDIA measured 938 images a second in TF32 and 2470 in mixed precision on an A100, with another
    memory layout: the prediction must be within a third.
    """
    load = training_load(model_on_meta("resnet50"), build(), meta_batch("3x224x224", 256))
    assert load.parameters == 25_557_032
    forward = 4.09e9 * 2
    without_input_gradient = 2 * 112 * 112 * 64 * 147
    assert (
        load.forward_backward.products + load.forward_backward.convolutions
    ) / 256 == pytest.approx(3 * forward - without_input_gradient, rel=0.01)
    for precision, measured in (("tf32", 938), ("bfloat16", 2470)):
        assert 256 / load.forward_backward.seconds(A100, precision) == pytest.approx(
            measured, rel=1 / 3
        )
    assert load.forward_backward.seconds(H100, "tf32") < load.forward_backward.seconds(A100, "tf32")


def documented() -> list[tuple[str, str]]:
    """Return the commands of docs/scaling.md, each with the block of text that follows it."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = re.findall(
        r"```console\n(python -m kfactk plan [^\n]*(?:\\\n[^\n]*)*)\n```\n\n```text\n(.*?)```",
        page,
        re.DOTALL,
    )
    return [(command, text) for command, text in found]


def test_documentation_shows_tables() -> None:
    assert len(documented()) >= 2


@pytest.mark.parametrize(
    ("command", "text"),
    [
        pytest.param(*each, id=str(number), marks=pytest.mark.thorough if number == 1 else ())
        for number, each in enumerate(documented())
    ],
)
def test_documentation_shows_what_plan_prints(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    assert main(shlex.split(command.replace("\\\n", " "))[3:]) == 0
    assert capsys.readouterr().out == text
