"""kfactk in `transformers.Trainer`, which takes optimizer and scheduler and saves both."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import kfactk


def examples(count=256, length=8):
    """Draw sequences of two tokens; the label says which is more frequent."""
    tokens = torch.randint(2, 4, (count, length + 1))
    labels = (tokens == 3).sum(1) > length // 2
    return [
        {"input_ids": row, "labels": label}
        for row, label in zip(tokens, labels.long(), strict=True)
    ]


def trainer(model, data, epochs):
    recipe = kfactk.build(
        curvature="kfac", basis="ekfac", update="adamw", lr=0.01, damping=0.01, basis_every=20
    )
    optimizer = recipe.bind(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=64)
    settings = TrainingArguments(
        "checkpoints",
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, settings, train_dataset=data, optimizers=(optimizer, scheduler))


def model():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return BertForSequenceClassification(
        BertConfig(vocab_size=4, max_position_embeddings=16, num_labels=2, **shape)
    )


def main():
    data = examples()
    trainer(model(), data, epochs=4).train()

    resumed = trainer(model(), data, epochs=4)
    resumed.train(resume_from_checkpoint="checkpoints/checkpoint-32")  # the end of the second epoch
    correct = sum(
        int(resumed.model(row["input_ids"][None]).logits.argmax() == row["labels"]) for row in data
    )
    print(f"accuracy {correct / len(data):.3f}, resumed after two epochs")


if __name__ == "__main__":
    main()
