"""The kernels of the regulariser: Numba's loops, Triton's interpreter on a CPU, and compiled on a GPU.

That they compute the penalty is shown by every test of the regulariser, which run them too.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings

import pytest
import torch
from naive_penalty import (
    assert_added,
    before,
    channels,
    group,
    member,
    naive_gradients,
    others,
    parameters,
    whole,
)
from torch import nn

from lightning_prune import GroupNormPruner, OptionError, PruneError, PruningOptions
from lightning_prune.scores import backends
from lightning_prune.scores.backends import NUMBA, TRITON, Kernels, backend_for
from lightning_prune.scores.gammas import Gammas
from lightning_prune.scores.inspecting import Inspector
from lightning_prune.scores.launching import KernelGammas, KernelWalk
from lightning_prune.scores.layout import Block, plan_blocks
from lightning_prune.scores.members import scored_members
from lightning_prune.scores.positions import Positions
from lightning_prune.scores.regularizer import Regularizer
from lightning_prune.scores.sheets import sheet_of
from lightning_prune.scores.walks import Walk

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["numba", "triton", GPU])
def device(request):
    if request.param == "triton":
        request.getfixturevalue("interpreted_kernels")
    return request.param if request.param == "cuda" else "cpu"


def backend_of(weights):
    return backend_for(next(iter(weights.values())).device, fused=True)


def walk_over(weights, *dims):
    """Make the walk over the same dimensions of every tensor, and give its blocks."""
    wanted = [(name, dim, 1) for name, w in weights.items() for dim in dims if dim < w.dim()]
    blocks = plan_blocks(weights, wanted)
    wide = any(w.dtype == torch.float64 for w in weights.values())
    return KernelWalk(blocks, weights, torch.float64 if wide else torch.float32, backend_of(weights)), blocks


def along(weight, dim, numbers):
    return numbers.view([-1 if d == dim else 1 for d in range(weight.dim())])


# More than a tile either way, less than one, one row, one column, kernels of every size.
SHAPES = [
    (70, 300),
    (5, 4300),
    (3, 600, 3, 3),
    (3, 5),
    (1, 200),
    (200, 1),
    (33, 5, 3, 3),
    (130, 3, 1, 1),
    (8, 3, 16, 16),
    (40, 70, 2, 2),
    (40,),
]


@pytest.mark.parametrize("dims", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_products_equal_a_plain_formula(device, dtype, channels_last, dims):
    weights = {str(shape): torch.randn(shape, dtype=dtype) for shape in SHAPES if len(shape) > max(dims)}
    if channels_last:
        weights = {
            n: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for n, w in weights.items()
        }
    weights = {n: nn.Parameter(w.to(device)) for n, w in weights.items()}
    for w in weights.values():
        w.grad = torch.randn_like(w)
    walk, blocks = walk_over(weights, *dims)
    assert not walk._rest
    sums, start = walk.sums(clean=False), {n: w.grad.clone() for n, w in weights.items()}
    flat = torch.rand_like(sums)
    walk.add(flat, clean=False)
    for name, w in weights.items():
        wanted, squares = start[name].clone(), w.detach().square()
        for slot in (s for b in blocks for s in b.slots if b.tensor == name):
            total = squares.movedim(slot.dim, 0).reshape(len(flat[slot.start : slot.stop]), -1).sum(1)
            torch.testing.assert_close(sums[slot.start : slot.stop], total)
            wanted += w.detach() * along(w, slot.dim, flat[slot.start : slot.stop])
        torch.testing.assert_close(w.grad, wanted, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_added_up_in_float32_and_rounded_once(device, dtype):
    weights = {
        "w": nn.Parameter(torch.randn(70, 300).to(device, dtype)),
        "v": nn.Parameter(torch.randn(9).to(device)),
    }
    for w in weights.values():
        w.grad = torch.zeros_like(w)
    walk, _ = walk_over(weights, 0)
    sums = walk.sums(clean=False)
    wide = weights["w"].detach().double()
    torch.testing.assert_close(sums[9:].double(), wide.square().sum(1), rtol=1e-5, atol=1e-5)
    walk.add(sums, clean=False)
    digits = 0.501 if device == "cuda" else 1.001  # the interpreter cuts digits off instead of rounding
    wanted = wide * sums[9:, None].double()
    torch.testing.assert_close(
        weights["w"].grad.double(), wanted, rtol=torch.finfo(dtype).eps * digits, atol=1e-7
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_counts_as_nothing_where_asked(device, value):
    weights = {"w": nn.Parameter(torch.ones(5, 6, device=device))}
    weights["w"].grad = torch.zeros_like(weights["w"])
    with torch.no_grad():
        weights["w"][1, 2] = weights["w"][2, 3] = weights["w"][4, 2] = value
    walk, _ = walk_over(weights, 0, 1)
    assert walk.sums(clean=False).isfinite().logical_not().nonzero().flatten().tolist() == [1, 2, 4, 7, 8]
    assert walk.sums(clean=True).tolist() == [6, 5, 5, 6, 5, 5, 5, 3, 4, 5, 5]
    walk.add(torch.ones(11, device=device), clean=True)
    wanted = torch.full((5, 6), 2.0)
    wanted[1, 2] = wanted[2, 3] = wanted[4, 2] = 0
    assert torch.equal(weights["w"].grad.cpu(), wanted)


def test_weights_and_gradients_that_moved_are_found(device):
    weights = {"w": nn.Parameter(torch.ones(4, 6, device=device))}
    walk, _ = walk_over(weights, 0)
    for step in (1, 2, 3):
        weights["w"].data = torch.full((4, 6), float(step), device=device)
        weights["w"].grad = torch.zeros(4, 6, device=device)
        assert walk.sums(clean=False).tolist() == [6 * step**2] * 4
        walk.add(torch.ones(4, device=device), clean=False)
        assert weights["w"].grad.eq(step).all()


def test_gradients_of_another_layout_or_type_or_none_at_all(device):
    weights = {
        n: nn.Parameter(torch.randn(5, 6, device=device)) for n in ("none", "across", "frozen", "plain")
    }
    weights["across"].grad = torch.zeros(6, 5, device=device).t()
    weights["plain"].grad = torch.zeros(5, 6, device=device)
    weights["frozen"].grad = torch.zeros(5, 6, device=device)
    weights["frozen"].requires_grad_(False)
    walk, _ = walk_over(weights, 0)
    for _ in range(2):
        walk.add(torch.ones(20, device=device), clean=False)
    assert weights["none"].grad is None
    assert not weights["frozen"].grad.any()
    for name in ("across", "plain"):
        torch.testing.assert_close(weights[name].grad, 2 * weights[name].detach())


def test_tensors_that_are_negated_in_name_alone(device):
    weights = {n: nn.Parameter(torch.randn(5, 6, device=device)) for n in ("w", "v")}
    weights["v"].data = torch._neg_view(weights["v"].detach())
    weights["w"].grad = torch._neg_view(torch.ones(5, 6, device=device))
    weights["v"].grad = torch.zeros(5, 6, device=device)
    walk_over(weights, 0)[0].add(torch.ones(10, device=device), clean=False)
    torch.testing.assert_close(weights["w"].grad.resolve_neg(), weights["w"].detach() - 1)
    torch.testing.assert_close(weights["v"].grad, weights["v"].detach().resolve_neg())


def test_a_gradient_is_negated_in_name_alone_from_some_step_on(device):
    weights = {"w": nn.Parameter(torch.randn(5, 6, device=device))}
    walk, _ = walk_over(weights, 0)
    for grad in (torch.ones(5, 6, device=device), torch._neg_view(torch.ones(5, 6, device=device))):
        weights["w"].grad = grad
        before = grad.resolve_neg().clone()
        walk.add(torch.ones(5, device=device), clean=False)
        torch.testing.assert_close(weights["w"].grad.resolve_neg(), before + weights["w"].detach())


def test_strides_along_an_axis_of_one_element_do_not_matter(device, monkeypatch):
    """Convolutions of 1x1 get such gradients from cuDNN."""
    monkeypatch.setattr(Block, "add_scaled", never)
    weights = {"w": nn.Parameter(torch.randn(5, 6, 1, 1, device=device))}
    weights["w"].grad = torch.zeros(5, 6, device=device).as_strided((5, 6, 1, 1), (6, 1, 6, 6))
    walk_over(weights, 0, 1)[0].add(torch.ones(11, device=device), clean=False)
    torch.testing.assert_close(weights["w"].grad, 2 * weights["w"].detach())


def never(*_, **__):
    raise AssertionError("PyTorch was asked")


def test_asked_for_they_are_what_runs(device, monkeypatch):
    for name in ("sums", "add_scaled"):
        monkeypatch.setattr(Block, name, never)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, 5)
    )
    net, x = net.to(device), torch.randn(2, 3, 8, 8, device=device)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    GroupNormPruner(net, x, reg=0.1, fused=True).regularize()
    assert net[0].weight.grad.abs().sum() > 0
    with pytest.raises(AssertionError, match="PyTorch was asked"):
        GroupNormPruner(net, x, reg=0.1, fused=False).regularize()


@pytest.mark.usefixtures("interpreted_kernels")
def test_a_default_device_of_the_users_is_not_where_the_tables_are_made():
    tensors, groups = parameters(), [channels(), *others()]
    start = before(tensors)
    with torch.device("meta"):
        Regularizer(groups, tensors, reg=0.1, fused=True).apply()
        flags, _ = Inspector(fused=True).look([t.grad for t in tensors.values()])
    assert not flags.any()
    assert_added(tensors, start, naive_gradients(groups, tensors, 0.1))


@pytest.mark.usefixtures("interpreted_kernels")
def test_tables_of_gradients_that_come_and_go_do_not_pile_up():
    inspector = Inspector(fused=True)
    for size in range(1, 30):
        inspector.look([torch.ones(size)])
    assert len(inspector._known) <= 8


BROKEN = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "all"])
def test_tensors_that_are_not_finite_are_found(device, fused, value, wide):
    """Of every type, size and layout; the last element is in a tile of its own."""
    tensors = [
        torch.ones((1 << 16) + 1),
        torch.ones(3, 5, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(6, 4, dtype=torch.float64).t(),
        torch.full((7,), 1e300, dtype=torch.float64),
        torch.ones(5, dtype=torch.float64 if wide else torch.bfloat16),
        torch.ones(1, dtype=torch.float64 if wide else torch.float16),
        torch.ones(2, 3),
        torch.ones(0),
    ]
    tensors = [t.to(device) for t in tensors]
    inspector = Inspector(fused=fused)
    for wrong in ([], [0], [1, 2], [4, 5], [6]):
        for i in wrong:
            tensors[i][..., -1:].fill_(value)
        flags, any_of_them = inspector.look(tensors)
        assert flags.nonzero().flatten().tolist() == wrong
        assert int(any_of_them) == bool(wrong)
        for i in wrong:
            tensors[i].fill_(1)


@pytest.mark.usefixtures("accelerator")
def test_gradients_of_no_elements_have_no_norm():
    tensors = [torch.ones(0), torch.ones(2), torch.full((2,), torch.inf), torch.ones(3, dtype=torch.float64)]
    flags, any_of_them = Inspector(fused=False).look(tensors)
    assert (flags.tolist(), int(any_of_them)) == ([0, 0, 1, 0], 1)


def test_tensors_with_gaps_or_of_other_types_are_left_to_pytorch(device):
    gaps = torch.ones(4, 6, device=device)
    gaps[1, 1] = torch.nan
    assert Inspector(fused=True).look([gaps[:, ::2]])[0].tolist() == [0]
    complex_one = torch.full((2,), torch.inf, dtype=torch.complex64, device=device)
    assert Inspector(fused=True).look([complex_one, gaps])[0].tolist() == [1, 1]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_gammas_are_those_of_pytorch(device, keep, broken):
    tensors = {n: nn.Parameter(t.detach().to(device)) for n, t in parameters().items()}
    shared = group("again", whole("conv.weight", 0), whole("fc.weight", 1))  # positions of two units
    groups = [shared, channels(), *others()]
    members = [scored_members(g, tensors, include_bias=False) for g in groups]
    blocks = plan_blocks(tensors, ((m.tensor, m.dim, m.rows) for g in members for m in g))
    positions = Positions.of(blocks, groups, members, torch.device(device))
    sums = torch.rand(positions.count, dtype=torch.float64, device=device)
    how = {"reg": 0.3, "alpha": 3.0, "dtype": torch.float64}
    backend = backend_of(tensors)
    found = [Gammas(positions, groups, **how), KernelGammas(positions, groups, backend=backend, **how)]
    for gammas in found:
        gammas.refresh(sums, sums)
    if broken:
        sums[int(positions.take[-1])] = torch.inf  # of the last group alone
    for gammas in found:
        gammas.refresh(sums * 2, sums, keep=keep)
    wanted, ours = found
    for name in ("gamma", "scores", "factors"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(wanted, name), msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("resting", "rested", "seen"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name)), name
    assert bool(ours.seen) == bool(ours.rested.any()) == broken


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        (torch.randn(8, 6, dtype=torch.complex64), [(0, 1), (1, 1)]),
        (torch.randn(2, 8, 6, 5), [(1, 1), (2, 1)]),  # positions along two axes in the middle
        (torch.randn(8, 3, 3), [(0, 1), (1, 2)]),  # rows with positions of their own
        (torch.randn(8, 12)[:, ::2], [(0, 1), (1, 1)]),
        (torch.randn(0, 6), [(1, 1)]),
    ],
    ids=["complex", "axes", "rows", "gaps", "empty"],
)
def test_what_the_kernels_cannot_do_is_left_to_pytorch(weight, wanted):
    blocks = plan_blocks(
        {"w": torch.view_as_real(weight) if weight.is_complex() else weight}, [("w", *w) for w in wanted]
    )
    sheets = [sheet_of(i, b, weight, TRITON.dtypes) for i, b in enumerate(blocks)]
    assert sheets == [None] * len(blocks)


def test_two_blocks_of_a_tensor_do_not_write_at_once(device):
    """One launch that wrote both would lose the one or the other."""
    weights = {"w": nn.Parameter(torch.randn(8, 3, 3, device=device))}
    weights["w"].grad = torch.zeros_like(weights["w"])
    blocks = plan_blocks(weights, [("w", 0, 2), ("w", 0, 4)])
    walk = KernelWalk(blocks, weights, torch.float32, backend_of(weights))
    assert len(blocks) == 2
    assert sum(len(t.sheets) for t in walk._tables) <= 1
    plain = Walk(blocks, weights, torch.float32)
    torch.testing.assert_close(walk.sums(clean=False), plain.sums(clean=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_launch_gives_the_same_bits():
    weights = {
        str(s): nn.Parameter(torch.randn(s, device="cuda")) for s in ((700, 300), (512, 256, 3, 3), (999,))
    }
    walk, _ = walk_over(weights, 0, 1)
    first = walk.sums(clean=False)
    assert all(torch.equal(walk.sums(clean=False), first) for _ in range(20))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_prune.scores.backends import TRITON, Kernels
from lightning_prune.scores.kernels import jitted

places = ("where", "weights", "grads", "facts", "jobs", "ends", "spans", "sizes", "group_of", "numbers")
kinds = dict.fromkeys(places, "*i64") | dict.fromkeys(("tiles", "chunks", "take", "owners"), "*i32")
kinds |= dict.fromkeys(("clean", "keep", "of_all", "n_units", "n_positions"), "i32")
kinds |= dict.fromkeys(("resting", "rested", "seen", "flags"), "*u8")
how = TRITON.sizes
sizes = {"square_sums": how.tile, "add_products": how.tile, "collect": how.collect, "unit_sums": how.units}
sizes |= {"press": (how.group,), "spread": (how.spread,), "find_non_finite": (how.inspect,)}
for name, kernel in zip(Kernels._fields, jitted()):
    fixed = dict(zip(kernel.arg_names[-len(sizes[name]):], sizes[name]))
    for like, precision in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        other = {a: "constexpr" if a in fixed else f"*{precision}" for a in kernel.arg_names}
        signature = other | {a: kinds[a] for a in kernel.arg_names if a in kinds}
        if "like" in signature:
            signature["like"] = f"*{like}"
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
            triton.compile(source, target=target)
    print(name)
"""


def test_they_compile_for_gpus_that_are_not_here(tmp_path):
    pytest.importorskip("triton", reason="Triton is published for Linux alone")
    surroundings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == list(Kernels._fields), done.stderr


CUDA, CPU, MPS = torch.device("cuda", 1), torch.device("cpu"), torch.device("mps")


def missing(name):
    def load():
        raise ModuleNotFoundError(f"No module named {name!r}")

    return load


def without(monkeypatch, backend):
    """Let the language of a backend not be installed."""
    backends._failure.cache_clear()
    for device, known in list(backends.BACKENDS.items()):
        if known == backend:
            lacking = dataclasses.replace(backend, load=missing(backend.language.lower()))
            monkeypatch.setitem(backends.BACKENDS, device, lacking)


def test_what_is_asked_for_and_not_installed_is_refused(monkeypatch):
    without(monkeypatch, TRITON)
    without(monkeypatch, NUMBA)
    with pytest.raises(OptionError, match=r"needs Triton for weights on cuda:1.*No module named 'triton'"):
        backend_for(CUDA, fused=True)
    with pytest.raises(
        OptionError, match=r"needs Numba for .* on cpu.*pip install 'lightning-prune\[fused\]'"
    ):
        backend_for(CPU, fused=True)


def test_a_gpu_needs_no_numba_and_a_cpu_does(monkeypatch):
    monkeypatch.setattr("lightning_prune.options.find_spec", lambda name: None if name == "numba" else name)
    without(monkeypatch, NUMBA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert PruningOptions(fused=True).fused
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(OptionError, match="needs Numba for weights on cpu"):
        Regularizer([group("w", member("w", 0, range(2), range(2), 2))], {"w": weight}, fused=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="fused=True needs numba"):
        PruningOptions(fused=True)


def test_what_nobody_asked_for_is_not_missed(monkeypatch):
    without(monkeypatch, NUMBA)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert backend_for(CPU, fused=None) is None
    assert not told


def test_every_device_has_its_language(monkeypatch):
    monkeypatch.setattr(backends, "_failure", lambda *_: None)  # there need not be a GPU
    assert backend_for(CUDA, fused=True) == TRITON
    assert backend_for(CPU, fused=True) == backend_for(CPU, fused=None) == NUMBA
    assert backend_for(MPS, fused=None) is backend_for(CPU, fused=False) is None
    assert backend_for(torch.device("meta"), fused=True) is None
    with pytest.raises(OptionError, match=r"fused=True has loops for CPUs .* and the weights lie on mps"):
        backend_for(MPS, fused=True)


@pytest.mark.parametrize("backend", [NUMBA, TRITON], ids=["numba", "triton"])
def test_where_they_do_not_compile_pytorch_is_asked_and_the_reason_is_told(monkeypatch, backend):
    monkeypatch.setitem(backends.BACKENDS, "cpu", dataclasses.replace(backend, load=broken))
    with pytest.warns(UserWarning, match=r"does not run on cpu \(RuntimeError: Failed to find C compiler"):
        assert backend_for(CPU, fused=None) is None
    assert backend_for(CPU, fused=None) is None  # told once
    with pytest.raises(OptionError, match=r"does not run there \(RuntimeError: Failed to find C compiler"):
        backend_for(CPU, fused=True)


def broken():
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")


def test_weights_without_memory_are_refused(device):
    weights = {"w": nn.Parameter(torch.ones(4, 6, device=device))}
    walk, _ = walk_over(weights, 0)
    walk.sums(clean=False)
    (table,) = walk._tables
    weights["w"].untyped_storage().resize_(0)
    with pytest.raises(PruneError, match="the memory of a weight was given back"):
        table.weights.of(table.tensors)  # what sums and products ask for first
