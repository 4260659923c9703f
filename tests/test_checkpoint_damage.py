"""Files that are broken or mean harm: an error, and the model is as before, whichever way they come in."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_callback import CHANNELS, Quiet, build, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint import PLAN, Outer, X, bits, fresh, pruned, same, through_a_file
from test_checkpoint_lightning import Cosine, every_epoch, pruning

from lightning_prune.checkpoint import load_from_checkpoint, load_pruned_state, prepare
from lightning_prune.errors import CheckpointMismatchError

BROKEN = (RuntimeError, EOFError, OSError, pickle.UnpicklingError)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit(build(Cosine), pruning(module="net"), every_epoch(folder), max_epochs=4, enable_checkpointing=True)
    return folder / "epoch=3.ckpt"


def network(model):
    """What the user sees of it: sizes that modules state, and every bit."""
    sizes = {
        name: {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
        for name, module in model.named_modules()
    }
    return sizes, {name: (t.shape, t.numpy().tobytes()) for name, t in model.state_dict().items()}


def refused(path, match=None):
    """A fit from the file and a load by class fail, and the model that was to go on is as before."""
    model = build(Cosine)
    before = network(model.net)
    with pytest.raises((*BROKEN, CheckpointMismatchError), match=match):
        fit(model, pruning(module="net"), ckpt_path=path, max_epochs=5)
    for name in ("_lightning_prune_ready", "_lightning_prune_trusts_shapes"):
        vars(model.net).pop(name, None)  # the callback was there, though nothing was loaded
    assert network(model.net) == before
    with pytest.raises((*BROKEN, CheckpointMismatchError), match=match):
        load_from_checkpoint(Cosine, path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(checkpoint, tmp_path, share):
    whole = checkpoint.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


def test_a_file_of_noise_is_refused(tmp_path):
    path = tmp_path / "noise.ckpt"
    path.write_bytes(torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes())
    refused(path)


@pytest.mark.parametrize("place", ["manifest", "entry", "callback"])
def test_a_pickled_class_is_refused_and_not_run(checkpoint, tmp_path, place):
    state, trap = torch.load(checkpoint, weights_only=True), Trap(tmp_path / "sprung")
    if place == "manifest":
        state["state_dict"]._metadata["net"]["lightning_prune"] = trap
    elif place == "entry":
        state["lightning_prune"]["net"] = trap
    else:
        state["callbacks"]["Quiet{'module': 'net'}"] = trap
    torch.save(state, tmp_path / "trap.ckpt")
    refused(tmp_path / "trap.ckpt", match="Weights only load failed")
    assert not (tmp_path / "sprung").exists()


def test_a_manifest_that_does_not_fit_its_tensors_is_refused_by_a_fit_too(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]._metadata["net"]["lightning_prune"]["cuts"][0][3].pop()
    torch.save(state, tmp_path / "edited.ckpt")
    refused(tmp_path / "edited.ckpt", match="the manifest leaves net.* the file is damaged or was edited")


def test_a_tensor_without_values_is_refused():
    model = fresh(Outer)
    before, state = bits(model), pruned(Outer).state_dict()
    state["net.fc.weight"] = state["net.fc.weight"].to("meta")
    with pytest.raises(CheckpointMismatchError, match=r"'net\.fc\.weight' in the state dict has no values"):
        load_pruned_state(model, state)
    assert same(model, before)


def places(data, path=()):
    """Paths of every value in nested lists and dicts."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


PLACES = [place for place in places(PLAN.as_dict()) if place]
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10)
    | st.floats()
    | st.sampled_from(["", "fc", "in_features"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["cuts", "a"]), inner),
    max_leaves=4,
)


@settings(deadline=None, max_examples=200)
@given(place=st.sampled_from(PLACES), value=plain, start=st.sampled_from([fresh, pruned]))
def test_any_other_value_in_a_manifest_is_refused_or_harmless(place, value, start):
    source = pruned(Outer)
    state, data = through_a_file(source.state_dict()), copy.deepcopy(PLAN.as_dict())
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    state._metadata["net"]["lightning_prune"] = data
    model = prepare(start(Outer))
    before = bits(model)
    try:
        load_pruned_state(model, state)
    except CheckpointMismatchError:
        assert same(model, before)
    else:
        assert torch.equal(model(X), source(X))
