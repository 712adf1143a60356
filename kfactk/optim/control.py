"""`Control`: what a controller does with the steps of one optimizer."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from kfactk.capture.forward import Forward
from kfactk.capture.linearized import (
    KnownForward,
    Locate,
    ModelContext,
    fisher_products,
    same_arguments,
)
from kfactk.capture.loss_scale import ScaleCheck, ScaleFault
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.sharding import is_sharded
from kfactk.errors import CaptureError, CombinationError, KfactkWarning, PluginError
from kfactk.options import LARGEST, plain
from kfactk.registry.registry import registry
from kfactk.stages import Controller, QuadraticModel
from kfactk.validation import attribute_errors, stage_label

WRITTEN = ("lr", "momentum", "damping")
"""Numbers of every group that a controller sets."""
LOOKS = 10
"""Evaluations of the loss after a step that must agree before there is a warning."""
ROUGHLY = 0.03
"""Relative deviation of a factor from the number of terms, which tells a sum."""
STEEP = 2.0
"""Loss that is lost for each of the first order's; a convex loss loses at most 1."""
Groups = Sequence[dict[str, Any]]
Replaced = Sequence[tuple[nn.Parameter, Tensor]]
"""Parameters, each with the gradient that the update rule is given."""
CLOSURE = (
    "Give the step one: optimizer.step(closure), with def closure(): optimizer.zero_grad(); loss = "
    "criterion(model(x), y); loss.backward(); return loss."
)


@attrs.frozen(eq=False)
class Decision:
    """What a controller has decided for one step.

    Args:
        number: Which of the dampings of the step.
        numbers: All numbers by name, as they are to be written.
        model: The quadratic model along the two directions.
        decay: `eta <theta, v_i>`, the part of the slopes that is of the weight decay.
        decay_curvature: `v_i^T eta v_j`, likewise.
        values: What is to be finite.
    """

    number: int
    numbers: Mapping[str, float]
    model: QuadraticModel
    decay: tuple[float, float]
    decay_curvature: Tensor
    values: Tensor

    def decay_change(self) -> float:
        """Return by how much the step changes `eta |theta|^2 / 2`."""
        step = _numbers([self.numbers["lr"], self.numbers["momentum"]])
        linear = _numbers(self.decay) @ step
        return float(linear + step @ self.decay_curvature @ step / 2)


class Control:
    """What a controller does with the steps of one optimizer.

    In a step: `check`, `evaluate`, then `dampings`, `decide`, and in `writing` the update and
    `adapt`.

    Args:
        controller: The stage.
        model: The model.
        communicator: Sums numbers over ranks.
        locate: Finds the heads in an output of the model.
        velocity_key: The key of the last step in the update rule's state of a parameter.
        usual: lr and momentum of groups that say nothing of their own.
        decayed: Whether weight decay is part of the gradients that are preconditioned.
    """

    running_again: ClassVar[int] = 0
    """How many closures of this process run again now: no optimizer counts their forwards."""

    def __init__(
        self,
        controller: Controller,
        model: nn.Module,
        communicator: Communicator,
        locate: Locate,
        *,
        velocity_key: str,
        usual: Mapping[str, float],
        decayed: bool,
    ) -> None:
        self._controller, self._model, self._communicator = controller, model, communicator
        self._locate, self._key, self._decayed = locate, velocity_key, decayed
        self.evaluating, self.repeating, self.cleared = False, False, False
        self._start: ModelContext | None = None
        self._forward_start: ModelContext | None = None
        self._forwards: list[KnownForward] = []
        self._repeated, self._other_batch = 0, False
        self._loss = math.nan
        self._left: dict[str, float] = {}
        self._usual = dict(usual)
        self._scale = ScaleCheck()
        self._parameters: Sequence[nn.Parameter] = ()
        self._trend = Trend()

    @property
    def _names(self) -> tuple[str, ...]:
        return (*WRITTEN, *self._controller.numbers)

    # ------------------------------------------------------------------------------- the groups

    def check(self, groups: Groups, *, closure: bool) -> None:
        """Check that this step can be controlled, before anything changes.

        Raises:
            CaptureError: There is no closure.
            CombinationError: Something else writes a number, groups have their own, or parameters
                are sharded.
        """
        label = stage_label("controller", self._controller)
        if not closure:
            raise CaptureError(
                f"{label} sets the step by the loss, and step() was given no closure (a GradScaler "
                f"gives none). {CLOSURE} This step changed nothing."
            )
        if any("initial_lr" in group for group in groups):
            raise CombinationError(
                f"{label} writes lr, and so does a torch.optim.lr_scheduler that was made for this "
                "optimizer. Leave out the scheduler, or build the recipe with controller=None."
            )
        for name in self._names:
            found = {float(plain(group[name])) for group in groups}
            if len(found) > 1:
                raise CombinationError(
                    f"{label} sets one {name} for all parameters, and groups have {sorted(found)}. "
                    f"Leave {name} out of the groups, or build the recipe with controller=None."
                )
            if name in self._usual and found != {self._usual[name]}:
                raise CombinationError(
                    f"{label} sets {name} in each step, so that {name}={found.pop():g} of the "
                    f"parameter groups would have no effect. Leave {name} out of the groups, or "
                    "build the recipe with controller=None."
                )
            if name in self._left and found != {self._left[name]}:
                raise CombinationError(
                    f"{label} left {name}={self._left[name]:g} in param_groups, where now "
                    f"{found.pop():g} stands: something else writes it too. Leave it to the "
                    "controller, or build the recipe with controller=None."
                )
        for group in groups:
            if plain(group["weight_decay"]) and not self._decayed:
                raise CombinationError(
                    f"{label} takes weight decay as part of the loss, and a group has "
                    f"weight_decay={group['weight_decay']}, which the update rule would add after "
                    "preconditioning. Build the recipe with weight_decay_at='gradient'."
                )
            if any(map(is_sharded, group["params"])):
                raise CombinationError(
                    f"{label} runs the forward again with other parameters, and fully_shard has "
                    "divided them. Use DistributedDataParallel, or controller=None."
                )

    def join(self, group: dict[str, Any], first: Mapping[str, Any]) -> None:
        """Give a new group the numbers of the others."""
        for name in self._names:
            group[name] = first[name]

    def forget(self) -> None:
        """Go on from the numbers that the groups hold now: a state was loaded."""
        self._left, self._usual = {}, {}

    def numbers(self, group: Mapping[str, Any]) -> dict[str, float]:
        """Return all numbers by name."""
        return {name: float(plain(group[name])) for name in self._names}

    def write(self, groups: Groups, numbers: Mapping[str, float]) -> None:
        """Write numbers into all groups."""
        for group in groups:
            group.update(numbers)
        self._left, self._usual = {**self._left, **numbers}, {}

    # ---------------------------------------------------------------------------- the first loss

    def evaluate(
        self, closure: Callable[[], Any], parameters: Sequence[nn.Parameter], step: int
    ) -> Any:
        """Evaluate the closure, and keep the forwards that it makes.

        Args:
            closure: The user's.
            parameters: Those that are trained.
            step: Index of the step.

        Raises:
            CaptureError: It adds to gradients of before, or gives no gradient or no loss.
        """
        before = [(each, each.grad) for each in parameters if each.grad is not None]
        filled = _any([gradient for _, gradient in before])
        self._forwards, self.cleared, self._parameters = [], False, parameters
        if not self._scale.done:
            self._scale.begin(again=self.evaluates(step))
        self._start = ModelContext.now(self._model)
        self.evaluating = True
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            self.evaluating = False
        kept = filled and any(each.grad is gradient for each, gradient in before)
        if kept and not self.cleared:
            raise CaptureError(
                "the closure left gradients of before in .grad, so that the gradient is not that "
                "of its loss (micro-batches outside of the closure?), and a controller compares "
                f"the two. Call optimizer.zero_grad() in it, and run all micro-batches there. "
                f"{CLOSURE}"
            )
        if parameters and not any(each.grad is not None for each in parameters):
            raise CaptureError(
                "the closure gave no trained parameter a gradient, so there is no step to take (no "
                f"loss.backward() in it?). {CLOSURE}"
            )
        self._loss = _number(loss)
        self._tell_scale(self._scale.look(parameters))
        return loss

    def clear(self) -> None:
        """Take note that the user empties `.grad`."""
        self.cleared = True
        self._scale.forget()

    def _tell_scale(self, fault: ScaleFault | None) -> None:
        """Warn of a loss of another scale than the likelihood's mean."""
        if fault is None:
            return
        likelihood, factor = fault.head.likelihood, fault.factor
        head = f" of head {fault.head.name!r}" if fault.head.name else ""
        remedy = f"Divide the loss by {factor:.4g} before its backward: loss = loss / {factor:.4g}"
        if abs(factor / fault.terms - 1) < ROUGHLY:
            remedy = f"It is a sum over its {fault.terms:g} terms: take the mean, reduction='mean'"
        elif (variance := getattr(likelihood, "variance", None)) is not None:
            given = registry().describe("likelihood", likelihood)
            remedy += (
                f"; or give likelihood={given | {'variance': float(f'{variance / factor:.4g}')}}"
            )
        warnings.warn(
            f"the loss of your closure{head} is {factor:.3g} times the mean negative "
            f"log-likelihood of {stage_label('likelihood', likelihood)}, as its gradient at the "
            f"output (shape {list(fault.shape)}) tells. The controller takes slopes from your loss "
            f"and curvature from the likelihood, which is {1 / factor:.3g} times that of your loss,"
            f" so that lr, momentum and dampings follow a wrong model. {remedy} (said once)",
            KfactkWarning,
            stacklevel=6,
        )

    def begin_forward(self) -> None:
        """Note what a forward that begins depends on."""
        if self.evaluating:
            self._forward_start = ModelContext.now(self._model)

    def end_forward(self, forward: Forward, batch: Mapping[str, Any]) -> None:
        """Keep a forward that counts; or compare it, where the closure runs once more.

        Args:
            forward: The forward.
            batch: What `observe` was given.
        """
        if self.repeating:
            known = self._forwards[self._repeated : self._repeated + 1]
            self._repeated += 1
            same = known and same_arguments(known[0], {**forward.batch, **batch})
            self._other_batch |= not same  # told when all ranks can know
            self._watch_scale(forward, batch)
        elif self.evaluating and self._forward_start is not None:
            assert forward.again is not None
            self._forwards.append(
                KnownForward.of(
                    self._model,
                    forward.again,
                    self._forward_start,
                    forward.output,
                    {**forward.batch, **batch},
                    self._locate,
                )
            )
            self._watch_scale(forward, batch)

    def _watch_scale(self, forward: Forward, batch: Mapping[str, Any]) -> None:
        """Let the gradients at the outputs of a forward tell the scale of the loss."""
        if self._scale.done:
            return
        given = {**forward.batch, **batch}
        with torch.enable_grad():
            heads = [head.read(each, given) for head, each in self._locate(forward.output)]
        self._scale.watch(heads, self._parameters)

    # ------------------------------------------------------------------------------ the decision

    def dampings(self, step: int, groups: Groups) -> list[float]:
        """Return the dampings of the blocks that are tried in a step, the present one first."""
        numbers = self.numbers(groups[0])
        with self._errors("choosing dampings"):
            found = [float(each) for each in self._controller.dampings(step, numbers)]
        good = found and found[0] == numbers["damping"]
        if not good or not all(0 < each <= LARGEST for each in found):
            raise PluginError(
                f"{stage_label('controller', self._controller)} gave the dampings {found}; they "
                "must be positive, the present one first. Report it to its authors, or give "
                "controller=None."
            )
        return found

    def decide(
        self,
        trials: Sequence[Replaced],
        groups: Groups,
        state: Mapping[Any, Any],
        dampings: Sequence[float],
    ) -> Decision:
        """Return what the controller decides; a collective call.

        Args:
            trials: For each damping, what the update rule would be given.
            groups: The parameter groups.
            state: The update rule's.
            dampings: Those that are tried.

        Raises:
            CaptureError: The closure made no forward that counts.
        """
        if not self._communicator.any(bool(self._forwards)):
            raise CaptureError(
                "the closure made no forward of the bound model that counts, in training mode and "
                f"with gradients, so a controller knows no quadratic model. {CLOSURE}"
            )
        directions = [_directions(replaced, groups) for replaced in trials]
        known = {p: state.get(p, {}) for p, _ in trials[0]}
        last = {id(p): entry[self._key] for p, entry in known.items() if self._key in entry}
        found, numbers = self._models([*directions, last], groups), self.numbers(groups[0])
        number, lr, momentum = 0, numbers["lr"], numbers["momentum"]
        if bool(found.values.isfinite().all()):
            with self._errors("deciding on a step"):
                number, lr, momentum = self._controller.decide(found.models, numbers)
                if not (0 <= number < len(trials) and math.isfinite(lr + momentum)):
                    raise ValueError(f"decide gave {(number, lr, momentum)!r}")
        numbers |= {"lr": lr, "momentum": momentum, "damping": dampings[number]}
        return Decision(
            number,
            numbers,
            found.models[number],
            found.decays[number],
            found.decay_curvatures[number],
            found.values,
        )

    def _models(self, directions: Sequence[Mapping[int, Tensor]], groups: Groups) -> Models:
        """Return the quadratic model of each direction with the last one.

        Raises:
            CaptureError: A forward cannot run again, on this rank or another.
        """
        size, fault = len(directions), None
        fisher, terms = torch.zeros(size, size, dtype=torch.float64, device="cpu"), 0.0
        try:
            fisher, terms = fisher_products(self._forwards, directions)
        except CaptureError as error:  # other ranks would wait for this one
            fault = error
        slopes, decays = _numbers([0.0] * 2 * size).reshape(2, size)
        squares, shrinking = _numbers([0.0] * 2 * size**2).reshape(2, size, size)
        entries = [(p, each) for each in groups for p in each["params"] if p.grad is not None]
        for p, group in entries:
            moves = [direction.get(id(p), torch.zeros_like(p)) for direction in directions]
            eta = float(plain(group["weight_decay"]))
            found = inner_products(moves, _dense(p.grad), p.detach())
            products, slope, position = (each.cpu() for each in found)
            squares += products
            shrinking += eta * products
            slopes += slope
            decays += eta * position
        # What all ranks know is averaged too, so that they go on with the same bits.
        known = torch.cat([each.flatten() for each in (slopes, decays, squares, shrinking)])
        alone = [*fisher.flatten().tolist(), terms]
        shared = (known / self._communicator.size).tolist()
        *sums, faults = self._communicator.total([*alone, *shared, float(fault is not None)])
        if faults:
            raise fault or CaptureError(
                "a forward of another rank could not run again, so a controller knows no quadratic "
                "model, and all ranks stop. Correct what its own message names."
            )
        area = size * size
        fisher, terms = _numbers(sums[:area]).reshape(size, size), sums[area]
        slopes, decays = _numbers(sums[area + 1 : area + 1 + 2 * size]).reshape(2, size)
        squares, shrinking = _numbers(sums[area + 1 + 2 * size :]).reshape(2, size, size)
        return Models.of(slopes, fisher / (terms or 1.0), squares, decays, shrinking)

    # --------------------------------------------------------------------------- the second loss

    def evaluates(self, step: int) -> bool:
        """Return whether the loss is evaluated after a step."""
        with self._errors("saying when the loss is evaluated"):
            return bool(self._controller.evaluates(step))

    @contextlib.contextmanager
    def writing(
        self, decision: Decision, groups: Groups, state: dict[Any, Any], *, evaluates: bool
    ) -> Iterator[None]:
        """Surround the update, and what comes after it: a failure takes back numbers and step.

        Args:
            decision: Its numbers are written.
            groups: The parameter groups.
            state: The update rule's.
            evaluates: Whether the loss is evaluated after the update, so that more can fail.
        """
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        before, left = self.numbers(groups[0]), self._left
        kept = [_copies(p, state, self._key) for p in parameters] if evaluates else []
        self.write(groups, decision.numbers)
        try:
            yield
        except BaseException:
            self.write(groups, before)
            self._left = left
            with torch.no_grad():
                for parameter, (value, velocity) in zip(parameters, kept, strict=False):
                    parameter.copy_(value)
                    if velocity is None:
                        state.pop(parameter, None)
                    else:
                        state[parameter][self._key].copy_(velocity)
            raise

    def recorded(self, decision: Decision) -> dict[str, float]:
        """Return what is recorded of a step."""
        return {name: decision.numbers[name] for name in ("momentum", *self._controller.numbers)}

    def adapt(
        self, decision: Decision, closure: Callable[[], Any], groups: Groups
    ) -> dict[str, float]:
        """Evaluate the loss after a step, and adapt numbers; a collective call.

        Args:
            decision: What the step was.
            closure: The user's.
            groups: The parameter groups.

        Returns:
            What is recorded.

        Raises:
            CaptureError: The closure did something else than before, on this rank or another.
        """
        numbers = decision.numbers
        parameters = [p for group in groups for p in group["params"]]
        fault, after = None, math.nan
        try:
            after = self._again(closure, parameters)
        except CaptureError as error:  # other ranks would wait for this one
            fault = error
        flag = float(fault is not None)
        *losses, faults = self._communicator.total([self._loss, after, flag])
        if faults:
            raise fault or CaptureError(
                "the closure of another rank did something else when it ran again after the step, "
                "so the losses before and after cannot be compared, and all ranks stop. Correct "
                "what its own message names."
            )
        before, after = (each / self._communicator.size for each in losses)
        after += decision.decay_change()
        step = numbers["lr"], numbers["momentum"]
        self._trend.look(before, after, float(_numbers(decision.model.slopes) @ _numbers(step)))
        with self._errors("adapting its numbers"):
            found = dict(self._controller.adapt(before, after, decision.model, numbers))
            good = found.keys() == self._controller.numbers.keys()
            if not good or not all(abs(each) <= LARGEST for each in found.values()):
                raise ValueError(f"adapt gave {found!r}")
        self.write(groups, found)
        return {"loss_change": after - before}

    def _again(self, closure: Callable[[], Any], parameters: Sequence[nn.Parameter]) -> float:
        """Return the loss after the step, of the batch of before; nothing else changes.

        Raises:
            CaptureError: The closure has other data than before, or makes other forwards.
        """
        assert self._start is not None
        everything = {id(p): p for p in (*parameters, *self._model.parameters())}.values()
        before = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in everything]
        self.repeating, self._repeated, self._other_batch = True, 0, False
        self._scale.begin_again()
        Control.running_again += 1
        try:
            with self._start.restored(self._model), torch.enable_grad():
                for p in everything:
                    p.grad = None
                loss = _number(closure())
        finally:
            self.repeating = False
            Control.running_again -= 1
            with torch.no_grad():
                for p, gradient, copy in before:
                    if gradient is not None and copy is not None:
                        gradient.copy_(copy)
                    p.grad = gradient
        if self._repeated == len(self._forwards) and self._other_batch:
            raise CaptureError(
                "the closure gave the model another batch when it ran again after the step, so the "
                "losses before and after cannot be compared. Draw the batch outside of the "
                f"closure. {CLOSURE}"
            )
        if self._repeated != len(self._forwards):
            raise CaptureError(
                f"the closure ran the model {len(self._forwards)} times, and {self._repeated} "
                "times when it ran again after the step, so the losses cannot be compared. Let it "
                "do the same each time."
            )
        self._tell_scale(self._scale.compare())
        return loss

    def finish(self) -> None:
        """End a step: drop the forwards that were kept for it."""
        self._forwards, self._start, self._forward_start = [], None, None
        self._scale.finish()

    def _errors(self, where: str) -> attribute_errors:
        return attribute_errors("controller", self._controller, where)


@attrs.define(eq=False)
class Trend:
    """What the losses around steps tell over time; it starts anew in a resumed run.

    Args:
        first: The highest loss before a step, of the first `LOOKS` evaluations.
        looks: How many there were.
        noisy: How many on end, as of now, lowered a loss that was above `first`.
        steep: How many on end, as of now, lowered the loss `STEEP` times what its gradient says.
    """

    first: float = -math.inf
    looks: int = 0
    noisy: int = 0
    steep: int = 0

    def look(self, before: float, after: float, linear: float) -> None:
        """Note the losses before and after a step, and warn where `LOOKS` on end are strange.

        Args:
            before: The loss before.
            after: The loss after.
            linear: The inner product of gradient and step.
        """
        self.looks += 1
        if self.looks <= LOOKS:
            self.first = max(self.first, before)
        noisy = self.looks > LOOKS and after < before and before > self.first
        self.noisy = self.noisy + 1 if noisy else 0
        steep = linear < 0 and after - before < STEEP * linear
        self.steep = self.steep + 1 if steep else 0
        if self.noisy == LOOKS:
            self._warn(
                "each step lowered the loss of its own batch, and yet the losses of new batches "
                f"are above all of the beginning (now {before:.3g}, then at most {self.first:.3g}):"
                " the steps fit what is peculiar to a batch. Give the controller much larger "
                "batches, or build the recipe with controller=None"
            )
        if self.steep == LOOKS:
            self._warn(
                f"the loss fell more than {STEEP:g} times what its gradient says (now by "
                f"{before - after:.3g}, and the gradient says {-linear:.3g}), so .grad is hardly "
                "the gradient of the loss that the closure returns, and lambda follows a wrong "
                "ratio. Clip or scale no gradients in the closure, and return the loss whose "
                "gradient they are"
            )

    def _warn(self, text: str) -> None:
        warnings.warn(f"{text} (in {LOOKS} evaluations on end)", KfactkWarning, stacklevel=9)


@attrs.frozen(eq=False)
class Models:
    """The quadratic model along each direction together with the last step.

    Args:
        models: The models.
        decays: For each, `eta <theta, v_i>`.
        decay_curvatures: For each, `v_i^T eta v_j`.
        values: All numbers, which are to be finite.
    """

    models: list[QuadraticModel]
    decays: list[tuple[float, float]]
    decay_curvatures: list[Tensor]
    values: Tensor

    @classmethod
    def of(
        cls, slopes: Tensor, fisher: Tensor, squares: Tensor, decays: Tensor, shrinking: Tensor
    ) -> Models:
        """Return the models, the last step being the last of all directions.

        Args:
            slopes: `<g, v_i>`, `[k]`.
            fisher: `v_i^T F v_j`, `[k, k]`.
            squares: `<v_i, v_j>`, `[k, k]`.
            decays: `eta <theta, v_i>`, `[k]`.
            shrinking: `v_i^T eta v_j`, `[k, k]`.
        """
        models, own, curvatures = [], [], []
        for number in range(len(slopes) - 1):
            pair = [number, len(slopes) - 1]
            square = fisher[pair][:, pair] + shrinking[pair][:, pair]
            models.append(
                QuadraticModel(
                    _two((slopes + decays)[pair]),
                    (_two(square[0]), _two(square[1])),
                    (_two(squares[pair[0]][pair]), _two(squares[pair[1]][pair])),
                )
            )
            own.append(_two(decays[pair]))
            curvatures.append(shrinking[pair][:, pair])
        parts = (slopes, decays, *fisher, *squares, *shrinking)
        return cls(models, own, curvatures, torch.cat([each.flatten() for each in parts]))


def inner_products(
    moves: Sequence[Tensor], gradient: Tensor, parameter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `<v_i, v_j>`, `<g, v_i>` and `<theta, v_i>` of one parameter, in double precision.

    Args:
        moves: What each direction v_i moves it by.
        gradient: g.
        parameter: theta.
    """
    wide = torch.stack(list(moves)).flatten(1).double()
    return wide @ wide.T, wide @ gradient.flatten().double(), wide @ parameter.flatten().double()


def _copies(parameter: Tensor, state: Mapping[Any, Any], key: str) -> tuple[Tensor, Tensor | None]:
    """Return copies of a parameter and of its last step, if it has one."""
    velocity = state.get(parameter, {}).get(key)
    return parameter.detach().clone(), None if velocity is None else velocity.clone()


def _directions(replaced: Replaced, groups: Groups) -> dict[int, Tensor]:
    """Return minus the gradients that the update rule would be given, by the parameter's id."""
    given = {id(p): gradient for p, gradient in replaced}
    return {
        id(p): -_dense(given[id(p)]) for group in groups for p in group["params"] if id(p) in given
    }


def _any(tensors: Sequence[Tensor]) -> bool:
    """Return whether any number is not zero, by one transfer."""
    if not tensors:
        return False
    flags = [_dense(each).any() for each in tensors]
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any())


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _two(values: Tensor) -> tuple[float, float]:
    one, other = values.tolist()
    return one, other


def _number(loss: Any) -> float:
    """Return the loss that a closure gave.

    Raises:
        CaptureError: It gave none.
    """
    given = plain(loss)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise CaptureError(
            f"the closure returned {type(loss).__name__}, and a controller needs its loss, a "
            f"number. {CLOSURE}"
        )
    return float(given)
