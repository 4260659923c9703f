"""Evidence that no weight holds: gradients and outputs, averaged over batches, cut along with a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_prune.errors import OptionError
from lightning_prune.graph.groups import Group
from lightning_prune.plan import Plan
from lightning_prune.scores.importance import NEEDS, Evidence
from lightning_prune.scores.members import scored_members
from lightning_prune.surgery.cutting import cut_tensor

__all__ = ["Collector", "Reduce"]

Reduce = Callable[[Tensor], Tensor]

# Layers whose outputs have one channel per position of their weight's dimension 0: the channel dimension of
# an output, counted from behind.
_CHANNEL_DIM: tuple[tuple[tuple[type, ...], Callable[[Any], int]], ...] = (
    ((_ConvTransposeNd,), lambda layer: 0),  # their dimension 0 is the input
    ((_ConvNd,), lambda layer: -len(layer.kernel_size) - 1),
    ((nn.Linear,), lambda layer: -1),
    ((nn.LayerNorm, nn.RMSNorm), lambda layer: -1 if len(layer.normalized_shape) == 1 else 0),
)
_SECOND = (_BatchNorm, _InstanceNorm, nn.GroupNorm)  # [batch, channels, ...], always with a batch


class Collector:
    """Means over the batches since the last ``restart``, by parameter name.

    An importance that needs nothing makes every method return at once.

    Args:
        model: The network; hooks are put on its layers within ``watch`` alone.
        importance: Name of an importance, or a callable, which collects for itself.
    """

    def __init__(self, model: nn.Module, importance: Any) -> None:
        self._model = model
        self.need = NEEDS.get(importance) if isinstance(importance, str) else None
        self._names: frozenset[str] = frozenset()
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def of(self, groups: Sequence[Group], *, include_bias: bool) -> None:
        """Say which parameters matter: those that the groups score, or whose layers produce their units."""
        if self.need is None:
            return
        tensors = dict(self._model.named_parameters())
        members = [m for g in groups for m in scored_members(g, tensors, include_bias=include_bias)]
        self._names = frozenset(m.tensor for m in members if m.dim == 0 or self.need != "activations")

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse groups of whose units nothing can be measured.

        Raises:
            OptionError: If outputs are needed and a group has no layer that produces its units.
        """
        if self.need != "activations":
            return
        known = self._producers()
        for group in groups:
            if not any(m.dim == 0 and m.tensor in known for m in group.members):
                raise OptionError(
                    "importance 'activation' needs a convolution, linear layer or norm to produce the units "
                    f"of group {group.name!r}, found none; put the layer into ignored_layers, or choose "
                    "another importance"
                )

    def restart(self) -> None:
        """Forget what was collected."""
        self._sums, self._counts, self._pending = {}, {}, {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure the outputs of layers meanwhile, if they are needed; the hooks are gone afterwards."""
        with ExitStack() as hooks:
            for name, layer, dim in self._producers().values() if self.need == "activations" else ():
                if name in self._names:
                    hooks.callback(layer.register_forward_hook(self._note(name, dim)).remove)
            yield

    def collect(self, grad_scale: float | Tensor = 1.0, reduce: Reduce | None = None) -> None:
        """Take in the gradients that lie on the parameters, or the outputs seen since the last call.

        Args:
            grad_scale: Factor that the gradients carry, such as the loss scale of mixed precision.
            reduce: Sums a tensor over processes; gradients must be the same in all of them already.
        """
        if self.need == "activations":
            self._fold(reduce)
        elif self.need is not None:
            self._add_gradients(grad_scale)

    def evidence(self, start: Evidence) -> Evidence:
        """Give ``start`` with the means so far."""
        if self.need is None:
            return start
        means = {name: total / self._counts[name].to(total.dtype) for name, total in self._sums.items()}
        return Evidence(start.include_bias, generator=start.generator, **{self.need: means})  # type: ignore[arg-type]

    def follow(self, plan: Plan) -> None:
        """Cut what was collected as ``plan`` cuts the parameters."""
        for name, cuts in plan.by_tensor().items():
            own = [c for c in cuts if c.dim == 0] if self.need == "activations" else cuts
            if name in self._sums and own:
                self._sums[name] = cut_tensor(self._sums[name], own)
        self._pending = {}  # of a batch that was not collected

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Give sums and counts."""
        tables = {"sums": self._sums, "counts": self._counts, "pending": self._pending}
        return {kind: {name: t.clone() for name, t in table.items()} for kind, table in tables.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take sums and counts, on the devices of their parameters."""
        devices = {name: p.device for name, p in self._model.named_parameters()}
        self._sums, self._counts, self._pending = (
            {
                name: t.to(devices[name], copy=True)
                for name, t in state.get(kind, {}).items()
                if name in devices
            }
            for kind in ("sums", "counts", "pending")
        )

    @torch.no_grad()
    def _add_gradients(self, grad_scale: float | Tensor) -> None:
        for name, parameter in self._model.named_parameters():
            if name not in self._names or parameter.grad is None:
                continue
            grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            grad = (grad if grad.dtype == torch.float64 or grad.is_complex() else grad.float()) / grad_scale
            if self.need == "squared_gradients":
                grad = torch.view_as_real(grad).square().sum(-1) if grad.is_complex() else grad.square()
            self._add(self._sums, name, grad)
            self._add(self._counts, name, torch.ones((), device=grad.device, dtype=torch.float64))

    def _fold(self, reduce: Reduce | None) -> None:
        """Join what is pending; in every process the same layers, seen there or not."""
        known, weights = self._producers(), dict(self._model.named_parameters())
        for name in sorted(known.keys() & self._names):
            seen = self._pending.pop(name, None)
            if seen is None and reduce is None:
                continue
            if seen is None:
                seen = torch.zeros(len(weights[name]) + 1, dtype=torch.float64, device=weights[name].device)
            seen = seen if reduce is None else reduce(seen)
            self._add(self._sums, name, seen[:-1])
            self._add(self._counts, name, seen[-1])

    @staticmethod
    def _add(table: dict[str, Tensor], name: str, value: Tensor) -> None:
        if name in table:
            table[name].add_(value)
        else:
            table[name] = value.clone()

    def _note(self, name: str, dim: int) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            with torch.no_grad():
                channels = output.detach().abs().movedim(dim, 0).flatten(1)
                count = channels.new_tensor([channels.shape[1]], dtype=torch.float64)
                self._add(self._pending, name, torch.cat([channels.sum(1, dtype=torch.float64), count]))

        return hook

    def _producers(self) -> dict[str, tuple[str, nn.Module, int]]:
        """Weight name -> (weight name, layer, channel dimension of its output)."""
        names = {id(p): n for n, p in self._model.named_parameters()}
        found = {}
        for layer in self._model.modules():
            dim, weight = _channel_dim(layer), getattr(layer, "weight", None)
            if dim and id(weight) in names:
                found[names[id(weight)]] = (names[id(weight)], layer, dim)
        return found


def _channel_dim(layer: nn.Module) -> int:
    if isinstance(layer, _SECOND):
        return 1
    return next((dim(layer) for types, dim in _CHANNEL_DIM if isinstance(layer, types)), 0)
