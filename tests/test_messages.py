"""Every message of kfactk stands in docs/errors.md, under the class of its error, with a remedy; and nothing else stands there.

To add one, paste the line that the test prints into a fence ```` ```message ```` of the page, one message a line, and say below it what
somebody is to do who sees it.
"""

import itertools
import re
from pathlib import Path

import attrs

from tests.messages import ERRORS, Message, messages, words

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
LEAST_REMEDY = 6
"""Words that must follow a fence."""

NO_MESSAGES = {  # strings of some words that no user sees as a message
    "through the graph a second time": "part of a message of torch's, looked for",
    "registered in this process": "where a plugin is from",
    "on the model's output": "fills in where a stage failed",
    "on the preconditioned gradients": "fills in where a stage failed",
    "<computed from the other options>": "a default in the list of stages",
    "a tensor of shape …": "fills in what a figure is",
    "Try `pip install -U …`": "fills in a remedy",
    "`pip install -U …` or": "fills in a remedy",
    "Correct it and register it again": "fills in a remedy",
    "Made … with the … …: …Next: …": "no trouble: what new-plugin has made",
    "one process does everything": "a reason of a placement",
    (
        "compute, messages, step: seconds of a mean step; worst step: of one in which everything is due; moved: bytes "
        "of curvature in a mean step, all ranks together; curvature, memory: bytes on the fullest rank, memory at its "
        "peak; *: recommended, the fastest that fits"
    ): "what columns of a table are",
    "…: … parameters, … layers preconditioned, … examples a rank; …, …": "the head of a table",
    "nothing fits into …; … comes nearest with …, of which … are activations. Take a smaller batch, or more ranks.": "advice of a plan",
    "…, … a step and … of …": "advice of a plan",
    "…; the choice of placement matters little": "advice of a plan",
    "…; … takes …, most of the difference in its … (… instead of …)…": "advice of a plan",
    "auto: one rank does everything": "a reason of a placement",
    "the smallest, since none does,": "a reason of a placement",
    "auto: … that keeps within … GB of curvature a rank, by the profile …: …": "a reason of a placement",
    "… (… ms a step, … MB)": "a reason of a placement",
    "decompositions divided among ranks, gradients preconditioned by all": "a reason of a placement",
    "each layer belongs to … of … ranks (fraction …)": "a reason of a placement",
    "each layer belongs to one rank": "a reason of a placement",
    "every rank does all": "a reason of a placement",
    "python -m kfactk stages --family …": "a command that is told",
}


@attrs.frozen
class Fence:
    """The messages of one fence, the error class of its section, and what follows it up to the next fence or heading."""

    lines: list[str]
    section: str
    remedy: str
    line: int


def fences(text: str) -> list[Fence]:
    found: list[Fence] = []
    section, inside = "", False
    for number, line in enumerate(text.splitlines(), start=1):
        if inside and line != "```":
            found[-1].lines.append(line)
        elif line.startswith("```"):
            inside = line == "```message"
            if inside:
                found.append(Fence([], section, "", number))
        elif line.startswith("#"):
            section = line.removeprefix("## ").strip("`") if line.startswith("## ") else section
            if found:
                found[-1] = attrs.evolve(found[-1], remedy=found[-1].remedy + "\n")
        elif found and not found[-1].remedy.endswith("\n"):
            found[-1] = attrs.evolve(found[-1], remedy=f"{found[-1].remedy} {line}")
    return found


def told() -> list[Message]:
    """All messages and phrases. Laws tell what a stage breaks by themselves: of `kfactk.testing` only its errors are listed."""
    files = [
        path
        for package in (ROOT / "kfactk", ROOT / "plugins" / "kfactk_stages")
        for path in sorted(package.rglob("*.py"))
        if "templates" not in path.parts
    ]
    return [
        message for path in files for message in messages(path, phrases="testing" not in path.parts)
    ]


MESSAGES = told()
FENCES = fences(PAGE.read_text())
LISTED = {(fence.section, line) for fence in FENCES for line in fence.lines}


def test_messages_are_found() -> None:
    found = {(message.kind, message.text) for message in MESSAGES}
    assert (
        "CaptureError",
        "output= found … in what the model returned; it must find a tensor.",
    ) in found  # an error's f-string
    assert ("KfactkWarning", "… (said once)") in found  # a warning
    assert ("", "it could not be imported: …") in found  # a phrase on its way into an error
    assert {kind for kind, _ in found} >= ERRORS - {"UnknownStageError"} | {""}
    assert len(MESSAGES) > 200


def test_every_message_is_listed() -> None:
    anywhere = {line for _, line in LISTED}
    missing = []
    for message in MESSAGES:
        listed = (
            (message.kind, message.text) in LISTED if message.kind else message.text in anywhere
        )
        if not listed and message.text not in NO_MESSAGES:
            missing.append(
                f"{message.where}, {f'## `{message.kind}`' if message.kind else 'where it belongs'}:\n{message.text}"
            )
    text = "\n".join(dict.fromkeys(missing))
    assert not missing, (
        f"docs/errors.md lacks {len(missing)} messages; add each to a ```message fence with a remedy below it:\n{text}"
    )


def test_nothing_is_listed_that_nobody_says() -> None:
    said = {message.text for path in _sources() for message in messages(path, least=1)}
    stale = [
        f"line {fence.line}: {line}" for fence in FENCES for line in fence.lines if line not in said
    ]
    assert not stale, "docs/errors.md lists what kfactk does not say (any more):\n" + "\n".join(
        stale
    )


def test_every_message_has_a_remedy() -> None:
    """Below its fence, of some words, and not the same words as elsewhere."""
    short = [fence.line for fence in FENCES if words(fence.remedy) < LEAST_REMEDY]
    assert not short, f"docs/errors.md: fences without a remedy below them, at lines {short}"
    again = [
        (a.line, b.line)
        for a, b in itertools.combinations(FENCES, 2)
        if a.remedy.strip() == b.remedy.strip()
    ]
    assert not again, f"docs/errors.md: the same remedy twice, at lines {again}"


def test_every_class_of_errors_has_a_section() -> None:
    missing = [
        name for name in ERRORS if not re.search(rf"^## `{name}`$", PAGE.read_text(), re.MULTILINE)
    ]
    assert not missing, f"docs/errors.md has no section on {missing}"


def test_what_is_no_message_is_there() -> None:
    gone = NO_MESSAGES.keys() - {message.text for message in MESSAGES}
    assert not gone, f"NO_MESSAGES excuses strings that are gone: {gone}"


def _sources() -> list[Path]:
    return [
        path
        for package in ("kfactk", "plugins/kfactk_stages")
        for path in (ROOT / package).rglob("*.py")
    ]
