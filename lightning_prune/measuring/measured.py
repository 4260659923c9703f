"""What was measured of a network, and on what."""

from __future__ import annotations

import io
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

from lightning_prune.measuring.cost import measure_cost
from lightning_prune.measuring.forwards import ForwardFn
from lightning_prune.measuring.latency import measure_latency
from lightning_prune.measuring.memory import peak_memory_bytes

__all__ = ["Measured", "describe_machine", "describe_versions", "measure_pair", "saved_bytes"]


@dataclass(frozen=True)
class Measured:
    """What was measured of one network. None = not measured.

    Args:
        accuracy: Value of the report's metric; an accuracy is a share in [0, 1].
        parameters: Number of parameter elements.
        macs: Multiply-accumulates of one forward of the example inputs.
        memory_bytes: Bytes of the parameters.
        latency_ms: Median time of one forward, in milliseconds.
        latency_iqr_ms: Its interquartile range, in milliseconds.
        peak_memory_bytes: Bytes of an inference forward at its worst moment.
        disk_bytes: Size of the saved weights, buffers included, as ``torch.save`` writes a state dict.
    """

    accuracy: float | None
    parameters: int
    macs: int
    memory_bytes: int
    latency_ms: float | None = None
    latency_iqr_ms: float | None = None
    peak_memory_bytes: int | None = None
    disk_bytes: int | None = None


def measure_pair(
    dense: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    *,
    accuracies: tuple[float | None, float | None] = (None, None),
    forward_fn: ForwardFn | None = None,
    min_run_time_s: float = 0.5,
) -> tuple[Measured, Measured]:
    """Measure two networks on the same inputs, their latencies in turns.

    Args:
        dense: What the pruned network is compared with; left as it was found.
        pruned: The network after its last cut; left as it was found.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments.
        accuracies: Value of the metric of (dense, pruned), None = not measured.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call.
        min_run_time_s: Time to spend on the latency of each, in seconds.

    Raises:
        TraceError: If a forward fails.

    >>> pair = measure_pair(nn.Linear(8, 4), nn.Linear(8, 2), torch.ones(1, 8), min_run_time_s=0.01)
    >>> [(measured.parameters, measured.macs, measured.memory_bytes) for measured in pair]
    [(36, 32, 144), (18, 16, 72)]
    """
    models = {"dense": dense, "pruned": pruned}
    latency = measure_latency(models, example_inputs, forward_fn=forward_fn, min_run_time_s=min_run_time_s)
    both = []
    for (name, model), accuracy in zip(models.items(), accuracies, strict=True):
        cost = measure_cost(model, example_inputs, forward_fn=forward_fn)
        both.append(
            Measured(
                accuracy=accuracy,
                parameters=cost.parameters,
                macs=cost.macs,
                memory_bytes=cost.parameter_bytes,
                latency_ms=latency[name].median_ms,
                latency_iqr_ms=latency[name].iqr_ms,
                peak_memory_bytes=peak_memory_bytes(model, example_inputs, forward_fn=forward_fn),
                disk_bytes=saved_bytes(model),
            )
        )
    return both[0], both[1]


class _Count(io.RawIOBase):
    """A file that keeps nothing but its length."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.length += size
        return size


def saved_bytes(model: nn.Module) -> int:
    """Give the size on disk of a network's weights without writing them.

    Args:
        model: Its state dict is what would be saved.

    >>> 400 < saved_bytes(nn.Linear(9, 10)) < 4000
    True
    """
    count = _Count()
    torch.save(model.state_dict(), cast(IO[bytes], count))
    return count.length


def describe_versions() -> dict[str, str]:
    """Give the versions that decide results; a package that is not installed is left out.

    >>> sorted(describe_versions())
    ['lightning', 'lightning_prune', 'python', 'torch']
    """
    found = {"python": platform.python_version()}
    for package in ("torch", "lightning", "lightning-prune"):
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:  # used from a checkout that was not installed
            continue
    return found


def describe_machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Give what a latency depends on.

    Args:
        device: Where the model ran.

    >>> sorted(describe_machine())
    ['cpu', 'device', 'platform', 'threads']
    """
    device = torch.device(device)
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "device": name,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() says nothing more than "x86_64" on Linux
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
