"""The command line prints text or JSON, and returns exit codes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfactk._version import __version__
from kfactk.cli import main as command
from kfactk.cli.main import main
from kfactk.registry.loading import DISABLE
from kfactk.registry.registry import Registry
from tests.distributions import CLIP, Site, site as site

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Let every command load only what the site has."""
    monkeypatch.setattr(command, "registry", lambda: Registry.load(site.entry_points()))
    monkeypatch.delenv(DISABLE, raising=False)
    return site


@pytest.fixture
def good(installed: Site) -> Site:
    installed.module(
        "good_plugin", "print('hello from a plugin')\n" + CLIP.format(name="Good", stage="good")
    )
    installed.install("good-dist", {"clip.good": "good_plugin"}, version="2.5")
    return installed


def test_stages_prints_text(good: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stages"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "clip",
        "  good  Divide by a number.",
        "        options: by (required), mode='all'",
        "        from good-dist 2.5 (plugin clip.good)",
        "        paper: Someone et al. 1999, A paper about dividing, arXiv:9901.00001; and another"
        " one 2001",
    ]


def test_stages_prints_json_even_if_a_plugin_prints(
    good: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stages", "--json"]) == 0
    captured = capsys.readouterr()
    (stage,) = json.loads(captured.out)
    assert (stage["family"], stage["name"], stage["distribution"], stage["version"]) == (
        "clip",
        "good",
        "good-dist",
        "2.5",
    )
    assert [
        (option["name"], option["required"], option["default"]) for option in stage["options"]
    ] == [
        ("by", True, None),
        ("mode", False, "all"),
    ]
    assert stage["paper"].startswith("Someone et al. 1999")
    assert captured.err == "hello from a plugin\n"


def test_stages_of_one_family(good: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stages", "--family", "basis", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["stages", "--family", "clip", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_stages_of_an_unknown_family_exits_2_with_near_names(
    good: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stages", "--family", "bases"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Did you mean 'basis'" in captured.err


def test_plugins_prints_text(good: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    assert capsys.readouterr().out == "clip.good  good-dist 2.5  API 1  loaded  clip.good\n"


def test_plugins_with_a_failed_one_exits_1_and_prints_the_error(
    good: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    good.module("bad_plugin", "import no_such_package_at_all")
    good.install("bad-dist", {"bad": "bad_plugin"})
    assert main(["plugins"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "bad        bad-dist 1.0   API ?  failed  -"
    assert lines[1].startswith(
        "    it could not be imported: ModuleNotFoundError: No module named 'no_such_package_at_all"
    )
    assert lines[2] == "clip.good  good-dist 2.5  API 1  loaded  clip.good"
    assert "warning: The kfactk plugin 'bad' (bad-dist 1.0) failed" in captured.err
    assert main(["stages"]) == 0


def test_plugins_prints_json_with_failed_and_blocked_ones(
    good: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good.module("bad_plugin", "1 / 0")
    good.install("bad-dist", {"bad": "bad_plugin"})
    monkeypatch.setenv(DISABLE, "good-dist")
    assert main(["plugins", "--json"]) == 1
    captured = capsys.readouterr()
    assert [(plugin["name"], plugin["status"]) for plugin in json.loads(captured.out)] == [
        ("bad", "failed"),
        ("clip.good", "blocked"),
    ]
    assert "warning:" in captured.err


def test_stages_marks_blocked_and_conflicting_ones(
    good: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("One", "Two"):
        good.module(f"plugin_{name.lower()}", CLIP.format(name=name, stage="shared"))
        good.install(f"dist-{name.lower()}", {name.lower(): f"plugin_{name.lower()}"})
    monkeypatch.setenv(DISABLE, "clip.good")
    assert main(["stages"]) == 0
    out = capsys.readouterr().out
    assert out.count("CONFLICT") == 2
    assert f"  good    BLOCKED by {DISABLE}=clip.good" in out


def test_stages_and_plugins_say_if_nothing_is_installed(
    installed: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stages"]) == 0
    assert "No stage is loaded" in capsys.readouterr().out
    assert main(["plugins"]) == 0
    assert "No plugin is installed" in capsys.readouterr().out


def test_stages_and_plugins_wrap_long_texts(
    installed: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "".join(f"    option_number_{n}: float = {n}.5\n" for n in range(30))
    words = "words " * 40
    source = (
        f"@attrs.frozen\nclass Long:\n    '''{words}'''\n{options}"
        "@hookimpl\ndef kfactk_clips(): return {'long_' * 4: Long}"
    )
    installed.module("long_plugin", source)
    installed.install(
        "long-dist",
        {
            f"a.very.long.name.of.a.plugin.{n}": f"long_plugin{':kfactk_clips' * n}"
            for n in range(2)
        },
    )
    main(["stages"])
    main(["plugins"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "option_number_29=29.5" in "".join(lines)


def test_new_plugin_prints_the_next_commands(
    good: Site, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["new-plugin", "kfactk-mine", "--stage", "clip", "--directory", str(tmp_path)]) == 0
    folder = tmp_path / "kfactk-mine"
    assert capsys.readouterr().out.splitlines() == [
        f"Made {folder} with the clip 'mine':",
        "  .gitignore",
        "  README.md",
        "  kfactk_mine.py",
        "  pyproject.toml",
        "  test_kfactk_mine.py",
        "Next:",
        f"  pip install -e '{folder}[test]'",
        f"  pytest {folder}",
        "  python -m kfactk stages --family clip",
    ]


def test_new_plugin_uses_the_current_folder(
    good: Site, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "kfactk-mine", "--stage", "clip"]) == 0
    assert f"pip install -e '{os.path.join('.', 'kfactk-mine')}[test]'" in capsys.readouterr().out
    assert main(["new-plugin", "kfactk-mine", "--stage", "clip"]) == 2
    assert "kfactk-mine exists already" in capsys.readouterr().err
    assert main(["new-plugin", "kfactk-good", "--stage", "clip"]) == 2
    assert "good-dist provides a clip 'good' already" in capsys.readouterr().err
    assert main(["new-plugin", "kfactk-other", "--stage", "clips"]) == 2
    assert "Did you mean 'clip'" in capsys.readouterr().err


def test_plugins_shows_one_of_another_api(good: Site, capsys: pytest.CaptureFixture[str]) -> None:
    good.module("new_plugin", "kfactk_api = 99")
    good.install("new-dist", {"new": "new_plugin"})
    assert main(["plugins"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split() == [
        "new",
        "new-dist",
        "1.0",
        "API",
        "99",
        "failed",
        "-",
    ]
    assert "it was written for version 99 of the plugin API" in captured.out
    assert "Try `pip install -U kfactk`" in captured.err


def test_main_prints_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"kfactk {__version__}\n"
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_main_tells_of_a_full_disk_on_one_line() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kfactk", "stages"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert done.returncode == 2
    assert done.stderr == "kfactk: the output cannot be written: No space left on device\n"


def test_main_escapes_letters_that_the_terminal_lacks(
    installed: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.module(
        "good_plugin", CLIP.format(name="Good", stage="good").replace("Someone", "Gauß")
    )
    installed.install("good-dist", {"good": "good_plugin"})
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(["stages"]) == 0
    assert b"Gau\\xdf et al. 1999" in out.getvalue()


def test_main_prints_no_traceback_if_the_reader_closes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    call = [sys.executable, "-m", "kfactk", "stages"]
    done = subprocess.run(
        call, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(writing)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
