"""Files that are broken or mean harm: an error, and the model is as before, whichever way they come in."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn
from test_callback import CHANNELS, Net, Quiet, build, data, fit, pytestmark  # noqa: F401 - same filters
from test_checkpoint import PLAN, Outer, X, bits, fresh, pruned, same, through_a_file
from test_checkpoint_lightning import Cosine, Judged, every_epoch, pruning, quiet_trainer

from lightning_prune import GroupNormPruner, PruningOptions
from lightning_prune.checkpoint import load_from_checkpoint, load_pruned_state, prepare
from lightning_prune.errors import CheckpointMismatchError
from lightning_prune.training.describing import Call, describe
from lightning_prune.training.vetting import vet_checkpoint

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


def put(*path, value):
    """Give an edit of a callback's state."""

    def edit(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return edit


def tensor(**changes):
    return put("example", 0, 1, "tuple", 0, value=lambda spec: {**spec, **changes})


def others(keep):
    """One channel is another; all of them as many."""
    return sorted({*keep[1:], next(i for i in range(CHANNELS) if i not in keep)})


CUT, GAMMA = ("pruner", "plan", "cuts"), ("pruner", "regularizer", "gamma")
EDITS = {
    "no state": (lambda state: state.clear(), "with 'pruner'"),
    "no epoch of a cut": (lambda state: state.pop("cut_epoch"), "with 'cut_epoch'"),
    "something more": (put("extra", value=1), "without 'extra'"),
    "epoch of a cut": (put("cut_epoch", value="x"), r"\['cut_epoch'\] must be a whole number in \[0, 2\]"),
    "epoch to come": (put("cut_epoch", value=3), r"\['cut_epoch'\] must be a whole number in \[0, 2\]"),
    "pruner is none": (put("pruner", value=None), r"\['pruner'\] must be a table where there is a 'initial'"),
    "pruner is a number": (put("pruner", value=3), r"\['pruner'\] must be a table"),
    "pruner is empty": (put("pruner", value={}), "with 'step'"),
    "step is a word": (put("pruner", "step", value="a"), r"\['step'\] must be a whole number in \[0, 3\]"),
    "step below": (put("pruner", "step", value=-5), r"\['step'\] must be a whole number in \[0, 3\]"),
    "step above": (put("pruner", "step", value=100), r"\['step'\] must be .*, the checkpoint holds 100:"),
    "step of nothing cut": (put("pruner", "step", value=0), r"\['step'\] must be at least 1"),
    "a cut dropped": (
        lambda state: state["pruner"]["plan"]["cuts"].pop(),
        "what the manifest of .* says for",
    ),
    "other channels": (put(*CUT, 0, 3, value=others), r"manifest of 'net' says for 'conv.weight' dim 0"),
    "no such channel": (put(*CUT, 0, 3, 0, value=99), r"\['plan'\] is no plan: .* distinct and in"),
    "fewer channels": (put(*CUT, 0, 3, value=[0]), r"leaves 'conv.weight' with shape \[5, 3, 3, 3\]"),
    "a size that was not": (
        put(*CUT, 0, 2, value=10**12),
        r"a size of 1000000000000 for 'conv.weight' dim 0",
    ),
    "rows without end": (
        put(*CUT, 0, value=["fc.weight", 1, 8, [], 10**12]),
        "is no plan: .* 1000000000000 rows",
    ),
    "plan of another format": (put("pruner", "plan", "format", value=0), "is no plan: the plan has format 0"),
    "base": (put("base", value=3), r"\['base'\] must be a table"),
    "base is the plan": (
        lambda state: state.update(base=state["pruner"]["plan"]),
        "a plan that follows its base",
    ),
    "budget": (put("pruner", "budget", value={"dense": None, "reached": 1.0, "notebook": 3}), "'notebook'"),
    "reached": (put("pruner", "budget", "reached", value=float("nan")), r"\['reached'\] must be a finite"),
    "latencies": (put("pruner", "budget", "notebook", "table", value={"layers": {}}), "with 'machine'"),
    "random numbers": (put("pruner", "rng", value=3), r"\['rng'\] must be a string"),
    "few random numbers": (put("pruner", "rng", value="00ff"), "state of a random number generator"),
    "units at first": (put("pruner", "initial", value=lambda units: dict.fromkeys(units, "8")), "'initial'"),
    "head dimensions": (put("pruner", "head_dims", value=[1]), r"\['head_dims'\]\[0\] must be a string"),
    "no regulariser": (put("pruner", "regularizer", value=None), r"\['regularizer'\] must be a table"),
    "age": (put("pruner", "regularizer", "age", value=None), r"\['age'\] must be a whole number where"),
    "skipped": (put("pruner", "regularizer", "skipped", value=2**70), r"holds a number of 71 bits"),
    "endless gamma": (put(*GAMMA, 0, value=float("inf")), r"\['gamma'\]\[0\] must be a finite number"),
    "negative gamma": (put(*GAMMA, 1, value=-1.0), r"\['gamma'\]\[1\] must be a finite number in \[0,"),
    "a unit less": (
        lambda state: state["pruner"]["regularizer"]["gamma"].pop(),
        r"\['scores'\] must be a list of 4",
    ),
    "a unit less, its score too": (
        lambda state: [state["pruner"]["regularizer"][name].pop() for name in ("gamma", "scores")],
        r"\['gamma'\] must be a list of 5, the checkpoint holds a list of 4:",
    ),
    "evidence": (
        put("pruner", "evidence", value={"sums": {"x": 1}, "counts": {}, "pending": {}}),
        "none of this name",
    ),
    "evidence of another shape": (
        put("pruner", "evidence", value={"sums": {"fc.bias": torch.ones(3)}, "counts": {}, "pending": {}}),
        r"\['sums'\]\['fc.bias'\] must be a tensor of shape \[2\], the checkpoint holds a tensor of shape",
    ),
    "huge inputs": (tensor(tensor=[2, 3, 10**6, 10**6]), "a shape of 268435456 elements at most"),
    "many inputs": (put("example", value=lambda calls: [*calls, call_of(2**28)]), "elements at most"),
    "a size below zero": (tensor(tensor=[-1, 3, 5, 5]), r"\[0\] must be a whole number in \[0, "),
    "a shape of letters": (tensor(tensor="abc"), r"\['tensor'\] must be a list, the checkpoint holds 'abc'"),
    "no type of numbers": (tensor(dtype="save"), "the name of a torch.dtype, the checkpoint holds 'save'"),
    "truths of numbers": (tensor(dtype="bool", tensor=[1], values=[1]), r"\['values'\]\[0\] must be True or"),
    "values that are none": (tensor(dtype="int64", values=[1]), r"the values of a shape \[2, 3, 5, 5\]"),
    "values too large": (tensor(dtype="uint8", tensor=[1], values=[300]), "numbers that torch.uint8 holds"),
    "an empty range": (tensor(dtype="int64", range=[3, 1]), "a lower bound and an upper one"),
    "counts": (put("initial", value=5), r"\['initial'\] must be a table"),
    "counts of words": (put("left", "macs", value="many"), r"\['left'\]\['macs'\] must be a finite number"),
    "overflows": (put("overflows", value="many"), r"\['overflows'\] must be a table"),
    "pending": (put("overflows", "pending", value=[1]), r"\['pending'\] must be a list of 2"),
    "teacher": (put("distiller", value={"teacher": {}, "loss": [0.0, 0.0]}), "a table with 'conv.weight'"),
    "report": (put("report", value=5), r"\['report'\] must be a table"),
    "timeline": (put("report", "timeline", 0, value=[1]), r"\['timeline'\]\[0\] must be a table"),
    "spread": (
        put("report", "spreads", 0, "quantiles", value=["a"]),
        r"\['quantiles'\]\[0\] must be a finite",
    ),
    "scores of a cut": (
        put("report", "cuts", 0, "classes", 0, "kept", value=3),
        r"\['kept'\] must be a list",
    ),
}


def call_of(size):
    return ["", {"tuple": [{"tensor": [size], "dtype": "float32"}]}, {"dict": []}]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A run that has cut once, and the checkpoint of one that has cut twice."""
    folder = tmp_path_factory.mktemp("live")
    fit(build(Cosine), pruning(module="net"), every_epoch(folder), max_epochs=3, enable_checkpointing=True)
    return fit(build(Cosine), pruning(module="net"), max_epochs=2), folder / "epoch=2.ckpt"


def everything(trainer):
    """Model, optimizer and callback; a new fit forgets the epoch of the last cut before it reads a file."""
    model, callback = trainer.lightning_module, trainer.callbacks[0]
    state = callback.state_dict()
    state.pop("cut_epoch")
    parts = network(model), trainer.optimizers[0].state_dict(), state
    return repr((*parts, callback.steps_done, callback.pruner, trainer.global_step))


@pytest.mark.parametrize(("edit", "match"), EDITS.values(), ids=EDITS)
def test_a_damaged_state_of_the_callback_is_refused_before_anything_is_loaded(live, tmp_path, edit, match):
    trainer, whole = live
    checkpoint = torch.load(whole, weights_only=True)
    edit(checkpoint["callbacks"]["Quiet{'module': 'net'}"])
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    before = everything(trainer)
    trainer.fit_loop.max_epochs = 5
    with pytest.raises(CheckpointMismatchError, match=match):
        trainer.fit(trainer.lightning_module, data(), ckpt_path=tmp_path / "edited.ckpt")
    assert everything(trainer) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"\['gamma'\] must be a list of 5,"),
        ({"ignored_layers": ["fc"]}, r"\['gamma'\] must be a list of 5 at most"),
        ({"pruning_ratio_dict": {"conv": 0.2}}, r"\['gamma'\] must be a list of 5 at most"),
    ],
)
def test_gammas_of_more_units_than_are_left_are_refused(live, options, match):
    """Which groups are pressed is for a trace to say; how many units there are stands in the state."""
    trainer = quiet_trainer(pruning(module="net"))
    trainer.callbacks[0].options = PruningOptions(**options)
    trainer.strategy.connect(build(Cosine))
    trainer.state.fn = TrainerFn.FITTING
    checkpoint = torch.load(live[1], weights_only=True)
    vet_checkpoint(trainer, checkpoint)
    regularizer = checkpoint["callbacks"]["Quiet{'module': 'net'}"]["pruner"]["regularizer"]
    for name, value in (("gamma", 1.0), ("scores", 0.0)):
        regularizer[name] += [value]
    with pytest.raises(CheckpointMismatchError, match=match):
        vet_checkpoint(trainer, checkpoint)
    trainer.state.fn = TrainerFn.VALIDATING
    vet_checkpoint(trainer, checkpoint)


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_a_damaged_state_of_the_callback_is_refused_by_an_evaluation_too(live, tmp_path, loop):
    """How often it cuts is for a fit alone to know."""
    checkpoint = torch.load(live[1], weights_only=True)
    model = build(Judged)
    before = network(model.net)
    checkpoint["callbacks"]["Quiet{'module': 'net'}"]["pruner"]["step"] = "a"
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    run = getattr(quiet_trainer(Quiet(module="net")), loop)
    with pytest.raises(CheckpointMismatchError, match=r"\['step'\] must be a whole number"):
        run(model, data(), ckpt_path=tmp_path / "edited.ckpt")
    for name in ("_lightning_prune_ready", "_lightning_prune_trusts_shapes"):
        vars(model.net).pop(name, None)
    assert network(model.net) == before
    run(model, data(), ckpt_path=live[1])
    assert model.net.conv.out_channels < CHANNELS


def test_the_callbacks_of_a_checkpoint_are_a_table(live, tmp_path):
    checkpoint = torch.load(live[1], weights_only=True)
    checkpoint["callbacks"] = [1]
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    with pytest.raises(CheckpointMismatchError, match="the checkpoint's callbacks must be a table"):
        fit(build(Cosine), pruning(module="net"), ckpt_path=tmp_path / "edited.ckpt", max_epochs=5)


def test_a_state_without_a_bottom_is_refused(live):
    checkpoint = torch.load(live[1], weights_only=True)
    inputs = {"tuple": []}
    for _ in range(10**4):
        inputs = {"tuple": [inputs]}
    checkpoint["callbacks"]["Quiet{'module': 'net'}"]["example"] = [["", inputs, {"dict": []}]]
    with pytest.raises(CheckpointMismatchError, match="nested less deeply"):
        vet_checkpoint(live[0], checkpoint)


def test_a_pruner_keeps_its_state_where_another_is_refused():
    net = Net()
    pruner = GroupNormPruner(net, torch.ones(2, 3, 5, 5), iterative_steps=2)
    pruner.regularizer.refresh()
    before, state = pruner.state_dict(), pruner.state_dict()
    state |= {"step": 1, "head_dims": ["x"]}
    for name in ("gamma", "scores"):
        state["regularizer"][name].pop()
    with pytest.raises(CheckpointMismatchError, match="a state of 7 units, these groups have 8"):
        pruner.load_state_dict(state)
    assert pruner.state_dict() == before


def test_inputs_too_large_to_be_read_are_not_written():
    large = torch.ones(1).expand(2**27, 3)
    assert describe([Call("", (large[: 2**26],))]) is not None
    assert describe([Call("", (large,))]) is None


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
