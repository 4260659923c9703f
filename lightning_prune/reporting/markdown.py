"""A report as Markdown, readable as plain text too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from lightning_prune.reporting.report import BEFORE_AFTER, Report, plain
from lightning_prune.reporting.sections import Section, sections
from lightning_prune.reporting.wording import markdown_table

__all__ = ["to_markdown"]


def to_markdown(
    report: Report, *, pictures: Mapping[str, str] | None = None, remarks: Sequence[str] = ()
) -> str:
    """Give a report as Markdown.

    Args:
        report: What to write.
        pictures: Name -> path of a picture, relative to the text; those left out are not shown.
        remarks: Further notes.
    """
    parts = [
        "# Before and after pruning",
        f"**dense**: {report.dense_is}",
        *([f"MACs, latency and peak memory are those of {report.inputs}."] if report.inputs else []),
        markdown_table(BEFORE_AFTER, [(r.label, r.dense, r.pruned, r.change) for r in report.rows()]),
        *(f"> {note}" for note in (*report.notes(), *remarks)),
    ]
    for section in sections(report):
        parts += _section(section, (pictures or {}).get(section.picture))
    if report.config:
        parts += ["## Configuration", f"```json\n{json.dumps(plain(report.config), indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, picture: str | None) -> list[str]:
    return [
        f"## {section.title}",
        *([section.text] if section.text else []),
        *([f"![{section.title}]({picture})"] if picture else []),
        markdown_table(section.head, section.lines),
    ]
