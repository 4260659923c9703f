"""A pruned state dict carries its structure and needs no example inputs; a damaged one touches nothing."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_prune.checkpoint import fit_to_checkpoint, load_pruned_state, manifests, prepare, record
from lightning_prune.errors import CheckpointMismatchError
from lightning_prune.plan import Cut, Patch, Plan, Rewrite
from lightning_prune.surgery.applying import apply
from lightning_prune.surgery.structure import plan_of


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean(dim=(2, 3)))


class Outer(nn.Module):
    """Holds the pruned network under a name, with a parameter of its own in front of it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.net = Net()

    def forward(self, x):
        return self.net(x * self.scale)


KEEP = (3, 1)
TENSORS = {
    "bn.bias": ((4,), 0),
    "bn.running_mean": ((4,), 0),
    "bn.running_var": ((4,), 0),
    "bn.weight": ((4,), 0),
    "conv.weight": ((4, 1, 1, 1), 0),
    "fc.weight": ((2, 4), 1),
}
PLAN = Plan(
    cuts=tuple(Cut(name, dim, 4, KEEP) for name, (_, dim) in TENSORS.items()),
    rewrites=(
        Rewrite("conv", "out_channels", 4, 2),
        Rewrite("bn", "num_features", 4, 2),
        Rewrite("fc", "in_features", 4, 2),
    ),
    sizes=tuple((name, shape) for name, (shape, _) in TENSORS.items()),
)
X = torch.arange(8.0).reshape(2, 1, 2, 2)


def fresh(cls=Net, seed=1):
    torch.manual_seed(seed)
    return cls().eval()


def pruned(cls=Net):
    model = fresh(cls, seed=0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    target = model if cls is Net else model.net
    apply(target, PLAN)
    prepare(model)
    record(target, PLAN)
    return model


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(model):
    """All that a load could touch: tensors, gradients, classes, attributes, the plan."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {n: (id(t), t.shape, t.detach().numpy().tobytes(), id(t.grad)) for n, t in tensors.items()}
    inner = ("_parameters", "_buffers", "_modules")
    for name, module in model.named_modules():
        own = {k: repr(v) for k, v in vars(module).items() if k not in inner and "hooks" not in k}
        values[f"module {name}"] = (type(module), own)
    return values


def same(model, before):
    return bits(model) == before


@pytest.mark.parametrize("cls", [Net, Outer])
def test_a_freshly_built_model_loads_it_and_computes_the_same(cls):
    model, other = pruned(cls), fresh(cls)
    load_pruned_state(other, through_a_file(model.state_dict()))
    assert torch.equal(other(X), model(X))
    net = other if cls is Net else other.net
    assert (net.conv.out_channels, net.bn.num_features, net.fc.in_features) == (2, 2, 2)
    assert plan_of(net) == PLAN


def test_the_manifest_adds_no_key_and_is_plain_data():
    state = pruned(Outer).state_dict()
    assert set(state) == set(fresh(Outer).state_dict())
    assert Plan.from_dict(state._metadata["net"]["lightning_prune"]) == PLAN
    assert manifests(pruned(Outer)) == {"net": PLAN.as_dict()}


def test_a_prepared_model_resizes_itself_in_load_state_dict():
    model, other = pruned(Outer), prepare(fresh(Outer))
    other.load_state_dict(through_a_file(model.state_dict()))
    assert torch.equal(other(X), model(X))


def test_a_prepared_model_resizes_itself_inside_another():
    class Holder(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

    model, other = Holder(pruned()), Holder(prepare(fresh()))
    other.load_state_dict(through_a_file(model.state_dict()))
    assert torch.equal(other.net(X), model.net(X))


def test_parameters_stay_the_same_objects_and_train():
    model, other = pruned(), prepare(fresh())
    before = dict(other.named_parameters())
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loss = other(X).sum()  # its graph knows the old shapes, and lives on
    loss.backward()
    other.load_state_dict(model.state_dict())
    assert all(before[name] is parameter for name, parameter in other.named_parameters())
    old = other.conv.weight.detach().clone()
    other(X).sum().backward()
    optimizer.step()
    assert not torch.equal(other.conv.weight, old)


def test_a_dense_checkpoint_makes_a_pruned_model_grow_back():
    dense = prepare(fresh(seed=7))
    record(dense, Plan())
    for state in (dense.state_dict(), dict(dense.state_dict())):
        model = pruned()
        model.load_state_dict(state)
        assert torch.equal(model(X), dense(X))
        assert model.fc.in_features == 4
        assert plan_of(model) == Plan()


def test_growing_keeps_values_in_their_places():
    model = pruned()
    kept = model.fc.weight.detach().clone()
    fit_to_checkpoint(model, {"state_dict": dict(fresh().state_dict())})
    assert torch.equal(model.fc.weight[:, list(KEEP)], kept)
    assert model.fc.weight[:, [0, 2]].abs().max() == 0


def test_the_structure_alone_is_taken_on_from_the_metadata():
    model, state = fresh(Outer), through_a_file(pruned(Outer).state_dict())
    fit_to_checkpoint(model, {"state_dict": state})
    assert model.net.conv.weight.shape == (2, 1, 1, 1)
    assert model.net.conv.out_channels == 2
    assert "lightning_prune" in model.state_dict()._metadata["net"]  # and is passed on


def test_a_model_of_which_nothing_was_noted_says_nothing():
    """Not even that it is whole: it may have been cut without a note."""
    state = prepare(fresh(Outer)).state_dict()
    assert all("lightning_prune" not in entry for entry in state._metadata.values())


def test_another_plan_is_taken_on_from_a_pruned_model():
    other = Plan(
        tuple(Cut(n, dim, 4, (0,)) for n, (_, dim) in TENSORS.items()),
        tuple(Rewrite(r.module, r.path, 4, 1) for r in PLAN.rewrites),
        sizes=PLAN.sizes,
    )
    single = fresh(seed=3)
    apply(single, other)
    record(single, other)
    model = pruned()
    model.load_state_dict(single.state_dict())
    assert torch.equal(model(X), single(X))
    assert model.conv.out_channels == 1


def test_a_replaced_computation_is_taken_on_and_taken_back():
    def attention():
        return nn.MultiheadAttention(4, 2, batch_first=True).eval()

    rows, tokens = (0, 2, 4, 6, 8, 10), torch.randn(1, 3, 4)
    cuts = (
        Cut("in_proj_weight", 0, 12, rows),
        Cut("in_proj_bias", 0, 12, rows),
        Cut("out_proj.weight", 1, 4, (0, 2)),
    )
    values = (("num_heads", 2), ("head_dim", 1), ("v_head_dim", 1), ("scale", 2**-0.5))
    sizes = (("in_proj_bias", (12,)), ("in_proj_weight", (12, 4)), ("out_proj.weight", (4, 4)))
    plan = Plan(cuts, patches=(Patch("", "attention", values),), sizes=sizes)
    model, other, dense = attention(), attention(), attention()
    apply(model, plan)
    record(model, plan)
    load_pruned_state(other, through_a_file(model.state_dict()))
    assert torch.equal(other(tokens, tokens, tokens)[0], model(tokens, tokens, tokens)[0])
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other(tokens, tokens, tokens)[0], dense(tokens, tokens, tokens)[0])


def test_copies_and_pickles_of_a_pruned_model_still_carry_it():
    for model in (copy.deepcopy(pruned()), pickle.loads(pickle.dumps(pruned()))):
        other = fresh()
        load_pruned_state(other, model.state_dict())
        assert torch.equal(other(X), model(X))
        model.load_state_dict(fresh().state_dict())
        assert model.conv.out_channels == 4


def test_the_network_of_a_larger_checkpoint_loads_by_its_prefix():
    model, net = pruned(Outer), fresh()
    load_pruned_state(net, {"state_dict": through_a_file(model.state_dict()), "epoch": 3}, prefix="net.")
    assert torch.equal(net(X), model.net(X))


def test_a_plain_dict_loads_with_its_plan_or_the_entry_of_its_checkpoint():
    model = pruned(Outer)
    one, two = fresh(), fresh(Outer)
    inner = {k.removeprefix("net."): v for k, v in model.state_dict().items() if "net" in k}
    load_pruned_state(one, inner, plan=PLAN)
    load_pruned_state(two, {"state_dict": dict(model.state_dict()), "lightning_prune": manifests(model)})
    assert torch.equal(one(X), model.net(X))
    assert torch.equal(two(X), model(X))


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Outer()


@pytest.mark.parametrize("held", [False, True], ids=["at the top", "below it"])
@pytest.mark.parametrize("strip", [False, True], ids=["metadata", "entry"])
def test_the_prefix_reaches_into_a_module_that_was_pruned_as_a_whole(strip, held):
    """The plan then lies above the prefix."""
    whole = Plan(
        tuple(dataclasses.replace(c, tensor=f"net.{c.tensor}") for c in PLAN.cuts),
        tuple(dataclasses.replace(r, module=f"net.{r.module}") for r in PLAN.rewrites),
        sizes=tuple((f"net.{name}", shape) for name, shape in PLAN.sizes),
    )
    root, net = fresh(Held if held else Outer, seed=0), fresh()
    model = root.inner if held else root
    apply(model, whole)
    record(model, whole)
    state = through_a_file(root.state_dict())
    if strip:
        state = {"state_dict": dict(state), "lightning_prune": manifests(root)}
    load_pruned_state(net, state, prefix="inner.net." if held else "net.")
    assert torch.equal(net(X), model.net(X))
    assert plan_of(net) == PLAN


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Net(), Net()

    def forward(self, x):
        return self.one(x) + self.two(x)


@pytest.mark.parametrize("how", ["function", "hook"])
def test_one_of_two_manifests_that_cannot_be_applied_leaves_both_networks_alone(how):
    model, source = prepare(fresh(Twice)), fresh(Twice, seed=0)
    for net in (source.one, source.two):
        apply(net, PLAN)
        record(net, PLAN)
    state = through_a_file(source.state_dict())
    state._metadata["two"]["lightning_prune"]["patches"].append(["conv", "eval", []])
    model(X).sum().backward()
    before = bits(model)
    with pytest.raises(CheckpointMismatchError, match="unknown kind of patch 'eval'"):
        load_pruned_state(model, state) if how == "function" else model.load_state_dict(state)
    assert same(model, before)


def test_channels_last_stays():
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    cuts = Cut("0.weight", 0, 4, (0, 2)), Cut("0.bias", 0, 4, (0, 2))
    plan = Plan(cuts, sizes=(("0.bias", (4,)), ("0.weight", (4, 4, 3, 3))))
    apply(model, plan)
    record(model, plan)
    model.load_state_dict(nn.Sequential(nn.Conv2d(4, 4, 3)).state_dict())
    assert model[0].weight.shape == (4, 4, 3, 3)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def edited(change):
    state = through_a_file(pruned(Outer).state_dict())
    data = copy.deepcopy(PLAN.as_dict())
    state._metadata["net"]["lightning_prune"] = change(data) or data
    return state


def with_item(table, index, value):
    def change(data):
        data[table][0][index] = value

    return change


DAMAGES = {
    "no dictionary": (lambda d: ["cuts"], "cannot be read"),
    "missing key": (lambda d: d.pop("sizes") and None, "cannot be read: not a plan: KeyError: 'sizes'"),
    "no cuts": (lambda d: d.pop("cuts") and None, "cannot be read"),
    "other format": (lambda d: d.update(format=99), "format 99"),
    "index out of range": (with_item("cuts", 3, [3, 4]), "cannot be read.*bn.bias"),
    "negative index": (with_item("cuts", 3, [-1, 1]), "cannot be read"),
    "index twice": (with_item("cuts", 3, [1, 1]), "distinct"),
    "nothing kept": (with_item("cuts", 3, []), "0 kept indices"),
    "endless rows": (lambda d: d["cuts"].__setitem__(0, ["bn.bias", 0, 4, [], 10**15]), "rows"),
    "half an index": (with_item("cuts", 3, [3, 1.5]), "cannot be read"),
    "infinite": (with_item("cuts", 2, float("inf")), "cannot be read"),
    "huge size": (
        with_item("sizes", 1, [10**12]),
        r"bn.bias of shape \[1000000000000\], this model has \[4\]",
    ),
    "unknown tensor": (with_item("sizes", 0, "bn.gain"), "no such tensor"),
    "cut of unstated size": (with_item("cuts", 2, 5), "does not agree with the sizes"),
    "cut of another dim": (with_item("cuts", 1, 7), "does not agree with the sizes"),
    "cut twice": (lambda d: d["cuts"].append(d["cuts"][0]), "does not agree with the sizes"),
    "fewer kept": (
        with_item("cuts", 3, [1]),
        r"leaves net.bn.bias with shape \[1\], the state dict holds \[2\]",
    ),
    "unknown attribute": (with_item("rewrites", 1, "out_chanels"), "which this model has not"),
    "way to a global": (
        lambda d: d["rewrites"].append(["conv", "__init__.__globals__['math'].pi", math.pi, 3.0]),
        "which this model has not",
    ),
    "unknown module": (with_item("rewrites", 0, "convolution"), "which this model has not"),
    "other value": (with_item("rewrites", 2, 5), "out_channels=5, this model has 4"),
    "unknown patch": (lambda d: d["patches"].append(["conv", "eval", []]), "patch"),
}


@pytest.mark.parametrize(("change", "match"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("how", ["function", "hook"])
@pytest.mark.parametrize("start", [fresh, pruned])
def test_a_damaged_manifest_is_refused_and_touches_nothing(change, match, how, start):
    model = prepare(start(Outer))
    output = model(X)
    output.sum().backward()
    before = bits(model)
    with pytest.raises(CheckpointMismatchError, match=match):
        load_pruned_state(model, edited(change)) if how == "function" else model.load_state_dict(
            edited(change)
        )
    assert same(model, before)
    assert torch.equal(model(X), output)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ([1, 2], "state dict was expected, got list"),
        ({"state_dict": [1]}, "state dict was expected, got list"),
        ({"state_dict": {}, "lightning_prune": 3}, "a int, no table of plans"),
        (
            {"state_dict": fresh(Outer).state_dict(), "lightning_prune": {"head": PLAN.as_dict()}},
            "module 'head'",
        ),
        (
            {**fresh(Outer).state_dict(), "scale": torch.ones(2)},
            r"scale: .*\(\[2\]\) from checkpoint, the shape in current model is torch.Size\(\[1\]\); build",
        ),
        (
            {**fresh(Outer).state_dict(), "net.conv.weight": "evil"},
            "net.conv.weight.*received <class 'str'>; build the model",
        ),
        ({"net.conv.weight": torch.ones(2, 1, 1, 1)}, "'scale' is missing from the state dict"),
        ({**fresh(Outer).state_dict(), "net.head": torch.ones(1)}, "'net.head' is not in the model"),
    ],
    ids=["list", "no tensors", "no table", "no module", "other shape", "no tensor", "missing", "unexpected"],
)
def test_a_file_of_another_kind_is_refused_and_touches_nothing(state, match):
    model = fresh(Outer)
    before = bits(model)
    with pytest.raises(CheckpointMismatchError, match=match):
        load_pruned_state(model, state)
    assert same(model, before)


def test_another_architecture_is_named_by_its_first_difference():
    torch.manual_seed(0)
    wider = Net(6)
    with pytest.raises(CheckpointMismatchError, match=r"from bn\.bias of shape \[4\], this model has \[6\]"):
        load_pruned_state(wider, pruned().state_dict())


@pytest.mark.parametrize("noted", [False, True])
def test_shapes_alone_are_not_trusted_without_being_asked(noted):
    model = prepare(fresh())
    if noted:
        record(model, Plan())
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv\.weight"):
        model.load_state_dict(dict(pruned().state_dict()))
    assert same(model, before)
