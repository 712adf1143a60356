"""What all likelihoods share, tested for each of them: the view, the weights, their errors."""

import math
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import CaptureError, OptionError
from kfactk_stages.likelihood.bernoulli import Bernoulli
from kfactk_stages.likelihood.categorical import Categorical
from kfactk_stages.likelihood.gaussian import Gaussian
from kfactk_stages.likelihood.layout import Layout

ALL = [Categorical, Bernoulli, Gaussian]
each = pytest.mark.parametrize("kind", ALL)


def output(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .to(dtype)
        .requires_grad_()
    )


@settings(deadline=None)
@given(
    kind=st.sampled_from(ALL),
    shape=st.lists(st.integers(2, 4), min_size=2, max_size=5),
    data=st.data(),
)
def test_view_has_terms_in_order_and_classes_last(
    kind: type[Layout], shape: list[int], data: st.DataObject
) -> None:
    axis = data.draw(st.integers(1, len(shape) - 1))
    written = data.draw(st.sampled_from([axis, axis - len(shape)]))
    f = output(*shape)
    view = kind(class_axis=written).view(f)
    rest = [d for k, d in enumerate(shape) if k not in (0, axis)]
    assert view.shape == (shape[0], math.prod(rest), shape[axis])
    for flat, place in enumerate(np.ndindex(*rest)):
        index = (slice(None), *place[: axis - 1], slice(None), *place[axis - 1 :])
        assert torch.equal(view[:, flat], f[index])
    (gradient,) = torch.autograd.grad((view * 2).sum(), f)
    assert torch.equal(gradient, torch.full_like(f, 2))


@each
def test_flat_outputs_need_no_class_axis(kind: type[Layout]) -> None:
    f = output(4, 3)
    assert torch.equal(kind().view(f), f.unsqueeze(1))
    assert torch.equal(kind(class_axis=-1).view(f), f.unsqueeze(1))


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian])
def test_vectors_are_one_number_for_each_example(kind: type[Layout]) -> None:
    assert kind().view(output(4)).shape == (4, 1, 1)
    assert kind(class_axis=-1).view(output(4)).shape == (4, 1, 1)


@each
@pytest.mark.parametrize(
    ("dtype", "seen"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32,) * 2,
        (torch.float64,) * 2,
    ],
)
def test_view_is_at_least_float32(
    kind: type[Layout], dtype: torch.dtype, seen: torch.dtype
) -> None:
    assert kind().view(output(4, 3, dtype=dtype)).dtype == seen


@each
def test_unsuitable_outputs_are_refused_with_the_remedy(kind: type[Layout]) -> None:
    with pytest.raises(
        CaptureError,
        match=r"3 dimensions \(shape \[2, 3, 4\].*class_axis=1 for images.*class_axis=-1 for",
    ):
        kind().view(output(2, 3, 4))
    with pytest.raises(
        CaptureError, match=r"looks like a loss: return the logits, or pick them with output="
    ):
        kind().view(output(2, 3).sum())
    with pytest.raises(CaptureError, match=r"torch.int64\) is not floating point: return logits"):
        kind().view(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(CaptureError, match=r"shape \[2, 3\].*does not require gradients.*no_grad"):
        kind().view(output(2, 3).detach())
    for axis, shape in [
        (3, (2, 3, 4)),
        (-3, (2, 3, 4)),
        (-4, (2, 3, 4)),
        (2, (2, 3)),
        (-2, (2, 3)),
    ]:
        with pytest.raises(
            CaptureError,
            match=rf"class_axis={axis} does not fit .*1 to {len(shape) - 1}, or -1 to "
            rf"{1 - len(shape)}",
        ):
            kind(class_axis=axis).view(output(*shape))


@each
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_axis": 0}, "class_axis=0 .* another dimension than that of the examples"),
        ({"class_axis": 1.0}, "class_axis=1.0 .* a whole number or None"),
        ({"class_axis": True}, "class_axis=True .* a whole number or None"),
        ({"targets": torch.zeros(2)}, "targets=tensor.* a non-empty string or None: the name"),
        ({"weights": ""}, "weights='' .* a non-empty string or None: the name"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(
    kind: type[Layout], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**options)


@each
def test_options_are_values(kind: type[Layout]) -> None:
    first = kind(class_axis=1, weights="mask")
    assert first == kind(class_axis=1, weights="mask")
    assert hash(first) == hash(kind(class_axis=1, weights="mask"))
    assert attrs.evolve(first, weights=None) == kind(class_axis=1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        first.class_axis = 2


@each
def test_weights_default_to_none(kind: type[Layout]) -> None:
    likelihood = kind()
    assert likelihood.term_weights(likelihood.view(output(2, 3)), {}) is None


@each
@pytest.mark.parametrize(
    ("given_weights", "expected"),
    [
        (torch.tensor([0.5, 2.0]), [[0.5] * 6, [2.0] * 6]),
        (torch.tensor([[0.5], [2.0]]), [[0.5] * 6, [2.0] * 6]),
        (torch.tensor([True, False]), [[1.0] * 6, [0.0] * 6]),
        (torch.arange(12).reshape(2, 3, 2), [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        (torch.arange(12).reshape(2, 1, 3, 2).half(), [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        (np.array([3, 4]), [[3.0] * 6, [4.0] * 6]),
        ([3, 4], [[3.0] * 6, [4.0] * 6]),
    ],
)
def test_weights_of_examples_or_terms(
    kind: type[Layout], given_weights: Any, expected: list[list[float]]
) -> None:
    likelihood = kind(class_axis=1, weights="w")
    view = likelihood.view(output(2, 5, 3, 2, dtype=torch.float16))
    found = likelihood.term_weights(view, {"x": None, "w": given_weights})
    assert found.dtype == torch.float32
    assert found.tolist() == expected


def test_weights_are_detached() -> None:
    likelihood = Categorical(weights="w")
    view = likelihood.view(output(2, 3))
    assert not likelihood.term_weights(view, {"w": torch.ones(2, requires_grad=True)}).requires_grad


def test_weights_are_aligned_with_terms() -> None:
    """Terms of an image in `F.cross_entropy`'s layout against the same order of its weights."""
    f = output(2, 4, 3, 5)
    targets = torch.randint(4, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    likelihood = Categorical(class_axis=1, weights="w")
    view = likelihood.view(f)
    found = (
        likelihood.term_weights(view, {"w": weights}) * likelihood.nll(view, targets.flatten(1))
    ).sum()
    torch.testing.assert_close(
        found, (weights * torch.nn.functional.cross_entropy(f, targets, reduction="none")).sum()
    )


@each
def test_unsuitable_weights_are_refused_with_the_remedy(kind: type[Layout]) -> None:
    likelihood = kind(class_axis=-1, weights="attention_mask")
    view = likelihood.view(output(2, 3, 4))
    with pytest.raises(
        CaptureError,
        match=r"weights='attention_mask'.*there are: 'x', 'attn_mask'\. Did you mean 'attn_mask'.*"
        r"observe\(attention_mask=",
    ):
        likelihood.term_weights(view, {"x": 1, "attn_mask": 2})
    with pytest.raises(CaptureError, match="there are: none"):
        likelihood.term_weights(view, {})
    with pytest.raises(CaptureError, match=r"is None in this forward"):
        likelihood.term_weights(view, {"attention_mask": None})
    with pytest.raises(CaptureError, match=r"is a str that cannot be made a tensor"):
        likelihood.term_weights(view, {"attention_mask": "ones"})
    for shape in [(), (3,), (2, 2), (3, 2), (2, 3, 4)]:
        with pytest.raises(
            CaptureError,
            match=rf"has shape \[{', '.join(map(str, shape))}\], but the output has 2 examples of "
            "3 terms",
        ):
            likelihood.term_weights(view, {"attention_mask": torch.ones(shape)})
    for bad in (-1.0, float("nan"), float("inf"), float("-inf")):
        with pytest.raises(CaptureError, match=r"negative or non-finite.*Additive attention masks"):
            likelihood.term_weights(view, {"attention_mask": torch.tensor([1.0, bad])})


@each
def test_unsuitable_labels_are_refused_with_the_remedy(kind: type[Layout]) -> None:
    likelihood = kind(class_axis=-1, targets="labels")
    view = likelihood.view(output(2, 3, 4))
    with pytest.raises(
        CaptureError, match=r"targets='labels' names an argument that this forward was not given"
    ):
        likelihood.term_weights(view, {"x": 1})
    with pytest.raises(CaptureError, match=r"targets='labels' has shape \[2, 2\].*shifted"):
        likelihood.term_weights(view, {"labels": torch.zeros(2, 2)})


def missing(kind: type[Layout], labels: Tensor) -> Tensor:
    return (
        torch.where(labels < 0, float("nan"), labels)
        if kind is Gaussian
        else torch.where(labels < 0, -100, labels)
    )


@each
def test_missing_labels_get_no_weight_and_multiply_with_weights(kind: type[Layout]) -> None:
    labels = missing(kind, torch.tensor([[1, -1, 0], [0, 1, -1]]))
    view = kind(class_axis=-1).view(output(2, 3, 4))
    assert kind(class_axis=-1, targets="y").term_weights(view, {"y": labels}).tolist() == [
        [1, 0, 1],
        [1, 1, 0],
    ]
    both = kind(class_axis=-1, targets="y", weights="w")
    assert both.term_weights(view, {"y": labels, "w": torch.tensor([0.5, 3])}).tolist() == [
        [0.5, 0, 0.5],
        [3, 3, 0],
    ]


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian])
def test_missing_vectors_count_as_a_whole(kind: type[Layout]) -> None:
    likelihood = kind(class_axis=-1, targets="y")
    view = likelihood.view(output(2, 3, 4))
    labels = torch.ones(2, 3, 4)
    labels[0, 1] = labels[1, 2] = -1
    assert likelihood.term_weights(view, {"y": missing(kind, labels)}).tolist() == [
        [1, 0, 1],
        [1, 1, 0],
    ]
    labels[0, 0, 0] = -1
    with pytest.raises(CaptureError, match=r"only some entries are missing.*Give weights="):
        likelihood.term_weights(view, {"y": missing(kind, labels)})


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian])
def test_missing_vectors_have_the_layout_of_the_output(kind: type[Layout]) -> None:
    likelihood = kind(class_axis=1, targets="y")
    view = likelihood.view(output(2, 3, 3, 3))
    labels = torch.ones(2, 3, 3, 3)
    labels[0, :, 1, 2] = -1
    expected = torch.ones(2, 9)
    expected[0, 5] = 0
    assert torch.equal(
        likelihood.term_weights(view, {"y": missing(kind, labels)}).float(), expected
    )


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian])
def test_missing_labels_of_single_outputs_may_lack_their_axis(
    kind: type[Layout],
) -> None:
    labels = missing(kind, torch.tensor([[[1, -1]], [[-1, 0]]]))
    likelihood = kind(class_axis=1, targets="y")
    view = likelihood.view(output(2, 1, 2))
    for shaped in (labels, labels.squeeze(1)):
        assert likelihood.term_weights(view, {"y": shaped}).tolist() == [[1, 0], [0, 1]]
    flat = kind(targets="y")
    assert flat.term_weights(
        flat.view(output(2, 4)), {"y": missing(kind, torch.tensor([1, -1]))}
    ).tolist() == [[1], [0]]


@each
@settings(deadline=None)
@given(shift=st.integers(1, 3), longer=st.integers(1, 3), seed=st.integers(0, 99))
def test_shift_applies_to_labels_and_masks(
    kind: type[Layout], shift: int, longer: int, seed: int
) -> None:
    """Term t predicts position t + shift: weights equal those of aligned labels and masks.

    The last terms predict nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = shift + longer
    labels = missing(kind, torch.randint(-1, 2, (2, positions), generator=generator))
    mask = torch.randint(0, 2, (2, positions), generator=generator)
    f = output(2, positions, 4)
    options: dict[str, Any] = {"class_axis": -1, "targets": "y", "weights": "w"}
    found = kind(**options, shift=shift).term_weights(
        kind(**options).view(f), {"y": labels, "w": mask}
    )
    aligned = {"y": labels[:, shift:], "w": mask[:, shift:]}
    assert found is not None
    assert torch.equal(
        found[:, :longer],
        kind(**options).term_weights(kind(**options).view(f[:, :longer]), aligned),
    )
    assert torch.equal(found[:, longer:], torch.zeros(2, shift, dtype=torch.float64))


@each
def test_shift_gives_the_last_terms_no_weight(kind: type[Layout]) -> None:
    view = kind(class_axis=-1).view(output(2, 3, 4))
    assert kind(class_axis=-1, shift=1).term_weights(view, {}).tolist() == [[1, 1, 0], [1, 1, 0]]
    weighted = kind(class_axis=-1, shift=2, weights="w").term_weights(
        view, {"w": torch.tensor([0.5, 3])}
    )
    assert weighted.tolist() == [[0.5, 0, 0], [3, 0, 0]]


@each
def test_shift_is_checked_with_the_remedy(kind: type[Layout]) -> None:
    for bad in (-1, 1.0, True, None):
        with pytest.raises(
            OptionError,
            match=r"shift=.* a whole number of at least 0: 0 .* 1 for a causal language model",
        ):
            kind(shift=bad)
    likelihood = kind(shift=1)
    with pytest.raises(
        CaptureError,
        match=r"shift=1, but the model's output has 1 positions in each.*leave it out otherwise",
    ):
        likelihood.term_weights(likelihood.view(output(2, 4)), {})
