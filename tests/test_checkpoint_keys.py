"""A sound manifest over wrong keys or shapes: an error that names the first, and the model is as before."""

from __future__ import annotations

import pytest
import torch
from test_callback import CHANNELS, Plain, build, data, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint import PLAN, Net, Outer, X, bits, fresh, pruned, same, through_a_file
from test_checkpoint_damage import checkpoint, network  # noqa: F401 - a fixture
from test_checkpoint_lightning import Cosine, Images, Judged, Mixed, pruning, quiet_trainer
from torch import nn

from lightning_prune.checkpoint import PrunableMixin, load_from_checkpoint, load_pruned_state, prepare, record
from lightning_prune.errors import CheckpointMismatchError
from lightning_prune.surgery.applying import apply

CHANGES = {  # all of tensors that no cut reaches
    "missing": (lambda s: s.pop("net.fc.bias"), r"'net\.fc\.bias' is missing from the state dict; build"),
    "extra": (lambda s: s.update({"net.head": torch.ones(1)}), r"'net\.head' is not in the model; build"),
    "shape": (
        lambda s: s.update({"net.fc.bias": torch.ones(3)}),
        r"net\.fc\.bias: .*\[3\]\) from checkpoint, the shape in current model is torch.Size\(\[2\]\); build",
    ),
}
KEYS = [CHANGES["missing"], CHANGES["extra"]]


class MixedJudged(PrunableMixin, Judged):
    pass


@pytest.fixture(params=CHANGES)
def wrong(request, checkpoint, tmp_path):
    """A file of a pruned fit with one thing wrong, and what the error says."""
    change, match = CHANGES[request.param]
    state = torch.load(checkpoint, weights_only=True)
    change(state["state_dict"])
    torch.save(state, tmp_path / "wrong.ckpt")
    return tmp_path / "wrong.ckpt", match


@pytest.mark.parametrize("cls", [Judged, MixedJudged])
@pytest.mark.parametrize("loop", ["fit", "validate", "test", "predict"])
def test_no_loop_of_a_trainer_touches_the_model(wrong, cls, loop):
    path, match = wrong
    model = build(cls)
    before, trainer = network(model.net), quiet_trainer(pruning(module="net"), max_epochs=5)
    with pytest.raises(CheckpointMismatchError, match=match):
        getattr(trainer, loop)(model, Images() if loop == "fit" else data(), ckpt_path=path)
    for name in ("_lightning_prune_ready", "_lightning_prune_trusts_shapes"):
        vars(model.net).pop(name, None)  # the callback was there, though nothing was loaded
    assert network(model.net) == before


def test_by_class_and_by_mixin_the_error_is_the_same(wrong):
    path, match = wrong
    with pytest.raises(CheckpointMismatchError, match=match):
        load_from_checkpoint(Cosine, path)
    with pytest.raises(CheckpointMismatchError, match=match):
        Mixed.load_from_checkpoint(path)


@pytest.mark.parametrize("how", ["function", "hook", "not strict"])
@pytest.mark.parametrize("start", [fresh, pruned])
@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_by_hand_nothing_is_touched(change, match, start, how):
    model, state = prepare(start(Outer)), through_a_file(pruned(Outer).state_dict())
    change(state)
    model(X).sum().backward()
    before = bits(model)
    strict = how != "not strict"
    if not strict and "current model" not in match:
        load_pruned_state(model, state, strict=False)
        assert model.net.conv.out_channels == 2
        return
    with pytest.raises(CheckpointMismatchError, match=match):
        load_pruned_state(model, state, strict=strict) if how == "function" else model.load_state_dict(
            state, strict=strict
        )
    assert same(model, before)


@pytest.mark.parametrize(("change", "match"), KEYS, ids=["missing", "extra"])
def test_who_asks_for_no_key_gets_what_is_there(change, match, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    change(state["state_dict"])
    torch.save(state, tmp_path / "part.ckpt")

    class Loose(Judged):
        strict_loading = False

    model, hand = build(Loose), prepare(build(Cosine))
    quiet_trainer(pruning(module="net")).test(model, data(), ckpt_path=tmp_path / "part.ckpt", verbose=False)
    hand.load_state_dict(state["state_dict"], strict=False)
    with pytest.warns(UserWarning, match="state dict"):
        loaded = load_from_checkpoint(Cosine, tmp_path / "part.ckpt", strict=False)
    for one in (model, hand, loaded):
        assert one.net.conv.out_channels == CHANNELS // 2
        assert torch.equal(one.net.conv.weight, state["state_dict"]["net.conv.weight"])


def test_a_key_that_its_module_can_do_without_is_no_error():
    """Batch norms of old files have no counter, and torch knows."""
    state = through_a_file(pruned(Outer).state_dict())
    del state["net.bn.num_batches_tracked"], state._metadata["net.bn"]["version"]
    model = prepare(fresh(Outer))
    model.load_state_dict(state)
    assert torch.equal(model(X), pruned(Outer)(X))
    load_pruned_state(other := fresh(Outer), state)
    assert torch.equal(other(X), pruned(Outer)(X))
    del state["net.fc.bias"]
    untouched = prepare(fresh(Outer))
    before = bits(untouched)
    with pytest.raises(CheckpointMismatchError, match=r"'net\.fc\.bias' is missing"):
        untouched.load_state_dict(state)
    assert same(untouched, before)


@pytest.mark.parametrize("how", ["function", "hook"])
def test_what_a_module_asks_for_is_a_matter_of_the_files_version(how):
    state = through_a_file(pruned(Outer).state_dict())
    del state["net.bn.num_batches_tracked"]
    model = prepare(fresh(Outer))
    before = bits(model)
    with pytest.raises(CheckpointMismatchError, match=r"'net\.bn\.num_batches_tracked' is missing"):
        load_pruned_state(model, state) if how == "function" else model.load_state_dict(state)
    assert same(model, before)


@pytest.mark.parametrize("how", ["function", "hook"])
def test_metadata_that_are_no_table_are_refused(how):
    state = through_a_file(pruned(Outer).state_dict())
    state._metadata["net.fc"] = 3
    model = prepare(fresh(Outer))
    before = bits(model)
    with pytest.raises(CheckpointMismatchError, match=r"metadata of 'net\.fc' are a int, no table"):
        load_pruned_state(model, state) if how == "function" else model.load_state_dict(state)
    assert same(model, before)


def test_a_key_that_another_hook_renames_is_no_error():
    def rename(state_dict, prefix, *_):
        state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}b")

    state = through_a_file(pruned(Outer).state_dict())
    state["net.fc.b"] = state.pop("net.fc.bias")
    model = prepare(fresh(Outer))
    model.net.fc._register_load_state_dict_pre_hook(rename)
    model.load_state_dict(state)
    assert torch.equal(model(X), pruned(Outer)(X))


def test_a_key_that_a_hook_above_excuses_is_no_error():
    class Above(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = prepare(fresh(Outer))
            self.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())

    state = through_a_file(Above().state_dict())
    del state["inner.net.fc.bias"]
    Above().load_state_dict(state)


def test_a_load_that_nobody_calls_strict_only_lists_the_keys():
    """Not every loader goes through load_state_dict."""
    model, state = prepare(fresh(Outer)), through_a_file(pruned(Outer).state_dict())
    del state["scale"]
    missing, unexpected, errors = [], [], []
    model._load_from_state_dict(state, "", dict(state._metadata[""]), True, missing, unexpected, errors)
    assert (missing, unexpected, errors) == (["scale"], [], [])
    assert model.net.conv.out_channels == 2


def test_state_of_other_kinds_is_asked_for_once():
    """What a module stores beside its tensors is set when it is loaded, and not while that is tried."""

    class Counted(Net):
        calls = 0

        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            Counted.calls += 1

    model = prepare(Counted())
    model.load_state_dict(Counted().state_dict())
    assert Counted.calls == 1
    with pytest.raises(CheckpointMismatchError, match="'_extra_state' is missing"):
        model.load_state_dict(Net().state_dict())
    assert Counted.calls == 1


class Doubling(nn.Linear):
    """Its own loading code writes into the file's tensors."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[f"{prefix}bias"].mul_(2)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Asking(nn.Linear):
    """Its own loading code looks at values, which a twin has not."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        assert state_dict[f"{prefix}bias"].sum().item() != 0
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize(("cls", "factor"), [(Doubling, 2), (Asking, 1)])
def test_loading_code_of_modules_has_its_way_once(cls, factor):
    source, model = pruned(Outer), fresh(Outer)
    model.net.fc = cls(4, 2)
    prepare(model).load_state_dict(through_a_file(source.state_dict()))
    assert torch.equal(model.net.fc.bias, factor * source.net.fc.bias)
    assert model.net.conv.out_channels == 2


def test_tensors_without_values_may_take_the_place_of_others():
    state = through_a_file(pruned(Outer).state_dict())
    state["net.fc.bias"] = state["net.fc.bias"].to("meta")
    model = prepare(fresh(Outer))
    model.load_state_dict(state, assign=True)
    assert model.net.fc.bias.is_meta


def test_tied_tensors_are_judged_by_the_shape_they_will_have():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.conv = self.net.conv  # a second name, behind the first
            self.first = nn.Linear(1, 1)

    class Ahead(nn.Module):
        def __init__(self):
            super().__init__()
            conv = nn.Conv2d(1, 4, 1, bias=False)
            self.conv, self.net = conv, Net()  # and in front of it
            self.net.conv = conv

    for cls in (Behind, Ahead):
        source, model = cls(), prepare(cls())
        apply(source.net, PLAN)
        record(source.net, PLAN)
        model.load_state_dict(through_a_file(source.state_dict()))
        assert model.net.conv.weight is model.conv.weight
        assert torch.equal(model.net.conv.weight, source.net.conv.weight)


def test_assigned_tensors_may_take_the_place_of_others():
    source, model = pruned(Outer), prepare(fresh(Outer))
    model.load_state_dict(through_a_file(source.state_dict()), assign=True)
    assert torch.equal(model(X), source(X))


def test_a_mixin_reads_the_entry_of_a_file_after_the_class_has_had_its_word(
    checkpoint,
    tmp_path,
):
    class Old(Cosine):
        def on_load_checkpoint(self, checkpoint):
            tensors = checkpoint["state_dict"]
            tensors["net.fc.bias"] = tensors.pop("net.fc.b")

    class New(PrunableMixin, Old):
        pass

    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"] = dict(state["state_dict"])
    torch.save(state, tmp_path / "plain.ckpt")
    expected = load_from_checkpoint(Cosine, checkpoint).state_dict()
    state["state_dict"]["net.fc.b"] = state["state_dict"].pop("net.fc.bias")
    torch.save(state, tmp_path / "old.ckpt")
    for model in (
        Mixed.load_from_checkpoint(tmp_path / "plain.ckpt"),
        New.load_from_checkpoint(tmp_path / "old.ckpt"),
    ):
        assert model.net.conv.out_channels == CHANNELS // 2
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
