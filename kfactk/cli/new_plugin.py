"""A plugin package to start from: names derived from one, and files filled in from the templates that come with kfactk.

Everything is checked and written beside the target first and moved there in one step, so a failure leaves nothing behind and nothing
that exists is ever overwritten.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import keyword
import re
import tempfile
from pathlib import Path
from string import Template

import attrs

from kfactk._version import __version__
from kfactk.errors import OptionError
from kfactk.registry.hookspecs import PROJECT
from kfactk.registry.inspection import PROTOCOLS, StageInfo
from kfactk.registry.loading import normal_name
from kfactk.registry.registry import Registry

LAWS = {family: f"{protocol.__name__}Laws" for family, protocol in PROTOCOLS.items()}
"""Family to its class of laws in `kfactk.testing`."""
FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    ".gitignore": "gitignore",
    "{module}.py": "{family}.py",
    "test_{module}.py": "test_{family}.py",
}
"""File of a package to the template it is made from, both with the package's names to be filled in."""
SUFFIX = ".template"
LONGEST = 60
"""Most characters that a name may have, so that the names of files made of it fit everywhere."""


@attrs.frozen
class Package:
    """The names in a plugin package of one stage.

    Args:
        distribution: Its name, normalised.
        family: The stage's family.

    Example:
        >>> package = Package("kfactk-trust-region", "clip")
        >>> package.module, package.stage, package.class_name
        ('kfactk_trust_region', 'trust_region', 'TrustRegionClip')
    """

    distribution: str
    family: str

    @property
    def module(self) -> str:
        """Its one module."""
        return self.distribution.replace("-", "_")

    @property
    def stage(self) -> str:
        """The stage's name: the distribution's without `kfactk-`."""
        return self.module.removeprefix(f"{PROJECT}_")

    @property
    def class_name(self) -> str:
        """The stage's class, which ends with its family: no keyword, and no name that its module imports."""
        words = "".join(word.capitalize() for word in self.stage.split("_"))
        ending = PROTOCOLS[self.family].__name__
        return words if words.endswith(ending) else words + ending

    def files(self) -> dict[str, str]:
        """Text of every file by its name."""
        names = {
            "distribution": self.distribution,
            "module": self.module,
            "family": self.family,
            "stage": self.stage,
            "Class": self.class_name,
            "Laws": LAWS[self.family],
            "needs": __version__,
        }
        folder = importlib.resources.files(__package__) / "templates"
        made = {}
        for file, template in FILES.items():
            source = folder / (template.format(family=self.family) + SUFFIX)
            text = Template(source.read_text(encoding="utf-8")).substitute(names)
            made[file.format(module=self.module)] = text
        return made


def new_plugin(name: str, family: str, directory: Path, known: Registry) -> tuple[Package, Path]:
    """Write a package with one stage that works and the laws it obeys.

    Args:
        name: The distribution's name, such as "kfactk-diagonal".
        family: The family of its stage.
        directory: Where its folder is made; exists.
        known: The stages there are, whose names are taken.

    Returns:
        The names, and the folder.

    Raises:
        UnknownStageError: There is no such family.
        OptionError: The name cannot be used, something of the name is there already, or the files cannot be written.

    Example:
        >>> package, folder = new_plugin("kfactk-lion", "update", Path(tempfile.mkdtemp()), Registry())
        >>> sorted(path.name for path in folder.iterdir())
        ['.gitignore', 'README.md', 'kfactk_lion.py', 'pyproject.toml', 'test_kfactk_lion.py']
    """
    stages = known.stages(family)
    package = Package(_normal(name), family)
    target = directory / package.distribution
    if target.exists() or target.is_symlink():
        raise OptionError(
            f"{target} is there already, and nothing of it is overwritten. "
            "Give another name, or another --directory."
        )
    _check_free(package, stages)
    _write(package.files(), target)
    return package, target


def _normal(name: str) -> str:
    """The name as package indexes compare it, checked."""
    normal = normal_name(name)
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", normal) or len(normal) > LONGEST:
        letters = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix(f"{PROJECT}-")
        example = letters if re.match(r"[a-z]", letters) else "diagonal"
        raise OptionError(
            f"{name!r} cannot be the name of a distribution and its module: it must begin with a "
            "letter, end with a letter or digit, and have only ASCII letters, digits and dashes in "
            f"between, {LONGEST} in all. Try {PROJECT}-{example}."
        )
    stage = normal.removeprefix(f"{PROJECT}-")
    if normal == PROJECT or not stage[0].isalpha():
        raise OptionError(
            f"{name!r} leaves no name for the stage, which begins with a letter. "
            f"Give a name such as {PROJECT}-diagonal."
        )
    return normal


def _check_free(package: Package, stages: list[StageInfo]) -> None:
    """Refuse names that something installed has."""
    name, module, taken = package.distribution, package.module, ""
    if keyword.iskeyword(module) or keyword.issoftkeyword(module):
        taken = f"{module!r} is a word of Python and cannot be a module's name"
    elif importlib.util.find_spec(module) is not None:
        taken = f"a module {module!r} can be imported already, and one would hide the other"
    elif module == name:
        taken = "its folder would have the name of its module, and hide it from a Python run there"
    elif module.startswith(("test_", "conftest")):
        taken = f"pytest would take the module {module!r} for one of its own"
    elif any(importlib.metadata.distributions(name=name)):
        taken = f"a distribution {name!r} is installed already"
    if taken:
        prefixed = name.startswith(f"{PROJECT}-")
        other = f"{name}-{package.family}" if prefixed else f"{PROJECT}-{name}"
        raise OptionError(f"{name!r} cannot be used: {taken}. Give another name, such as {other}.")
    if rival := next((info for info in stages if info.name == package.stage), None):
        raise OptionError(
            f"There is a {package.family} {package.stage!r} already, of "
            f"{rival.distribution or rival.plugin}: with two of a name neither could be used. "
            f"Give another name, such as {name}-2."
        )


def _write(files: dict[str, str], target: Path) -> None:
    """Make the folder with all of its files, or nothing."""
    try:
        with tempfile.TemporaryDirectory(prefix=".kfactk-", dir=target.parent) as staging:
            whole = Path(staging) / target.name
            whole.mkdir()
            for name, text in files.items():
                (whole / name).write_text(text, encoding="utf-8", newline="\n")
            whole.rename(target)
    except OSError as error:
        raise OptionError(
            f"{target} cannot be made: {error.strerror or error}. "
            f"Give a --directory that exists, can be written and lacks {target.name}."
        ) from error
