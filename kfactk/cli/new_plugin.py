"""Write a plugin package to start from: derive its names from one, and fill in templates.

All files are written to a temporary folder beside the target, which is then renamed. So a failure
leaves nothing behind, and nothing is overwritten.
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
"""By family, the class of its laws in `kfactk.testing`."""
FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    ".gitignore": "gitignore",
    "{module}.py": "{family}.py",
    "test_{module}.py": "test_{family}.py",
}
"""By file of the package, its template; names of the package are filled into both."""
SUFFIX = ".template"
MAX_LENGTH = 60
"""Largest number of characters of a name, so that file names made of it fit everywhere."""


@attrs.frozen
class Package:
    """The names in a plugin package with one stage.

    Args:
        distribution: Normalised name of the distribution.
        family: Family of the stage.

    Example:
        >>> package = Package("kfactk-trust-region", "clip")
        >>> package.module, package.stage, package.class_name
        ('kfactk_trust_region', 'trust_region', 'TrustRegionClip')
    """

    distribution: str
    family: str

    @property
    def module(self) -> str:
        """Name of its module."""
        return self.distribution.replace("-", "_")

    @property
    def stage(self) -> str:
        """Name of the stage: that of the distribution without `kfactk-`."""
        return self.module.removeprefix(f"{PROJECT}_")

    @property
    def class_name(self) -> str:
        """Name of the class of the stage.

        It ends with the family, so it is no keyword and no name that the module imports.
        """
        words = "".join(word.capitalize() for word in self.stage.split("_"))
        ending = PROTOCOLS[self.family].__name__
        return words if words.endswith(ending) else words + ending

    def files(self) -> dict[str, str]:
        """Return the text of every file, by name."""
        names = {
            "distribution": self.distribution,
            "module": self.module,
            "family": self.family,
            "stage": self.stage,
            "Class": self.class_name,
            "Laws": LAWS[self.family],
            "needs": __version__,
        }
        folder = importlib.resources.files(f"{PROJECT}.cli") / "templates"
        texts = {}
        for file, template in FILES.items():
            path = folder / (template.format(family=self.family) + SUFFIX)
            text = Template(path.read_text(encoding="utf-8")).substitute(names)
            texts[file.format(module=self.module)] = text
        return texts


def new_plugin(name: str, family: str, directory: Path, known: Registry) -> tuple[Package, Path]:
    """Write a package with one stage that works, and with the tests of its laws.

    Args:
        name: Name of the distribution, such as "kfactk-diagonal".
        family: Family of its stage.
        directory: The folder to make the package's folder in; it exists.
        known: The registry whose names are taken.

    Returns:
        The names, and the folder.

    Raises:
        UnknownStageError: There is no such family.
        OptionError: The name cannot be used, the folder exists, or the files cannot be written.

    Example:
        >>> directory = Path(tempfile.mkdtemp())
        >>> package, folder = new_plugin("kfactk-lion", "update", directory, Registry())
        >>> sorted(path.name for path in folder.iterdir())
        ['.gitignore', 'README.md', 'kfactk_lion.py', 'pyproject.toml', 'test_kfactk_lion.py']
    """
    stages = known.stages(family)
    package = Package(_normalise(name), family)
    target = directory / package.distribution
    if target.exists() or target.is_symlink():
        raise OptionError(
            f"{target} exists already, and nothing is overwritten. Give another name, or another "
            "--directory."
        )
    _check_free(package, stages)
    _write(package.files(), target)
    return package, target


def _normalise(name: str) -> str:
    """Return the name as package indexes compare it, checked."""
    normal = normal_name(name)
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", normal) or len(normal) > MAX_LENGTH:
        letters = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix(f"{PROJECT}-")
        example = letters if re.match(r"[a-z]", letters) else "diagonal"
        raise OptionError(
            f"{name!r} cannot be the name of a distribution and its module: it must begin with a "
            "letter, end with a letter or digit, and have only ASCII letters, digits and dashes in "
            f"between, at most {MAX_LENGTH} characters. Try {PROJECT}-{example}."
        )
    stage = normal.removeprefix(f"{PROJECT}-")
    if normal == PROJECT or not stage[0].isalpha():
        raise OptionError(
            f"{name!r} leaves no name for the stage, which begins with a letter. Give a name such "
            f"as {PROJECT}-diagonal."
        )
    return normal


def _check_free(package: Package, stages: list[StageInfo]) -> None:
    """Refuse names that are taken.

    Raises:
        OptionError: A module, a distribution or a stage has the name.
    """
    name, module, taken = package.distribution, package.module, ""
    if keyword.iskeyword(module) or keyword.issoftkeyword(module):
        taken = f"{module!r} is a keyword of Python and cannot be the name of a module"
    elif importlib.util.find_spec(module) is not None:
        taken = f"a module {module!r} can be imported already, and one would hide the other"
    elif module == name:
        taken = "its folder would have the name of its module, and hide it from a Python run there"
    elif module.startswith(("test_", "conftest")):
        taken = f"pytest would collect the module {module!r} as a test"
    elif any(importlib.metadata.distributions(name=name)):
        taken = f"a distribution {name!r} is installed already"
    if taken:
        prefixed = name.startswith(f"{PROJECT}-")
        other = f"{name}-{package.family}" if prefixed else f"{PROJECT}-{name}"
        raise OptionError(f"{name!r} cannot be used: {taken}. Give another name, such as {other}.")
    if rival := next((info for info in stages if info.name == package.stage), None):
        raise OptionError(
            f"{rival.distribution or rival.plugin} provides a {package.family} {package.stage!r} "
            "already, and of two stages with one name neither could be used. Give another name, "
            f"such as {name}-2."
        )


def _write(files: dict[str, str], target: Path) -> None:
    """Make the folder with all of its files, or nothing."""
    try:
        with tempfile.TemporaryDirectory(prefix=".kfactk-", dir=target.parent) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8", newline="\n")
            folder.rename(target)
    except OSError as error:
        raise OptionError(
            f"{target} cannot be made: {error.strerror or error}. Give a --directory that exists, "
            f"can be written and does not contain {target.name}."
        ) from error
