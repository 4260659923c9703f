"""How operations are followed: the table of rules, what happens without one, and where zeros matter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import Net, conv, draw, image, param, randomise
from oracle import assert_exact
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan
from lightning_prune.graph.analysis import analyse
from lightning_prune.tracing.labels import Tags
from lightning_prune.tracing.rules import FUNCTIONS, RULES, function_rule, rule, rule_for
from lightning_prune.tracing.trace import trace
from lightning_prune.tracing.tracer import Tracer

X = draw(4, 5)


@torch.library.custom_op("rules::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    """An operation that nobody has heard of; every channel by itself."""
    return x.sin()


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Twist(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = twist(x)
        return out


def twisted() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(5, 8), Twist(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), 0)


def prunable(model: nn.Module, inputs: Any) -> set[str]:
    """``tensor:dim`` of every parameter dimension that holds units."""
    groups = analyse(model, inputs).groups
    return {f"{m.tensor}:{m.dim}" for g in groups for m in g.members if not m.is_buffer}


def prune(model: nn.Module, inputs: Any, **options: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupNormPruner(model, inputs, **options).step()


@pytest.fixture
def tables() -> Iterator[None]:
    """Give the tables back as they were."""
    before = dict(RULES), dict(FUNCTIONS)
    yield
    for table, old in zip((RULES, FUNCTIONS), before, strict=True):
        table.clear()
        table.update(old)  # type: ignore[attr-defined]
    rule_for.cache_clear()


# -- the table -----------------------------------------------------------------


def test_an_operation_without_a_rule_freezes_its_inputs() -> None:
    assert prunable(twisted(), X) == {"2.weight:0", "2.bias:0", "4.weight:1"}


def test_an_operation_without_a_rule_is_reported_with_its_module_and_line() -> None:
    [found] = trace(twisted(), X).unknown
    line = Twist.forward.__code__.co_firstlineno + 1
    assert found.op == "rules::twist"
    assert (found.site.module, found.site.line) == ("1", f"test_rules.py:{line}")
    assert str(found.site) == f"rules::twist in 1 (test_rules.py:{line})"


def test_an_operation_without_a_rule_on_unlabelled_inputs_is_no_news() -> None:
    model = randomise(nn.Sequential(Twist(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    assert trace(model, X).unknown == []
    assert "1.weight:0" in prunable(model, X)


@pytest.mark.usefixtures("tables")
def test_a_rule_may_come_after_its_operation_was_met() -> None:
    model = twisted()
    assert trace(model, X).unknown

    @rule("rules::twist")
    def by_channel(t: Tracer, a: Any, out: Tensor) -> None:
        t.put(out, Tags(t.tags(a["x"]).dims, (True, True)))

    assert trace(model, X).unknown == []
    dense = copy.deepcopy(model)
    plan = prune(model, X)
    assert [model[i].out_features for i in (0, 2, 4)] == [4, 3, 3]
    assert_exact(dense, model, plan, X)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("register", "name", "table"),
    [(rule, "cumsum", RULES), (function_rule, torch.lstm, FUNCTIONS)],
    ids=["operation", "function"],
)
def test_a_second_rule_is_refused_and_the_first_stays(
    register: Callable[..., Any], name: Any, table: dict[Any, Any]
) -> None:
    first = table[name]
    with pytest.raises(RuntimeError, match=r"duplicate rule for .*(cumsum|lstm)"):
        register(name)(lambda *args: None)
    assert table[name] is first


@pytest.mark.parametrize(
    ("operation", "same_as"),
    [
        (torch.ops.aten.relu_.default, "pointwise"),
        (torch.ops.aten.add.Tensor, "pointwise"),
        (torch.ops.aten.cumsum_.default, "cumsum"),
        (torch.ops.aten.permute_copy.default, "permute"),
        (torch.ops.aten.amax.default, "max"),
    ],
    ids=str,
)
def test_a_rule_is_found_by_name_or_by_torchs_own_tag(operation: Any, same_as: str) -> None:
    assert rule_for(operation) is RULES[same_as]


def test_what_is_not_tagged_as_pointwise_is_not_taken_for_it() -> None:
    assert rule_for(torch.ops.rules.twist.default) is None
    assert rule_for(torch.ops.aten.trace.default) is None


# -- over channels -------------------------------------------------------------

Step = Callable[[Tensor], Tensor]


def through(step: Step) -> nn.Module:
    """conv a -> relu -> step -> conv b, or the step's own result where it has dropped the channels."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = step(torch.relu(m.a(x)))
        if x.ndim < 4:
            return x
        out: Tensor = m.b(x)
        return out

    return randomise(Net(run, a=conv(3, 8), b=conv(8, 2)), 0)


GOES: dict[str, Step] = {
    "nothing": lambda x: x,
    "sigmoid": torch.sigmoid,
    "sum over channels": lambda x: x.sum(1),
    "norm over channels": lambda x: x.norm(dim=1),
    "sum of tanh": lambda x: x.tanh().sum(1),
    "sum of gelu of a product": lambda x: nn.functional.gelu(x * 3).sum(1),
    "sum of zeros times anything": lambda x: (x * x.sigmoid()).sum(1),
    "mean over space": lambda x: x.mean((2, 3), keepdim=True),
    "maximum over space": lambda x: x.amax((2, 3), keepdim=True),
    "softmax over space": lambda x: x.softmax(3),
    "sum of sums over space": lambda x: x.sum((2, 3)).sum(1),
}

STAYS: dict[str, Step] = {
    "sum of sigmoid": lambda x: x.sigmoid().sum(1),
    "sum of cosine": lambda x: x.cos().sum(1),
    "sum of shifted": lambda x: (x + 0.5).sum(1),
    "sum of exp": lambda x: x.exp().sum(1),
    "sum of softmax over space": lambda x: x.softmax(3).sum(1),
    "mean over channels": lambda x: x.mean(1),
    "softmax over channels": lambda x: x.softmax(1),
    "log-softmax over channels": lambda x: x.log_softmax(1),
    "maximum over channels": lambda x: x.amax(1),
    "maximum with its index": lambda x: x.max(1).values,
    "product over channels": lambda x: x.prod(1),
    "logsumexp over channels": lambda x: x.logsumexp(1),
    "cumulative sum over channels": lambda x: x.cumsum(1),
    "sorted channels": lambda x: x.sort(1).values,
    "top channels": lambda x: x.topk(8, 1).values,
    "one channel": lambda x: x[:, 7],
    "a literal shape": lambda x: x.reshape(-1, 8, 6, 6),
}


def test_the_two_tables_differ_in_the_step_alone() -> None:
    assert prunable(through(lambda x: x), image()) == {"a.weight:0", "a.bias:0", "b.weight:1"}


@pytest.mark.parametrize("name", GOES)
def test_channels_may_go_through(name: str) -> None:
    model = through(GOES[name])
    assert {"a.weight:0", "a.bias:0"} <= prunable(model, image())
    dense = copy.deepcopy(model)
    plan = prune(model, image())
    assert model.a.out_channels == 4
    assert_exact(dense, model, plan, image())


@pytest.mark.parametrize("name", STAYS)
def test_channels_stay_before(name: str) -> None:
    model = through(STAYS[name])
    assert prunable(model, image()) == set()
    assert trace(model, image()).unknown == []


def test_zeros_that_are_overwritten_in_place_are_lost() -> None:
    assert prunable(through(lambda x: x.add_(1.0).sum(1)), image()) == set()


def test_a_view_of_what_is_overwritten_has_lost_its_zeros_too() -> None:
    def step(x: Tensor) -> Tensor:
        view = x.view(x.shape)
        x.exp_()
        return view.sum(1)

    assert prunable(through(step), image()) == set()


# -- means over channels -------------------------------------------------------


def rms(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * m.scale.view(1, -1, 1, 1)
    out: Tensor = m.b(torch.relu(x))
    return out


def test_a_mean_inside_a_hand_written_rms_norm_lets_channels_go() -> None:
    """The mean is then taken over the channels that are left."""
    model = randomise(Net(rms, a=conv(3, 8), scale=param(8), b=conv(8, 2)), 0)
    dense = copy.deepcopy(model)
    plan = prune(model, image())
    keep = next(list(c.keep) for c in plan.cuts if (c.tensor, c.dim) == ("a.weight", 0))
    assert len(keep) == 4
    with torch.no_grad():
        x = nn.functional.conv2d(image(), dense.a.weight[keep], dense.a.bias[keep], padding=dense.a.padding)
        x = x / (x.pow(2).sum(1, keepdim=True) / 4 + 1e-6).sqrt() * dense.scale[keep].reshape(4, 1, 1)
        want = nn.functional.conv2d(x.relu(), dense.b.weight[:, keep], dense.b.bias, padding=dense.b.padding)
        torch.testing.assert_close(model(image()), want, rtol=1e-5, atol=1e-5)


def gated(m: Net, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    out: Tensor = m.b(x * torch.sigmoid(m.gate(x.mean(1, keepdim=True))))
    return out


def gated_twice(m: Net, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    out: Tensor = m.b(x * torch.sigmoid(m.gate(both)))
    return out


@pytest.mark.parametrize(("run", "seen"), [(gated, 1), (gated_twice, 2)], ids=["mean", "mean and maximum"])
def test_a_mean_that_feeds_a_convolution_keeps_its_channels(run: Callable[..., Any], seen: int) -> None:
    """Spatial attention: a mean over fewer channels is another mean."""
    model = randomise(Net(run, a=conv(3, 8), gate=conv(seen, 1), b=conv(8, 2)), 0)
    assert prunable(model, image()) == set()


def test_a_mean_that_is_an_output_keeps_its_channels() -> None:
    def run(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(m.a(x))
        return m.b(x), x.mean(1)

    assert prunable(randomise(Net(run, a=conv(3, 8), b=conv(8, 2)), 0), image()) == set()


def test_a_mean_that_meets_other_channels_keeps_its_own() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        a, c = torch.relu(m.a(x)), torch.relu(m.c(x))
        out: Tensor = m.b(c * a.mean(1, keepdim=True))
        return out

    model = randomise(Net(run, a=conv(3, 8), c=conv(3, 6), b=conv(6, 2)), 0)
    assert prunable(model, image()) == {"c.weight:0", "c.bias:0", "b.weight:1"}


def test_memory_that_lost_its_zeros_is_not_mistaken_for_another() -> None:
    tracer = Tracer()
    for _ in range(20):
        tracer.soil(torch.ones(8))
    fresh = [torch.ones(8) for _ in range(20)]
    assert not any(x.untyped_storage()._cdata in tracer.dirty for x in fresh)
