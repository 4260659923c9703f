"""docs/coverage.md: what became of every case, and why what stays stays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

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
ORDER = ("exact", "untrue", "not shrunk", "refused", "WRONG", "crash", "limit")


def page(verdicts: Sequence[Verdict]) -> str:
    """Write the page."""
    parts = [HEAD, *_summary(verdicts), "## Cases\n", *_table(verdicts), "\n## Why dimensions stay\n"]
    parts.append(
        "Parameter dimensions of which no position can go, by the operation at the root; `*` is any number.\n"
    )
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
    yield "| case | status | parameters | after | left | unknown operations | detail |"
    yield "|---|---|--:|--:|--:|---|---|"
    for v in verdicts:
        share = v.after / v.before if v.before else 1.0
        unknown = ", ".join(sorted({u.split(" ")[0] for u in v.unknown}))
        detail = "" if v.status == "exact" else _escaped(v.detail[:160])
        yield f"| {v.name} | {v.status} | {v.before:,} | {v.after:,} | {share:.2f} | {unknown} | {detail} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def root(reason: str) -> str:
    """Name the operation at the root of an explanation, numbers in module paths replaced.

    >>> root(": 0 of 8 positions can be removed. 8 stay: numel in h.0.k (a.py:3) <- paired: add (b.py:1)")
    'numel in h.*.k (a.py:3)'
    """
    text = reason.partition(" stay: ")[2] or reason.lstrip(": ")
    text = text.partition(" <- ")[0]
    if text.startswith("an output of the model"):
        return "an output of the model"
    return starred(text)


def starred(text: str) -> str:
    """Replace the numbers that are whole parts of a dotted path."""
    return re.sub(r"(?<=\.)\d+(?=[.: ])|\b\d+(?=\.[A-Za-z_])", "*", text)


def _reasons(v: Verdict) -> Iterable[str]:
    table: dict[str, Counter[str]] = {}
    for reason, dims in v.kept.items():
        table.setdefault(root(reason), Counter()).update(starred(d) for d in dims)
    for reason, dims in sorted(table.items(), key=lambda item: -item[1].total()):
        names = [f"`{d}`" for d in dims]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        yield f"- {_escaped(reason)}: {', '.join(names[:6])}{more}"
