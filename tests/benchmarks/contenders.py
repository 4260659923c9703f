"""The two libraries, asked for the same: half of every group by one criterion, classifier left alone."""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from benchmarks.subjects import LLAMA_HEADS, Subject
from torch import nn

from lightning_prune import GroupNormPruner
from lightning_prune.graph.analysis import analyse
from lightning_prune.graph.groups import Group

RATIO = 0.5
PATIENCE = 60.0  # seconds: on windowed attention its lists of indices grow without end
_TOO_LONG = f"more than {PATIENCE:.0f} s"


def ours(subject: Subject, model: nn.Module | None = None, **options: Any) -> GroupNormPruner:
    """Make our pruner for the subject, or for a copy of its model."""
    options = {"pruning_ratio": RATIO, "ignored_layers": [subject.head], **options}
    return GroupNormPruner(model or subject.model, subject.inputs, **options)


def our_groups(subject: Subject) -> tuple[Group, ...]:
    """Trace the subject and list its groups."""
    return analyse(subject.model, subject.inputs).groups


def theirs(subject: Subject, model: nn.Module | None = None) -> Any:
    """Make Torch-Pruning's GroupNormPruner with the hints that its guide gives for such a model."""
    library = import_module("torch_pruning")
    model = model or subject.model
    heads: dict[str, Any] = {}
    if _is_language(subject):
        sizes = {
            m: LLAMA_HEADS for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))
        }
        heads = {"num_heads": sizes, "prune_num_heads": True, "prune_head_dims": False}
        heads["head_pruning_ratio"] = RATIO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every parameter outside a known layer
        return library.pruner.GroupNormPruner(
            model,
            subject.inputs,
            importance=library.importance.GroupMagnitudeImportance(),
            pruning_ratio=RATIO,
            ignored_layers=[model.get_submodule(subject.head)],
            output_transform=_logits if _is_language(subject) else None,
            **heads,
        )


def their_groups(subject: Subject) -> list[Any]:
    """Build Torch-Pruning's graph and list its groups once; its pruner lists them twice."""
    library = import_module("torch_pruning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = library.DependencyGraph().build_dependency(
            subject.model, subject.inputs, output_transform=_logits if _is_language(subject) else None
        )
    head = subject.model.get_submodule(subject.head)
    return list(graph.get_all_groups(ignored_layers=[head], root_module_types=[nn.Conv2d, nn.Linear]))


def _is_language(subject: Subject) -> bool:
    return subject.name.startswith("llama")


def _logits(output: Any) -> Any:
    return output.logits.sum()


_KNOWN: dict[tuple[str, str], str] = {}  # several rows ask, and it takes a minute to find no end


def cannot_list(subject: Subject) -> str:
    """Say why Torch-Pruning cannot list the groups; nothing if it can."""
    key = ("list", subject.name)
    if key not in _KNOWN:
        _KNOWN[key] = _complaint(partial(their_groups, subject))
    return _KNOWN[key]


def cannot_prune(subject: Subject) -> str:
    """Say why Torch-Pruning cannot prune this model; nothing if the pruned one runs and is smaller."""
    key = ("prune", subject.name)
    if key not in _KNOWN:
        _KNOWN[key] = cannot_list(subject) or _prune_complaint(subject)
    return _KNOWN[key]


def _prune_complaint(subject: Subject) -> str:
    model = copy.deepcopy(subject.model)
    before = sum(p.numel() for p in model.parameters())

    def attempt() -> None:
        theirs(subject, model).step()
        if hasattr(model, "hidden_dim"):  # torchvision's ViT keeps a size there that nobody follows
            model.hidden_dim = model.get_submodule("conv_proj").out_channels
        model(subject.inputs)

    reason = _complaint(attempt)
    left = sum(p.numel() for p in model.parameters()) / before
    return reason if reason or left < 0.9 else f"Torch-Pruning leaves {left:.0%} of the parameters"


def _complaint(attempt: Callable[[], Any]) -> str:
    """Name what the call raises, or that it takes longer than ``PATIENCE``."""
    before = signal.signal(signal.SIGALRM, _out_of_patience)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        attempt()
    except Exception as error:  # whatever it raises is the answer
        first = str(error).partition("\n")[0]
        return f"Torch-Pruning: {type(error).__name__}: {first[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return ""


def ran_out_of_time(reason: str) -> bool:
    """Whether a reason is that it took longer than ``PATIENCE``."""
    return reason.endswith(_TOO_LONG)


def _out_of_patience(*_: Any) -> None:
    raise TimeoutError(_TOO_LONG)
