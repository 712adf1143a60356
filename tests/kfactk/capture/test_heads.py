"""Several likelihoods on one model: F is the weighted sum of theirs, by dense algebra."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.capture.heads import at_path

N, T = 5, 3


class Heads(nn.Module):
    """A trunk with a policy, a value, and classes at each of three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)
        self.aux = nn.Linear(6, 2 * T)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.trunk(x))
        aux = self.aux(hidden).unflatten(1, (T, 2))
        return {"policy": self.policy(hidden), "rest": (self.value(hidden), aux)}


HEADS = [
    kfactk.head("policy", "categorical"),
    kfactk.head("rest.0", {"name": "gaussian", "variance": 0.5}, weight=0.3),
    kfactk.head("rest.1", {"name": "categorical", "class_axis": -1}, weight=2.0),
]
PARTS: list[tuple[Callable[[Any], Tensor], float, int]] = [
    (lambda out: out["policy"].reshape(N, 1, 3), 1.0, N),
    (lambda out: out["rest"][0].reshape(N, 1, 1), 0.3, N),
    (lambda out: out["rest"][1], 2.0, T * N),
]
"""By head: its output as `[N, S, C]`, its weight and its number of terms."""


@pytest.fixture
def model() -> Heads:
    torch.manual_seed(0)
    return Heads().double()


def made(model: nn.Module, **options: Any) -> kfactk.Optimizer:
    chosen = {"curvature": "kfac", "basis": "kfac", "fisher": "exact", "likelihood": HEADS}
    return kfactk.build(**{**chosen, "update": "sgd", "lr": 0.0, **options}).bind(model)


def information(z: Tensor, number: int) -> Tensor:
    """The Fisher information of one term's output, `[C, C]`."""
    if number == 1:
        return torch.eye(1, dtype=z.dtype) / 0.5
    p = z.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def factors(model: Heads, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of each layer, by autograd at each term of each example."""
    found = {}
    for name in ("trunk", "policy", "value", "aux"):
        layer, seen = getattr(model, name), {}
        handle = layer.register_forward_hook(
            lambda m, args, out, seen=seen: seen.update(a=args[0].detach(), out=out)
        )
        output = model(x)
        handle.remove()
        ones = torch.ones(N, 1, dtype=x.dtype)
        a = torch.cat([seen["a"], ones], 1)
        g = torch.zeros(layer.out_features, layer.out_features, dtype=x.dtype)
        for number, (part, weight, terms) in enumerate(PARTS):
            view = part(output)
            for n in range(N):
                for s in range(view.shape[1]):
                    rows = [
                        torch.autograd.grad(
                            view[n, s, c], seen["out"], retain_graph=True, allow_unused=True
                        )[0]
                        for c in range(view.shape[2])
                    ]
                    if rows[0] is None:
                        continue
                    jacobian = torch.stack([row[n] for row in rows])
                    inner = information(view[n, s].detach(), number)
                    g += weight / terms * jacobian.T @ inner @ jacobian
        found[name] = (a.T @ a / N, g)
    return found


def step(model: nn.Module, optimizer: kfactk.Optimizer, x: Tensor) -> None:
    output = model(x)
    loss = (
        F.cross_entropy(output["policy"], torch.arange(N) % 3) + output["rest"][0].square().mean()
    )
    loss = loss + output["rest"][1].logsumexp(-1).mean()
    loss.backward()
    optimizer.step()


def test_factors_are_the_weighted_sums_of_the_heads(model: Heads):
    x, optimizer = torch.randn(N, 4, dtype=torch.float64), made(model)
    expected = factors(model, x)
    step(model, optimizer, x)
    for name, (a, g) in expected.items():
        measured = optimizer.layers[name].factors
        torch.testing.assert_close(measured["A"], a, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(measured["G"], g, rtol=1e-12, atol=1e-14)


def test_draws_have_the_weighted_sums_in_expectation(model: Heads):
    x = torch.randn(N, 4, dtype=torch.float64)
    optimizer = made(model, fisher={"name": "mc", "samples": 300})
    expected = factors(model, x)
    step(model, optimizer, x)
    for name, (_, g) in expected.items():
        measured = optimizer.layers[name].factors["G"]
        assert (measured - g).norm() < 0.3 * g.norm()


def test_the_scale_is_that_of_all_heads(model: Heads):
    """The block of the trunk in its own basis, against the dense Fisher matrix there."""
    x = torch.randn(N, 4, dtype=torch.float64)
    optimizer = made(model, basis="ekfac")
    params = (model.trunk.weight, model.trunk.bias)
    dense = torch.zeros(30, 30, dtype=x.dtype)
    for n in range(N):
        output = model(x[n : n + 1].expand(N, -1))
        for number, (part, weight, terms) in enumerate(PARTS):
            view = part(output)
            for s in range(view.shape[1]):
                rows = []
                for c in range(view.shape[2]):
                    w, b = torch.autograd.grad(view[0, s, c], params, retain_graph=True)
                    rows.append(torch.cat([w, b[:, None]], 1).flatten())
                jacobian = torch.stack(rows)
                inner = information(view[0, s].detach(), number)
                dense += weight / terms * jacobian.T @ inner @ jacobian
    step(model, optimizer, x)
    view = optimizer.layers["trunk"]
    left, right = (torch.linalg.eigh(view.factors[name])[1] for name in ("G", "A"))
    basis = torch.kron(left, right)
    expected = (basis.T @ dense @ basis).diagonal().reshape(6, 5)
    v = torch.randn(6, 5, dtype=x.dtype)
    product = optimizer.fisher_product({"trunk.weight": v[:, :4], "trunk.bias": v[:, 4]})
    found = left.T @ torch.cat([product["trunk.weight"], product["trunk.bias"][:, None]], 1) @ right
    torch.testing.assert_close(found, expected * (left.T @ v @ right), rtol=1e-9, atol=1e-12)


def test_one_head_in_a_list_is_that_head_bit_for_bit(model: Heads):
    x, kept = torch.randn(N, 4, dtype=torch.float64), []
    chosen = [
        {"likelihood": [kfactk.head("policy", "categorical")]},
        {"likelihood": "categorical", "output": lambda out: out["policy"]},
    ]
    for options in chosen:
        optimizer = made(model, fisher="mc", exclude=["value", "aux"], **options)
        step(model, optimizer, x)
        kept.append(optimizer.layers["trunk"].factors)
        optimizer.close()
    assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())


def test_masks_belong_to_their_heads(model: Heads):
    """A head whose terms are masked counts its own terms."""
    x = torch.randn(N, 4, dtype=torch.float64)
    aux = {"name": "categorical", "class_axis": -1, "weights": "mask"}
    heads = [*HEADS[:2], kfactk.head("rest.1", aux, weight=2.0)]
    mask = torch.zeros(N, T)
    mask[:, 0] = 1
    optimizer = made(model, likelihood=heads, observe="manual")
    output = model(x)
    optimizer.observe(mask=mask)
    output["policy"].logsumexp(1).mean().backward()
    optimizer.step()
    parts = [*PARTS[:2], (lambda out: out["rest"][1][:, :1], 2.0, N)]
    before, PARTS[:] = list(PARTS), parts
    try:
        expected = factors(model, x)
    finally:
        PARTS[:] = before
    torch.testing.assert_close(
        optimizer.layers["trunk"].factors["G"], expected["trunk"][1], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_a_head_whose_labels_are_all_masked_leaves_the_others(
    model: Heads, order: int, fisher: str
):
    """Two tasks that alternate: each batch has the labels of one."""
    heads = [
        kfactk.head("policy", {"name": "categorical", "targets": "one"}),
        kfactk.head("rest.1", {"name": "categorical", "class_axis": -1, "targets": "other"}),
    ][::order]
    x = torch.randn(N, 4, dtype=torch.float64)
    optimizer = made(model, likelihood=heads, fisher=fisher, observe="manual", exclude=["value"])
    output, labels = model(x), torch.randint(2, (N, T))
    optimizer.observe(one=torch.full((N,), -100), other=labels)
    F.cross_entropy(output["rest"][1].flatten(0, 1), labels.flatten()).backward()
    optimizer.step()
    factors = {name: view.factors for name, view in optimizer.layers.items()}
    assert float(factors["aux"]["G"].trace()) > 0
    if fisher == "exact":
        before, PARTS[:] = list(PARTS), [(PARTS[2][0], 1.0, T * N)]
        try:
            expected = globals()["factors"](model, x)
        finally:
            PARTS[:] = before
        for name in ("aux", "trunk"):
            torch.testing.assert_close(
                factors[name]["G"], expected[name][1], rtol=1e-12, atol=1e-14
            )


def test_empirical_factors_do_not_depend_on_the_order_of_heads(model: Heads):
    x, found = torch.randn(N, 4, dtype=torch.float64), []
    for heads in (HEADS, HEADS[::-1]):
        optimizer = made(model, likelihood=heads, fisher="empirical")
        step(model, optimizer, x)
        found.append(optimizer.layers["trunk"].factors["G"])
        optimizer.close()
        model.zero_grad()
    torch.testing.assert_close(*found)


def test_a_mapping_names_the_heads_by_their_places():
    named = kfactk.build(likelihood={"policy": "categorical", "value": "gaussian"})
    listed = kfactk.build(
        likelihood=[kfactk.head("policy", "categorical"), kfactk.head("value", "gaussian")]
    )
    assert named == listed == kfactk.Recipe.from_dict(named.to_dict())
    assert repr(named) == (
        "kfactk.build(likelihood=[{'output': 'policy', 'likelihood': 'categorical'}, "
        "{'output': 'value', 'likelihood': 'gaussian'}])"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"class_axis": 1}, "without a name"),
        ([], "is empty"),
        (["categorical"], "needs the part of the output"),
        ([{"output": "a"}], "lacks its likelihood"),
        ([{"output": "a", "likelihood": "gaussian", "scale": 1}], "no scale"),
        ([{"output": "", "likelihood": "gaussian"}], "output of a head"),
        ([{"output": 3, "likelihood": "gaussian"}], "output of a head"),
        ([{"output": "a", "likelihood": "gaussian", "weight": 0}], "leave that head out"),
        ([{"output": "a", "likelihood": "gaussian", "weight": -1}], "weight of a head"),
        ([{"output": "a", "likelihood": "gausian"}], "gaussian"),
        ([{"output": "a", "likelihood": "gaussian", "optional": 1}], "True or False"),
    ],
)
def test_heads_that_cannot_work_are_refused(given: Any, words: str):
    with pytest.raises(kfactk.KfactkError, match=words):
        kfactk.build(likelihood=given)


def test_functions_of_strangers_are_not_imported():
    written = {"likelihood": [{"output": {"callable": "os:getcwd"}, "likelihood": "gaussian"}]}
    with pytest.raises(kfactk.OptionError, match="trusted"):
        kfactk.Recipe.from_dict(written)


@pytest.mark.parametrize(
    ("path", "words"),
    [("polcy", "Did you mean 'policy'"), ("rest.2", "There are: '0', '1'"), ("policy.x", "no 'x'")],
)
def test_parts_that_are_not_there_are_named(model: Heads, path: str, words: str):
    optimizer = made(model, likelihood={path: "categorical"})
    with pytest.raises(kfactk.CaptureError, match=words):
        model(torch.randn(N, 4, dtype=torch.float64))
    optimizer.close()


def test_paths_lead_through_keys_attributes_and_numbers():
    class Output:
        logits = torch.tensor([1.0])

    assert at_path({"a": [Output()]}, "a.0.logits") is Output.logits
    nested = {"out.logits": [1], 7: {"a": 2}, "a": {"b.c": 3}}
    assert [at_path(nested, path) for path in ("out.logits.0", "7.a", "a.b.c")] == [1, 2, 3]


class Sometimes(Heads):
    """Heads of which the value is there in some forwards only."""

    lacks: str | None = None

    def forward(self, x: Tensor) -> dict[str, Any]:
        found = super().forward(x)
        found |= {"value": found["rest"][0]}
        if self.lacks == "none":
            found["value"] = None
        elif self.lacks == "key":
            del found["value"]
        return found


@pytest.mark.parametrize("lacks", ["none", "key"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_a_forward_without_an_optional_head_is_that_of_the_others(fisher: str, lacks: str):
    x, found = torch.randn(N, 4, dtype=torch.float64), []
    policy = kfactk.head("policy", "categorical")
    for heads in ([policy, kfactk.head("value", "gaussian", optional=True)], [policy]):
        torch.manual_seed(0)
        model = Sometimes().double()
        model.lacks = lacks
        optimizer = made(model, likelihood=heads, fisher=fisher, exclude=["value", "aux"])
        F.cross_entropy(model(x)["policy"], torch.arange(N) % 3).backward()
        optimizer.step()
        found.append(optimizer.layers["trunk"].factors)
        optimizer.close()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_an_optional_head_counts_where_it_is():
    x, found = torch.randn(N, 4, dtype=torch.float64), []
    for optional in (False, True):
        torch.manual_seed(0)
        model = Sometimes().double()
        value = kfactk.head("value", "gaussian", weight=0.5, optional=optional)
        heads = [kfactk.head("policy", "categorical"), value]
        optimizer = made(model, likelihood=heads, exclude=["aux"])
        step(model, optimizer, x)
        found.append(optimizer.layers["trunk"].factors)
        optimizer.close()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("optional", [False, True])
def test_a_head_that_is_not_there_is_named(optional: bool):
    model = Sometimes().double()
    model.lacks = "none"
    name = "value" if not optional else "valu"  # a wrong name is no absence
    optimizer = made(model, likelihood=[HEADS[0], kfactk.head(name, "gaussian", optional=optional)])
    words = "Did you mean 'value'" if optional else r"kfactk.head\('value', ..., optional=True\)"
    with pytest.raises(kfactk.CaptureError, match=words):
        model(torch.randn(N, 4, dtype=torch.float64))
    optimizer.close()


def test_a_forward_without_any_head_is_refused():
    model = Sometimes().double()
    model.lacks = "none"
    optimizer = made(model, likelihood=[kfactk.head("value", "gaussian", optional=True)])
    with pytest.raises(kfactk.CaptureError, match="none of the heads"):
        model(torch.randn(N, 4, dtype=torch.float64))
    optimizer.close()


def test_a_frozen_head_is_named(model: Heads):
    optimizer = made(model, likelihood=HEADS[:2])
    model.requires_grad_(False)
    model.policy.requires_grad_(True)
    with pytest.raises(kfactk.CaptureError, match=r"head 'rest.0': .* does not require gradients"):
        model(torch.randn(N, 4, dtype=torch.float64))
    optimizer.close()


def test_a_head_made_of_another_one_is_no_wrong_loss():
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.first(x)
            return logits, self.second(logits)

    model, labels = Stacked(), torch.arange(N) % 2
    optimizer = made(model, likelihood={"0": "categorical", "1": "categorical"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = model(torch.randn(N, 4))
        (F.cross_entropy(one, labels) + F.cross_entropy(other, labels)).backward()
        optimizer.step()


def test_a_loss_that_is_not_the_heads_is_told(model: Heads):
    optimizer = made(model)
    output = model(torch.randn(N, 4, dtype=torch.float64))
    loss = output["policy"].square().mean() + output["rest"][0].square().mean()
    loss.backward()
    with pytest.warns(kfactk.KfactkWarning, match="does not sum to zero") as caught:
        optimizer.step()
    assert len(caught) == 1
