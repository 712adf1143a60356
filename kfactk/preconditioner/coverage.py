"""Which parameters are preconditioned, by which block, or why not."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfactk.errors import OptionError, near_names
from kfactk.preconditioner.parameters import ParameterTracker
from kfactk.preconditioner.rules import BlockRule, unwrapped_name, within
from kfactk.stages import Layer, Replay, owner_of, parameter_at
from kfactk.validation import attribute_errors

LARGE_BYTES, LARGE_SECONDS = 2**28, 10.0
"""What the curvature of a block takes at least where its row in a table says it."""


def told_bytes(number: float) -> str:
    """Return a number of bytes in words.

    Example:
        >>> told_bytes(1.34e9), told_bytes(2048)
        ('1.3 GB', '2 kB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.{int(number < 10 * size)}f} {unit}"
    return f"{number / 1e3:.0f} kB" if number >= 500 or not number else "under 1 kB"


def told_seconds(seconds: float) -> str:
    """Return seconds in words.

    Example:
        >>> told_seconds(0.002), told_seconds(12.2), told_seconds(170)
        ('2 ms', '12 s', '2.8 min')
    """
    if seconds >= 90:
        return f"{seconds / 60:.2g} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    if seconds >= 1:
        return f"{seconds:.2g} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 1e-3 else "under 1 ms"


@attrs.frozen
class Row:
    """One parameter.

    Args:
        parameter: Its qualified name in the model.
        shape: Its shape.
        block: Name of the layer whose block preconditions it; `None` when its plain gradient goes
            to the update rule.
        reason: Why it has no block; empty when it has one.
        trained: Whether the optimizer trains it now.
        stages: Names of the block's curvature and basis.
        linked: Name of the link that joins the block with others; empty where none does.
        bytes: Of the block's curvature between steps; `None` where that is not known.
        seconds: Of one decomposition of the block, predicted for one core of a server or an H100;
            `None` where that is not known.
        wide: What stands for its sides that are too wide to be matrices, in words.
    """

    parameter: str
    shape: tuple[int, ...]
    block: str | None
    reason: str
    trained: bool
    stages: str = ""
    linked: str = ""
    bytes: int | None = None
    seconds: float | None = None
    wide: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def cost(self) -> str:
        """What the block's curvature takes, such as "1.3 GB, 2.8 min a decomposition"."""
        size = "" if self.bytes is None else told_bytes(self.bytes)
        time = "" if self.seconds is None else f"{told_seconds(self.seconds)} a decomposition"
        return ", ".join(filter(None, (size, time)))

    @property
    def _large(self) -> bool:
        return (self.bytes or 0) >= LARGE_BYTES or (self.seconds or 0) >= LARGE_SECONDS

    @property
    def treatment(self) -> str:
        """How the parameter is treated, in words."""
        if self.block is not None:
            linked = f"linked by {self.linked}" if self.linked else ""
            cost = self.cost if self.wide or self._large else ""
            parts = [self.stages, linked, *self.wide, cost]
            told = "; ".join(filter(None, parts))
            stages = f" ({told})" if told else ""
            return f"block {self.block or '(root)'}{stages}"
        return f"{'-' if self.trained else 'not trained'}: {self.reason}"


@attrs.frozen
class Coverage:
    """Every parameter of a model with its block; prints as a table.

    Example:
        >>> row = Row("0.weight", (2, 3), "0", "", True, "kfac, ekfac")
        >>> print(Coverage((row,)))
        parameter  shape  preconditioned by
        0.weight   2x3    block 0 (kfac, ekfac)
        1 of 1 parameters preconditioned (6 of 6 elements, 100.0%)

    Args:
        rows: One for each parameter.
        notes: What the recipe does besides, for all blocks together, a line each.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

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
        lines = [("parameter", "shape", "preconditioned by")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            lines.append((row.parameter, shape, row.treatment))
        widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
        table = [f"{n:<{widths[0]}}  {s:<{widths[1]}}  {t}" for n, s, t in lines]
        covered = [row for row in self.rows if row.block is not None]
        total, size = sum(row.numel for row in self.rows), sum(row.numel for row in covered)
        share = f"{size} of {total} elements, {100 * size / max(total, 1):.1f}%"
        table.append(f"{len(covered)} of {len(self.rows)} parameters preconditioned ({share})")
        return "\n".join([*table, *self.notes])


@attrs.frozen(eq=False)
class CoveredLayer(Layer):
    """A layer whose parameters are the trained ones, also while a wrapper has replaced them.

    Args:
        shapes: Shapes of its parameters.
        tracker: Knows the trained parameters.
        held: The parameters, where they were looked up for the time of a step.
    """

    shapes: tuple[torch.Size, ...] = attrs.field(kw_only=True)
    tracker: ParameterTracker = attrs.field(kw_only=True)
    held: dict[str, nn.Parameter] | None = attrs.field(default=None, kw_only=True)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the parameters themselves, by name."""
        if self.held is not None:
            return self.held
        found = {}
        for name in self.parameters:
            if (parameter := self.tracker.at(self.module, name)) is not None:
                found[name] = parameter
        return found

    def hold(self) -> CoveredLayer:
        """Return the same layer for a time in which no parameter is replaced."""
        return attrs.evolve(self, held=self.tensors())

    @property
    def key(self) -> Hashable:
        """What makes it this layer, whatever its name: modules, parameters and their shapes."""
        return self.sites, self.part, self.parameters, self.shapes


@attrs.frozen(eq=False)
class Candidate:
    """A layer that a rule can take, whatever is trained now.

    Args:
        name: The layer's name.
        module: Its module.
        part: Its part of the module.
        shapes: Its parameters by name, the anchor first, with their shapes.
        sites: All modules that hold these parameters.
        rule: The rule that takes it.
        replay: How calls of the module run again, where the layer lies inside.
    """

    name: str
    module: nn.Module
    part: str
    shapes: Mapping[str, torch.Size]
    sites: tuple[nn.Module, ...]
    rule: BlockRule
    replay: Replay | None = None

    @property
    def anchor(self) -> str:
        """Name of its anchor."""
        return next(iter(self.shapes))

    @property
    def path(self) -> str:
        """Its module's name."""
        return self.name.removesuffix(f"[{self.part}]")

    @property
    def place(self) -> tuple[nn.Module, str]:
        """Its module and its part of it."""
        return self.module, self.part

    def layer(self) -> Layer:
        """Return the layer of all its parameters, whatever is trained now."""
        names = tuple(self.shapes)
        return Layer(self.name, self.module, names, self.part, self.sites, self.replay)

    def tensors(self) -> Iterator[nn.Parameter]:
        """Yield its parameters, as they are in the module now."""
        yield from _named(self.module, self.shapes).values()


class ModelSurvey:
    """What the rules make of a model: the candidate layers, and the reasons against the rest.

    The survey follows the model: when modules or parameters are replaced, added, removed or tied,
    the next look examines the model again. What is trained is asked anew each time.

    Args:
        model: The model.
        rules: In order; the first that supports a module takes it.
        exclude: Shell-style patterns of module names whose layers are left alone.

    Raises:
        OptionError: A pattern matches no module.
    """

    def __init__(
        self, model: nn.Module, rules: Sequence[BlockRule], exclude: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.rules, self.exclude = tuple(rules), tuple(exclude)
        self.tracker = ParameterTracker(model)
        names = [name for name, _ in model.named_modules()]
        for pattern in exclude:
            _check_pattern("exclude", pattern, names)
        for rule in rules:
            for pattern in rule.layers:
                _check_pattern("layers", pattern, names)
        self._examined: tuple[int | str, ...] | None = None
        self.candidates: tuple[Candidate, ...] = ()
        self._layers: dict[tuple[Candidate, tuple[str, ...]], CoveredLayer] = {}
        self._why_not: dict[str, str] = {}
        self._left: dict[tuple[nn.Module, str], str] = {}
        self._examine()

    def leave(self, layers: Iterable[Layer], reason: str) -> None:
        """Leave these layers alone from now on.

        Args:
            layers: The layers.
            reason: Why, for the table.
        """
        self._left.update(((layer.module, layer.part), reason) for layer in layers)

    def _examine(self) -> None:
        """Find the candidates, where the model has changed since the last time."""
        if self.tracker.signature == self._examined:
            return
        self._examined = self.tracker.signature
        modules = [(name, module) for name, module in self.model.named_modules() if _own(module)]
        names = {module: name for name, module in modules}
        owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for name, module in modules:
            for key, parameter in _own(module).items():
                owners.setdefault(id(parameter), []).append((name, module, key))
        candidates: list[Candidate] = []
        self._why_not = {}
        taken: set[nn.Module] = set()
        inside: set[tuple[nn.Module, str]] = set()
        for name, module in modules:
            if all((module, key) in inside for key in _own(module)):
                continue
            rule, reason = self._rule_for(name, module)
            if rule is not None and rule.of_gradient:
                rule = None  # it takes what is left of all modules, below
            parts = {} if rule is None else self._parts(name, module, rule)
            sites: tuple[nn.Module, ...] = (module,)
            apart: dict[str, tuple[nn.Module, ...]] = {}
            if rule is not None:
                sites, reason = self._sites(name, module, rule, parts, owners)
                if reason or _shares_inside(self.model, module, parts):
                    apart = self._sites_apart(module, rule, parts, owners)
            if rule is not None and apart:
                reason = ""
                for part, own in apart.items():
                    if own[0] is module:
                        candidates += self._candidates(name, module, rule, {part: parts[part]}, own)
                inside.update(owner_of(module, key) for keys in parts.values() for key in keys)
            elif rule is not None and not reason and module not in taken:
                taken.update(sites)
                candidates += self._candidates(names[sites[0]], module, rule, parts, sites)
                candidates += _beside(module, sites, rule, names, owners)
                for site in sites:
                    inside.update(owner_of(site, key) for keys in parts.values() for key in keys)
            for key in _own(module):
                self._why_not[_join(name, key)] = reason
        for candidate in candidates:
            for site in candidate.sites:
                beside = f"the {candidate.anchor} beside it is tied, in block {candidate.name!r}"
                for key in _own(site):
                    reason = "" if key in _own(candidate.module) else beside
                    self._why_not[_join(names[site], key)] = reason
        candidates += self._rest(modules, candidates)
        order = {module: place for place, (_, module) in enumerate(modules)}
        candidates.sort(key=lambda candidate: order[candidate.module])
        self.candidates = tuple(candidates)
        self._layers.clear()

    def _excluded(self, name: str) -> str:
        """Return why a module is left alone; empty where it is not."""
        patterns = (pattern for pattern in self.exclude if within(name, pattern))
        return next((f"excluded (exclude={pattern!r})" for pattern in patterns), "")

    def _unsupported(self, rule: BlockRule, name: str, module: nn.Module) -> str | None:
        """Return why a rule's curvature supports nothing of a module, or `None`."""
        with attribute_errors("curvature", rule.curvature, f"on module {name!r}"):
            return rule.curvature.unsupported(module)

    def _parts(self, name: str, module: nn.Module, rule: BlockRule) -> dict[str, tuple[str, ...]]:
        """Return the parts of a module that a rule may take.

        A part with parameters of modules inside is left out where one of these is excluded, or
        belongs to an earlier rule on gradients.
        """
        with attribute_errors("curvature", rule.curvature, f"on module {name!r}"):
            parts = rule.curvature.parts(module)
            for key in (key for keys in parts.values() for key in keys):
                if parameter_at(module, key) is None:
                    raise ValueError(f"parts() names {key!r}, which is no parameter of it")
        earlier = self.rules[: self.rules.index(rule)]

        def elsewhere(key: str) -> bool:
            owner, path = owner_of(module, key)[0], _join(name, key).rpartition(".")[0]
            if owner is module:
                return False
            own_rule, _ = self._rule_for(path, owner)
            of_gradient = own_rule is not None and own_rule.of_gradient
            return bool(self._excluded(path)) or (of_gradient and own_rule in earlier)

        return {part: keys for part, keys in parts.items() if not any(map(elsewhere, keys))}

    def _candidates(
        self,
        name: str,
        module: nn.Module,
        rule: BlockRule,
        parts: Mapping[str, tuple[str, ...]],
        sites: tuple[nn.Module, ...],
    ) -> Iterator[Candidate]:
        """Yield a candidate for each part of a module."""
        with attribute_errors("curvature", rule.curvature, f"on module {name!r}"):
            replay = rule.curvature.replay(module)
        for part, keys in parts.items():
            label = f"{name}[{part}]" if part else name
            shapes = {key: parameter.shape for key, parameter in _named(module, keys).items()}
            yield Candidate(label, module, part, shapes, sites, rule, replay)

    def _of_gradient(
        self, name: str, module: nn.Module, rule: BlockRule
    ) -> list[tuple[Candidate, str | None]]:
        """Return the layers that a rule on gradients makes of a module, and why not, of each."""
        parts = self._parts(name, module, rule)
        made = self._candidates(name, module, rule, parts, (module,))
        return [(each, rule.refuses(each.layer())) for each in made]

    def _rest(
        self, modules: Sequence[tuple[str, nn.Module]], taken: Sequence[Candidate]
    ) -> list[Candidate]:
        """Return what rules on gradients make of the parameters that others have left.

        A gradient is that of all uses of a parameter, so tied parameters are taken once.

        Args:
            modules: By name.
            taken: The layers that there are already.
        """
        held = {id(parameter) for candidate in taken for parameter in candidate.tensors()}
        places = {candidate.place for candidate in taken}
        found: list[Candidate] = []
        modules = [(name, module) for name, module in modules if not self._excluded(name)]
        reasons: dict[str, dict[str, None]] = {
            _join(name, key): {} for name, module in modules for key in _own(module)
        }
        for rule in (rule for rule in self.rules if rule.of_gradient):
            for name, module in modules:
                if not rule.allows(name):
                    continue
                if reason := self._unsupported(rule, name, module):
                    for key in _own(module):
                        reasons[_join(name, key)][reason] = None
                    continue
                for made, refusal in self._of_gradient(name, module, rule):
                    mine = {id(parameter) for parameter in made.tensors()}
                    if mine & held:
                        continue
                    if refusal:
                        reasons[_join(name, made.anchor)][refusal] = None
                        continue
                    if made.place in places:  # another rule's part has this name
                        part = made.anchor
                        made = attrs.evolve(made, name=f"{made.path}[{part}]", part=part)
                    held |= mine
                    places.add(made.place)
                    found.append(made)
        for name, module in modules:
            for key, parameter in _own(module).items():
                path = _join(name, key)
                before = self._why_not.get(path, "")
                known = dict.fromkeys([*([before] if before else []), *reasons[path]])
                self._why_not[path] = "" if id(parameter) in held else "; ".join(known)
        return found

    def _rule_for(self, name: str, module: nn.Module) -> tuple[BlockRule | None, str]:
        """Return the first rule that supports a module, and the reasons of those that do not.

        A rule on gradients supports it where its basis can treat any of its parameters.
        """
        if excluded := self._excluded(name):
            return None, excluded
        reasons: dict[str, None] = {}
        allowing = [rule for rule in self.rules if rule.allows(name)]
        for rule in allowing:
            if reason := self._unsupported(rule, name, module):
                if not rule.of_gradient:  # the others tell theirs for each parameter
                    reasons[reason] = None
            elif not rule.of_gradient:
                return rule, ""
            elif any(not refusal for _, refusal in self._of_gradient(name, module, rule)):
                return rule, "; ".join(reasons)
        return None, "; ".join(reasons) or ("" if allowing else "no block's layers= matches it")

    def _sites(
        self,
        name: str,
        module: nn.Module,
        rule: BlockRule,
        parts: Mapping[str, tuple[str, ...]],
        owners: Mapping[int, Sequence[tuple[str, nn.Module, str]]],
    ) -> tuple[tuple[nn.Module, ...], str]:
        """Return all modules with the same parameters, or why tied modules make no layer."""
        keys = dict.fromkeys([*_own(module), *(key for part in parts.values() for key in part)])
        own = _named(module, keys)
        places = {key: owner_of(module, key) for key in own}
        others: dict[tuple[nn.Module, str], str] = {}
        for key, parameter in own.items():
            for other_name, other, other_key in owners[id(parameter)]:
                if (other, other_key) != places[key]:
                    others[other, other_key] = _join(other_name, other_key)
        if not others:
            return (module,), ""
        tied = f"tied: it shares a parameter with {', '.join(sorted(set(others.values())))}"
        mine = {key: id(parameter) for key, parameter in own.items()}
        if len(set(mine.values())) < len(mine):
            return (module,), tied
        names = {each: path for path, each in self.model.named_modules()}
        direct = {key for key in own if places[key][0] is module}
        alike: dict[nn.Module, bool] = {}
        for other in dict.fromkeys(each for each, key in others if key in direct):
            theirs = {key: id(p) for key, p in _named(other, [*_own(other), *keys]).items()}
            alike[other] = self._rule_for(names[other], other)[0] is rule
            if mine != theirs and (alike[other] or not mine.items() <= theirs.items()):
                return (module,), tied
            if not alike[other] and not self._may_join(rule, names[other], other):
                return (module,), tied
        for other, of_the_rule in alike.items():
            with attribute_errors("curvature", rule.curvature, f"on module {name!r}"):
                same = rule.curvature.same_call(module, other)
            if not same:
                settings = ", of a module with other settings" if of_the_rule else ""
                return (module,), f"{tied}{settings}"
        if not set(others) <= {owner_of(each, key) for each in alike for key in own}:
            return (module,), tied
        order = {id(each): place for place, each in enumerate(self.model.modules())}
        return tuple(sorted([module, *alike], key=lambda site: order[id(site)])), ""

    def _sites_apart(
        self,
        module: nn.Module,
        rule: BlockRule,
        parts: Mapping[str, tuple[str, ...]],
        owners: Mapping[int, Sequence[tuple[str, nn.Module, str]]],
    ) -> dict[str, tuple[nn.Module, ...]]:
        """Return all modules with the same parameters by part, where some parts alone are shared.

        Calls that run again give each product inside with its own numbers, so that modules of one
        class may have other settings. It is empty where a part is shared in another way.
        """
        replay, alike = rule.curvature.replay(module), []
        if replay is None:
            return {}
        for name, other in self.model.named_modules():
            same = type(other) is type(module) and self._rule_for(name, other)[0] is rule
            if same and rule.curvature.replay(other) == replay:
                alike.append((other, self._parts(name, other, rule)))
        found: dict[str, tuple[nn.Module, ...]] = {}
        for part, keys in parts.items():
            own = [id(parameter_at(module, key)) for key in keys]
            found[part] = tuple(
                other
                for other, theirs in alike
                if [id(parameter_at(other, key)) for key in theirs.get(part, ())] == own
            )
            places = {owner_of(site, key) for site in found[part] for key in keys}
            if any((m, key) not in places for each in own for _, m, key in owners[each]):
                return {}
        return found

    def _may_join(self, rule: BlockRule, name: str, module: nn.Module) -> bool:
        """Return whether a module, which another rule may take, may be a site of a rule's layer.

        It may where nobody has asked for something else, and the rule does not take it by itself.
        """
        own_rule, _ = self._rule_for(name, module)
        if self._excluded(name) or not rule.allows(name) or (own_rule and own_rule.layers):
            return False
        return self._unsupported(rule, name, module) is not None

    def layers(self, trained: Container[int]) -> list[tuple[CoveredLayer, BlockRule]]:
        """Return the layers whose anchor is trained now, in the model's order, with their rules.

        Args:
            trained: Ids of the parameters that the optimizer trains.
        """
        self._examine()
        found = []
        for candidate in self.candidates:
            if candidate.place in self._left:
                continue
            names = tuple(
                name
                for name in candidate.shapes
                if self._is_trained(candidate.module, name, trained)
            )
            if names and names[0] == candidate.anchor:
                found.append((self._layer(candidate, names), candidate.rule))
        return found

    def _layer(self, candidate: Candidate, names: tuple[str, ...]) -> CoveredLayer:
        """Return the layer of these parameters; the same one until the model changes."""
        layer = self._layers.get((candidate, names))
        if layer is None:
            layer = self._layers[candidate, names] = CoveredLayer(
                candidate.name,
                candidate.module,
                names,
                candidate.part,
                candidate.sites,
                candidate.replay,
                shapes=tuple(candidate.shapes[name] for name in names),
                tracker=self.tracker,
            )
        return layer

    def _is_trained(self, module: nn.Module, name: str, trained: Container[int]) -> bool:
        parameter = self.tracker.at(module, name)
        return parameter is not None and parameter.requires_grad and id(parameter) in trained

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the model by name, those that are meant; see `tracker`."""
        for name, _ in self.model.named_parameters():
            owner, _, key = name.rpartition(".")
            parameter = self.tracker.at(self.model.get_submodule(owner), key)
            assert parameter is not None
            yield name, parameter

    def candidate_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of all candidate layers by name."""
        self._examine()
        for candidate in self.candidates:
            for key in candidate.shapes:
                if (parameter := self.tracker.at(candidate.module, key)) is not None:
                    yield _join(candidate.path, key), parameter

    def why_not(self, name: str) -> str:
        """Return why a parameter has no block; empty where its layer can have one."""
        return self._why_not.get(name, "")

    def coverage(self, trained: Container[int]) -> Coverage:
        """Return the table, by what is trained now."""
        self.tracker.look()
        blocks = {
            id(parameter): (layer.name, rule.label)
            for layer, rule in self.layers(trained)
            for parameter in layer.tensors().values()
        }
        owners = {
            id(self.tracker.at(candidate.module, key)): candidate
            for candidate in self.candidates
            for key in candidate.shapes
        }
        rows = []
        for name, parameter in self.parameters():
            wanted = parameter.requires_grad and id(parameter) in trained
            if id(parameter) in blocks:
                reason = ""
            elif not parameter.requires_grad:
                reason = "frozen (requires_grad is False)"
            elif id(parameter) not in trained:
                reason = "not among the optimizer's parameters"
            else:
                reason = self._why_not.get(name, "")
                if not reason and (candidate := owners.get(id(parameter))) is not None:
                    untrained = f"the layer's {candidate.anchor} is not trained"
                    reason = self._left.get(candidate.place, untrained)
                reason = reason or "the curvature treats other parameters of its module only"
            shape = () if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)
            block, stages = blocks.get(id(parameter), (None, ""))
            rows.append(Row(name, shape, block, reason, wanted, stages))
        return Coverage(tuple(rows))


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _shares_inside(
    model: nn.Module, module: nn.Module, parts: Mapping[str, tuple[str, ...]]
) -> bool:
    """Return whether a module inside, whose parameters a part has, is in another module too."""
    inner = {owner_of(module, key)[0] for keys in parts.values() for key in keys} - {module}
    return bool(inner) and any(
        child in inner
        for each in model.modules()
        if each is not module
        for child in each.children()
    )


def _beside(
    module: nn.Module,
    sites: Iterable[nn.Module],
    rule: BlockRule,
    names: Mapping[nn.Module, str],
    owners: Mapping[int, Sequence[tuple[str, nn.Module, str]]],
) -> Iterator[Candidate]:
    """Yield the layers of what sites of a module's layer hold besides its parameters.

    A module that contains the site may hold such a parameter too: it leaves its use to the site.
    """
    for site in sites:
        more = {key: p for key, p in _own(site).items() if key not in module._parameters}
        if not more:
            continue
        with attribute_errors("curvature", rule.curvature, f"on module {names[site]!r}"):
            parts = rule.curvature.parts(site)
        for part, keys in parts.items():
            having = [m for key in keys if key in more for _, m, _ in owners[id(more[key])]]
            if more.keys() >= set(keys) and all(site in each.modules() for each in having):
                label, shapes = f"{names[site]}[{part}]", {key: more[key].shape for key in keys}
                yield Candidate(label, site, part, shapes, (site,), rule)


def _named(module: nn.Module, keys: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of these names, those of modules inside too; without absent ones."""
    found = ((key, parameter_at(module, key)) for key in keys)
    return {key: parameter for key, parameter in found if parameter is not None}


def _check_pattern(option: str, pattern: str, names: Iterable[str]) -> None:
    """Check that a pattern matches a module.

    Raises:
        OptionError: It matches none.
    """
    names = list(names)
    if any(within(name, pattern) for name in names):
        return
    inside = list(filter(None, dict.fromkeys(map(unwrapped_name, names))))
    preset = OF_A_PRESET if option == "layers" else ""
    if not inside:
        raise OptionError(
            f"{option}={pattern!r} matches no module of the model, which is a single one, without "
            f"names inside: leave it out.{preset}"
        )
    raise OptionError(
        f"{option}={pattern!r} matches no module of the model.{near_names(pattern, inside)} "
        f"Give one of: {', '.join(inside[:12])}{' ...' if len(inside) > 12 else ''}.{preset}"
    )


OF_A_PRESET = (
    " If a preset has it, that preset is for models with such layers, such as 'blocks.0.mlp': give "
    "curvature= layers of your own, kfactk.block(..., layers=[...])."
)


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
