"""Plan a Llama of 8 B parameters without its weights: ``python tests/zoo/big.py``.

Prints groups, units, predicted parameters and MACs, the seconds of processor time and the peak of memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its names are plain words

import torch  # noqa: E402

torch.set_num_threads(1)

from zoo.operators import import_torchvision  # noqa: E402

import_torchvision()  # lightning imports it where it finds one, so it comes first

from zoo.huggingface_cases import transformers  # noqa: E402

from lightning_prune import GroupNormPruner, floats_on_meta  # noqa: E402

SIZES = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Build, plan, print one line of JSON."""
    library = transformers()
    begun = time.process_time()
    with floats_on_meta():
        model = library.LlamaForCausalLM(library.LlamaConfig(**SIZES))
    ids = torch.randint(5, SIZES["vocab_size"], (1, 128))
    built = time.process_time()
    pruner = GroupNormPruner(model, {"input_ids": ids}, pruning_ratio=0.5)
    dense, pruned = pruner.foresee()
    plan = pruner.step(dry_run=True)
    ended = time.process_time()
    facts = {
        "groups": len(pruner.groups()),
        "units": sum(g.n_units for g in pruner.groups()),
        "cuts": len(plan.cuts),
        "parameters": [dense.parameters, pruned.parameters],
        "macs": [dense.macs, pruned.macs],
        "seconds_to_build": round(built - begun, 1),
        "seconds_to_plan": round(ended - built, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
