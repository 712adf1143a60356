"""Tiny transformers: curvature against autograd, `Trainer` against a loop written by hand."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import kfactk
from kfactk.testing import CurvatureLaws
from kfactk.testing._support.strategies import case_of
from kfactk_stages.curvature.kfac import Kfac
from tests.integrations.by_hand import same

N, T, VOCABULARY = 3, 5, 7
SHAPE: dict[str, Any] = {
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CAUSAL = {"name": "categorical", "class_axis": -1, "targets": "labels", "shift": 1}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=8, **SHAPE, **options
    )
    return transformers.LlamaForCausalLM(config)


def in_double(model: Any) -> Any:
    """In float64 throughout: Llama's own norms compute in float32 whatever they are given."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(name, nn.RMSNorm(len(module.weight), eps=module.variance_epsilon))
    return model.double()


def bert(kind: Any) -> Any:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(
        transformers.BertConfig(
            vocab_size=VOCABULARY, num_labels=3, max_position_embeddings=8, **dropout, **SHAPE
        )
    )


def tokens(classes: int = VOCABULARY) -> dict[str, Tensor]:
    """Padded sequences, and labels that are missing at the padding and at one place more."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (N, T), generator=generator)
    mask = (torch.arange(T) < torch.tensor([[5], [3], [4]])).long()
    labels = (ids % classes).masked_fill(mask == 0, -100)
    labels[0, 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@attrs.frozen
class Case:
    """A kind of model: construction, data, likelihood options, and the terms its loss counts."""

    model: Callable[[], Any]
    batch: dict[str, Tensor]
    likelihood: Any
    counted: list[tuple[int, ...]]


def pairs(where: Tensor) -> list[tuple[int, ...]]:
    return [tuple(index) for index in where.nonzero().tolist()]


def case(kind: str) -> Case:
    few, batch = tokens(3), tokens()
    if kind == "causal":
        return Case(llama, batch, CAUSAL, pairs(batch["labels"][:, 1:] != -100))
    if kind == "causal, masked by padding":
        likelihood = {
            "name": "categorical",
            "class_axis": -1,
            "weights": "attention_mask",
            "shift": 1,
        }
        return Case(
            llama,
            {**batch, "labels": batch["input_ids"]},
            likelihood,
            pairs(batch["attention_mask"][:, 1:] == 1),
        )
    if kind == "tokens":
        likelihood = {"name": "categorical", "class_axis": -1, "targets": "labels"}
        return Case(
            lambda: bert(transformers.BertForTokenClassification),
            few,
            likelihood,
            pairs(few["labels"] != -100),
        )
    assert kind == "sequences"
    whole = {**few, "labels": few["input_ids"][:, 0] % 3}
    return Case(
        lambda: bert(transformers.BertForSequenceClassification),
        whole,
        "categorical",
        [(n,) for n in range(N)],
    )


each_kind = pytest.mark.parametrize(
    "kind", ["causal", "causal, masked by padding", "tokens", "sequences"]
)


class Watched:
    """A forward in float64 with the inputs and the outputs of the layers."""

    def __init__(self, model: Any, names: list[str], batch: dict[str, Tensor]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        modules = {name: model.get_submodule(name) for name in names}
        handles = [
            module.register_forward_hook(self._keep(name)) for name, module in modules.items()
        ]
        self.answer = model(**batch)
        for handle in handles:
            handle.remove()
        self.bias = {name: module.bias is not None for name, module in modules.items()}

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0].detach(), output

        return keep

    def rows(self, name: str) -> Tensor:
        """Inputs of each example, with a last column of ones for the bias: `[N, rows, d_in]`."""
        inputs = self.inputs[name].reshape(N, -1, self.inputs[name].shape[-1])
        return (
            torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1) if self.bias[name] else inputs
        )

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of a loss with respect to the outputs, `[N, rows, d_out]`."""
        found = torch.autograd.grad(
            loss, list(self.outputs.values()), retain_graph=True, allow_unused=True
        )
        pairs = zip(self.outputs.items(), found, strict=True)
        return {
            n: (torch.zeros_like(o) if g is None else g).reshape(N, -1, o.shape[-1])
            for (n, o), g in pairs
        }

    def counted(self, where: list[tuple[int, ...]]) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Yield probability and log-probability gradients of each class of each counted term."""
        log_p = self.answer.logits.log_softmax(-1)
        for place in where:
            for value in log_p[place]:
                yield float(value.detach().exp()), self.gradients(value)


def measured(kind: str, fisher: str) -> tuple[kfactk.Optimizer, Watched, Case]:
    """One step from no curvature, and the same forward again; weights do not move."""
    torch.set_default_dtype(torch.float64)
    try:
        made = case(kind)
        model = in_double(made.model())
        recipe = kfactk.build(
            curvature="kfac",
            basis="ekfac",
            update="sgd",
            lr=1e-300,
            fisher=fisher,
            likelihood=made.likelihood,
        )
        optimizer = recipe.bind(model)
        model(**made.batch).loss.backward()
        optimizer.step()
        return optimizer, Watched(model, list(optimizer.layers), made.batch), made
    finally:
        torch.set_default_dtype(torch.float32)


@each_kind
def test_the_fisher_is_that_of_the_terms_which_the_loss_counts(kind: str) -> None:
    """A, G and the scale of EKFAC by autograd: F = (1/M) sum_terms sum_c p_c grad grad^T."""
    optimizer, seen, made = measured(kind, "exact")
    num_terms = len(made.counted)
    assert len(optimizer.layers) == {"causal": 8, "tokens": 7, "sequences": 8}[kind.split(",")[0]]
    g = {
        name: torch.zeros(seen.outputs[name].shape[-1:] * 2, dtype=torch.float64)
        for name in optimizer.layers
    }
    scale = {name: torch.zeros_like(view.scale["scale"]) for name, view in optimizer.layers.items()}
    for probability, gradients in seen.counted(made.counted):
        for name, view in optimizer.layers.items():
            rows = gradients[name].flatten(0, 1)
            g[name] += probability * rows.T @ rows / (num_terms * gradients[name].shape[1])
            left, right = (view.decomposition[side]["eigenvectors"] for side in "GA")
            block = gradients[name].flatten(0, 1).T @ seen.rows(name).flatten(0, 1)
            scale[name] += probability * (left.T @ block @ right).square() / num_terms
    for name, view in optimizer.layers.items():
        a = seen.rows(name).flatten(0, 1)
        torch.testing.assert_close(view.factors["A"], a.T @ a / N, rtol=1e-10, atol=1e-14, msg=name)
        torch.testing.assert_close(view.factors["G"], g[name], rtol=1e-10, atol=1e-14, msg=name)
        blurred(view.scale["scale"], scale[name], view)


def blurred(found: Tensor, expected: Tensor, view: Any) -> None:
    """Compare entries where no eigenvalue vanishes, and sums in null spaces, which share a mean."""
    values = {side: view.decomposition[side]["eigenvalues"] for side in "GA"}
    sure = {side: value > 1e-9 * value.max() for side, value in values.items()}
    where = sure["G"][:, None] & sure["A"]
    torch.testing.assert_close(found[where], expected[where], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.sum(), expected.sum(), rtol=1e-9, atol=1e-12)


@each_kind
def test_the_empirical_fisher_is_that_of_the_loss_in_the_model(kind: str) -> None:
    """The model's loss is a mean over M terms, so gradients of the sum are M times as large."""
    optimizer, seen, made = measured(kind, "empirical")
    num_terms = len(made.counted)
    for name, gradient in seen.gradients(seen.answer.loss).items():
        rows = num_terms * gradient.flatten(0, 1)
        expected = rows.T @ rows / (num_terms * gradient.shape[1])
        torch.testing.assert_close(
            optimizer.layers[name].factors["G"], expected, rtol=1e-10, atol=1e-14, msg=name
        )


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **dropout, **ends)
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 4, "d_ff": 6, "d_kv": 2, "num_heads": 2, "num_layers": 1}
    config = transformers.T5Config(
        vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes
    )
    return transformers.T5ForConditionalGeneration(config)


TIED: dict[str, tuple[Callable[[], Any], str, int]] = {
    "GPT-2": (gpt2, "transformer.wte.weight", 1),
    "T5": (t5, "shared.weight", 0),
    "BERT": (
        lambda: bert(transformers.BertForMaskedLM),
        "bert.embeddings.word_embeddings.weight",
        0,
    ),
}
"""Models whose table is their output layer, its name, and by how much they shift labels."""


@pytest.mark.parametrize("kind", TIED)
def test_a_table_that_is_the_output_layer_too_is_one_block(kind: str) -> None:
    """The scale of each row, summed over the directions, does not depend on the basis."""
    make, name, shift = TIED[kind]
    model, batch = make().double(), tokens()
    if kind == "T5":  # encoder and decoder see other tokens
        batch["input_ids"] = batch["input_ids"].flip(0)
    likelihood = {"name": "categorical", "class_axis": -1, "targets": "labels", "shift": shift}
    optimizer = kfactk.build(
        curvature="all",
        basis="ekfac",
        update="sgd",
        lr=1e-300,
        fisher="empirical",
        likelihood=likelihood,
    ).bind(model)
    model(**batch).loss.backward()
    optimizer.step()
    counts = (batch["labels"][:, shift:] != -100).sum(1)
    squares = torch.zeros(VOCABULARY, dtype=torch.float64)
    for n, count in enumerate(counts):
        one = {key: value[n : n + 1] for key, value in batch.items()}
        loss = model(**one).loss * count
        (d,) = torch.autograd.grad(loss, model.get_parameter(name))
        squares += d.square().sum(1) / counts.sum()
    if kind == "BERT":
        assert not optimizer.coverage().plain
    scale = optimizer.layers[name.removesuffix(".weight")].scale["scale"]
    torch.testing.assert_close(scale.sum(0), squares, rtol=1e-6, atol=1e-12)


def test_what_a_model_returns_without_names_or_labels_is_refused_with_the_remedy() -> None:
    batch = tokens()
    model = llama()
    optimizer = kfactk.build(curvature="kfac", likelihood=CAUSAL).bind(model)
    with pytest.raises(
        kfactk.CaptureError, match="looks like a loss: return the logits, or pick them with output="
    ):
        model(**batch, return_dict=False)
    with pytest.raises(
        kfactk.CaptureError,
        match="targets='labels' names an argument that this forward was not given",
    ):
        model(input_ids=batch["input_ids"])
    optimizer.close()
    optimizer = kfactk.build(curvature="kfac").bind(model)
    with pytest.warns(kfactk.KfactkWarning, match="class_axis=-1"):
        model(**batch)
    optimizer.close()


def test_a_model_with_two_heads_is_refused_once_with_the_line() -> None:
    """BERT for pre-training returns two parts, neither of which is called logits."""
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(config)
    given = {"curvature": "kfac", "exclude": ["cls.predictions.decoder"]}
    optimizer = kfactk.build(**given).bind(model)
    with pytest.raises(kfactk.CaptureError) as error:
        model(input_ids=torch.randint(11, (N, 6)), output_hidden_states=True)
    optimizer.close()
    text = str(error.value)
    (line,) = re.findall(r"works as it is: build\(\.\.\., (.*?)\)\. ", text)
    pasted = eval(f"dict({line})")
    assert pasted == {
        "likelihood": {
            "prediction_logits": {"name": "categorical", "class_axis": -1},
            "seq_relationship_logits": "gaussian",
        }
    }
    pasted["likelihood"]["seq_relationship_logits"] = "categorical"
    optimizer = kfactk.build(**given, **pasted).bind(model)
    for _ in range(2):
        optimizer.zero_grad()
        ids = torch.randint(11, (N, 6))
        out = model(input_ids=ids, labels=ids, next_sentence_label=torch.arange(N) % 2)
        out.loss.backward()
        optimizer.step()
    optimizer.close()


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    several = [tokens() for _ in range(count // N)]
    return [{key: value[n] for key, value in batch.items()} for batch in several for n in range(N)]


def prepared(model: Any) -> tuple[kfactk.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    periods = {"factor_every": 2, "scale_every": 2, "basis_every": 3}
    optimizer = kfactk.build(
        curvature="kfac", basis="ekfac", update="adamw", lr=0.01, likelihood=CAUSAL, **periods
    ).bind(model)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def by_trainer(
    folder: Path, *, epochs: int = 2, resume: str | None = None, **options: Any
) -> tuple[nn.Module, kfactk.Optimizer]:
    model = llama()
    settings = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        **{
            "save_strategy": "epoch",
            "logging_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    optimizer, scheduler = prepared(model)
    if resume is not None:
        nn.init.zeros_(model.lm_head.weight)
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows(),
        eval_dataset=rows(),
        optimizers=(optimizer, scheduler),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, optimizer


def by_loop(
    *, epochs: int = 2, micro: int = 1, half: bool = False
) -> tuple[nn.Module, kfactk.Optimizer]:
    """Train as `Trainer` does: mean over all labels of a step, gradients clipped at norm 1."""
    model = llama()
    optimizer, scheduler = prepared(model)
    model.train()
    batches = [
        {key: torch.stack([row[key] for row in rows()[start : start + 4]]) for key in rows()[0]}
        for start in (0, 4, 8)
    ]
    for _ in range(epochs):
        for start in range(0, 3, micro):
            group = batches[start : start + micro]
            count = sum((batch["labels"][:, 1:] != -100).sum() for batch in group)
            for batch in group:
                given = {key: value for key, value in batch.items() if key != "labels"}
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    logits = model(**given, labels=batch["labels"], use_cache=False).logits.float()
                target = batch["labels"][:, 1:].flatten()
                (
                    F.cross_entropy(logits[:, :-1].flatten(0, 1), target, reduction="sum") / count
                ).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Trainer talks to Accelerate through the environment and a state of the process."""
    states = (AcceleratorState, PartialState, GradientState)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    for state in states:
        state._shared_state.clear()
    yield
    for state in states:
        state._shared_state.clear()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"eval_strategy": "epoch"}, {}),
        ({"gradient_accumulation_steps": 2}, {"micro": 2}),
        ({"bf16": True}, {"half": True}),
        ({"gradient_checkpointing": True}, {}),
    ],
    ids=["plain", "evaluated", "accumulated", "bf16", "checkpointed activations"],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_the_trainer(theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    same(by_trainer(tmp_path, **theirs, save_strategy="no"), by_loop(**ours))


@pytest.mark.usefixtures("fresh")
def test_a_trainer_resumed_from_its_checkpoint_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = by_trainer(tmp_path, epochs=3)
    resumed = by_trainer(tmp_path, epochs=3, resume=str(tmp_path / "checkpoint-3"))
    same(resumed, whole)
    same(whole, by_loop(epochs=3))


def gpt2() -> Any:
    torch.manual_seed(0)
    names = {
        "n_positions": 8,
        "n_embd": 4,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, **names, **rates)
    ).double()


@pytest.mark.parametrize("curvature", ["kfac", "conv_kfac", "all"])
def test_the_projections_of_gpt2_are_covered(curvature: str) -> None:
    rows = {row.parameter: row for row in kfactk.build(curvature=curvature).coverage(gpt2())}
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        for parameter in ("weight", "bias"):
            assert rows[f"transformer.h.0.{name}.{parameter}"].block == f"transformer.h.0.{name}"
    if curvature == "all":
        assert not [name for name, row in rows.items() if row.block is None]


def as_linear(model: Any, names: list[str]) -> Any:
    """The same model with `nn.Linear` in place of Conv1D."""
    for name in names:
        module = model.get_submodule(name)
        linear = nn.Linear(module.nx, module.nf, dtype=torch.float64)
        linear.load_state_dict({"weight": module.weight.data.T, "bias": module.bias.data})
        model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("stage", ["kfac", {"name": "conv_kfac", "spatial": "reduce"}], ids=str)
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_conv1d_equals_the_linear_layer_that_it_is(basis: str, stage: Any) -> None:
    """They precondition the same gradients, transposed; a bias is frozen; both resume."""
    theirs = gpt2()
    names = [name for name, module in theirs.named_modules() if type(module) is Conv1D]
    ours = as_linear(gpt2(), names)
    recipe = kfactk.build(
        curvature=stage,
        basis=basis,
        update="sgd",
        lr=0.1,
        fisher="exact",
        likelihood=CAUSAL,
        basis_every=2,
    )
    for model in (theirs, ours):
        model.get_submodule(names[-1]).bias.requires_grad_(False)
        optimizer, state = recipe.bind(model), None
        for _ in range(3):
            if state is not None:
                optimizer = recipe.bind(model)
                optimizer.load_state_dict(state)
            assert set(names) <= set(optimizer.layers)
            optimizer.zero_grad()
            model(**tokens()).loss.backward()
            optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
    for name in names:
        mine, reference = theirs.get_submodule(name), ours.get_submodule(name)
        torch.testing.assert_close(mine.weight.T, reference.weight, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(mine.bias, reference.bias, rtol=1e-8, atol=1e-10)


class TestConv1D(CurvatureLaws):
    """The laws on Conv1D, whose per-example gradients are those of autograd."""

    stage = "kfac"
    covers: ClassVar = (nn.Linear, Conv1D)
    test_two_ranks_are_one_process = None  # in the model of that law there is none

    def cases(self) -> Any:
        modules = st.builds(Conv1D, st.integers(1, 3), st.integers(1, 3))
        shape = st.lists(st.integers(1, 3), min_size=1, max_size=2)
        return super().cases() | case_of(
            modules, lambda draw, m: (*draw(shape), m.nx), most_calls=2, freeze=True
        )

    def single_row_cases(self) -> Any:
        modules = st.builds(Conv1D, st.integers(1, 3), st.integers(1, 3))
        return case_of(modules, lambda draw, m: (draw(st.integers(1, 3)), m.nx))


class Wrapped(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(Conv1D):
    pass


def test_subclasses_of_conv1d_are_covered_where_they_compute_the_same() -> None:
    assert Kfac().unsupported(Renamed(2, 3)) is None
    assert "a subclass of Conv1D with its own forward" in str(Kfac().unsupported(Wrapped(2, 3)))


def test_stacked_experts_are_covered() -> None:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, num_local_experts=2, **SHAPE
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    table = kfactk.build(curvature="all").coverage(model)
    found = {row.parameter.split(".")[-1]: row for row in table if ".experts." in row.parameter}
    assert set(found) == {"gate_up_proj", "down_proj"}
    assert all(str(row.block).startswith("model.layers.") for row in found.values())
    alone = kfactk.build(curvature="kfac").coverage(model)
    reasons = {row.reason for row in alone if ".experts." in row.parameter}
    assert len(reasons) == 1
    assert reasons.pop().endswith("curvature='experts' covers stacked experts")
