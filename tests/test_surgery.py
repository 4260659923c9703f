"""Cutting a model in place: what stays the same object, what follows, and what happens when it fails."""

from __future__ import annotations

import copy
import os
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune.surgery.applying
from lightning_prune.errors import PlanError
from lightning_prune.plan import Cut, Patch, Plan, Rewrite
from lightning_prune.surgery.applying import Snapshot, apply, validate
from lightning_prune.surgery.cutting import cut_tensor, set_tensor_data
from lightning_prune.surgery.patches import patch_values


class Net(nn.Module):
    """conv, bn, relu, grouped conv, linear; the plan below keeps channels 0, 2, 3, 5 of the first conv."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, groups=2)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return self.head(x.mean((2, 3)))


KEEP = (0, 2, 3, 5)  # of group 0: its channels 0, 2; of group 1 (3, 4, 5): its channels 0, 2
PLAN = Plan(
    cuts=(
        Cut("conv1.weight", 0, 6, KEEP),
        Cut("conv1.bias", 0, 6, KEEP),
        Cut("bn.weight", 0, 6, KEEP),
        Cut("bn.bias", 0, 6, KEEP),
        Cut("conv2.weight", 1, 3, (0, 2, 0, 2), 2),
        Cut("bn.running_mean", 0, 6, KEEP),
        Cut("bn.running_var", 0, 6, KEEP),
    ),
    rewrites=(
        Rewrite("conv1", "out_channels", 6, 4),
        Rewrite("bn", "num_features", 6, 4),
        Rewrite("conv2", "in_channels", 6, 4),
    ),
    sizes=(("bn.bias", (6,)), ("conv1.weight", (6, 3, 3, 3)), ("conv2.weight", (8, 3, 3, 3))),
)


def silenced(net):
    """The same function, masked by hand: channels 1 and 4 leave the batch norm as 0."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (twin.bn.weight, twin.bn.bias):
            tensor[[1, 4]] = 0.0
    return twin


def fingerprint(model):
    """Everything that could change: objects, memory, bits, gradients, attributes, classes."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(n, id(t), t.data_ptr(), t.stride(), t.requires_grad, t.tolist()) for n, t in tensors],
        [None if t.grad is None else (id(t.grad), t.grad.tolist()) for _, t in tensors],
        [
            (n, type(m), sorted((k, repr(v)) for k, v in vars(m).items() if k[0] != "_"))
            for n, m in model.named_modules()
        ],
    )


@pytest.fixture
def net():
    net = Net().double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
        net.bn.running_mean.normal_()
        net.bn.running_var.uniform_(0.5, 2.0)
    return net


@pytest.fixture
def x():
    return torch.randn(4, 3, 7, 7, dtype=torch.float64)


def test_the_cut_model_computes_what_the_masked_one_does(net, x):
    for train in (True, False):
        twin = copy.deepcopy(net)
        expected = silenced(twin).train(train)(x)
        apply(twin, PLAN)
        torch.testing.assert_close(twin.train(train)(x), expected, rtol=0, atol=1e-12)
    assert (twin.conv1.out_channels, twin.bn.num_features, twin.conv2.in_channels) == (4, 4, 4)


def test_kept_values_are_the_same_bits_in_the_same_place(net):
    before = copy.deepcopy(net)
    apply(net, PLAN)
    assert torch.equal(net.conv1.weight, before.conv1.weight[list(KEEP)])
    assert torch.equal(net.bn.running_var, before.bn.running_var[list(KEEP)])
    assert torch.equal(net.conv2.weight, before.conv2.weight[:, [0, 2]])
    assert torch.equal(net.head.weight, before.head.weight)


def test_objects_flags_and_order_stay(net):
    net.bn.bias.requires_grad_(False)
    objects = dict(net.named_parameters()) | dict(net.named_buffers())
    flags = [p.requires_grad for p in net.parameters()]
    refs = [weakref.ref(t) for t in objects.values()]
    apply(net, PLAN)
    after = dict(net.named_parameters()) | dict(net.named_buffers())
    assert list(after) == list(objects)
    assert all(after[name] is objects[name] for name in objects)
    assert all(ref() is not None for ref in refs)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.is_leaf for p in net.parameters())


def test_gradients_are_cut_along(net, x):
    net(x).square().sum().backward()
    before = {n: p.grad.clone() for n, p in net.named_parameters()}
    apply(net, PLAN)
    assert torch.equal(net.conv1.weight.grad, before["conv1.weight"][list(KEEP)])
    assert torch.equal(net.conv2.weight.grad, before["conv2.weight"][:, [0, 2]])
    assert torch.equal(net.head.weight.grad, before["head.weight"])


def test_a_sparse_gradient_is_cut_along():
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1, 3, 3])).square().sum().backward()
    expected = table.weight.grad.to_dense()[:, [0, 3]]
    apply(table, Plan((Cut("weight", 1, 4, (0, 3)),)))
    assert table.weight.grad.is_sparse
    assert torch.equal(table.weight.grad.to_dense(), expected)


def test_a_loss_that_is_still_held_does_not_break_the_next_backward(net, x):
    held = net(x).sum()
    apply(net, PLAN)
    net(x).sum().backward()
    assert net.conv1.weight.grad.shape == (4, 3, 3, 3)
    assert held.grad_fn is not None


def test_a_held_accumulate_grad_node_does_not_break_the_next_backward(net, x):
    nodes = [p.view_as(p).grad_fn.next_functions[0][0] for p in net.parameters()]
    apply(net, PLAN)
    net(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in net.parameters())
    assert len(nodes) == 8


def test_hooks_of_tensors_survive(net, x):
    seen = []
    net.conv1.weight.register_hook(lambda g: seen.append(("grad", tuple(g.shape))))
    net.conv1.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("after", tuple(p.grad.shape))))
    apply(net, PLAN)
    net(x).sum().backward()
    assert seen == [("grad", (4, 3, 3, 3)), ("after", (4, 3, 3, 3))]


@pytest.mark.parametrize("names", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
def test_a_tied_tensor_is_cut_once_under_whatever_names(names):
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
    model["b"].weight = model["a"].weight
    expected = model["a"].weight[:, [3, 1]].detach().clone()
    apply(model, Plan(tuple(Cut(name, 1, 4, (3, 1)) for name in names)))
    assert model["b"].weight is model["a"].weight
    assert torch.equal(model["a"].weight, expected)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 1, 3, 3), (1, 4, 3, 3), (6, 1, 1, 1)])
def test_memory_formats_stay(shape):
    for fmt in (torch.channels_last, torch.contiguous_format):
        weight = torch.empty_strided(shape, torch.empty(shape, device="meta").to(memory_format=fmt).stride())
        weight.normal_()
        keep = tuple(range(0, shape[0], 2))
        got = cut_tensor(weight, [Cut("w", 0, shape[0], keep)])
        reference = torch.empty((len(keep), *shape[1:]), device="meta").to(memory_format=fmt)
        assert got.stride() == reference.stride()
        assert torch.equal(got, weight[list(keep)])


def test_channels_last_models_stay_channels_last(net, x):
    net = net.to(memory_format=torch.channels_last)
    net(x).sum().backward()
    apply(net, PLAN)
    for p in (net.conv1.weight, net.conv2.weight, net.conv1.weight.grad):
        assert p.is_contiguous(memory_format=torch.channels_last)
        assert not p.is_contiguous()


def test_a_transposed_weight_keeps_its_layout():
    weight = torch.randn(5, 4).t()
    got = cut_tensor(weight, [Cut("w", 0, 4, (2, 0))])
    assert torch.equal(got, weight[[2, 0]])
    assert got.stride() == (1, 2)


def test_integer_and_bool_buffers_are_cut():
    model = nn.Module()
    model.register_buffer("index", torch.arange(6).reshape(2, 3))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    held = model.index
    apply(model, Plan((Cut("index", 1, 3, (2, 0)), Cut("mask", 0, 3, (0, 2)))))
    assert held is model.index
    assert model.index.tolist() == [[2, 0], [5, 3]]
    assert model.mask.tolist() == [True, True]


def test_both_dimensions_and_rows_of_one_weight():
    """Blocks are those before any cut: filters 0-1 keep column 1, filters 2-3 column 0; then filters 3, 0."""
    layer = nn.Conv1d(4, 4, 1, groups=2, bias=False)
    layer.weight.data = torch.arange(8.0).reshape(4, 2, 1)
    apply(layer, Plan((Cut("weight", 0, 4, (3, 0)), Cut("weight", 1, 2, (1, 0), 2))))
    assert layer.weight.flatten().tolist() == [6.0, 1.0]


def test_recurrent_layers_run_on_after_a_cut():
    layer = nn.LSTM(4, 3, batch_first=True)
    apply(layer, Plan((Cut("weight_ih_l0", 1, 4, (0, 3)),), (Rewrite("", "input_size", 4, 2),)))
    assert layer(torch.randn(2, 5, 2))[0].shape == (2, 5, 3)
    assert layer._flat_weights[0] is layer.weight_ih_l0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.num_heads = 2
        self.shape = (2, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, *self.shape)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


ATTENTION_KEEP = tuple(i for block in range(0, 24, 4) for i in range(block, block + 3))
SCALE = (f"scaled_dot_product_attention 4 {3**-0.5!r}", 0.5)
ATTENTION_PLAN = Plan(
    cuts=(Cut("0.qkv.weight", 0, 24, ATTENTION_KEEP), Cut("0.qkv.bias", 0, 24, ATTENTION_KEEP)),
    rewrites=(Rewrite("0", "shape[1]", 4, 3),),
    patches=(Patch("0", "numbers", (SCALE,)),),
)


def test_patches_and_item_rewrites_are_applied():
    model, x = nn.Sequential(Attention()), torch.randn(2, 5, 8)
    with torch.no_grad():  # the fourth dim of every head is silent, so that removing it changes nothing
        for t in (model[0].qkv.weight, model[0].qkv.bias):
            t[3::4] = 0.0
    expected = model(x)[..., :3]
    apply(model, ATTENTION_PLAN)
    assert model[0].shape == (2, 3)
    torch.testing.assert_close(model(x), expected)


def test_an_empty_plan_changes_nothing(net):
    before = fingerprint(net)
    apply(net, Plan())
    assert fingerprint(net) == before


def test_restore_gives_back_every_bit_object_attribute_and_patch(net, x):
    net(x).sum().backward()
    before, out = fingerprint(net), net.eval()(x)
    snapshot = Snapshot.of(net, PLAN)
    apply(net, PLAN)
    assert fingerprint(net) != before
    for _ in range(2):
        snapshot.restore()
    net.train()
    assert fingerprint(net) == before
    assert torch.equal(net.eval()(x), out)
    net(x).sum().backward()

    model = nn.Sequential(Attention())
    before = fingerprint(model)
    snapshot = Snapshot.of(model, ATTENTION_PLAN)
    apply(model, ATTENTION_PLAN)
    assert patch_values(model[0]) == dict([SCALE])
    snapshot.restore()
    assert fingerprint(model) == before
    assert patch_values(model[0]) is None


STAGES = ["set_tensor_data", "set_path", "install_patch"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_commit_leaves_the_old_model(monkeypatch, stage, error, after):
    model = nn.Sequential(Attention())
    model(torch.randn(2, 5, 8)).sum().backward()
    before = fingerprint(model)
    real, calls = getattr(lightning_prune.surgery.applying, stage), []

    def broken(*args):
        if len(calls) == (1 if stage == "set_tensor_data" else 0):
            calls.append(1)
            if after:
                real(*args)
            raise error
        calls.append(1)
        real(*args)

    monkeypatch.setattr(lightning_prune.surgery.applying, stage, broken)
    with pytest.raises(error):
        apply(model, ATTENTION_PLAN)
    assert fingerprint(model) == before


def test_ctrl_c_on_the_way_back_does_not_stop_it(net):
    before, calls = fingerprint(net), []
    snapshot = Snapshot.of(net, PLAN)
    apply(net, PLAN)

    def interrupted():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    snapshot._undos.insert(3, interrupted)
    snapshot.restore()
    assert len(calls) == 2
    assert fingerprint(net) == before


def wrong(cuts=(), **kwargs):
    return Plan(tuple(Cut(*c) for c in cuts), **kwargs)


GOOD = ("conv1.bias", 0, 6, KEEP)
REFUSED = {
    "name": (
        wrong([GOOD, ("conv9.weight", 0, 6, (0,))]),
        "conv9.weight: the model has no parameter or buffer",
    ),
    "dim": (wrong([GOOD, ("bn.bias", 1, 6, (0,))]), "bn.bias dim 1: the tensor has 1 dimensions"),
    "size": (
        wrong([GOOD, ("bn.bias", 0, 7, (0,))]),
        "bn.bias dim 0: the plan cuts .* size 7, the model has 6",
    ),
    "shape": (
        wrong([GOOD], sizes=(("conv1.weight", (6, 4, 3, 3)),)),
        r"conv1.weight: the plan is for shape \(6, 4",
    ),
    "rows": (wrong([GOOD, ("conv1.weight", 1, 3, (0,) * 4, 4)]), "4 rows are blocks of dimension 0"),
    "rows of dim 0": (wrong([GOOD, ("conv1.weight", 0, 6, (0, 1), 2)]), "2 rows are blocks"),
    "empty": (wrong([GOOD, ("bn.bias", 0, 6, ())]), "bn.bias dim 0: nothing would be left of 6"),
    "twice": (wrong([GOOD, GOOD]), "conv1.bias: one dimension is cut twice"),
    "module": (
        wrong([GOOD], rewrites=(Rewrite("x", "n", 1, 2),)),
        "rewrite of n in 'x': the model has no such module",
    ),
    "path": (wrong([GOOD], rewrites=(Rewrite("bn", "width", 6, 4),)), "BatchNorm2d.width: not found"),
    "before": (
        wrong([GOOD], rewrites=(Rewrite("bn", "num_features", 5, 4),)),
        "the plan expects 5, the model has 6",
    ),
    "flag": (wrong([GOOD], rewrites=(Rewrite("bn", "affine", True, False),)), "no flag follows a size"),
    "number for a flag": (wrong([GOOD], rewrites=(Rewrite("bn", "affine", 1, 0),)), "no flag follows a size"),
    "patch": (wrong([GOOD], patches=(Patch("bn", "magic"),)), "unknown kind of patch"),
    "patched module": (
        wrong([GOOD], patches=(Patch("z", "numbers"),)),
        "no module 'z'",
    ),
}


@pytest.mark.parametrize(("plan", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_does_not_fit_leaves_the_model_bit_identical(net, x, plan, message):
    net(x).sum().backward()
    before = fingerprint(net)
    for refuse in (apply, validate, Snapshot.of):
        with pytest.raises(PlanError, match=message):
            refuse(net, plan)
    assert fingerprint(net) == before


def test_an_attribute_that_cannot_be_set_leaves_the_model_bit_identical():
    class Fixed(nn.Linear):
        @property
        def width(self):
            return 4

    model = Fixed(3, 4)
    before = fingerprint(model)
    with pytest.raises(PlanError, match=r"Fixed.width: cannot be set to 2"):
        apply(model, Plan((Cut("weight", 0, 4, (0, 1)),), (Rewrite("", "width", 4, 2),)))
    assert fingerprint(model) == before


def test_twins_cut_in_two_ways_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(PlanError, match=r"b.weight: the same tensor as a.weight, but cut in another way"):
        apply(model, Plan((Cut("a.weight", 0, 4, (0,)), Cut("b.weight", 0, 4, (1,)))))
    assert model["a"].weight.shape == (4, 4)


def test_inference_mode_is_refused_and_no_grad_is_not(net, x):
    before = fingerprint(net)
    with torch.inference_mode(), pytest.raises(PlanError, match="inference_mode"):
        apply(net, PLAN)
    assert fingerprint(net) == before
    with torch.no_grad():
        apply(net, PLAN)
    net(x).sum().backward()


def test_tensors_made_under_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Linear(3, 4)
    with pytest.raises(PlanError, match=r"weight \(Linear\): made under torch.inference_mode"):
        apply(model, Plan((Cut("bias", 0, 4, (0,)),)))


def test_meta_and_lazy_parameters_are_refused():
    with pytest.raises(PlanError, match=r"1.weight \(Linear\): on the meta device"):
        apply(
            nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4, device="meta")), Plan((Cut("0.bias", 0, 3, (0,)),))
        )
    with pytest.raises(PlanError, match=r"1.weight \(LazyLinear\): not initialised yet; run the model once"):
        apply(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(3)), Plan((Cut("0.bias", 0, 3, (0,)),)))


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(3, 4)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), DeviceMesh("cpu", [0])))
        with pytest.raises(PlanError, match=r"weight \(Linear\): a DTensor"):
            apply(model, Plan((Cut("bias", 0, 4, (0,)),)))
    finally:
        torch.distributed.destroy_process_group()
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_set_tensor_data_grows_and_shrinks_every_dtype(dtype):
    p = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    p.grad = torch.ones(3, 2, dtype=dtype)
    for rows in (5, 1):
        loss = (p * p).sum()
        set_tensor_data(p, torch.ones(rows, 2, dtype=dtype))
        assert p.grad is None
        assert (p.dtype, p.shape, p.requires_grad) == (dtype, (rows, 2), True)
        (p * p).sum().abs().backward()
        assert p.grad.shape == (rows, 2)
        del loss
