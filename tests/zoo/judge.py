"""One case of the zoo, pruned by half with no hints and held against its mask: a ``Verdict``."""

from __future__ import annotations

import copy
import math
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from oracle import (
    assert_sliced,
    call,
    doubled,
    in_double,
    masked_twin,
    relative_error,
    tensors_in,
    without_fast_path,
)
from torch import Tensor, nn
from zoo.cases import ZooCase, randomise
from zoo.doubles import InDouble, Survivors, adapt
from zoo.truths import false_attributes

from lightning_prune import GroupNormPruner, Plan, from_pretrained
from lightning_prune.errors import PruneError

SECONDS = 120  # of processor time, for the analysis and for the cut
MEMORY = 9 * 2**30
LEAST = 0.10  # of the parameters have to go
RTOL = 1e-9


@dataclass
class Verdict:
    """What became of a case.

    Args:
        name: The case.
        status: ``exact``, ``refused`` (with a reason), ``not shrunk``, ``untrue`` (exact, but an
            attribute is not), ``WRONG``, ``crash`` or ``limit``.
        detail: First line of the error, or the largest relative error.
        before: Parameters of the dense model.
        after: Parameters left.
        analysis: Seconds of processor time of the analysis.
        cut: The same of the step.
        total: The same of everything, the oracle included.
        unknown: Operations without a rule that the pruner reported.
        kept: ``{reason: ["tensor:dim", ...]}`` of the parameter dimensions that stay.
        trace: Last lines of a traceback.
    """

    name: str
    status: str = "crash"
    detail: str = ""
    before: int = 0
    after: int = 0
    analysis: float = 0.0
    cut: float = 0.0
    total: float = 0.0
    unknown: list[str] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return asdict(self)


class OverTimeError(BaseException):
    """The processor time is used up; no ``except Exception`` may swallow it."""


class WrongError(AssertionError):
    """The pruned model computes something else than its mask."""


@contextmanager
def limits(seconds: float) -> Iterator[None]:
    """Interrupt the block after ``seconds`` of processor time, and cap the address space."""

    def stop(*_: Any) -> None:
        raise OverTimeError

    before = signal.signal(signal.SIGPROF, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def judge(case: ZooCase, *, reasons: bool = True) -> Verdict:
    """Prune one case and say what became of it; never raises."""
    verdict = Verdict(case.name)
    stage = "build"
    try:
        with _timed(verdict, "total"):
            torch.manual_seed(0)
            model, inputs = randomise(case.build()), case.inputs()
            verdict.before = verdict.after = count(model)
            for reached in _stages(case, model, inputs, verdict, reasons):
                stage = reached
    except OverTimeError:
        verdict.status, verdict.detail = "limit", f"{stage}: more than {SECONDS} s of processor time"
    except MemoryError as error:
        verdict.status, verdict.detail = "limit", f"{stage}: {_line(error)}"
    except WrongError as error:
        verdict.status, verdict.detail = "WRONG", f"{stage}: {_line(error)}"
    except PruneError as error:
        verdict.status, verdict.detail = "refused", f"{type(error).__name__}: {_line(error, 400)}"
        verdict.trace = _tail(error)
    except Exception as error:  # a crash is a verdict too
        verdict.detail = f"{stage}: {type(error).__name__}: {_line(error, 400)}"
        verdict.trace = _tail(error)
    return verdict


def _stages(case: ZooCase, model: nn.Module, inputs: Any, verdict: Verdict, reasons: bool) -> Iterator[str]:
    yield "dense"
    dense = copy.deepcopy(model)
    with torch.no_grad():
        shapes = [t.shape for t in tensors_in(call(copy.deepcopy(dense), copied(inputs)))]
    assert any(s.numel() for s in shapes), "the case has no output to compare"
    yield "analysis"
    options = {"pruning_ratio": 0.5, **case.options}
    with limits(SECONDS), _timed(verdict, "analysis"):
        pruner = GroupNormPruner(model, inputs, **options)
    verdict.unknown = list(pruner.unknown_operations())
    yield "explain"
    verdict.kept, held = (why_kept(pruner), why_held(pruner)) if reasons else ({}, {})
    yield "cut"
    with limits(SECONDS), _timed(verdict, "cut"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = pruner.step()
    verdict.after = count(model)
    verdict.kept |= _left_whole(held, plan)
    yield "run"
    with torch.no_grad():
        got = [t.shape for t in tensors_in(call(copy.deepcopy(model), copied(inputs)))]
    first = 1 if case.counts else 0
    if [s[first:] for s in got] != [s[first:] for s in shapes]:
        raise WrongError(f"output shapes {[list(s) for s in shapes]} became {[list(s) for s in got]}")
    yield "exact"
    verdict.detail = f"{error_of(dense, model, plan, inputs):.1e}"
    yield from _manners(case, dense, model, inputs, verdict, pruner.notes)


def _manners(
    case: ZooCase, dense: nn.Module, model: nn.Module, inputs: Any, verdict: Verdict, notes: Sequence[str]
) -> Iterator[str]:
    """What an exact model has to do besides: tell the truth, save itself, learn and generate."""
    yield "attributes"
    false = false_attributes(dense, model, inputs, notes=notes)
    yield "files"
    check_files(model, inputs)
    yield "gradients"
    check_gradients(case, model)
    if case.generates:
        yield "generate"
        check_generates(model, inputs)
    least = LEAST if not case.options else 0.01
    other = other_shapes(case, model)
    verdict.status = "exact" if verdict.after <= (1 - least) * verdict.before and not other else "not shrunk"
    verdict.detail += f"; {other}" if other else ""
    if false:
        verdict.status = "untrue"
        verdict.detail = f"exact, but {len(false)} attributes: {'; '.join(false[:3])}"


@contextmanager
def _timed(verdict: Verdict, name: str) -> Iterator[None]:
    start = time.process_time()
    try:
        yield
    finally:
        setattr(verdict, name, round(time.process_time() - start, 2))


def count(model: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def copied(value: Any) -> Any:
    """Copy nested inputs: a model may write into them."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(copied(v) for v in value)
    return value


def error_of(dense: nn.Module, pruned: nn.Module, plan: Plan, inputs: Any) -> float:
    """Give the largest relative error of any output in float64.

    Raises:
        WrongError: If it is above the tolerance, or a kept value moved.
    """
    try:
        assert_sliced(dense, pruned, plan)
    except AssertionError as error:
        raise WrongError(str(error)) from error
    twin = masked_twin(dense, plan)
    adapt(twin, plan)
    with Survivors(twin, plan), InDouble(), without_fast_path():
        want = _run(twin, inputs)
    with InDouble():
        got = _run(copy.deepcopy(pruned).double().eval(), inputs)
    if len(got) != len(want):
        raise WrongError(f"{len(want)} output tensors became {len(got)}")
    worst = 0.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        error = relative_error(g, w)
        if error > RTOL or math.isnan(error):
            raise WrongError(f"output {i} {list(w.shape)}: relative error {error:.3g}")
        worst = max(worst, error)
    return worst


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)  # some models draw masks even in eval mode
    with in_double(), torch.no_grad():
        return tensors_in(call(model, doubled(inputs)))


def check_gradients(case: ZooCase, model: nn.Module) -> None:
    """One backward pass in train mode: every gradient that there is is finite."""
    inputs = case.inputs() if case.train_inputs is None else case.train_inputs()
    model.train()
    out = tensors_in(call(model, inputs))
    loss = sum(t.square().mean() for t in out if t.is_floating_point() and t.requires_grad)
    if not isinstance(loss, Tensor):
        raise WrongError("no output of the pruned model requires a gradient in train mode")
    loss.backward()
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    model.zero_grad(set_to_none=True)
    model.eval()
    if bad:
        raise WrongError(f"gradients that are not finite: {', '.join(bad[:3])}")


def other_shapes(case: ZooCase, model: nn.Module) -> str:
    """Compare with the shapes that the case expects; the first difference."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, shape in case.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else ()
        if found != shape:
            return f"{name} has shape {list(found)}, by hand it is {list(shape)}"
    return ""


@torch.no_grad()
def check_files(model: Any, inputs: Any) -> None:
    """A model that saves itself comes back from its files, bit for bit."""
    if not (hasattr(model, "save_pretrained") and hasattr(type(model), "config_class")):
        return
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = from_pretrained(type(model), folder)
    runs = []
    for one in (model, loaded):
        torch.manual_seed(0)
        runs.append(tensors_in(call(copy.deepcopy(one), copied(inputs))))
    if len(runs[0]) != len(runs[1]) or not all(map(torch.equal, *runs)):
        raise WrongError("the model computes something else once it was saved and loaded")


@torch.no_grad()
def check_generates(model: Any, inputs: Mapping[str, Tensor], new: int = 3) -> None:
    """``generate()``, with its cache, gives the tokens that repeated full passes give."""
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    grows = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ended = torch.zeros(len(out), dtype=torch.bool)
    for n in range(max(out.shape[1] - new, inputs[grows].shape[1]), out.shape[1]):
        logits = call(model, {**inputs, grows: out[:, :n], "use_cache": False}).logits[:, -1]
        differs = (logits.argmax(-1) != out[:, n]) & ~ended
        if differs.any():
            raise WrongError(
                f"generate() gave {out[:, n].tolist()}, full passes {logits.argmax(-1).tolist()}"
            )
        ended |= out[:, n] == model.generation_config.eos_token_id
    if out.shape[1] <= inputs[grows].shape[1]:
        raise WrongError(f"generate() gave nothing new: {list(out.shape)}")


def why_kept(pruner: GroupNormPruner) -> dict[str, list[str]]:
    """Say why each parameter dimension that no group can shorten stays."""
    free = {(m.tensor, m.dim) for g in pruner.groups() for m in g.members}
    table: dict[str, list[str]] = {}
    for name, p in pruner.model.named_parameters():
        for dim in range(p.ndim):
            if p.shape[dim] > 1 and (name, dim) not in free:
                reason = _line(pruner.explain(name, dim), 300).removeprefix(f"{name} dim {dim}")
                table.setdefault(reason, []).append(f"{name}:{dim}")
    return table


FOLLOWS = "Their count follows one of positions that stay: "


def why_held(pruner: GroupNormPruner) -> dict[str, list[str]]:
    """Say of what could go by itself, but for a count that is bound to positions that stay, what binds it."""
    table: dict[str, list[str]] = {}
    for group in pruner.groups():
        dims = {f"{m.tensor}:{m.dim}" for m in group.members if not m.is_buffer}
        told = pruner.explain(group.members[0].tensor, group.members[0].dim).splitlines()
        reason = next((line.removeprefix(FOLLOWS) for line in told if line.startswith(FOLLOWS)), "")
        if reason:
            table.setdefault(f": their count follows one that stays, {_line(reason, 300)}", []).extend(dims)
    return table


def _left_whole(held: Mapping[str, list[str]], plan: Plan) -> dict[str, list[str]]:
    """Of what is held, the dimensions that were not cut at all."""
    cut = {f"{c.tensor}:{c.dim}" for c in plan.cuts}
    whole = {reason: sorted({d for d in dims if d not in cut}) for reason, dims in held.items()}
    return {reason: dims for reason, dims in whole.items() if dims}


def _line(error: object, length: int = 240) -> str:
    return " ".join(str(error).split())[:length]


def _tail(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in frames[-5:]]
