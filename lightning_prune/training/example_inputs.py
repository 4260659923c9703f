"""Example inputs for the trace: what the modules of a LightningModule are called with.

A LightningModule need not have a ``forward``: its training step may call any of its submodules. So one
training step runs on a copy, and the *outermost* calls of modules with parameters are recorded. One call of
the module itself gives plain example inputs; anything else is replayed call by call, and what each call
returns counts as an output.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lightning_prune.errors import TraceError
from lightning_prune.randomness import randomness_kept
from lightning_prune.training.describing import Call, describe

__all__ = [
    "Call",
    "Example",
    "collated",
    "from_array",
    "from_batch",
    "one_sample",
    "quiet_twin",
    "replay",
    "take_batch",
    "training_step",
    "transferred",
]


@dataclass(frozen=True)
class Example:
    """What a pruner is built with.

    Args:
        inputs: ``example_inputs`` of the pruner.
        forward_fn: ``forward_fn`` of the pruner, None where calling the module is enough.
    """

    inputs: Any
    forward_fn: Callable[[nn.Module, Any], Any] | None = None

    @staticmethod
    def of(calls: list[Call]) -> Example:
        """Choose plain example inputs for one plain call, else a replay."""
        only = calls[0]
        if len(calls) == 1 and not only.path and not (only.args and only.kwargs):
            return Example(only.kwargs or only.args)
        return Example(calls, replay)


def one_sample(example: Example) -> Example:
    """Cut the inputs down to one sample where every tensor has the same leading size."""
    if example.forward_fn is replay:
        calls = [Call(c.path, _leading(c.args, 1), _leading(c.kwargs, 1)) for c in example.inputs]
        return Example(calls, replay)
    return Example(_leading(example.inputs, 1), example.forward_fn)


def replay(model: nn.Module, calls: list[Call]) -> list[Any]:
    """Call the same submodules of ``model`` in turn; every result is an output."""
    return [model.get_submodule(call.path)(*call.args, **call.kwargs) for call in calls]


def from_array(pl_module: LightningModule, module: str | None) -> list[Call]:
    """Record the calls that ``forward`` makes on ``example_input_array``; empty if there is none."""
    array = pl_module.example_input_array
    if array is None:
        return []
    array = apply_to_collection(array, Tensor, _to(pl_module))
    args, kwargs = ((), dict(array)) if isinstance(array, Mapping) else (_as_args(array), {})
    if module is None:
        return [Call("", args, kwargs)] if _has_forward(pl_module) else []
    with randomness_kept(), torch.no_grad():
        twin = _twin(pl_module)
        calls, _ = _record(_submodule(twin, module), lambda: twin(*args, **kwargs))
    return calls


def from_batch(pl_module: LightningModule, module: str | None, batch: Any, trainer: Trainer) -> list[Call]:
    """Record the calls that one training step makes on ``batch``.

    The step runs on a copy that logs nothing and steps no optimizer, without gradients, with random states
    put back. Where every tensor of the batch has the same leading size, two samples are enough and keep the
    trace cheap.

    Raises:
        TraceError: If the step calls no module that has parameters.
    """
    failure: Exception | None = None
    with randomness_kept(), torch.no_grad():
        for sample in (_leading(batch, 2), batch):
            twin = quiet_twin(pl_module, trainer)
            calls, failure = _record(_submodule(twin, module), training_step(twin, sample))
            if failure is None:
                break
    if not calls:
        raise TraceError(
            f"one training step of {type(pl_module).__name__} was run to see what "
            f"{'its modules' if module is None else repr(module)} is called with, and "
            f"{'it called none of them' if failure is None else f'{type(failure).__name__}: {failure}'}; "
            "set example_input_array on the LightningModule, or name another module"
        ) from failure
    return calls


def take_batch(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Take one training batch and leave loaders and random states as they were.

    A map-style dataset is asked for its first two samples, so that neither sampler nor workers notice.
    """
    with randomness_kept():
        return transferred(trainer, pl_module, _each_loader(trainer.train_dataloader))


def transferred(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Bring a batch to where and into what the training step gets it as."""
    batch = trainer.precision_plugin.convert_input(batch)
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        batch = batch if owner is None else owner.on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _to(pl_module: LightningModule) -> Callable[[Tensor], Tensor]:
    def move(tensor: Tensor) -> Tensor:
        dtype = pl_module.dtype
        tensor = tensor.to(pl_module.device)
        return tensor.to(dtype) if tensor.is_floating_point() and isinstance(dtype, torch.dtype) else tensor

    return move


def _as_args(array: Any) -> tuple[Any, ...]:
    return tuple(array) if isinstance(array, tuple) else (array,)


def _has_forward(pl_module: LightningModule) -> bool:
    return type(pl_module).forward is not LightningModule.forward


def _submodule(twin: nn.Module, module: str | None) -> nn.Module:
    return twin.get_submodule(module or "")


def _twin(pl_module: LightningModule) -> LightningModule:
    try:
        return copy.deepcopy(pl_module)
    except Exception as error:
        raise TraceError(
            f"{type(pl_module).__name__} was to be copied for the trace: {type(error).__name__}: {error}; "
            "keep what cannot be copied (files, locks, processes) out of the module"
        ) from error


class _Still:
    """Stands where an optimizer or scheduler stands, and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def __len__(self) -> int:
        return 0


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Accept a call and ignore it."""


def quiet_twin(pl_module: LightningModule, trainer: Trainer) -> LightningModule:
    """Copy the module; a training step of the copy logs nothing and steps no optimizer."""
    twin = _twin(pl_module)
    twin.trainer = trainer
    still = [_Still() for _ in trainer.optimizers]
    stills = still[0] if len(still) == 1 else still
    for name in (
        "log",
        "log_dict",
        "manual_backward",
        "toggle_optimizer",
        "untoggle_optimizer",
        "clip_gradients",
    ):
        setattr(twin, name, _nothing)
    for name in ("optimizers", "lr_schedulers"):
        setattr(twin, name, lambda *args, **kwargs: stills)
    return twin


def training_step(twin: LightningModule, batch: Any) -> Callable[[], Any]:
    """Give a call of the training step on a batch, whichever arguments it takes."""
    step = type(twin).training_step
    count = len([p for p in inspect.signature(step).parameters.values() if p.kind is not p.KEYWORD_ONLY])
    return lambda: step(twin, *(batch, 0)[: max(count - 1, 1)])


def _record(target: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], Exception | None]:
    """Run, and list the outermost calls inside ``target``, equal ones once, and how the run failed."""
    calls: dict[str, Call] = {}
    depth = [0]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if depth[0] == 0:
            call = Call(names[module], _keep(args), _keep(kwargs))
            spec = describe([call])
            calls.setdefault(f"{call.path} {len(calls) if spec is None else json.dumps(_shapes(spec))}", call)
        depth[0] += 1

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        depth[0] -= 1

    names = _with_parameters(target)
    for module in names:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)
    failure: Exception | None = None
    try:
        run()
    except Exception as error:  # the calls before it may be all that is needed
        failure = error
    return list(calls.values()), failure


def _with_parameters(target: nn.Module) -> dict[nn.Module, str]:
    """Name the modules that hold something to prune; a network inside a metric is not the user's."""
    metrics = {
        inner for module in target.modules() if isinstance(module, Metric) for inner in module.modules()
    }
    return {
        module: name
        for name, module in target.named_modules()
        if module not in metrics and next(module.parameters(), None) is not None
    }


def _keep(value: Any) -> Any:
    return apply_to_collection(value, Tensor, lambda t: t.detach().clone())


def _shapes(spec: Any) -> Any:
    """Drop the values, so that two calls that differ in them alone count as one."""
    if isinstance(spec, dict):
        return {key: _shapes(value) for key, value in spec.items() if key not in ("values", "range")}
    return [_shapes(item) for item in spec] if isinstance(spec, list) else spec


def _leading(batch: Any, count: int) -> Any:
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(t.shape[0] if t.dim() else -1))
    if len(set(sizes)) != 1 or sizes[0] <= count:
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t[:count])


def _each_loader(loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        return {key: _each_loader(loader) for key, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return type(loaders)(_each_loader(loader) for loader in loaders)
    return _first_batch(loaders)


def _first_batch(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return _first_and_rewind(loader)
    if isinstance(loader.dataset, IterableDataset):
        # Without workers: starting them for one batch is slow, and persistent ones would not be given back.
        return next(iter(DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)))
    if loader.batch_sampler is None:
        return loader.collate_fn(loader.dataset[0])
    count = min(2, loader.batch_size or 2, len(loader.dataset))  # type: ignore[arg-type]
    return collated(loader, list(range(count)))


def collated(loader: DataLoader[Any], indices: list[int]) -> Any:
    """Make a batch of samples of a map-style dataset, as the loader would."""
    together = getattr(loader.dataset, "__getitems__", None)  # a dataset may fetch a batch at once
    return loader.collate_fn(together(indices) if together else [loader.dataset[i] for i in indices])


def _first_and_rewind(loader: Any) -> Any:
    state = (
        loader.state_dict() if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") else None
    )
    batch = next(iter(loader))
    if state is not None:
        loader.load_state_dict(state)
    return batch
