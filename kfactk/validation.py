"""Checks of what stages return, and messages for errors that name the stage and the layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.errors import (
    KfactkError,
    MemoryExhaustedError,
    PluginError,
    memory_message,
    memory_ran_out,
)
from kfactk.options import shortened
from kfactk.samples import Statistic
from kfactk.sides import KRONECKER, is_diagonal, side_of


def stage_label(family: str, stage: object) -> str:
    """Return the stage as text, such as `curvature kfactk_stages.curvature.kfac:Kfac`."""
    return f"{family} {type(stage).__module__}:{type(stage).__qualname__}"


class attribute_errors:
    """Context that turns an exception of a stage into a `PluginError` that names the stage.

    Errors of kfactk pass through. Exhausted memory is a `MemoryExhaustedError`, or torch's own
    error with a note. This is a class because a generator would
    cost more than many of the calls it surrounds.

    Args:
        family: Family of the stage.
        stage: The stage.
        where: What it was doing, in words that follow "failed".
    """

    __slots__ = ("_family", "_stage", "_where")

    def __init__(self, family: str, stage: object, where: str) -> None:
        self._family, self._stage, self._where = family, stage, where

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Raise the `PluginError`."""
        if not isinstance(error, Exception) or isinstance(error, KfactkError):
            return
        if isinstance(error, torch.OutOfMemoryError) or memory_ran_out(error):
            message = memory_message(
                error, f"{stage_label(self._family, self._stage)} {self._where}"
            )
            if isinstance(error, torch.OutOfMemoryError):  # callers know its class
                error.add_note(message)
                return
            raise MemoryExhaustedError(message) from error
        raise PluginError(
            f"{stage_label(self._family, self._stage)} failed {self._where} "
            f"({type(error).__name__}: {error}). Report it to its authors, or use another "
            f"{self._family}."
        ) from error


@contextlib.contextmanager
def note_stage(family: str, stage: object, where: str) -> Iterator[None]:
    """Add a note that names the stage to an exception whose type must not change.

    Args:
        family: Family of the stage.
        stage: The stage.
        where: What it was doing, in words that follow its name.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(f"raised by {stage_label(family, stage)} {where}")
        raise


def check_statistics(
    family: str, stage: object, where: str, found: Any, *, required: bool
) -> dict[str, Statistic]:
    """Return the statistics that a stage gave, checked.

    Args:
        family: Family of the stage.
        stage: The stage.
        where: What it was doing, in words that follow "gave ...".
        found: What it returned.
        required: Whether there must be at least one.

    Raises:
        PluginError: It is no mapping of names to `Statistic`, or empty though one is required.
    """
    good = isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(each, Statistic) for name, each in found.items()
    )
    if good and (found or not required):
        return dict(found)
    if good:
        gave = "nothing"
    elif isinstance(found, Mapping):
        gave = str({name: type(each).__name__ for name, each in found.items()})
    else:
        gave = repr(found)
    raise PluginError(
        f"{stage_label(family, stage)} gave {gave} {where}; it must give a dict from names to "
        f"kfactk.Statistic. Report it to its authors, or use another {family}."
    )


def check_matrices(
    stage: object, where: str, found: Mapping[str, Tensor], required: Set[str]
) -> dict[str, Tensor]:
    """Return the required ones among the matrices that a curvature assembled, checked.

    Others are not read, since a mapping may make each matrix when it is read.

    Args:
        stage: The curvature.
        where: What it was doing, in words that follow "assembled ...".
        found: What it returned.
        required: Names that the basis requires.

    Raises:
        PluginError: A required matrix is missing, or a Kronecker factor is not square.
    """
    present = {name: found[name] for name in sorted(required) if name in found}
    oblong = {
        name: tuple(matrix.shape)
        for name, matrix in present.items()
        if side_of(name) in KRONECKER and not is_diagonal(name) and not square(matrix)
    }
    if oblong or len(present) < len(required):
        shapes = f" with the last two dimensions equal, not {oblong}" if oblong else ""
        raise PluginError(
            f"{stage_label('curvature', stage)} assembled {', '.join(sorted(found)) or 'nothing'} "
            f"{where}; the basis requires {', '.join(sorted(required))}{shapes}. Report it to its "
            "authors, or use another curvature."
        )
    return present


def square(matrix: Tensor) -> bool:
    """Return whether the last two dimensions are equal."""
    return matrix.ndim >= 2 and matrix.shape[-1] == matrix.shape[-2]


def check_tensors(parameters: Mapping[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what `Curvature.tensors` gave, checked.

    Raises:
        ValueError: Its names or shapes are not those of the parameters.
    """
    same_names = found.keys() == parameters.keys()
    if same_names and all(found[name].shape == each.shape for name, each in parameters.items()):
        return found
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (found, parameters)
    )
    raise ValueError(f"`tensors` gave the shapes {shapes}; the parameters have {expected}")


def check_clipped(
    stage: object, found: Any, given: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return what a clip gave, checked.

    Args:
        stage: The clip.
        found: What it returned.
        given: The preconditioned gradients that it was given.

    Raises:
        PluginError: It is not a pair of a list and a factor, or a tensor's shape has changed.
    """
    remedy = "Report it to its authors, or use another clip."
    is_pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list)
    if not is_pair or len(found[0]) != len(given):
        raise PluginError(
            f"{stage_label('clip', stage)} gave {type(found).__name__}; it must give a pair of a "
            f"list of {len(given)} tensors, one for each it was given, and the factor as a tensor. "
            f"{remedy}"
        )
    for clipped, preconditioned in zip(found[0], given, strict=True):
        shape = getattr(clipped, "shape", type(clipped).__name__)
        if shape != preconditioned.shape:
            raise PluginError(
                f"{stage_label('clip', stage)} changed the shape of a gradient: {shape} for "
                f"{preconditioned.shape}. {remedy}"
            )
    answer: tuple[list[Tensor], Tensor] = found
    return answer


def input_modified_message(layer: str) -> str:
    """Return the message for a layer whose input changed before its statistics were taken."""
    return (
        f"the input of layer {layer!r} was modified in place after its forward, so its statistics "
        "would be wrong. Write h = h + layer(h) in place of h += layer(h), refill input buffers "
        "only after step(), or give the model a copy."
    )


def replay_differs_message(module: str, deviation: float) -> str:
    """Return the message for a call that gave another output when it ran again.

    Args:
        module: The module's path.
        deviation: Relative size of the difference; infinite where shapes differ.
    """
    return (
        f"module {module!r} gave another output when its call ran again (relative difference "
        f"{deviation:.2g}), so gradients inside of it are not known. Likely causes: it draws "
        "random numbers from a generator of its own, or chose another kernel. To train it by its "
        f"plain gradient, build the recipe with exclude=[{module!r}]."
    )


def ungathered_message(module: str) -> str:
    """Return the message for a call that must run again when its parameters are gone."""
    return (
        f"the parameters of module {module!r} are no longer gathered where its call must run again "
        "for gradients inside of it. fully_shard frees them after the module's backward: run one "
        "backward for each forward, without retain_graph=True, or build the recipe with "
        f"exclude=[{module!r}]."
    )


def folded_message(layer: str, touched: int, rows: int) -> str:
    """Return the message for a layer whose rows belong to examples, in no regular order."""
    return (
        f"layer {layer!r}: {touched} of its {rows} rows in dimension 0 belong to one example of "
        f"the output, and others have another number, or another order. {_ROWS_ARE_EXAMPLES} If it "
        "gets the tokens of all examples in one dimension, give it [N, T, d] in place of [N T, d], "
        "padded: a linear layer takes both. If another dimension counts examples, set the "
        "curvature's batch_dim. Of tokens that a router chose, nothing better is known."
    )


_ROWS_ARE_EXAMPLES = (
    "What is measured for each example (EKFAC's scale, sums of reduce) then takes its rows for "
    "examples."
)


def unordered_message(layer: str, rows: int, examples: int, why: str) -> str:
    """Return the message for a layer whose rows may belong to examples, which is not certain.

    Args:
        layer: Its name.
        rows: Number of its rows.
        examples: Number of examples of the output.
        why: Why it is not certain, as a clause.
    """
    return (
        f"layer {layer!r} has {rows} rows in dimension 0, and the output has {examples} examples: "
        f"which row belongs to which is not known, because {why}. {_ROWS_ARE_EXAMPLES} Give it "
        "[N, T, d] in place of [N T, d]."
    )


def unknown_examples_message(layer: str, rows: int) -> str:
    """Return the message for flattened tokens where the number of examples is unknown."""
    return (
        f"layer {layer!r} gets the tokens of all examples in one dimension, {rows} rows, and "
        "without a likelihood nobody says how many examples there are. "
        f"{_ROWS_ARE_EXAMPLES} Give it [N, T, d] in place of [N T, d]."
    )


def joined_message(module: str, tokens: int, examples: int) -> str:
    """Return the message for experts whose tokens are in no known order.

    Args:
        module: The module's path.
        tokens: Number of its rows.
        examples: Number of examples of the output.
    """
    return (
        f"module {module!r} got {tokens} tokens of the {examples} examples of the output, neither "
        "example by example nor position by position: which token belongs to which example is not "
        "known. Give it flattened [N, T, d] or [T, N, d], or train the experts by their plain "
        f"gradient: exclude=[{module!r}]."
    )


def flat_output_message(rows: int, examples: int, argument: str) -> str:
    """Return the message for an output whose rows may be the tokens of fewer examples.

    Args:
        rows: Number of its rows.
        examples: Number of examples of an argument of the model.
        argument: Its name.
    """
    return (
        f"the model's output has {rows} rows, and its argument {argument!r} has {examples}: as if "
        "the output held the tokens of all examples in one dimension. That its rows are ordered "
        "by example does not show, so each row is taken for an example. Return [N, T, C], or say "
        f"how it divides: output=lambda out: out.view(-1, {rows // max(1, examples)}, "
        "out.shape[-1]), and .transpose(0, 1) behind it where dimension 1 counts the examples"
    )


def chosen_output_message(rows: int, examples: int, argument: str) -> str:
    """Return the message for an output that may hold a part of the tokens.

    Args:
        rows: Number of its rows.
        examples: That of the argument.
        argument: An argument of the model with fewer rows and more tokens.
    """
    return (
        f"the model's output has {rows} rows, and its argument {argument!r} has {examples}: as if "
        "the output held tokens that the model chose (logits[mask]). Each row is taken for an "
        "example, and fisher='empirical' then measures single tokens in place of sequences. Return "
        "all tokens, [N, T, C], and name those that count: likelihood={'name': 'categorical', "
        "'class_axis': -1, 'weights': 'mask'}, mask being an argument of the model. Or use "
        "fisher='mc', for which rows may be taken so"
    )


def transposed_output_message(shape: Sequence[int], view: Sequence[int]) -> str:
    """Return the message for an output whose examples are in dimension 1.

    Args:
        shape: Its shape.
        view: The same as `[N, S, C]`, by its dimension 0.
    """
    flat = len(shape) < len(view)
    before = f", {list(view)} before it was flattened," if flat else ""
    divided = f".view(-1, {view[1]}, out.shape[-1])" if flat else ""
    return (
        f"dimension 1 of the model's output of shape {list(shape)}{before} counts the examples, "
        f"not dimension 0. {_ROWS_ARE_EXAMPLES} Say so: output=lambda out: out{divided}"
        ".transpose(0, 1), and give the curvatures batch_dim=1"
    )


def looped_message(layer: str, calls: int) -> str:
    """Return the message for a layer of which the same row belongs to other examples each call."""
    return (
        f"layer {layer!r} runs {calls} times in a forward, each time on other examples, or on the "
        "same ones in another order. Rows of its calls are taken for those of the same examples, "
        "so its curvature is wrong. Run the layer once on the whole batch."
    )


def batch_dim_message(layer: str, dim: int) -> str:
    """Return the message for a layer whose examples are in another dimension than the first."""
    return (
        f"layer {layer!r}: dimension {dim} of its output counts the examples, not dimension 0. "
        "What is measured for each example (EKFAC's scale) then takes its rows for examples. Set "
        f"the curvature's batch_dim={dim}. Attention and recurrent layers have no batch_dim, since "
        "they say where their examples are: there, the model's output has them elsewhere, and "
        "output= can transpose it."
    )


def lag_message(lag: int, period: int, step: int | None = None) -> str:
    """Return the message for a lag that reaches over a whole period of decompositions.

    Args:
        lag: Steps between the beginning of a decomposition and its use.
        period: Steps between decompositions.
        step: The step at which the period is so short; `None` where it always is.
    """
    where = "" if step is None else f" at step {step}"
    return (
        f"lag is {lag} and basis_every is {period}{where}: a decomposition would begin before the "
        "last one is used. Give a lag below basis_every."
    )


def lost_message(layers: Sequence[str]) -> str:
    """Return the message for layers whose decomposition was on its way, and is not in the state."""
    return (
        f"the loaded state lacks the decompositions of layers {', '.join(map(repr, layers))} that "
        "the recipe's lag had begun. They are made when they are due, of the factors then, so the "
        "run is not bit for bit that of before. torch.distributed.checkpoint leaves them out, and "
        "a recipe without a lag has none. For equal runs save state_dict() by torch.save, or set "
        "lag=0"
    )


def layout_message(faults: Sequence[str], paths: Sequence[str]) -> str:
    """Return the message for layers whose examples are not those of the output.

    Args:
        faults: What is wrong with each.
        paths: Their paths in the model.
    """
    others = ", ".join(map(repr, paths[1:]))
    more = f" Layers {others} have a fault of this kind too." if others else ""
    return f"{faults[0]}{more} To leave such layers out, set exclude={list(dict.fromkeys(paths))}"


def unseen_message(layers: Sequence[str]) -> str:
    """Return the message for layers whose influence on the output no recorded call holds whole."""
    return (
        f"the output depends on the weights of layers {', '.join(map(repr, layers))} not only "
        "through the outputs of these layers in this forward, so their curvature would be wrong. "
        "Likely causes: a function reads a weight (F.linear(x, layer.weight)); the output is a "
        "derivative with respect to inputs (torch.autograd.grad(..., create_graph=True)): call the "
        "network with kfactk.jet(x) in place of x, take the derivatives from what it returns, and "
        "build the recipe with curvature='taylor'; "
        "torch.func runs the layer (vmap, functional_call); another output of the module is used, "
        "which its curvature does not follow; outputs of an earlier forward are "
        "fed in again, as a recurrent loop outside the bound model does (bind a module that holds "
        "the loop, or detach them). "
    )


def jet_message(layer: str, path: str, curvature: str) -> str:
    """Return the message for a layer that was called with a jet, of another curvature.

    Args:
        layer: Its name.
        path: The name of its module.
        curvature: What names its curvature.
    """
    return (
        f"layer {layer!r} was called with a kfactk.Jet, whose rows of derivatives have no bias, "
        f"and {curvature} would count one in each row. Build the recipe with curvature='taylor', "
        f"or train the layer by its plain gradient: exclude=[{path!r}]."
    )


def remainder_message(layers: Sequence[str], paths: Sequence[str]) -> str:
    """Return the message for layers of whose gradient recorded calls hold a part only.

    Args:
        layers: Their names.
        paths: The names of their modules.
    """
    return (
        f"a part of the gradient of layers {', '.join(map(repr, layers))} came past their calls in "
        "the bound model's forward. fisher='empirical' measures the rest without it, so their "
        "curvature is wrong, unless it is that of a penalty on the weights themselves, which is no "
        "part of the curvature. Likely causes: the loss calls a layer again, or reads its weight "
        "(F.linear(z, layer.weight)); a part of the model, or the model in evaluation mode, ran "
        "beside it. Compute such terms in the forward of the bound model; or use fisher='mc', "
        f"which does not measure them; or train these layers by their plain gradient: "
        f"exclude={list(paths)} (said once)"
    )


def mended_message(layers: Mapping[str, str]) -> str:
    """Return the message for layers that ranks did not decompose alike.

    Args:
        layers: For each, why a rank failed, or "".
    """
    why = next(filter(None, layers.values()), "")
    cause = (
        f"one of them failed ({why})"
        if why
        else "one of them computes otherwise (another device, library or number of threads)"
    )
    return (
        f"ranks did not decompose the curvature of layers {', '.join(map(repr, layers))} alike: "
        f"{cause}. All took what the first one found, so that they stay equal"
    )


@attrs.frozen
class OtherParts:
    """The parts of a model's output that no likelihood reads.

    Args:
        heads: The likelihoods, each as `kfactk.build` takes it among several; none where they
            cannot be written so.
        parts: For each layer that leads to such a part alone, a likelihood for it, likewise.
        told: For each of these layers, the part in words.
        paths: For each of these layers, the path of its module.
        exclude: The patterns of modules that the recipe leaves alone.
    """

    heads: Sequence[Mapping[str, Any]] = ()
    parts: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    told: Mapping[str, str] = attrs.field(factory=dict)
    paths: Mapping[str, str] = attrs.field(factory=dict)
    exclude: Sequence[str] = ()


def likelihood_argument(heads: Sequence[Mapping[str, Any]]) -> str:
    """Return likelihoods as the argument of `kfactk.build`.

    Args:
        heads: Each as `{"output": path, "likelihood": {"name": ...}}`, with other options of
            `kfactk.head`; a single one may have no output.

    Example:
        >>> value = {"output": "value", "likelihood": {"name": "gaussian"}}
        >>> likelihood_argument([value]), likelihood_argument([{**value, "weight": 0.5}])
        ("likelihood={'value': 'gaussian'}", \
"likelihood=[{'output': 'value', 'likelihood': 'gaussian', 'weight': 0.5}]")
        >>> likelihood_argument([{"likelihood": {"name": "gaussian", "class_axis": 1}}])
        "likelihood={'name': 'gaussian', 'class_axis': 1}"
    """
    short = [{**head, "likelihood": shortened(head["likelihood"])} for head in heads]
    if "output" not in short[0]:
        return f"likelihood={short[0]['likelihood']!r}"
    mapping = {str(head["output"]): head["likelihood"] for head in short}
    plain = all(set(head) == {"output", "likelihood"} for head in short)
    paths = all(isinstance(head["output"], str) for head in short)
    if plain and paths and len(mapping) == len(short) and mapping.keys().isdisjoint(RESERVED):
        return f"likelihood={mapping!r}"
    return f"likelihood={short!r}"


RESERVED = {"name", "likelihood"}
"""Keys by which a mapping is a likelihood, or a head, and not several."""


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"])
        ('a, b and c', 'a')
    """
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _other_parts_message(layers: Sequence[str], others: OtherParts) -> str:
    """Return what to do for layers that lead to a part of the output that no likelihood reads."""
    parts = listed(list(dict.fromkeys(others.told[name] for name in layers)))
    left = list(dict.fromkeys([*others.exclude, *(others.paths[name] for name in layers)]))
    alone = f"exclude={left} leaves it alone, to its plain gradient"
    if not others.heads:
        return f"It leads to {parts} in the output, which no likelihood reads: {alone}."
    found = {repr(others.parts[name]): others.parts[name] for name in layers}
    argument = likelihood_argument([*others.heads, *found.values()])
    return (
        f"It leads to {parts} in the output, which no likelihood reads. This line works as it is: "
        f"build(..., {argument}). Put there the likelihood of its loss: 'categorical' is cross "
        "entropy, 'gaussian' a squared error, and class_axis is the dimension of the classes. Or "
        f"{alone}."
    )


def missing_samples_message(
    layers: Sequence[str], *, some: bool, others: OtherParts | None = None
) -> str:
    """Return the message for layers that have a gradient but gave no sample.

    Args:
        layers: Their names.
        some: Whether other layers gave samples, so that the model was called.
        others: The parts of the model's output that no likelihood reads, where that is known.
    """
    shown = ", ".join(repr(name) for name in layers[:4])
    if len(layers) > 4:
        shown += f" and {len(layers) - 4} more"
    start = (
        f"curvature is due, and layer {shown} has a gradient but gave no sample: to precondition "
        "it would use wrong statistics."
    )
    if others is not None and others.parts.keys() >= set(layers):
        return f"{start} {_other_parts_message(layers, others)} This step changed nothing."
    outside = (
        "it ran with other weights than its own (torch.func.functional_call), or inside a "
        "transform (torch.func.vmap, grad): call the model directly; it ran under reentrant "
        "activation checkpointing (use use_reentrant=False)"
    )
    causes = f"{start} Likely causes: "
    if some:
        return (
            f"{causes}it leads to another output than the likelihood sees, as a head with a loss "
            "of its own does (give each head its likelihood, likelihood={'logits': 'categorical', "
            "'value': 'gaussian'}; or leave the head alone, "
            f"exclude={list(layers[:4])}); {outside}. This step changed nothing."
        )
    return (
        f"{causes}observe='manual' without optimizer.observe() between forward and backward; the "
        "bound model itself was not called, but a submodule or a copy was, or another method than "
        "its forward (name it: bind(model, entry='evaluate_actions')), or one that replaced the "
        "entry after bind (bind again); the forward ran in evaluation mode (use observe='manual'), "
        "or compiled before bind; the output that the likelihood sees does not depend on it (name "
        f"it with output=); {outside}. This step changed nothing."
    )
