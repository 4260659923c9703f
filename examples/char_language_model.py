"""Prune a Llama: a small one learns to write Python's own manual, character by character.

    pip install lightning-prune transformers
    python examples/char_language_model.py    about two minutes; EPOCHS=2 for a look

Whole heads (a key/value head with all its query heads), the dims of each head in RoPE pairs, the hidden units
of the feed-forward layers and the width of the stream all go; nothing is said about where they are. The
report at the end gives the perplexity on held-out text before the first cut and after the last epoch.
"""

import os
from pydoc_data.topics import topics  # the language reference, as help("if") shows it

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_prune import PrunedModelCheckpoint, StructuredPruning

LENGTH = 64  # characters that the model sees at once

text = "\n".join(topics[name] for name in sorted(topics))
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
pieces = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)  # [pieces, LENGTH]
held_out = torch.arange(len(pieces)) % 20 == 0


class Writer(LightningModule):
    """Predict the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(letters),
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=LENGTH,
                use_cache=False,
            )
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Give the mean cross entropy per character; ``batch`` is [b, LENGTH] codes."""
        return self.net(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the perplexity: among how many characters the model hesitates."""
        self.log("val/perplexity", self.net(input_ids=batch, labels=batch).loss.exp(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01)


epochs = int(os.environ.get("EPOCHS", "24"))
model = Writer()
pruning = StructuredPruning(
    module="net",
    sparse_start_epoch=epochs // 4,
    start_epoch=epochs // 2,
    iterative_steps=max(1, epochs // 4),
    options={"budget": {"macs": 0.5}, "prune_num_heads": True, "head_pruning_ratio": 0.25},
)
best = PrunedModelCheckpoint(monitor="val/perplexity", mode="min", dirpath="checkpoints", filename="writer")
trainer = Trainer(
    max_epochs=epochs,
    limit_train_batches=40,  # batches of 32 pieces that make one epoch
    callbacks=[pruning, best],
    accelerator="cpu",
    logger=False,
)
trainer.fit(
    model,
    DataLoader(pieces[~held_out], batch_size=32, shuffle=True, drop_last=True),
    DataLoader(pieces[held_out], batch_size=32),
)

for layer in model.net.model.layers:
    width, hidden = layer.self_attn.head_dim, layer.mlp.up_proj.out_features
    heads = [layer.self_attn.q_proj.out_features // width, layer.self_attn.k_proj.out_features // width]
    print(f"{heads[0]} heads on {heads[1]}, each {width} wide; {hidden} hidden units")

model.eval()  # the pruned network is an ordinary one: Hugging Face's own generate() goes on with a text
start = torch.tensor([[letters.index(letter) for letter in "The statement "]])
written = model.net.generate(start, max_length=LENGTH, do_sample=False, pad_token_id=0)
print("".join(letters[code] for code in written[0]))
