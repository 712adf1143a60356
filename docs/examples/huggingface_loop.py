"""kfactk with a Hugging Face transformer: padded sequences, and a model that returns its loss."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kfactk

VOCABULARY, PADDING = 16, 0


def batch(size=32, longest=12):
    """Draw sequences of consecutive numbers, of several lengths."""
    start = torch.randint(VOCABULARY - 1, (size, 1))
    tokens = (start + torch.arange(longest)) % (VOCABULARY - 1) + 1
    mask = (torch.arange(longest) < torch.randint(4, longest + 1, (size, 1))).long()
    tokens = torch.where(mask.bool(), tokens, PADDING)
    labels = torch.where(mask.bool(), tokens, -100)  # the tokens themselves: the model shifts them
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def main():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=16, pad_token_id=PADDING, **shape
        )
    )

    recipe = kfactk.build(
        curvature="kfac",
        basis="ekfac",
        update="adamw",
        lr=0.01,
        damping=0.003,
        likelihood={"name": "categorical", "class_axis": -1, "targets": "labels", "shift": 1},
        basis_every=10,
    )
    print(recipe.coverage(model))
    optimizer = recipe.bind(model)

    model.train()
    for step in range(60):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
