"""The architectures of other libraries: pruned by half with one call, exact or refused with a reason."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from zoo.board import Board
from zoo.catalogue import CASES
from zoo.operators import import_torchvision
from zoo.page import ORDER, page
from zoo.timm_cases import SMALLEST

FAST = (
    "hard_ops/multihead_attention",
    "hard_ops/ragged_groups",
    "hard_ops/shuffle_of_four",
    "hard_ops/standardised_grouped",
    "hard_ops/transformer_decoder",
    "huggingface/bert",
    "huggingface/llama",
    "timm/convnext",
    "timm/nfnet",
    "timm/resnet",
    "timm/vision_transformer",
    "torchvision/resnet18",
)
AIM = 0.97
HOURS = 3600
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def _names() -> list[object]:
    return [pytest.param(n, marks=[pytest.mark.zoo_fast] if n in FAST else []) for n in CASES]


@pytest.mark.zoo
@pytest.mark.timeout(HOURS)
@pytest.mark.parametrize("name", _names())
def test_exact_or_refused_with_the_reason(name: str, board: Board) -> None:
    verdict = board.verdict(name)
    said = f"{verdict.status}: {verdict.detail}\n" + "\n".join(verdict.trace)
    assert verdict.status in ("exact", "not shrunk", "refused"), said
    if verdict.status == "refused":
        assert len(verdict.detail) > 40, said  # the type alone is no reason
    if verdict.status == "not shrunk":
        assert verdict.kept, "less than 10 % went and nothing is explained"


@pytest.mark.zoo
@pytest.mark.timeout(3 * HOURS)
def test_nearly_all_are_exact_and_shrunk(board: Board) -> None:
    for package in ("timm", "transformers"):
        import_module(package)  # without them the page would say that everything failed
    verdicts = [board.verdict(name) for name in CASES]
    PAGE.write_text(page(verdicts))
    shares = {s: sum(v.status == s for v in verdicts) / len(verdicts) for s in ORDER}
    assert shares["exact"] >= AIM, f"{shares}; docs/coverage.md says which and why"


@pytest.mark.zoo
def test_every_module_of_timm_is_a_case() -> None:
    assert set(SMALLEST) == set(import_module("timm").list_modules())


@pytest.mark.zoo
def test_every_model_of_torchvision_but_other_sizes_of_classifiers_is_a_case() -> None:
    import_torchvision()
    models = import_module("torchvision.models")
    kinds = ("segmentation", "detection", "video", "optical_flow")
    wanted = {n for kind in kinds for n in models.list_models(module=getattr(models, kind))}
    assert {f"torchvision/{n}" for n in wanted} <= set(CASES)
    classifiers = {re.split(r"[\d_]", n)[0] for n in models.list_models(module=models)}
    cases = {n.removeprefix("torchvision/") for n in CASES if n.startswith("torchvision/")}
    assert classifiers == {re.split(r"[\d_]", n)[0] for n in cases - wanted}


@pytest.mark.zoo
def test_no_case_has_hints() -> None:
    hints = {key for case in CASES.values() for key in case.options}
    assert hints <= {"pruning_ratio", "prune_num_heads", "head_pruning_ratio"}
