"""Patches compute what the stock module computes, and survive whatever happens to a module."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.errors import PlanError
from lightning_prune.plan import Patch
from lightning_prune.surgery.attention import attention_forward
from lightning_prune.surgery.numbers import entry
from lightning_prune.surgery.patches import (
    check_patch,
    install_patch,
    patch_values,
    remember_patch,
    remove_patches,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}


def heads(module="", num_heads=2, head_dim=4, v_head_dim=4, scale=0.5):
    values = {"num_heads": num_heads, "head_dim": head_dim, "v_head_dim": v_head_dim, "scale": scale}
    return Patch(module, "attention", tuple(values.items()))


def scaled(module="", scale=0.25):
    """The default scale of ``Block``, 4 ** -0.5, is replaced."""
    return Patch(module, "numbers", (entry("scaled_dot_product_attention", 4, 0.5, scale),))


def multihead(**kwargs):
    return nn.MultiheadAttention(8, 2, dtype=torch.float64, **kwargs)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def causal(size, kind):
    mask = torch.ones(size, size, dtype=torch.bool).triu(1)
    return (
        mask if kind == "bool" else torch.zeros(size, size, dtype=torch.float64).masked_fill(mask, -torch.inf)
    )


def mine(module, *args, **kwargs):
    return attention_forward(module, *args, **kwargs, num_heads=2, head_dim=4, v_head_dim=4, scale=0.5)


def assert_same(module, *args, **kwargs):
    torch.manual_seed(7)
    expected, expected_weights = module(*args, **kwargs)
    torch.manual_seed(7)
    got, weights = mine(module, *args, **kwargs)
    torch.testing.assert_close(got, expected, **EXACT)
    if expected_weights is None:
        assert weights is None
    else:
        torch.testing.assert_close(weights, expected_weights, **EXACT)


BUILDS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both_tokens": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 6, "vdim": 10},
    "kdim_no_bias": {"kdim": 6, "bias": False},
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_attention_equals_stock_without_masks(build, batch_first):
    module = multihead(batch_first=batch_first, **build)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
    key, value = randn(3, 5, build.get("kdim", 8)), randn(3, 5, build.get("vdim", 8))
    query = randn(3, 4, 8) if batch_first else randn(4, 5, 8)
    for need_weights, average in itertools.product([False, True], repeat=2):
        assert_same(module, query, key, value, need_weights=need_weights, average_attn_weights=average)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_attention_equals_stock_unbatched(build):
    module = multihead(**build)
    args = randn(4, 8), randn(6, build.get("kdim", 8)), randn(6, build.get("vdim", 8))
    for need_weights in (False, True):
        assert_same(module, *args, need_weights=need_weights)
        padding = torch.tensor([False] * 4 + [True] * 2)
        assert_same(module, *args, key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", ["none", "2d", "3d", "causal"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_attention_equals_stock_with_masks(kind, padded, mask, need_weights, extra):
    module = multihead(batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    x = randn(3, 5, 8)
    kwargs = {"need_weights": need_weights}
    if padded:
        lengths = torch.tensor([5, 3, 4]).unsqueeze(1)
        padding = torch.arange(5).unsqueeze(0) >= lengths
        kwargs["key_padding_mask"] = padding if kind == "bool" else padding.double() * -3.0
    if mask == "3d":
        kwargs["attn_mask"] = randn(6, 5, 5) if kind == "float" else torch.rand(6, 5, 5) < 0.2
    elif mask != "none":
        kwargs["attn_mask"] = causal(5, kind)
        kwargs["is_causal"] = mask == "causal"
    assert_same(module, x, x, x, **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_drops_out_in_training_alone(need_weights):
    module = multihead(dropout=0.5)
    x = randn(4, 3, 8)
    assert_same(module.train(), x, x, x, need_weights=need_weights)
    assert_same(module.eval(), x, x, x, need_weights=need_weights)
    torch.manual_seed(0)
    first = mine(module.train(), x, x, x)[0]
    assert not torch.equal(first, mine(module, x, x, x)[0])


def test_attention_gradients_equal_stock():
    module, x = multihead(), randn(4, 3, 8)
    module(x, x, x, need_weights=False)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    mine(module, x, x, x, need_weights=False)[0].square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], **EXACT)


def test_attention_with_uneven_heads_follows_the_equation():
    """Softmax(q k^T scale) v per head, written with loops over samples and heads."""
    h, dq, dv, scale = 3, 2, 5, 0.7
    module = multihead(batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.data, module.in_proj_bias.data = randn(2 * h * dq + h * dv, 8), randn(27)
        module.out_proj.weight.data, module.out_proj.bias.data = randn(8, h * dv), randn(8)
    x = randn(2, 4, 8)
    sizes = {"num_heads": h, "head_dim": dq, "v_head_dim": dv, "scale": scale}
    for need_weights in (False, True):
        got, _ = attention_forward(module, x, x, x, need_weights=need_weights, **sizes)
        for n in range(2):
            rows = x[n] @ module.in_proj_weight.T + module.in_proj_bias
            outs = []
            for i in range(h):
                q = rows[:, i * dq : (i + 1) * dq]
                k = rows[:, h * dq + i * dq : h * dq + (i + 1) * dq]
                v = rows[:, 2 * h * dq + i * dv : 2 * h * dq + (i + 1) * dv]
                outs.append(torch.softmax(q @ k.T * scale, -1) @ v)
            expected = torch.cat(outs, 1) @ module.out_proj.weight.T + module.out_proj.bias
            torch.testing.assert_close(got[n], expected, **EXACT)


def test_attention_refuses_a_causal_hint_without_mask_and_masks_of_other_heads():
    module, x = multihead(), randn(4, 3, 8)
    with pytest.raises(RuntimeError, match="pass the mask"):
        mine(module, x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="12 rows, expected 3 samples x 2 heads"):
        mine(module, x, x, x, attn_mask=torch.zeros(12, 4, 4, dtype=torch.bool))


class Block(nn.Module):
    """Attention as people write it, with the scale left to its default."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, *, bonus=0.0):
        out = F.scaled_dot_product_attention(x * self.weight, x, x) + bonus
        return out if self.inner is None else out + self.inner(x)


def attend(x, scale):
    return torch.softmax(x @ x.transpose(-2, -1) * scale, -1) @ x


def test_scale_reaches_calls_that_name_none_and_no_others():
    x = torch.randn(2, 5, 4)
    model = nn.Sequential(Block())
    install_patch(model, scaled("0", 0.9))
    torch.testing.assert_close(model(x), attend(x, 0.9))
    torch.testing.assert_close(model[0](x, bonus=1.0), attend(x, 0.9) + 1.0)
    torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), attend(x, 0.5))


def test_a_number_that_was_seen_is_left_alone_and_an_unknown_one_refused():
    class Explicit(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, scale=0.3)

    module, x = Explicit(), torch.randn(2, 5, 4)
    name, leaf = "scaled_dot_product_attention", 4
    install_patch(module, Patch("", "numbers", (*scaled().values, entry(name, leaf, 0.3, 0.3))))
    torch.testing.assert_close(module(x), attend(x, 0.3))
    install_patch(module, scaled(scale=0.9))
    with pytest.raises(
        PlanError, match=r"compute with 0\.9 where the pruned model finds 0\.5, but it found 0\.3"
    ):
        module(x)


def test_the_innermost_of_nested_scales_wins():
    x = torch.randn(2, 5, 4)
    model = Block(Block())
    install_patch(model, scaled("", 0.9))
    install_patch(model, scaled("inner", 0.1))
    torch.testing.assert_close(model(x), attend(x, 0.9) + attend(x, 0.1))


def test_a_patch_leaves_no_mode_behind_when_the_forward_fails():
    module = Block()
    install_patch(module, scaled(scale=0.9))
    x = torch.randn(2, 5, 4)
    with pytest.raises(TypeError):
        module(x, nonsense=1)
    torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), attend(x, 0.5))


def roundtrip_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle2": lambda m: pickle.loads(pickle.dumps(m, 2)),
    "torch.save": roundtrip_save,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", ["numbers", "attention"])
def test_copies_compute_alike_and_on_their_own_parameters(kind, make):
    module, patch = (Block(), scaled(scale=0.9)) if kind == "numbers" else (multihead(), heads(scale=0.9))
    args = (torch.randn(2, 5, 4),) if kind == "numbers" else (randn(5, 2, 8),) * 3
    install_patch(module, patch)
    expected = module(*args)
    expected = expected if kind == "numbers" else expected[0]
    twin = make(module)
    assert type(twin) is type(module)
    with torch.no_grad():
        for p in module.parameters() if make is not copy.copy else ():
            p.zero_()
    got = twin(*args)
    torch.testing.assert_close(got if kind == "numbers" else got[0], expected)


def test_a_patch_changes_neither_state_dict_nor_type_checks_nor_names():
    module = multihead()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    install_patch(module, heads())
    assert list(module.state_dict()) == list(before)
    module.load_state_dict(before)
    assert isinstance(module, nn.MultiheadAttention)
    assert (type(module).__name__, type(module).__qualname__) == ("MultiheadAttention", "MultiheadAttention")
    assert repr(module) == repr(multihead())


def test_installing_again_replaces_and_remove_gives_the_stock_back():
    x = torch.randn(2, 5, 4)
    model = nn.ModuleDict({"a": Block(), "b": multihead()})
    for scale in (0.9, 0.2):
        install_patch(model, scaled("a", scale))
    torch.testing.assert_close(model["a"](x), attend(x, 0.2))
    assert patch_values(model["a"]) == dict(scaled(scale=0.2).values)
    install_patch(model, heads("b"))
    assert model["b"]._qkv_same_embed_dim is False
    remove_patches(model)
    torch.testing.assert_close(model["a"](x), attend(x, 0.5))
    assert type(model["a"]) is Block
    assert type(model["b"]) is nn.MultiheadAttention
    assert model["b"]._qkv_same_embed_dim is True
    assert patch_values(model["a"]) is None
    assert vars(model["b"]).keys() == vars(multihead()).keys()


def test_remember_puts_back_the_patch_that_was_there():
    x, model = torch.randn(2, 5, 4), nn.Sequential(Block())
    install_patch(model, scaled("0", 0.9))
    undo = remember_patch(model, scaled("0", 0.2))
    install_patch(model, scaled("0", 0.2))
    undo()
    undo()
    torch.testing.assert_close(model(x), attend(x, 0.9))


def encoder(layers=2):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, layers).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_fast_paths_of_the_transformer_encoder_do_not_go_round_the_patch(padded):
    model, x = encoder(), randn(3, 5, 8)
    padding = torch.arange(5).unsqueeze(0) >= torch.tensor([[5], [3], [4]]) if padded else None
    for i in range(2):
        install_patch(model, heads(f"layers.{i}.self_attn", scale=3.0))
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model.train().requires_grad_(True)
    for m in slow.modules():
        m.p = 0.0 if isinstance(m, nn.Dropout) else getattr(m, "p", None)
        m.dropout = 0.0 if isinstance(m, nn.MultiheadAttention) else getattr(m, "dropout", None)
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(fast[real], slow(x, src_key_padding_mask=padding)[real], **EXACT)
    remove_patches(model)
    assert model.use_nested_tensor is True
    assert not any(k.startswith("_lightning_prune") for k in vars(model))


def test_remember_puts_back_the_nested_tensors_of_an_encoder():
    model = encoder()
    patch = heads("layers.0.self_attn")
    undo = remember_patch(model, patch)
    install_patch(model, patch)
    assert model.use_nested_tensor is False
    undo()
    assert model.use_nested_tensor is True
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("whole", [False, True])
def test_torch_compile_traces_through_a_patch(whole):
    x = torch.randn(2, 5, 4)
    model = nn.Sequential(Block(), nn.Identity())
    install_patch(model, scaled("0", 0.9))
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager", fullgraph=True) if whole else model
    if not whole:
        model[0].compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x), attend(x, 0.9))
    install_patch(model, scaled("0", 0.1))
    torch.testing.assert_close(run(x), attend(x, 0.1))
    torch._dynamo.reset()


def test_torch_compile_traces_through_patched_attention():
    module, x = multihead(), randn(5, 2, 8)
    install_patch(module, heads(scale=0.9))
    expected = module(x, x, x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], expected)
    torch._dynamo.reset()


def test_torch_export_keeps_the_scale():
    x = torch.randn(2, 5, 4)
    model = nn.Sequential(Block())
    install_patch(model, scaled("0", 0.9))
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), attend(x, 0.9))


def test_a_patched_module_can_be_parametrized():
    model, x = Block(), torch.randn(2, 5, 4)
    install_patch(model, scaled(scale=0.9))
    nn.utils.parametrize.register_parametrization(model, "weight", nn.Identity())
    torch.testing.assert_close(model(x), attend(x, 0.9))
    install_patch(model, scaled(scale=0.2))
    torch.testing.assert_close(model(x), attend(x, 0.2))
    torch.testing.assert_close(copy.deepcopy(model)(x), attend(x, 0.2))
    nn.utils.parametrize.remove_parametrizations(model, "weight")
    torch.testing.assert_close(model(x), attend(x, 0.2))


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0] + 1.0


WRONG = {
    "unknown kind": (Block(), Patch("", "magic"), "unknown kind"),
    "no module": (Block(), scaled("nowhere"), "no module 'nowhere'"),
    "missing value": (multihead(), Patch("", "attention", (("num_heads", 2),)), "needs the positive numbers"),
    "extra value": (
        Block(),
        Patch("", "numbers", (*scaled().values, ("x", 1))),
        "needs entries",
    ),
    "zero": (multihead(), heads(num_heads=0), "needs the positive numbers"),
    "text": (Block(), Patch("", "numbers", (("mul 1 0.5", "0.25"),)), "needs entries"),
    "float heads": (multihead(), heads(num_heads=2.0), "needs the positive numbers"),
    "not attention": (Block(), heads(), "only the forward of nn.MultiheadAttention"),
    "own forward": (OwnForward(8, 2), heads(), "only the forward of nn.MultiheadAttention"),
    "hidden": (multihead(), scaled(), "use a patch of kind 'attention'"),
}


@pytest.mark.parametrize(("module", "patch", "message"), WRONG.values(), ids=WRONG)
def test_a_patch_that_does_not_fit_is_refused(module, patch, message):
    cls, before = type(module), dict(vars(module))
    for refuse in (check_patch, install_patch):
        with pytest.raises(PlanError, match=message):
            refuse(module, patch)
    assert type(module) is cls
    assert vars(module) == before


def test_a_forward_replaced_on_the_instance_is_refused():
    module = Block()
    module.forward = lambda x: x
    with pytest.raises(PlanError, match="replaced on the instance"):
        install_patch(module, scaled())
