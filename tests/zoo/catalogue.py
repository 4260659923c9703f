"""Every case of the zoo by name; libraries are imported when a case is built, not before."""

from __future__ import annotations

from fnmatch import fnmatch

from zoo.cases import ZooCase
from zoo.hard_ops_cases import HARD_OPS
from zoo.huggingface_cases import HUGGINGFACE
from zoo.timm_cases import TIMM
from zoo.torchvision_cases import TORCHVISION

CASES: dict[str, ZooCase] = {c.name: c for c in (*HARD_OPS, *HUGGINGFACE, *TIMM, *TORCHVISION)}


def matching(globs: list[str]) -> list[str]:
    """List the names of the cases that match any glob; all without globs."""
    return [n for n in CASES if not globs or any(fnmatch(n, g) for g in globs)]
