"""Whether fewer multiply-accumulates became less time, and which layers are at fault where they did not."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.measuring.clock import clock_of
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.measuring.forwards import ForwardFn, measured_forward

__all__ = [
    "Fault",
    "LayerTime",
    "Speedup",
    "account_for_speed",
    "explain_speedup",
    "judge_speedup",
    "measure_layers",
]

MULTIPLE = 8  # widths that vector units and tensor cores like
MOVES = 8  # multiply-accumulates per number read or written, under which memory sets the pace
NOTABLE = 0.02  # share of the dense time that a layer must have lost to be named, and of the work of one
MOST = 5  # layers that are named

Verdict = Literal["as promised", "short", "slower"]


@dataclass(frozen=True)
class LayerTime:
    """One module's own part of a forward, its children left out.

    Args:
        name: As in ``named_modules()``; "" is the network itself.
        kind: Its type.
        dense_ms: Median time before the cut, in milliseconds.
        pruned_ms: The same after it.
        dense_macs: Multiply-accumulates before the cut.
        pruned_macs: The same after it.
        widths: After the cut, those of the leading two sizes of its own largest parameter that were cut.
        moved: After the cut, numbers that it reads and writes: inputs, outputs and own parameters.
        has_layers: Whether it has children, whose time is not in here.
    """

    name: str
    kind: str
    dense_ms: float
    pruned_ms: float
    dense_macs: int
    pruned_macs: int
    widths: tuple[int, ...] = ()
    moved: int = 0
    has_layers: bool = False


@dataclass(frozen=True)
class Fault:
    """A layer that took longer than the cut promised.

    Args:
        layer: What was measured of it.
        lost_ms: Its time beyond what was promised, in milliseconds.
        reason: Why, in words.
    """

    layer: LayerTime
    lost_ms: float
    reason: str


@dataclass(frozen=True)
class Speedup:
    """Time against multiply-accumulates, both pruned / dense, and who is at fault.

    Args:
        time: Share of the time that is left.
        macs: Share of the multiply-accumulates that is left.
        faults: Layers, the costliest first; empty where the gain is as promised.
        between: Milliseconds of the pruned network outside its layers, and how many of them are more than was
            promised; both 0 where that is not worth a word.
    """

    time: float
    macs: float
    faults: tuple[Fault, ...] = ()
    between: tuple[float, float] = (0.0, 0.0)

    @property
    def verdict(self) -> Verdict:
        """``slower`` than before; ``short`` of half of the gain that the MACs promise; ``as promised``."""
        if self.macs < 1 and self.time >= 1:
            return "slower"
        return "short" if 1 - self.time < (1 - self.macs) / 2 else "as promised"


def judge_speedup(time: float, macs: float, layers: Sequence[LayerTime] = ()) -> Speedup:
    """Hold a network's time against its multiply-accumulates.

    A layer was promised the share of its time that its own MACs kept; one that multiplies nothing, the share
    that the network kept.

    Args:
        time: Latency, pruned / dense.
        macs: Multiply-accumulates, pruned / dense.
        layers: What ``measure_layers`` gives; looked at only where the gain is too small.

    >>> judge_speedup(0.6, 0.5).verdict
    'as promised'
    >>> norm = LayerTime("norm", "BatchNorm2d", 4.0, 4.0, 0, 0, (64,), 1000)
    >>> judge_speedup(0.9, 0.5, [norm]).faults[0].lost_ms
    2.0
    """
    bare = Speedup(time, macs)
    if bare.verdict == "as promised":
        return bare
    notable = NOTABLE * sum(layer.dense_ms for layer in layers)
    work = NOTABLE * sum(layer.dense_macs for layer in layers)
    # What does next to nothing of its own only calls its layers: its name would blame them.
    workers = [each for each in layers if not each.has_layers or each.dense_macs > work]
    faults = [Fault(each, _lost(each, macs), _reason(each)) for each in workers]
    named = sorted((f for f in faults if f.lost_ms > notable), key=lambda f: -f.lost_ms)
    rest = [each for each in layers if each not in workers]
    lost = sum(_lost(each, macs) for each in rest)
    between = (sum(each.pruned_ms for each in rest), lost) if lost > notable else (0.0, 0.0)
    return Speedup(time, macs, tuple(named[:MOST]), between)


def _lost(layer: LayerTime, macs: float) -> float:
    share = layer.pruned_macs / layer.dense_macs if layer.dense_macs else macs
    return layer.pruned_ms - share * layer.dense_ms


def _reason(layer: LayerTime) -> str:
    odd = [str(n) for n in layer.widths if n > MULTIPLE and n % MULTIPLE]
    if not layer.pruned_macs:
        return "it multiplies nothing, so its time is that of memory and of the call"
    if odd:
        return f"{' and '.join(odd)} channels are no multiple of {MULTIPLE}; set round_to={MULTIPLE}"
    if layer.moved and layer.pruned_macs < MOVES * layer.moved:
        per = layer.pruned_macs / layer.moved
        return f"{per:.1f} multiply-accumulates per number moved: it is bound by memory"
    if layer.pruned_macs == layer.dense_macs:
        return "it was not cut"
    return "it is too small by now to fill the machine"


def explain_speedup(speedup: Speedup) -> list[str]:
    """Say it in sentences, the layers at fault one by one; nothing where the gain is as promised.

    >>> explain_speedup(Speedup(0.6, 0.5))
    []
    >>> explain_speedup(Speedup(1.1, 0.5))
    ['Pruning made the network slower: it takes 1.10 of the time at 0.50 of the multiply-accumulates.']
    """
    if speedup.verdict == "as promised":
        return []
    head = {
        "slower": "Pruning made the network slower",
        "short": "Less than half of the promised time was gained",
    }[speedup.verdict]
    first = (
        f"{head}: it takes {speedup.time:.2f} of the time at {speedup.macs:.2f} of the multiply-accumulates."
    )
    taken, lost = speedup.between
    rest = (
        f"Outside the layers, calls and operations such as additions take {taken:.2g} ms, {lost:.2g} ms more "
        "than promised."
    )
    return [first, *map(_sentence, speedup.faults), *([rest] if lost else [])]


def account_for_speed(
    dense: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    *,
    time: float,
    macs: float,
    rounds: int = 7,
    forward_fn: ForwardFn | None = None,
) -> list[str]:
    """Say why a pruned network is not as much faster as its MACs promise; layers are timed only if it is not.

    Args:
        dense: The network before the cut.
        pruned: After it.
        example_inputs: What the latency was measured on.
        time: Latency, pruned / dense.
        macs: Multiply-accumulates, pruned / dense.
        rounds: As for ``measure_layers``.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call.

    Returns:
        Sentences, none where the gain is as promised.
    """
    if judge_speedup(time, macs).verdict == "as promised":
        return []
    layers = measure_layers(dense, pruned, example_inputs, rounds=rounds, forward_fn=forward_fn)
    return explain_speedup(judge_speedup(time, macs, layers))


def _sentence(fault: Fault) -> str:
    layer = fault.layer
    where = f"{layer.name} ({layer.kind})" if layer.name else layer.kind
    where += " outside its layers" if layer.has_layers else ""
    return (
        f"{where} takes {layer.pruned_ms:.2g} ms, {fault.lost_ms:.2g} ms more than promised: {fault.reason}."
    )


def measure_layers(
    dense: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    *,
    rounds: int = 7,
    forward_fn: ForwardFn | None = None,
) -> tuple[LayerTime, ...]:
    """Time every module's own part of a forward, the two networks in turns.

    On CUDA every module is waited for, so the sum is larger than the time of a forward.

    Args:
        dense: The network before the cut; left as it was found.
        pruned: After it; left as it was found.
        example_inputs: As for ``measure_latency``.
        rounds: Forwards of each network that count, >= 1; one more warms up.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call.

    Returns:
        The modules that were called, in the order of ``named_modules()``.

    Raises:
        TraceError: If a forward fails.
    """
    networks = {"dense": dense, "pruned": pruned}
    macs = {
        k: _own_macs(m, measure_cost(m, example_inputs, forward_fn=forward_fn)) for k, m in networks.items()
    }
    clocks = {key: _Clock(clock_of(network)) for key, network in networks.items()}
    with ExitStack() as stack:
        forwards = {}
        for key, network in networks.items():
            forwards[key] = stack.enter_context(measured_forward(network, example_inputs, forward_fn))
            stack.enter_context(clocks[key].hung_on(network))
        for turn in range(rounds + 1):
            for key, forward in forwards.items():
                clocks[key].begin()
                forward()
                if turn:
                    clocks[key].end()
    before, after = clocks["dense"].medians(), clocks["pruned"].medians()
    return tuple(
        LayerTime(
            name,
            type(module).__name__,
            before[name],
            after[name],
            macs["dense"].get(name, 0),
            macs["pruned"].get(name, 0),
            _cut_widths(dense.get_submodule(name), module),
            clocks["pruned"].moved[name],
            any(True for _ in module.children()),
        )
        for name, module in pruned.named_modules()
        if name in before and name in after
    )


def _own_macs(network: nn.Module, cost: Any) -> dict[str, int]:
    """MACs of each module without those of its children."""
    counted: Mapping[str, int] = cost.macs_by_module
    return {
        name: counted.get(name, 0)
        - sum(counted.get(f"{name}.{child}".lstrip("."), 0) for child, _ in module.named_children())
        for name, module in network.named_modules()
    }


def _cut_widths(dense: nn.Module, pruned: nn.Module) -> tuple[int, ...]:
    return tuple(a for a, b in zip(_widths(pruned), _widths(dense), strict=False) if a != b)


def _widths(module: nn.Module) -> tuple[int, ...]:
    own = [tuple(p.shape[:2]) for p in module.parameters(recurse=False)]
    return max(own, key=lambda shape: (len(shape), shape), default=())


class _Clock:
    """Times modules from inside a forward; a child's time is taken from its parent's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.moved: dict[str, int] = {}
        self._rounds: dict[str, list[float]] = {}
        self._now: dict[str, float] = {}
        self._running: list[list[float]] = []  # per module that runs: when it began, its children's time

    def begin(self) -> None:
        """Begin a forward."""
        self._now, self._running = {}, []

    def end(self) -> None:
        """Count the forward since ``begin``."""
        for name, seconds in self._now.items():
            self._rounds.setdefault(name, []).append(1e3 * seconds)

    def medians(self) -> dict[str, float]:
        """Milliseconds per module, the median over the forwards that count."""
        return {name: statistics.median(times) for name, times in self._rounds.items()}

    @contextmanager
    def hung_on(self, network: nn.Module) -> Iterator[None]:
        """Listen to every module meanwhile."""
        with ExitStack() as stack:
            for name, module in network.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave(name), with_kwargs=True).remove)
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append([self._clock(), 0.0])

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            began, inside = self._running.pop()
            taken = self._clock() - began
            if self._running:
                self._running[-1][1] += taken
            self._now[name] = self._now.get(name, 0.0) + taken - inside
            leaves = tree_leaves((args, kwargs, output, list(module.parameters(recurse=False))))
            self.moved[name] = sum(t.numel() for t in leaves if isinstance(t, Tensor))

        return hook
