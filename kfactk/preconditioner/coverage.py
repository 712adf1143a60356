"""Which parameters are preconditioned, by which block, or why not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence

import attrs
from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfactk.errors import OptionError, near_names
from kfactk.preconditioner.parameters import ParameterTracker
from kfactk.stages import Curvature, Layer
from kfactk.validation import attribute_errors


@attrs.frozen
class Row:
    """One parameter.

    Args:
        parameter: Its qualified name in the model.
        shape: Its shape.
        block: Name of the layer whose block preconditions it; `None` when its plain gradient goes to the update rule.
        reason: Why it has no block; empty when it has one.
        trained: Whether the optimizer trains it now.
    """

    parameter: str
    shape: tuple[int, ...]
    block: str | None
    reason: str
    trained: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@attrs.frozen
class Coverage:
    """Every parameter of a model with its block; prints as a table.

    Example:
        >>> row = Row("0.weight", (2, 3), "0", "", True)
        >>> print(Coverage((row,)))
        parameter  shape  preconditioned by
        0.weight   2x3    block 0
        1 of 1 parameters preconditioned (6 of 6 elements, 100.0%)
    """

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the preconditioned parameters."""
        return tuple(row.parameter for row in self.rows if row.block is not None)

    @property
    def plain(self) -> tuple[str, ...]:
        """Names of the trained parameters whose plain gradient goes to the update rule."""
        return tuple(row.parameter for row in self.rows if row.block is None and row.trained)

    def __str__(self) -> str:
        head = ("parameter", "shape", "preconditioned by")
        body = [
            (
                row.parameter,
                "x".join(map(str, row.shape)) or "scalar",
                f"block {row.block or '(root)'}"
                if row.block is not None
                else f"{'-' if row.trained else 'not trained'}: {row.reason}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in (0, 1)]
        lines = [
            f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {block}"
            for name, shape, block in [head, *body]
        ]
        covered, total = (
            [row for row in self.rows if row.block is not None],
            sum(row.numel for row in self.rows),
        )
        size = sum(row.numel for row in covered)
        share = f"{size} of {total} elements, {100 * size / max(total, 1):.1f}%"
        return "\n".join(
            [*lines, f"{len(covered)} of {len(self.rows)} parameters preconditioned ({share})"]
        )


@attrs.frozen(eq=False)
class CoveredLayer(Layer):
    """A layer whose parameters are those that are trained, also while a wrapper has put others in their place.

    Args:
        originals: Knows them.
        held: The parameters themselves, where they were looked up once and for all.
    """

    originals: ParameterTracker = attrs.field(kw_only=True)
    held: dict[str, nn.Parameter] | None = None

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters themselves, by name."""
        if self.held is not None:
            return self.held
        at, module = self.originals.at, self.module
        return {
            name: parameter
            for name in self.parameters
            if (parameter := at(module, name)) is not None
        }

    def hold(self) -> CoveredLayer:
        """The same layer, for a time in which no parameter is replaced: they are looked up now."""
        return CoveredLayer(
            self.name,
            self.module,
            self.parameters,
            originals=self.originals,
            held=self.tensors(),
        )


class ModelSurvey:
    """What a curvature can make of a model: the candidate layers, and the reasons for the rest.

    Structure (module types, shared parameters) is looked at once; what is trained is asked anew each time, since layers may be frozen and
    unfrozen while training.

    Args:
        model: The model.
        curvature: Its stage.
        exclude: Shell-style patterns of module names; a layer is left alone where one matches its name or that of a module it is in.

    Raises:
        OptionError: A pattern matches nothing.
    """

    def __init__(self, model: nn.Module, curvature: Curvature, exclude: Sequence[str] = ()) -> None:
        self.model = model
        self.originals = ParameterTracker(model)
        self._candidates: list[tuple[str, nn.Module]] = []
        self._why_not: dict[str, str] = {}
        owners: dict[int, set[str]] = {}
        modules = list(model.named_modules())
        for pattern in exclude:
            if not any(_within(name, pattern) for name, _ in modules):
                names = [name for name, _ in modules if name]
                raise OptionError(
                    f"exclude={pattern!r} matches no module of the model.{near_names(pattern, names)} Its modules are: "
                    f"{', '.join(names[:12])}{' ...' if len(names) > 12 else ''}."
                )
        for name, module in modules:
            for parameter_name, parameter in module.named_parameters(
                recurse=False, remove_duplicate=False
            ):
                owners.setdefault(id(parameter), set()).add(_join(name, parameter_name))
        for name, module in modules:
            own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            if not own:
                continue
            excluded = next((pattern for pattern in exclude if _within(name, pattern)), None)
            with attribute_errors("curvature", curvature, f"on module {name!r}"):
                reason = (
                    curvature.unsupported(module)
                    if excluded is None
                    else f"excluded (exclude={excluded!r})"
                )
            tied = sorted(
                set().union(*(owners[id(parameter)] for parameter in own.values()))
                - {_join(name, key) for key in own}
            )
            if reason is None and tied:
                reason = f"tied: it shares a parameter with {', '.join(tied)}"
            if reason is None:
                self._candidates.append((name, module))
            for key in own:
                self._why_not[_join(name, key)] = reason or ""

    def layers(self, trained: Callable[[nn.Parameter], bool]) -> list[CoveredLayer]:
        """The layers whose weight is trained now, in the model's order."""
        found, at = [], self.originals.at
        for name, module in self._candidates:
            held = {}
            for key in ("weight", "bias"):
                parameter = at(module, key)
                if parameter is not None and parameter.requires_grad and trained(parameter):
                    held[key] = parameter
            if "weight" in held:
                found.append(CoveredLayer(name, module, tuple(held), originals=self.originals))
        return found

    def coverage(self, trained: Callable[[nn.Parameter], bool]) -> Coverage:
        """The table, by what is trained now."""
        block = {
            _join(layer.name, key): layer.name
            for layer in self.layers(trained)
            for key in layer.parameters
        }
        rows = []
        for name, _ in self.model.named_parameters():
            owner, _, key = name.rpartition(".")
            parameter = self.originals.at(self.model.get_submodule(owner), key)
            assert parameter is not None
            wanted = parameter.requires_grad and trained(parameter)
            if name in block:
                reason = ""
            elif not parameter.requires_grad:
                reason = "frozen (requires_grad is False)"
            elif not trained(parameter):
                reason = "not among the optimizer's parameters"
            else:
                reason = self._why_not.get(name) or "the layer's weight is not trained"
            shape = () if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)
            rows.append(Row(name, shape, block.get(name), reason, wanted))
        return Coverage(tuple(rows))


def _within(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1)
    )


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
