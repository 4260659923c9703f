"""The judge of the zoo tells right from wrong: every fault here is made by hand."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import Net, conv, image
from torch import Tensor, nn
from torch.nn import functional
from zoo.cases import ZooCase, draw, randomise
from zoo.catalogue import CASES
from zoo.doubles import InDouble
from zoo.judge import (
    OverTimeError,
    Verdict,
    WrongError,
    check_files,
    check_generates,
    check_gradients,
    error_of,
    judge,
    limits,
    other_shapes,
)
from zoo.operators import nms, roi_align
from zoo.page import page
from zoo.truths import false_attributes

from lightning_prune import GroupNormPruner, Plan, apply
from lightning_prune.plan import Cut


def _net() -> nn.Module:
    return Net(
        lambda m, x: m.fc(m.norm(m.c(x).flatten(2).mean(2))),
        c=conv(3, 8),
        norm=nn.LayerNorm(8),
        fc=nn.Linear(8, 4),
    )


def _pruned() -> tuple[nn.Module, nn.Module, Plan]:
    dense = randomise(_net())
    model = copy.deepcopy(dense)
    return dense, model, GroupNormPruner(model, image(), pruning_ratio=0.5).step()


def test_a_right_cut_is_exact() -> None:
    assert error_of(*_pruned(), image()) < 1e-12


def test_a_moved_value_is_wrong() -> None:
    dense, model, plan = _pruned()
    with torch.no_grad():
        model.get_parameter("fc.weight")[0, 0] += 1e-6
    with pytest.raises(WrongError, match=r"fc\.weight"):
        error_of(dense, model, plan, image())


def test_a_scale_that_followed_a_size_is_wrong() -> None:
    dense, model, plan = _pruned()
    model.get_submodule("norm").eps = 2e-5
    with pytest.raises(WrongError, match="relative error"):
        error_of(dense, model, plan, image())


def test_a_consumer_cut_elsewhere_than_its_producer_is_wrong() -> None:
    dense = randomise(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    cuts = (
        Cut("0.weight", 0, 4, (0, 1)),
        Cut("0.bias", 0, 4, (0, 1)),
        Cut("2.weight", 1, 4, (2, 3)),
    )
    model = copy.deepcopy(dense)
    plan = Plan(cuts=cuts)
    apply(model, plan)
    with pytest.raises(WrongError, match="relative error"):
        error_of(dense, model, plan, draw(2, 5))


def test_functional_norms_without_weights_see_the_survivors() -> None:
    dense = randomise(
        Net(
            lambda m, x: m.fc(functional.layer_norm(m.a(x), m.a(x).shape[-1:])),
            a=nn.Linear(5, 8),
            fc=nn.Linear(8, 3),
        )
    )
    model = copy.deepcopy(dense)
    keep = (0, 3, 5)
    plan = Plan(
        cuts=(Cut("a.weight", 0, 8, keep), Cut("a.bias", 0, 8, keep), Cut("fc.weight", 1, 8, keep)),
    )
    apply(model, plan)
    assert error_of(dense, model, plan, draw(2, 5)) < 1e-12


def test_casts_stay_in_double() -> None:
    x = torch.tensor([1 / 3], dtype=torch.float64)
    with InDouble():
        assert [x.float().dtype, x.to(torch.float32).dtype, x.softmax(0, dtype=torch.float32).dtype] == [
            torch.float64
        ] * 3


def test_gradients_that_are_not_finite_are_wrong() -> None:
    model = Net(lambda m, x: (m.a(x) * 0).sqrt(), a=nn.Linear(3, 2))
    case = ZooCase("x", lambda: model, lambda: draw(2, 3))
    with pytest.raises(WrongError, match="not finite"):
        check_gradients(case, model)


def test_a_refusal_and_a_crash_are_told_apart() -> None:
    refused = judge(ZooCase("option", _net, image, options={"pruning_ratio": 2.0}))
    assert (refused.status, refused.after) == ("refused", refused.before)
    assert "pruning_ratio" in refused.detail
    crashed = judge(ZooCase("stuck", lambda: Net(_stuck, a=conv(3, 8)), image))
    assert (crashed.status, crashed.detail) == ("crash", "dense: RuntimeError: this model never runs")


def _stuck(m: Net, x: Tensor) -> Tensor:
    raise RuntimeError("this model never runs")


def test_time_runs_out() -> None:
    with pytest.raises(OverTimeError), limits(0.05):
        _busy(5)


def _busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))


def test_attributes_that_lie_are_found() -> None:
    dense = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    pruned = copy.deepcopy(dense)
    pruned[0].out_features = 5
    assert false_attributes(dense, dense, draw(2, 3)) == []
    assert false_attributes(dense, pruned, draw(2, 3)) == ["0: out_features is 5, the weight says 4"]


# -- Hugging Face models -------------------------------------------------------------------------------


def _language_model() -> tuple[Any, Any, GroupNormPruner]:
    pytest.importorskip("transformers")
    case = CASES["huggingface/llama"]
    dense = randomise(case.build())
    model = copy.deepcopy(dense)
    pruner = GroupNormPruner(model, case.inputs(), pruning_ratio=0.5, round_to=4)
    pruner.step()
    return dense, model, pruner


def test_a_config_that_does_not_tell_all_is_found_where_no_note_says_so() -> None:
    dense, model, pruner = _language_model()
    ids = CASES["huggingface/llama"].inputs()
    assert false_attributes(dense, model, ids, notes=pruner.notes) == []
    assert "computes something else" in false_attributes(dense, model, ids)[0]  # other frequencies
    model.config.hidden_size = 40
    assert "config says [96, 40]" in false_attributes(dense, model, ids)[0]
    found = false_attributes(dense, model, ids, notes=("config cannot tell, it says [1] for lm_head.bias, ",))
    assert "the note names no difference" in found[0]


def test_a_needless_note_is_found() -> None:
    dense, _, _ = _language_model()
    ids, note = CASES["huggingface/llama"].inputs(), "config gives the sizes, but not the scales"
    assert false_attributes(dense, dense, ids) == []
    assert "tells everything, and yet" in false_attributes(dense, dense, ids, notes=(note,))[0]


def test_shapes_other_than_by_hand_are_found() -> None:
    _, model, _ = _language_model()
    case = CASES["huggingface/llama"]
    assert other_shapes(case, model) == ""
    case = replace(case, shapes={"lm_head.weight": (96, 31)})
    assert other_shapes(case, model) == "lm_head.weight has shape [96, 32], by hand it is [96, 31]"


def test_files_that_lose_something_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = _language_model()
    ids = CASES["huggingface/llama"].inputs()
    check_files(model, ids)
    monkeypatch.setattr("zoo.judge.from_pretrained", lambda cls, path: cls.from_pretrained(path))
    with pytest.raises(WrongError, match="once it was saved and loaded"):
        check_files(model, ids)


def test_a_cache_that_goes_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = _language_model()
    ids = CASES["huggingface/llama"].inputs()
    check_generates(model, ids)
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **asked: (generate(**asked) + 1) % 96)
    with pytest.raises(WrongError, match="full passes"):
        check_generates(model, ids)
    monkeypatch.setattr(model, "generate", lambda **asked: asked["input_ids"])
    with pytest.raises(WrongError, match="nothing new"):
        check_generates(model, ids)


class _Backbone(nn.Sequential):
    """Says of itself what the models of timm say."""

    num_features = head_hidden_size = 6
    feature_info = ({"num_chs": 6, "module": "0"},)

    def get_classifier(self) -> nn.Module:
        return self[1]

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self[0](x)
        return out


def test_what_a_backbone_says_of_itself_is_held_against_what_passes() -> None:
    dense = _Backbone(nn.Linear(3, 6), nn.Linear(6, 2))
    pruned = _Backbone(nn.Linear(3, 4), nn.Linear(4, 2))
    assert false_attributes(dense, dense, draw(2, 3)) == []
    assert false_attributes(dense, pruned, draw(2, 3)) == [
        "feature_info[0] is 6, it speaks of [2, 4]",
        "head_hidden_size is 6, it speaks of [2, 4]",
        "num_features is 6, it speaks of [2, 4]",
    ]


def test_nms_keeps_the_best_of_those_that_overlap() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.95).tolist() == [1, 0, 2]


def test_roi_align_averages_a_plane_at_the_middle_of_each_bin() -> None:
    plane = torch.arange(8.0).expand(1, 1, 8, 8)  # the value is the column
    out = roi_align(plane, torch.tensor([[0.0, 1, 1, 5, 5]]), 1.0, 2, 2, 2, aligned=True)
    assert torch.allclose(out[0, 0], torch.tensor([[1.5, 3.5], [1.5, 3.5]]))


def test_the_page_names_the_root_and_counts() -> None:
    v = Verdict("lib/a", "exact", "1e-16", before=100, after=30)
    v.kept = {
        ": 0 of 4 positions can be removed. 4 stay: cat in h.0 (a.py:3) <- add (b.py:1)": ["h.0.w:1"],
        ": 0 of 4 positions can be removed. 4 stay: cat in h.1 (a.py:3) <- add (b.py:1)": ["h.1.w:1"],
        ": 0 of 3 positions can be removed. 3 stay: position in a kernel: conv2d in c (c.py:5)": ["c.w:2"],
        ": their count follows one that stays, used as a size: view in h.0 (a.py:9).": ["h.0.v:0"],
    }
    text = page([v, Verdict("lib/b", "refused", "TraceError: no", before=10, after=10)])
    assert "| lib/a | exact | 100 | 30 | 0.30 |" in text
    assert "- cat in `h.*` (a.py:3): `h.*.w:1`\n" in text
    assert "- position in a kernel in `c`: `c.w:2`\n" in text
    assert "- their count follows one that stays, used as a size: view in `h.*` (a.py:9): `h.*.v:0`\n" in text
    assert "- lib/b: **refused**, TraceError: no\n" in text
    assert "| all | 2 | 1 | 0 | 0 | 1 |" in text
