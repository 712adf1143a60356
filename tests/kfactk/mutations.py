"""Every damage that a saved optimizer state may have suffered, one at a time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

DELETED = object()
Path = tuple[Any, ...]


class Derived(Tensor):
    """A tensor of a class of its own."""


@attrs.frozen(eq=False)
class Mutation:
    """One damage of one entry.

    Args:
        name: What it does, and where.
        apply: Damages the state that it is given, in place.
        harmless: Whether the state means the same after it.
    """

    name: str
    apply: Callable[[dict[str, Any]], None]
    harmless: bool = False

    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a damaged copy."""
        state = copy.deepcopy(state)
        self.apply(state)
        return state


def paths(nested: Any, start: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every entry of a state, by its keys, with its value."""
    items: Any = ()
    if isinstance(nested, dict):
        items = nested.items()
    elif isinstance(nested, list):
        items = enumerate(nested)
    for key, value in items:
        yield (*start, key), value
        yield from paths(value, (*start, key))


def mutations(state: dict[str, Any]) -> Iterator[Mutation]:
    """Yield all damages of a state."""
    for path, value in paths(state):
        where = "/".join(map(str, path))
        kinds = {"anything": OF_ANYTHING, **_of_kind(value)}
        for damages in kinds.values():
            for name, damage in damages.items():
                if damage(copy.deepcopy(value)) is not value:
                    yield Mutation(f"{name} of {where}", _replacing(path, damage), name in HARMLESS)
        if isinstance(path[-1], str | int) and len(path) > 1:
            yield from _of_key(path, where)
    yield from _of_several(state)


def _of_kind(value: Any) -> dict[str, dict[str, Callable[[Any], Any]]]:
    if isinstance(value, Tensor):
        return {"tensor": OF_TENSORS}
    if isinstance(value, int | float):
        return {"number": OF_NUMBERS}
    if isinstance(value, tuple | list):
        return {"row": OF_ROWS}
    return {"dict": OF_DICTS} if isinstance(value, dict) else {}


OF_ANYTHING: dict[str, Callable[[Any], Any]] = {
    "deletion": lambda value: DELETED,
    "none": lambda value: None,
    "text": lambda value: "rubbish",
    "a list": lambda value: [1, 2],
    "nested garbage": lambda value: {"x": {"y": [None, {"z": object}]}},
    "an odd number": lambda value: 1.5,
}
OF_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "number as text": str,
    "nan": lambda value: float("nan"),
    "inf": lambda value: float("inf"),
    "negative": lambda value: -1 - value,
    "as tensor": lambda value: torch.tensor(float(value)),
    "as vector": lambda value: torch.full((2,), float(value)),
    "as meta tensor": lambda value: torch.tensor(float(value), device="meta"),
    "as complex": lambda value: complex(value),
}
OF_ROWS: dict[str, Callable[[Any], Any]] = {
    "truncation": lambda value: value[:-1],
    "excess": lambda value: value + value[-1:],
    "repetition": lambda value: value[:1] * len(value),
    "emptiness": lambda value: type(value)(),
    "nan in": lambda value: type(value)([*value[:-1], float("nan")]),
    "unhashable in": lambda value: type(value)([*value[:-1], {}]),
    "negative in": lambda value: type(value)([*value[:-1], -5]),
}
OF_DICTS: dict[str, Callable[[Any], Any]] = {
    "emptiness": lambda value: {},
    "unknown key in": lambda value: {**value, "unknown": 5},
    "odd key in": lambda value: {**value, 999: 5},
    "tuple key in": lambda value: {**value, (1, 2): None},
    "unknown curvature in": lambda value: {**value, "kfactk.unknown": torch.ones(())},
}


def _nan(value: Tensor, number: float) -> Tensor:
    if not value.is_floating_point():
        return value.double() * number
    value = value.clone(memory_format=torch.contiguous_format)
    value.view(-1)[-1:] = number
    return value


def _strided(value: Tensor) -> Tensor:
    out = torch.empty(*value.shape, 2, dtype=value.dtype)[..., 0]
    return out.copy_(value)


OF_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "number": lambda value: 3.5,
    "number as text": lambda value: str(value.view(-1)[0].item()) if value.numel() else "0",
    "another shape": lambda value: torch.ones(2, 3, 5, dtype=value.dtype),
    "one more dimension": lambda value: value[None],
    "one row less": lambda value: value[:-1] if value.ndim else value.new_ones(0),
    "one row more": lambda value: torch.cat([value, value[-1:]]) if value.ndim else value.repeat(2),
    "flattening": lambda value: value.flatten() if value.ndim > 1 else value.new_ones(()),
    "transposition": lambda value: value.mT.contiguous() if value.ndim > 1 else value[None, None],
    "float16": lambda value: value.half(),
    "bfloat16": lambda value: value.bfloat16(),
    "float64": lambda value: value.double() if value.dtype != torch.float64 else value.float(),
    "int64": lambda value: value.long() if value.is_floating_point() else value.int(),
    "bool": lambda value: value.bool(),
    "complex": lambda value: value + 1j,
    "nan": lambda value: _nan(value, float("nan")),
    "inf": lambda value: _nan(value, float("inf")),
    "-inf": lambda value: _nan(value, float("-inf")),
    "negative": lambda value: -1 - value,
    "negative in": lambda value: _nan(value, -3.0),
    "huge": lambda value: (
        value.double().add(1).mul(1e30).to(value.dtype)
        if value.is_floating_point()
        else value * 0 + 2**62
    ),
    "overflow": lambda value: value.double() * 0 + 1e300,
    "huge in": lambda value: _nan(value, 1e30),
    "fraction": lambda value: value.double() + 0.5,
    "zeros": torch.zeros_like,
    "meta device": lambda value: value.to("meta"),
    "sparse": lambda value: value.to_sparse(),
    "expansion": lambda value: (
        value.new_ones(()).expand(value.shape) if value.ndim else value[None]
    ),
    "requires_grad": lambda value: (
        value.requires_grad_() if value.is_floating_point() else torch.clone(value)
    ),
    "graph": lambda value: (
        value.requires_grad_() * 1 if value.is_floating_point() else torch.clone(value)
    ),
    "strides": _strided,
    "subclass": lambda value: value.as_subclass(Derived),
    "parameter": lambda value: torch.nn.Parameter(value, requires_grad=False),
}
HARMLESS = {"requires_grad", "graph", "strides", "subclass", "parameter"}


def _at(state: Any, path: Path) -> Any:
    for key in path:
        state = state[key]
    return state


def _replacing(path: Path, damage: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        inside = _at(state, path[:-1])
        new = damage(inside[path[-1]])
        if new is DELETED:
            del inside[path[-1]]
        else:
            inside[path[-1]] = new

    return apply


def _of_key(path: Path, where: str) -> Iterator[Mutation]:
    """Yield damages of a key itself."""
    for name, change in {
        "renaming": lambda key: f"{key}x",
        "key as text": str,
        "key as number": lambda key: 77,
        "key as bytes": lambda key: str(key).encode(),
    }.items():

        def apply(state: dict[str, Any], change: Callable[[Any], Any] = change) -> None:
            inside = _at(state, path[:-1])
            if isinstance(inside, dict):
                inside[change(path[-1])] = inside.pop(path[-1])

        if change(path[-1]) != path[-1]:
            yield Mutation(f"{name} of {where}", apply)


def _of_several(state: dict[str, Any]) -> Iterator[Mutation]:
    """Yield damages of two entries, and of all entries at once."""
    entries = state["state"]
    numbers = sorted(entries)
    for one, other in itertools.pairwise(numbers):

        def swap(state: dict[str, Any], one: int = one, other: int = other) -> None:
            entries = state["state"]
            entries[one], entries[other] = entries[other], entries[one]

        yield Mutation(f"swap of entries {one} and {other}", swap)
        for key in sorted(set(entries[one]) & set(entries[other]), key=str):

            def exchange(
                state: dict[str, Any], one: int = one, other: int = other, key: str = key
            ) -> None:
                a, b = state["state"][one], state["state"][other]
                a[key], b[key] = b[key], a[key]

            def share(
                state: dict[str, Any], one: int = one, other: int = other, key: str = key
            ) -> None:
                state["state"][one][key] = state["state"][other][key]

            yield Mutation(f"exchange of {key} between {one} and {other}", exchange)
            yield Mutation(f"{key} of {other} also as that of {one}", share)
        for pair in itertools.pairwise(entries[one]):

            def within(state: dict[str, Any], one: int = one, pair: Any = pair) -> None:
                entry = state["state"][one]
                entry[pair[0]], entry[pair[1]] = entry[pair[1]], entry[pair[0]]

            yield Mutation(f"exchange of {' and '.join(map(str, pair))} of {one}", within)
    steps: dict[str, Any] = {
        "10**30": 10**30,
        "2**63 - 1": 2**63 - 1,
        "2**40": 2**40,
        "-1": -1,
        "half": 2.5,
        "true": True,
        "1e300": torch.tensor(1e300, dtype=torch.float64),
        "a long tensor": torch.tensor([3]),
        "meta": torch.tensor(3, device="meta"),
    }
    for name, value in steps.items():

        def count(state: dict[str, Any], value: Any = value) -> None:
            for entry in state["state"].values():
                entry["kfactk.step"] = value

        yield Mutation(f"{name} as every kfactk.step", count)
    keys = {key for entry in entries.values() for key in entry}
    for key in sorted(keys, key=str):

        def lose(state: dict[str, Any], key: str = key) -> None:
            for entry in state["state"].values():
                entry.pop(key, None)

        yield Mutation(f"loss of every {key}", lose)
