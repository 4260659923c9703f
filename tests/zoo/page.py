"""docs/coverage.md: what became of every case, and why what stays stays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoo.judge import Verdict

HEAD = """# What is covered

Every network below is built with random weights and pruned at ratio 0.5 by one call with no hints. Its
result is compared in float64 with the original in which the removed weights are zero, and norms over a pruned
dimension take their statistics over what is left. `make zoo` repeats this and writes this page.

- **exact**: both agree to 1e-9 relative, at least 10 % of the parameters are gone, output shapes are the
  same, gradients in train mode are finite, attributes and configurations say what the shapes say; language
  models still generate. `+heads` cases remove half of the heads instead.
- **untrue**: the same, but an attribute or a configuration does not follow.
- **not shrunk**: exact, but less than 10 % of the parameters could go.
- **refused**: nothing was cut, the error says why.
- **WRONG**, **crash**, **limit** (120 s of processor time for the analysis or the cut, 9 GiB): failures.
"""
REASONS = """
## Why dimensions stay

Parameter dimensions of which no position can go, and those whose count is bound to one that stays: by what
happens at the root, in which module, in which line of the source. `*` is any number. Outputs of the model,
inputs and positions in a kernel stay by their nature.
"""
KERNELS = "position in a kernel"
ORDER = ("exact", "untrue", "not shrunk", "refused", "WRONG", "crash", "limit")


def page(verdicts: Sequence[Verdict]) -> str:
    """Write the page."""
    parts = [HEAD, *_summary(verdicts)]
    other = [v for v in verdicts if v.status != "exact"]
    if other:
        parts += [
            "## What is not exact\n",
            *(f"- {v.name}: **{v.status}**, {_escaped(v.detail)}" for v in other),
            "",
        ]
    parts += ["## Cases\n", *_table(verdicts), REASONS]
    for v in verdicts:
        reasons = list(_reasons(v))
        if reasons:
            parts += [f"### {v.name}\n", *reasons, ""]
    return "\n".join(parts).rstrip() + "\n"


def _summary(verdicts: Sequence[Verdict]) -> Iterable[str]:
    yield "| library | cases | " + " | ".join(ORDER) + " |"
    yield "|---|--:|" + "--:|" * len(ORDER)
    libraries = dict.fromkeys(v.name.partition("/")[0] for v in verdicts)
    for library in (*libraries, "all"):
        found = [v.status for v in verdicts if library in (v.name.partition("/")[0], "all")]
        counts = " | ".join(str(found.count(s)) for s in ORDER)
        yield f"| {library} | {len(found)} | {counts} |"
    yield ""


def _table(verdicts: Sequence[Verdict]) -> Iterable[str]:
    yield "| case | status | parameters | after | left | seconds | unknown operations |"
    yield "|---|---|--:|--:|--:|--:|---|"
    for v in verdicts:
        share = v.after / v.before if v.before else 1.0
        unknown = ", ".join(sorted({u.split(" ")[0] for u in v.unknown}))
        size = f"{v.before:,} | {v.after:,} | {share:.2f} | {v.analysis + v.cut:.1f}"
        yield f"| {v.name} | {v.status} | {size} | {unknown} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


@dataclass(frozen=True)
class Root:
    """The operation at the root of an explanation.

    Args:
        text: What it does to the dimension, with the name of the operation.
        module: Where it runs, numbers replaced.
        line: The line of the source, or nothing.
    """

    text: str
    module: str
    line: str


def root(reason: str) -> Root:
    """Take an explanation apart.

    >>> root(": 0 of 8 positions can be removed. 8 stay: numel in h.0.k (a.py:3) <- paired: add (b.py:1)")
    Root(text='numel', module='h.*.k', line='a.py:3')
    """
    text = reason.partition(" stay: ")[2] or reason.lstrip(": ")
    text = text.partition(" <- ")[0].rstrip(".")
    if text.startswith("an output of the model"):
        return Root("an output of the model", "", "")
    match = re.fullmatch(r"(?P<text>.*?)(?: in (?P<module>[\w.*-]+))?(?: \((?P<line>[^()]*:\d+)\))?", text)
    assert match is not None
    return Root(match["text"], starred(match["module"] or ""), match["line"] or "")


def starred(path: str) -> str:
    """Replace the numbers in a dotted path.

    >>> starred("cell_12.left.0.weight:1")
    'cell_*.left.*.weight:1'
    """
    return re.sub(r"(?<=[._])\d+(?=[._:]|$)|^\d+(?=\.)", "*", path)


def _reasons(v: Verdict) -> Iterable[str]:
    """One line per text and line of source: where it runs, and which dimensions stay for it."""
    table: dict[tuple[str, str], tuple[dict[str, None], Counter[str]]] = {}
    for reason, dims in v.kept.items():
        found = root(reason)
        everywhere = found.text.startswith(KERNELS)  # the same for every convolution: once is enough
        key = (KERNELS, "") if everywhere else (found.text, found.line)
        modules, names = table.setdefault(key, ({}, Counter()))
        modules[found.module] = None
        names.update(starred(d) for d in dims)
    for (text, line), (modules, names) in sorted(table.items(), key=lambda item: -item[1][1].total()):
        where = _some([m for m in modules if m], 2)
        source = f" ({line})" if line else ""
        yield f"- {_escaped(text)}{f' in {where}' if where else ''}{source}: {_some(list(names), 4)}"


def _some(names: Sequence[str], most: int) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
