"""What else lives in a Trainer: other strategies, tuners, compilers, several networks, odd training steps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import ModelParallelStrategy
from test_callback import CHANNELS, Net, NoForward, Plain, Quiet, build, data, fit, pytestmark  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lightning_prune.errors import OptionError, StrategyError, TraceError
from lightning_prune.training import describing, example_inputs
from lightning_prune.training.strategies import check_set_up
from lightning_prune.vetting import Part

HALF = CHANNELS // 2


def test_sharded_strategies_are_refused_by_name():
    trainer = Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(StrategyError, match=r"found ModelParallelStrategy.*prune before sharding"):
        check_set_up(trainer, build())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_are_refused_by_name():
    model = build()
    model.net.fc = nn.LazyLinear(2)
    with pytest.raises(StrategyError, match=r"'net\.fc\.weight' has no shape yet"):
        fit(model, Quiet(0.5))


def test_a_trainer_of_another_distribution_is_refused():
    class Trainer:
        """Same name, another class."""

    with pytest.raises(StrategyError, match=r"import Trainer and callbacks from lightning\.pytorch"):
        check_set_up(Trainer(), build())


class Pair(Plain):
    """Two networks, each with its own schedule."""

    def __init__(self):
        super().__init__()
        self.other = Net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return sum(nn.functional.cross_entropy(net(x), y) for net in (self.net, self.other))


def test_several_callbacks_prune_several_networks(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def callbacks():
        return Quiet(0.5, module="net"), Quiet(0.25, module="other", start_epoch=2)

    model, saver = build(Pair), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = fit(model, *callbacks(), saver, max_epochs=3, enable_checkpointing=True)
    assert (model.net.conv.out_channels, model.other.conv.out_channels) == (4, 6)
    assert float(trainer.callback_metrics["prune/net/channels"]) == 0.5
    assert float(trainer.callback_metrics["prune/other/channels"]) == 0.25
    resumed = build(Pair)
    fit(resumed, *callbacks(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_one_callback_prunes_every_network_that_the_training_step_calls():
    model = build(Pair)
    model.forward = None  # nobody calls it
    fit(model, Quiet(0.5))
    assert (model.net.conv.out_channels, model.other.conv.out_channels) == (HALF, HALF)


def test_a_teacher_outside_the_named_module_stays_whole():
    model = build(Pair)
    fit(model, Quiet(0.5, module="net"))
    assert (model.net.conv.out_channels, model.other.conv.out_channels) == (HALF, CHANNELS)


def test_a_network_inside_a_metric_stays_whole():
    class Distance(Metric):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, x):
            self.total += self.net(x).mean().detach()

        def compute(self):
            return self.total

    class Measured(NoForward):
        def __init__(self):
            super().__init__()
            self.metric = Distance()

        def training_step(self, batch, batch_idx):
            self.metric.update(batch[0])
            self.metric(batch[0])
            return super().training_step(batch, batch_idx)

    model = build(Measured)
    fit(model, Quiet(0.5))
    assert (model.net.conv.out_channels, model.metric.net.conv.out_channels) == (HALF, CHANNELS)


class Adversaries(NoForward):
    """Manual optimisation, two optimizers, a step that uses most of what a LightningModule offers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = Net()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.other)]

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            self.log("loss", loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_manual_optimisation_with_two_networks(start_epoch):
    model = build(Adversaries)
    fit(model, Quiet(0.5, start_epoch=start_epoch))
    assert (model.net.conv.out_channels, model.other.conv.out_channels) == (HALF, HALF)


def test_the_learning_rate_finder_may_run_first(tmp_path):
    class Found(Plain):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    model = build(Found)
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None)
    fit(model, Quiet(0.5, start_epoch=0), finder, default_root_dir=tmp_path)
    assert model.net.conv.out_channels == HALF


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"overfit_batches": 1}, {"limit_train_batches": 2}]
)
@pytest.mark.filterwarnings("ignore:.*overfit_batches", "ignore:.*You requested to overfit")
def test_short_runs_cut_as_well(options):
    model = build()
    fit(model, Quiet(0.5, start_epoch=0), **options)
    assert model.net.conv.out_channels == HALF


class Counting(Plain):
    """Counts the batches of every loop, by the width that they met."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def count(self, loop, batch):
        self.seen[loop, self.net.conv.out_channels] += 1
        return self(batch[0])

    def training_step(self, batch, batch_idx):
        self.count("train", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.count("val", batch)

    def test_step(self, batch, batch_idx):
        self.count("test", batch)

    def predict_step(self, batch, batch_idx):
        return self.count("predict", batch)

    def val_dataloader(self):
        return data()


@pytest.mark.parametrize(
    ("loop", "limit", "batches"),
    [(loop, *limit) for loop in ("train", "val", "test", "predict") for limit in ((0.5, 2), (3, 3))]
    + [("val", 0, 0)],
)
def test_limits_of_batches_hold_before_and_after_a_cut(loop, limit, batches):
    model = build(Counting)
    limits = {f"limit_{loop}_batches": limit}
    trainer = fit(model, Quiet(0.5, start_epoch=1), num_sanity_val_steps=0, **limits)
    trainer.test(model, data(), verbose=False)
    trainer.predict(model, data())
    unlimited = [("train", CHANNELS), ("train", HALF), ("val", CHANNELS), ("val", HALF)]
    unlimited += [("test", HALF), ("predict", HALF)]
    assert model.seen == Counter({case: batches if case[0] == loop else 4 for case in unlimited})


def test_frozen_weights_are_cut_but_not_pressed():
    model = build()
    model.net.conv.weight.requires_grad_(False)
    before = model.net.conv.weight.clone()
    callback = Quiet(0.5, start_epoch=1, options={"reg": 1.0})
    fit(model, callback)
    keep = next(cut.keep for cut in callback.pruner.plan.cuts if cut.tensor == "net.conv.weight")
    assert torch.equal(model.net.conv.weight, before[list(keep)])


@pytest.mark.filterwarnings("ignore:.*low-precision", "ignore:.*bf16")
def test_low_precision_gradients_are_pointed_out():
    with pytest.warns(UserWarning, match="less than 24 bits.*may round to nothing"):
        fit(build(), Quiet(0.5), precision="bf16-true")


def test_a_compiled_network_is_pruned_more_often_than_torch_recompiles():
    model = build()
    model.net.conv, model.net.bn, model.net.fc = (
        nn.Conv2d(3, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.Linear(24, 2),
    )
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model.net.compile(backend=backend)
    eager = build()
    eager.net = Net()
    eager.net.conv, eager.net.bn, eager.net.fc = (
        nn.Conv2d(3, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.Linear(24, 2),
    )
    eager.load_state_dict(model.state_dict())
    for each in (model, eager):
        fit(each, Quiet(0.5, start_epoch=0, iterative_steps=10), max_epochs=10)
    torch._dynamo.reset()
    assert len(compiled) >= 10
    assert model.net.conv.out_channels == 12
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), eager.parameters(), strict=True))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data().dataset)


class Batches:
    def __iter__(self):
        return iter(data())

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Stream(), batch_size=4), Batches(), DataLoader(data().dataset, batch_size=None)],
    ids=["iterable dataset", "own iterable", "no batching"],
)
def test_a_cut_in_epoch_zero_finds_its_inputs_in_any_loader(loader):
    class Single(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step(
                (x, y) if x.dim() == 4 else (x.expand(2, -1, -1, -1), y.expand(2)), 0
            )

    model = build(Single)
    fit(model, Quiet(0.5, start_epoch=0), loader=loader, max_epochs=1, limit_train_batches=2)
    assert model.net.conv.out_channels == HALF


def test_a_step_that_calls_nothing_is_an_error_that_says_what_to_do():
    class Idle(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("not today")

    with pytest.raises(TraceError, match="RuntimeError: not today; set example_input_array"):
        fit(build(Idle), Quiet(0.5, start_epoch=0))


def test_recorded_inputs_are_rebuilt_in_structure_shape_and_dtype():
    x, tokens = torch.randn(2, 3), torch.tensor([[1, 5], [7, 0]])
    calls = [describing.Call("a.b", (x, [tokens, None], 3), {"mask": {"m": tokens > 2}, "flag": True})]
    (call,) = describing.rebuild(describing.describe(calls), torch.device("cpu"))
    assert call.path == "a.b"
    assert (call.args[0].shape, call.args[0].dtype) == ((2, 3), torch.float32)
    assert torch.equal(call.args[1][0], tokens)
    assert call.args[1][1:] == [None]
    assert call.args[2] == 3
    assert torch.equal(call.kwargs["mask"]["m"], tokens > 2)
    assert call.kwargs["flag"] is True


KINDS = [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.complex64]


@pytest.mark.parametrize("size", [0, 3, 5000])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_recorded_is_what_a_checkpoint_may_hold(kind, size):
    spec = describing.describe([describing.Call("", (torch.zeros(size, dtype=kind),))])
    describing.vet_calls(Part("the example", spec))
    (call,) = describing.rebuild(spec, torch.device("cpu"))
    assert (call.args[0].dtype, call.args[0].shape) == (kind, (size,))


def test_numbers_without_a_smallest_are_not_recorded():
    assert describing.describe([describing.Call("", (torch.zeros(5000, dtype=torch.uint16),))]) is None


def test_large_integers_keep_their_range():
    tokens = torch.arange(5000) % 97 + 3
    (call,) = describing.rebuild(describing.describe([describing.Call("", (tokens,))]), torch.device("cpu"))
    assert call.args[0].dtype == torch.int64
    assert 3 <= int(call.args[0].min()) <= int(call.args[0].max()) <= 99


def test_two_samples_stand_for_a_batch_and_the_state_is_left_alone():
    model = build(NoForward)
    model.trainer = trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch, rng = next(iter(data(batch_size=16))), torch.get_rng_state()
    calls = example_inputs.from_batch(model, None, batch, trainer)
    assert [(c.path, c.args[0].shape) for c in calls] == [("net", (2, 3, 5, 5))]
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


def test_an_option_error_of_the_pruner_comes_before_training():
    class Net(Plain):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.zeros(1, 3, 5, 5)

    steps = []

    class Model(Net):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)

    with pytest.raises(OptionError, match="ignored_layers"):
        fit(build(Model), Quiet(0.5, options={"ignored_layers": ["net.cnov"]}))
    assert steps == []
