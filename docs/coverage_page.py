"""Write `docs/coverage.md`: how much of real models `curvature="all"` preconditions.

    python docs/coverage_page.py

Every model is bound and makes one forward; large ones on the meta device, where tensors have shapes
but no data. Layers whose weight a function reads are found there, and left to the update rule.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import kfactk

PAGE = Path(__file__).parent / "coverage.md"
HEAD = """\
# Coverage

How much of real models `curvature="all"` preconditions, in per cent of their trained elements. What
is left goes to the update rule with its plain gradient. Models of torchvision have their own sizes,
those of transformers a small configuration: there, what is small by itself (norms, positions)
weighs more than at full size. Each model made one forward with `unseen="plain"`, so layers whose
weight a function reads outside of them are among what is left.

`print(recipe.coverage(model))` prints such a table for yours, parameter by parameter.

Parameters that belong to no layer, as the class token and the positions of a ViT, have no layer
curvature. They are why the small ViT is below 99 %; in `vit_b_16` they weigh 0.2 %. Statistics of
their gradient cover them: `curvature=["all", {"name": "gradient", "dims": "batch"}]` covers 100 %
of it.

| model | covered | left |
|---|---|---|
"""
FOOT = """
This page is made by `python docs/coverage_page.py`.
"""
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@attrs.frozen
class Model:
    """A model of the table.

    Args:
        name: Its name.
        make: Makes it.
        arguments: The arguments of its forward, by name: shapes of floats or, with `:int`, tokens.
        device: Where it runs.
    """

    name: str
    make: Callable[[], nn.Module]
    arguments: dict[str, str]
    device: str = "cpu"

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a forward: ones."""
        found = {}
        for name, text in self.arguments.items():
            sides, _, kind = text.partition(":")
            dtype = torch.int64 if kind else torch.float32
            found[name] = torch.ones(*map(int, sides.split("x")), dtype=dtype, device=self.device)
        return found


def vision(name: str) -> Model:
    """Return a classifier of torchvision."""
    from torchvision import models

    return Model(f"torchvision {name}", getattr(models, name), {"x": "2x3x224x224"}, "meta")


def causal(name: str, **config: Any) -> Model:
    """Return a language model of transformers."""
    import transformers

    def make() -> nn.Module:
        kind = getattr(transformers, f"{name}Config")
        known = {**SMALL, **config}
        if name == "GPT2":
            known = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2}
            known |= {"bos_token_id": 0, "eos_token_id": 0}
        heads = {"Bert": "ForMaskedLM", "GPT2": "LMHeadModel"}
        model: nn.Module = getattr(transformers, name + heads.get(name, "ForCausalLM"))(
            kind(**known)
        )
        return model

    return Model(f"transformers {name}", make, {"input_ids": "2x16:int"})


def other_transformers() -> Iterator[Model]:
    """Yield the models of transformers that are no language models, or have two inputs."""
    import transformers as t

    def t5() -> nn.Module:
        config = t.T5Config(
            vocab_size=512, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2
        )
        return t.T5ForConditionalGeneration(config)

    def vit() -> nn.Module:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        return t.ViTForImageClassification(
            t.ViTConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8)
        )

    def whisper() -> nn.Module:
        sides = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16}
        depth = {"encoder_layers": 2, "decoder_layers": 2, "max_target_positions": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        tokens = {"vocab_size": 512, "pad_token_id": 0, "decoder_start_token_id": 1}
        tokens |= {"bos_token_id": 2, "eos_token_id": 3}
        config = t.WhisperConfig(**sides, **depth, **heads, **tokens, max_source_positions=50)
        return t.WhisperForConditionalGeneration(config)

    pair = {"input_ids": "2x16:int", "decoder_input_ids": "2x16:int"}
    yield Model("transformers T5", t5, pair)
    yield Model("transformers ViT", vit, {"pixel_values": "2x3x32x32"})
    speech = {"input_features": "2x16x100", "decoder_input_ids": "2x16:int"}
    yield Model("transformers Whisper", whisper, speech)


class LstmLanguage(nn.Module):
    """A language model around `nn.LSTM`."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(512, 64), nn.LSTM(64, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[N, T]` to logits."""
        return self.head(self.lstm(self.table(tokens))[0])


class UNet(nn.Module):
    """The layers of a diffusion model's UNet: time, group norms, attention, a decoder."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.enter, self.down = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.norm, self.middle = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, 1, 1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.leave = nn.Conv2d(2 * width, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map `[N, 3, H, W]` and embedded times `[N, 16]` to noise."""
        early = self.enter(x)
        hidden = self.down(early) + self.time(t)[:, :, None, None]
        hidden = self.middle(nn.functional.silu(self.norm(hidden)))
        rows = hidden.flatten(2).mT
        mixed = rows + self.attention(rows, rows, rows)[0]
        late = self.up(mixed.mT.unflatten(2, hidden.shape[2:]))
        return self.leave(torch.cat([early, late], 1))


class Gcn(nn.Module):
    """A graph convolution network (Kipf and Welling 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 7)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Map features `[nodes, 64]` to logits."""
        return adjacency @ self.second((adjacency @ self.first(x)).relu())


def models() -> Iterator[Model]:
    """Yield the models of the table."""
    for name in ("resnet50", "vit_b_16", "swin_t", "convnext_tiny", "efficientnet_b0"):
        yield vision(name)
    for name in ("GPT2", "Llama", "Bert"):
        yield causal(name)
    yield causal("Mixtral", num_local_experts=4)
    yield from other_transformers()
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 128}
    transformer = functools.partial(nn.Transformer, 64, 2, **sizes, batch_first=True)
    yield Model("nn.Transformer", transformer, {"src": "2x16x64", "tgt": "2x16x64"})
    yield Model("language model of nn.LSTM", LstmLanguage, {"tokens": "2x16:int"})
    yield Model("UNet", UNet, {"x": "2x3x16x16", "t": "2x16"})
    yield Model("GCN", Gcn, {"x": "20x64", "adjacency": "20x20"})


def covered(model: Model, curvature: Any = "all") -> tuple[float, dict[str, int]]:
    """Return the covered part in per cent, and the elements that are left, by their reason."""
    recipe = kfactk.build(
        curvature=curvature, unseen="plain", fisher={"name": "empirical", "terms": 2}, update="sgd"
    )
    with torch.device(model.device):
        made = model.make().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left, which the table has
        optimizer = recipe.bind(made)
        made(**model.inputs())
    rows = [row for row in optimizer.coverage() if row.trained]
    optimizer.close()
    left: dict[str, int] = {}
    for row in rows:
        if row.block is None:
            left[row.reason] = left.get(row.reason, 0) + row.numel
    return 100 * (1 - sum(left.values()) / sum(row.numel for row in rows)), left


def row_of(model: Model) -> str:
    """Return the row of a model."""
    share, left = covered(model)
    total = sum(left.values())
    most = sorted(left.items(), key=lambda each: -each[1])[:3]
    words = "; ".join(f"{reason} ({100 * size / total:.0f} %)" for reason, size in most)
    return f"| {model.name} | {share:.1f} % | {words.replace('|', ' ')} |"


def page() -> str:
    """Return the page."""
    logging.disable(logging.WARNING)  # transformers' remarks on small configurations
    rows = [row_of(model) for model in models()]
    logging.disable(logging.NOTSET)
    return HEAD + "\n".join(rows) + "\n" + FOOT


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
