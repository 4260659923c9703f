"""``lightning-prune plan``: what a prune would cut, what stays and why, without training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from lightning_prune.commands.configuring import compose_config, config_parser, pruner_of
from lightning_prune.errors import OptionError
from lightning_prune.graph.groups import Group
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.plan import Plan
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.surgery.applying import apply
from lightning_prune.training.example_inputs import Example, from_array, one_sample

__all__ = ["run"]

EXAMPLES = """\
  lightning-prune plan                                  the demo
  lightning-prune plan model=vit pruning=vit_heads      a transformer, by heads
  lightning-prune plan pruning.options.budget.macs=0.3  another budget
  lightning-prune plan --config-dir my model=mine       a model of your own"""


def run(words: Sequence[str]) -> None:
    """Print what would be cut."""
    parser = config_parser("plan", "Show what would be cut, what stays and why; train nothing.", EXAMPLES)
    given = parser.parse_intermixed_args(words)
    _print_plan(compose_config(given.overrides, given.config_dir))


def _print_plan(cfg: DictConfig) -> None:
    """Print the groups before and after, what stays and why, and what the prune will save."""
    if not cfg.pruning:
        raise OptionError(
            "a plan was asked for with pruning=none, which cuts nothing; choose another pruning=..."
        )
    cfg.pruning.iterative_steps = 1  # the end of all steps, seen at once
    seed_everything(cfg.seed, verbose=False)
    model, callback = instantiate(cfg.model), instantiate(cfg.pruning)
    pruner = pruner_of(callback, model)
    if pruner is None:
        raise OptionError(
            f"a plan for {type(model).__name__} was asked for, but it has no example_input_array to trace it "
            "with; set that attribute to one input of forward"
        )
    plan = pruner.step(dry_run=True)
    print(f"{'units':>12}  group")
    for group in pruner.groups():
        kind = "" if group.kind == "channel" else f" ({group.kind})"
        print(f"{f'{group.n_units} -> {units_left(group, plan)}':>12}  {group.name.split('/')[0]}{kind}")
    print("\nWhat stays whole, and why:", *_frozen(pruner), sep="\n  ")
    before, after = pruner.model, copy.deepcopy(pruner.model)
    apply(after, plan)
    example = one_sample(Example.of(from_array(model, callback.module)))
    dense, pruned = (measure_cost(m, example.inputs, forward_fn=example.forward_fn) for m in (before, after))
    for name in ("macs", "parameters"):
        was, will = getattr(dense, name), getattr(pruned, name)
        print(f"{name:>12}  {was:,} -> {will:,} ({will / was:.1%})")
    print(*pruner.notes, sep="\n", end="")


def units_left(group: Group, plan: Plan) -> int:
    """Count the units of a group that a plan keeps.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
    >>> pruner = GroupNormPruner(net, torch.ones(1, 2))
    >>> units_left(pruner.groups()[0], pruner.step(dry_run=True))
    2
    """
    cuts = {(cut.tensor, cut.dim): cut for cut in plan.cuts}
    alive: set[int] = set()
    for member in group.members:
        cut = cuts.get((member.tensor, member.dim))
        if cut is None:
            return group.n_units
        rows = cut.by_row() if cut.rows > 1 else cut.by_row() * member.rows
        kept = [row * member.size + position for row, positions in enumerate(rows) for position in positions]
        alive |= set(member.unit[np.isin(member.index, kept)].tolist())
    return len(alive)


def _frozen(pruner: GroupNormPruner) -> Iterator[str]:
    """Name the channel dimensions of which something stays, with the reason."""
    for name, tensor in pruner.model.named_parameters():
        for dim in range(min(2, tensor.dim())):  # those after are a kernel's height and width
            _, found, reason = pruner.explain(name, dim).partition(" stay: ")
            if found:
                yield f"{name} dim {dim}: {reason.splitlines()[0]}"
    yield from (f"operation without a rule, its inputs stay: {name}" for name in pruner.unknown_operations())
