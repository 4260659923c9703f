"""Costs against numbers worked out by hand."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn, mha, mkldnn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_prune import GroupNormPruner
from lightning_prune.budgets.latency import CACHE
from lightning_prune.errors import OptionError, TraceError
from lightning_prune.measuring import clock, latency
from lightning_prune.measuring.cost import Cost, measure_cost
from lightning_prune.measuring.forwards import measured_forward
from lightning_prune.measuring.latency import measure_latency, summarize_latency
from lightning_prune.measuring.memory import peak_memory_bytes
from lightning_prune.measuring.speedup import measure_layers


class Attention(nn.Module):
    """[b, s, 8] with 2 heads of 4: q, k, v, out are [8, 8]."""

    def __init__(self, backend: SDPBackend | None = None) -> None:
        super().__init__()
        self.qkv, self.out, self.backend = nn.Linear(8, 24), nn.Linear(8, 8), backend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.backend is None:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel(self.backend):
                mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Llama(nn.Module):
    """A block as in Llama: 4 query heads of 4 on 2 key/value heads, causal, gated, tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.q, self.k, self.v, self.o = (nn.Linear(16, n, bias=False) for n in (16, 8, 8, 16))
        self.gate, self.up, self.down = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        x = self.embed(tokens) * scale
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(
            functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )
        return self.head(x + self.down(functional.silu(self.gate(x)) * self.up(x)))


class Product(nn.Module):
    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b if self.bias is None else torch.addmv(self.bias, a, b)


def sequence(*shape: int) -> Tensor:
    return torch.ones(shape)


# batch * positions * (multiplications per position)
CASES: dict[str, tuple[Callable[[], nn.Module], object, int]] = {
    "linear": (lambda: nn.Linear(3, 5), sequence(2, 7, 3), 2 * 7 * 15),
    "linear on one vector": (lambda: nn.Linear(3, 5, bias=False), sequence(3), 15),
    "matrix times vector": (Product, (sequence(4, 6), sequence(6)), 24),
    "matrix times vector plus vector": (lambda: Product(torch.ones(4)), (sequence(4, 6), sequence(6)), 24),
    "dot product": (Product, (sequence(6), sequence(6)), 6),
    "bilinear": (lambda: nn.Bilinear(3, 5, 4), (sequence(2, 3), sequence(2, 5)), 2 * 4 * 3 * 5),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), sequence(2, 3, 5, 7), 2 * 35 * 8 * 3 * 9),
    "strided conv": (lambda: nn.Conv2d(3, 8, 3, stride=2), sequence(1, 3, 9, 9), 16 * 8 * 3 * 9),
    "grouped conv": (
        lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4),
        sequence(2, 8, 5, 5),
        2 * 25 * 12 * 2 * 9,
    ),
    "depthwise conv": (lambda: nn.Conv1d(8, 8, 3, groups=8), sequence(1, 8, 10), 8 * 8 * 3),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), sequence(1, 4, 3, 3), 9 * 4 * 6 * 4),
    # in- and out-projection, then scores and mix: 2 heads * 5 * 5 * 4 each
    "sdpa": (Attention, sequence(3, 5, 8), 3 * (5 * 4 * 64 + 2 * 2 * 25 * 4)),
    "multi-head attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        (sequence(3, 5, 8), sequence(3, 5, 8), sequence(3, 5, 8)),
        3 * (5 * 4 * 64 + 2 * 2 * 25 * 4),
    ),
    "transformer encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        sequence(3, 5, 8),
        3 * (5 * 4 * 64 + 2 * 2 * 25 * 4 + 5 * 2 * 8 * 16),
    ),
    # 4 gates; the second layer reads both directions of the first
    "lstm": (
        lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True),
        sequence(7, 2, 3),
        7 * 2 * 2 * 4 * (5 * 3 + 5 * 5 + 5 * 10 + 5 * 5),
    ),
    "gru": (lambda: nn.GRU(3, 5, batch_first=True), sequence(2, 7, 3), 7 * 2 * 3 * (5 * 3 + 5 * 5)),
    "rnn": (lambda: nn.RNN(3, 5), sequence(7, 2, 3), 7 * 2 * (5 * 3 + 5 * 5)),
    "lstm cell": (lambda: nn.LSTMCell(3, 5), sequence(2, 3), 2 * 4 * (5 * 3 + 5 * 5)),
    # every product of the causal square counts; 4 query heads
    "llama block": (
        Llama,
        torch.zeros(2, 6, dtype=torch.long),
        2 * (6 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 20 + 16 * 11) + 2 * 4 * 36 * 4),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_macs_are_those_counted_by_hand(case: str) -> None:
    build, inputs, macs = CASES[case]
    assert measure_cost(build(), inputs).macs == macs


@pytest.mark.parametrize("case", [case for case in CASES if "dot" not in case and "matrix" not in case])
def test_macs_on_meta_are_the_same(case: str) -> None:
    build, inputs, macs = CASES[case]
    with torch.device("meta"):
        model = build()
    assert measure_cost(model, inputs).macs == macs


def test_macs_do_not_depend_on_the_caller_s_modes() -> None:
    build, inputs, macs = CASES["transformer encoder layer"]
    with torch.inference_mode():
        assert measure_cost(build(), inputs).macs == macs
    assert measure_cost(build().train(), inputs).macs == macs


def test_attention_that_picks_its_own_kernel_is_counted() -> None:
    _, inputs, macs = CASES["sdpa"]
    assert measure_cost(Attention(SDPBackend.FLASH_ATTENTION), inputs).macs == macs


def test_tied_parameters_count_once_and_bytes_follow_the_dtype() -> None:
    model = Llama().half()
    model.register_buffer("mask", torch.zeros(3, dtype=torch.float64))
    cost = measure_cost(model.float(), torch.zeros(1, 2, dtype=torch.long))
    parameters = 11 * 16 + 16 * (16 + 8 + 8 + 16) + 2 * (16 * 20 + 20) + 20 * 16 + 16
    assert (cost.parameters, cost.parameter_bytes, cost.buffer_bytes) == (parameters, 4 * parameters, 3 * 4)


def test_macs_by_module_use_the_model_s_names_and_add_up() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared, nn.Linear(4, 2)), nn.Linear(2, 4), nn.Sequential(shared))
    by_module = measure_cost(model, sequence(3, 4)).macs_by_module
    assert by_module == {"": 144, "0": 72, "0.0": 96, "0.1": 24, "1": 24, "2": 48}
    assert by_module["0.0"] + by_module["0.1"] + by_module["1"] == by_module[""]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Recursive()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, 2)


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return self(self.linear(x), depth - 1) if depth else x


def test_a_module_that_calls_itself_counts_once() -> None:
    assert measure_cost(Nested(), sequence(1, 4)).macs_by_module == {"": 32, "inner": 32, "inner.linear": 32}


class Forgiving(nn.Module):
    """Multiplies, fails inside a child, and goes on with the same child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Recursive()

    def forward(self, x: Tensor) -> Tensor:
        with suppress(TypeError):
            self.child(x, "not a number")
        return self.child(x, 1)


def test_a_call_that_fails_and_is_caught_counts_what_it_computed() -> None:
    assert measure_cost(Forgiving(), sequence(1, 4)).macs_by_module == {
        "": 32,
        "child": 32,
        "child.linear": 32,
    }


def test_the_count_uses_plain_attention_and_no_gradients() -> None:
    def flags() -> tuple[bool, bool, bool]:
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), torch.is_grad_enabled()

    seen = []
    model = nn.Identity()
    model.register_forward_hook(lambda *_: seen.append(flags()))
    before = flags()
    measure_cost(model, sequence(1))
    assert seen == [(False, False, False)]
    assert flags() == before


def test_inputs_by_position_by_keyword_and_by_function() -> None:
    tokens = torch.zeros(2, 6, dtype=torch.long)
    macs = CASES["llama block"][2]
    assert measure_cost(Llama(), (tokens, 2.0)).macs == macs
    assert measure_cost(Llama(), {"tokens": tokens, "scale": 2.0}).macs == macs
    costs = measure_cost(
        Llama(), [tokens, "any object"], forward_fn=lambda model, given: model.head(model.embed(given[0]))
    )
    assert costs.macs == 12 * 16 * 11
    assert costs.macs_by_module == {"": costs.macs, "embed": 0, "head": costs.macs}


def test_a_foreign_kernel_is_reported_not_guessed() -> None:
    @torch.library.custom_op("test_cost::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    class Foreign(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return double(super().forward(x))

    assert measure_cost(Foreign(3, 5), sequence(2, 3)) == Cost(
        20, 30, 80, 0, {"": 30}, ("test_cost::double",)
    )


class Restless(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("swapped", torch.zeros(2))
        self.norm.eval()

    def train(self, mode: bool = True) -> "Restless":
        raise AssertionError("measuring may not call train() or eval(): overrides do more than set the flag")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.swapped = torch.ones(2)
        self.register_buffer("cache", torch.ones(3), persistent=False)
        random.random(), np.random.rand(), torch.rand(1)
        return self.drop(
            functional.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)
        )


def test_the_model_and_the_random_states_are_given_back() -> None:
    model = Restless()
    state = {name: (value.clone(), value) for name, value in model.state_dict(keep_vars=True).items()}
    undisturbed = reseed_and_draw(lambda: None)
    for measure in (measure_cost, peak_memory_bytes):
        assert undisturbed == reseed_and_draw(lambda measure=measure: measure(model, sequence(6, 4)))
    assert {name: module.training for name, module in model.named_modules()} == {
        "": True,
        "norm": False,
        "drop": True,
    }
    assert model.state_dict().keys() == state.keys()
    assert not hasattr(model, "cache")
    for name, (copy, value) in state.items():
        assert model.state_dict(keep_vars=True)[name] is value
        assert torch.equal(value, copy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all((torch.is_grad_enabled(), mha.get_fastpath_enabled(), mkldnn.enabled, cudnn.enabled))


@pytest.mark.parametrize("layer", ["conv", "rnn"])
def test_precision_that_is_set_for_some_layers_alone_is_left_alone(layer: str) -> None:
    """``torch.backends.cudnn.flags()`` fails then."""
    asked = getattr(cudnn, layer)
    before = asked.fp32_precision
    try:
        asked.fp32_precision = "ieee"
        with pytest.raises(RuntimeError, match="TF32"), cudnn.flags(enabled=False):
            pass
        assert measure_cost(nn.Linear(3, 2), sequence(5, 3)).macs == 30
        found = [getattr(cudnn, kind).fp32_precision == "ieee" for kind in ("conv", "rnn")]
    finally:
        asked.fp32_precision = before
    assert found == [layer == "conv", layer == "rnn"]


def reseed_and_draw(between: Callable[[], object]) -> tuple[float, float, float]:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    between()
    return random.random(), float(np.random.rand()), float(torch.rand(1))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such thing")


@pytest.mark.parametrize("measure", [measure_cost, peak_memory_bytes])
def test_a_failing_forward_is_named_and_leaves_no_trace(measure: Callable[..., object]) -> None:
    model = Failing()
    with pytest.raises(TraceError, match=r"measuring Failing on float32\[3, 2\].*KeyError: 'no such thing'"):
        measure(model, sequence(3, 2))
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all((torch.is_grad_enabled(), mha.get_fastpath_enabled(), mkldnn.enabled, cudnn.enabled))


def test_bad_models_are_refused_before_anything_runs() -> None:
    with pytest.raises(OptionError, match=r"torch\.nn\.Module but got str"):
        measure_cost("resnet", sequence(1))  # type: ignore[arg-type]
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(TraceError, match=r"2 of its tensors have no shape yet \(0\.weight, 0\.bias\)"):
        measure_cost(lazy, sequence(1, 2))
    assert isinstance(lazy[0], nn.LazyLinear)


class Wide(nn.Module):
    """[1, 4] -> 100 -> 4 -> 4; at the worst moment 100 and 4 are alive, and once 100 and 100."""

    def __init__(self, keeps_both: bool) -> None:
        super().__init__()
        self.up, self.down, self.keeps_both = nn.Linear(4, 100), nn.Linear(100, 4), keeps_both

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x)
        wide = functional.relu(wide) if self.keeps_both else functional.relu_(wide)
        return self.down(wide).add_(1)


@pytest.mark.parametrize(("keeps_both", "elements"), [(True, 200), (False, 104)], ids=["copies", "in place"])
def test_peak_memory_follows_what_is_alive(keeps_both: bool, elements: int) -> None:
    held = 4 * 100 + 100 + 100 * 4 + 4
    for _ in range(2):
        assert peak_memory_bytes(Wide(keeps_both), sequence(1, 4)) == 4 * (held + elements)


def test_peak_memory_counts_buffers_but_not_inputs_or_views() -> None:
    model = nn.Flatten()
    model.register_buffer("table", torch.zeros(10, dtype=torch.float64))
    assert peak_memory_bytes(model, sequence(3, 4, 5)) == 80


def test_measured_forward_moves_inputs_to_the_model() -> None:
    with measured_forward(nn.Linear(3, 2).to("meta"), {"input": sequence(1, 3)}) as forward:
        assert forward().device.type == "meta"


class Clocked(nn.Module):
    """Takes ``cost`` units of a clock of our own per call, and notes who was called."""

    def __init__(self, name: str, costs: list[float], log: list[str], time: list[float]) -> None:
        super().__init__()
        self.name, self.costs, self.log, self.time = name, costs, log, time

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        self.time[0] += self.costs[0] if len(self.costs) == 1 else self.costs.pop(0)
        return x


def test_latency_takes_turns_and_reports_what_the_clock_said(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    time = [0.0]
    monkeypatch.setattr(latency, "clock_of", lambda *models: lambda: time[0])
    models = {
        name: Clocked(name, [seconds], log, time).train() for name, seconds in (("a", 0.25), ("b", 0.5))
    }
    taken = measure_latency(models, sequence(1), rounds=4, min_run_time_s=4.0)
    assert (taken["a"].median_ms, taken["a"].iqr_ms, taken["b"].median_ms) == (250.0, 0.0, 500.0)
    assert (taken["a"].runs, taken["b"].runs) == (4 * 4, 4 * 2)  # 1 s per round
    turns = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    assert turns == ["a", "b"] * 5  # one turn to warm up
    assert all(model.training for model in models.values())
    assert taken["a"].threads == torch.get_num_threads()


def test_latency_spread_is_the_interquartile_range_of_the_rounds() -> None:
    taken = summarize_latency([0.010, 0.001, 0.002, 0.004, 0.003], runs=5, threads=2)
    assert (taken.median_ms, taken.iqr_ms, taken.rounds) == (3.0, 2.0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2}, "rounds >= 3"),
        ({"min_run_time_s": 0.0}, "min_run_time_s to be a positive"),
        ({"num_threads": 0}, "num_threads >= 1"),
    ],
)
def test_latency_refuses_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        measure_latency({"a": nn.Identity()}, sequence(1), **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least one model"):
        measure_latency({}, sequence(1))


def test_latency_sets_the_threads_only_while_timing() -> None:
    seen = []
    before = torch.get_num_threads()
    model = nn.Identity()
    model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    measure_latency({"a": model}, sequence(1), rounds=3, min_run_time_s=1e-4, num_threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.fixture
def gpu_beside(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A machine with a GPU that nobody has used yet; gives the devices that are waited for."""
    waited: list[object] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("the GPU was initialised"))
    return waited


def test_timing_a_model_on_a_cpu_leaves_a_gpu_alone(
    gpu_beside: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    dense, pruned = nn.Linear(8, 8), nn.Linear(8, 4)
    measure_latency({"dense": dense, "pruned": pruned}, sequence(1, 8), rounds=3, min_run_time_s=1e-3)
    measure_layers(dense, pruned, sequence(1, 8), rounds=2)
    GroupNormPruner(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), sequence(1, 8), budget={"latency": 0.99})
    assert gpu_beside == []


def test_a_clock_waits_for_the_devices_of_its_models_else_for_the_one_in_use(
    gpu_beside: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(clock, "devices", lambda model: [torch.device(name) for name in model])
    clock.clock_of(["cpu", "cuda:1"], ["cuda:2", "cuda:1", "meta"])()  # type: ignore[arg-type]
    assert gpu_beside == [torch.device("cuda", 1), torch.device("cuda", 2)]
    clock.clock_of(["cpu"])()  # type: ignore[arg-type]  # its forward may do what it likes
    assert gpu_beside[2:] == [None]
