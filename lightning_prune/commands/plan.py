"""``lightning-prune plan``: what a prune would cut, what stays and why, without training."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_prune.commands.configuring import compose_config, config_parser, sow, traced
from lightning_prune.errors import OptionError
from lightning_prune.graph.groups import Group
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.reporting.diagram import to_mermaid
from lightning_prune.reporting.outlook import GroupOutlook, Outlook, print_outlook, waiting, with_progress
from lightning_prune.scores.importance import NEEDS
from lightning_prune.training.callback import StructuredPruning
from lightning_prune.training.example_inputs import Example
from lightning_prune.training.samples import described, per_sample, sample_of

__all__ = ["run"]

IMPORTANCE = "pruning.options.importance"
EXAMPLES = """\
  lightning-prune plan                                  the demo
  lightning-prune plan model=vit pruning=vit_heads      a transformer, by heads
  lightning-prune plan pruning.options.budget.macs=0.3  can that budget be met?
  lightning-prune plan --config-dir my model=mine       a model of your own, from my/model/mine.yaml
  lightning-prune plan --json > plan.json               the same, for a program
  lightning-prune plan --diagram stem > stem.mmd        the group of a layer, drawn with Mermaid

The weights are fresh ones, so which units go is not known yet; how many is."""


def run(words: Sequence[str]) -> None:
    """Print what would be cut."""
    parser = config_parser(
        "plan",
        "Show what would be cut, what stays and why, what every step leaves and whether the budget can\n"
        "be met. Nothing is trained and nothing is written.",
        EXAMPLES,
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print it as JSON and nothing else")
    form.add_argument(
        "--diagram",
        metavar="GROUP",
        help="print one group as a Mermaid diagram: a group's name, or a layer's",
    )
    given = parser.parse_intermixed_args(words)
    cfg = compose_config(given.overrides, given.config_dir)
    callback, pruner = _built(cfg)
    if given.diagram:
        group = _group(pruner, given.diagram)
        types = {name: type(layer).__name__ for name, layer in pruner.model.named_modules()}
        print(to_mermaid(group, pruner.couplings(group), types))
        return
    outlook = _outlook(callback, pruner)
    if given.json:
        print(json.dumps(outlook.as_dict(), indent=2))
    else:
        print_outlook(outlook)


def _built(cfg: DictConfig) -> tuple[StructuredPruning, GroupNormPruner]:
    if not cfg.pruning:
        raise OptionError(
            "a plan was asked for with pruning=none, which cuts nothing; choose another pruning=..."
        )
    sow(cfg.seed)
    asked = OmegaConf.select(cfg, IMPORTANCE)
    if asked in NEEDS:
        print(f"importance={asked} needs training; this plan ranks by group_norm\n", file=sys.stderr)
        OmegaConf.update(cfg, IMPORTANCE, "group_norm")
    model, callback = instantiate(cfg.model), instantiate(cfg.pruning)
    with waiting(f"following {type(model).__name__} through one forward"):
        return callback, traced(callback, model, "a plan for")


def _outlook(callback: StructuredPruning, pruner: GroupNormPruner) -> Outlook:
    steps = tuple(with_progress(pruner.foresee(), pruner.iterative_steps + 1))
    inputs = Example(pruner.example_inputs, pruner.options.forward_fn)
    steps, macs_of = per_sample(steps, inputs, sample_of(pruner.model, inputs))
    first, last = steps[0], steps[-1]
    classes = list(dict.fromkeys(group.isomorphism for group in pruner.groups()))
    groups = tuple(
        GroupOutlook(
            group.name,
            group.kind,
            classes.index(group.isomorphism) + 1,
            before,
            after,
            tuple(f"{member.tensor}:{member.dim}" for member in group.members),
        )
        for group, before, after in zip(pruner.groups(), first.kept, last.kept, strict=True)
    )
    return Outlook(
        model=type(pruner.model).__name__,
        inputs=described(inputs),
        macs_of=macs_of,
        groups=groups,
        steps=steps,
        epochs=tuple(
            callback.start_epoch + number * callback.every_n_epochs for number in range(len(steps) - 1)
        ),
        budget=(pruner.budget.name, pruner.budget.share, pruner.budget.reached) if pruner.budget else None,
        frozen=pruner.frozen(),
        unknown=pruner.unknown_operations(),
    )


def _group(pruner: GroupNormPruner, name: str) -> Group:
    """Find a group by its own name or by that of the layer whose outputs it is."""
    groups = pruner.groups()
    exact = [group for group in groups if group.name == name]
    ours = exact or [g for g in groups if g.members[0].tensor in (name, f"{name}.weight")]
    ours = ours or [
        g for g in groups if any(m.tensor in (name, f"{name}.weight") and m.dim == 0 for m in g.members)
    ]
    if len(ours) == 1:
        return ours[0]
    names = [group.name for group in ours or groups]
    near = names if ours else get_close_matches(name, names, n=5, cutoff=0.0)
    found = "more than one group has" if ours else "no group has"
    rest = "" if len(near) == len(names) else f"; `lightning-prune plan` shows all {len(names)}"
    raise OptionError(
        f"--diagram {name} was asked for, and {found} that name; name one of {', '.join(near)}{rest}"
    )
