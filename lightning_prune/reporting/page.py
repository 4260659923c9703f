"""A report as one HTML page that needs nothing beside itself.

The template is jinja2's: torch brings it along, it escapes what users name their layers, and the page can be
read as a page. Pictures are SVG in data URIs, so their ids do not meet and each has an alternative text.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from functools import lru_cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lightning_prune.reporting.pictures.drawing import Drawn
from lightning_prune.reporting.report import BEFORE_AFTER, Report, plain
from lightning_prune.reporting.sections import sections
from lightning_prune.reporting.wording import saved

__all__ = ["page_template", "to_html"]


def to_html(report: Report, pictures: Sequence[Drawn] = (), *, remarks: Sequence[str] = ()) -> str:
    """Give a report as an HTML page.

    Args:
        report: What to write.
        pictures: Those that were drawn.
        remarks: Further notes.
    """
    return page_template("report.html").render(
        report=report,
        head=BEFORE_AFTER,
        rows=[(row.label, row.dense, row.pruned, row.change) for row in report.rows()],
        facts=_facts(report),
        notes=[*report.notes(), *remarks],
        sections=sections(report),
        pictures={each.name: (_data_uri(each.svg), each.alt) for each in pictures},
        config=json.dumps(plain(report.config), indent=2) if report.config else "",
    )


@lru_cache
def page_template(name: str) -> Template:
    """Load a template of this package.

    Args:
        name: File in ``reporting/templates``.
    """
    environment = Environment(
        loader=PackageLoader("lightning_prune.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """Choose what a reader wants to know first: (name, large, small)."""
    rows = {row.label: row for row in report.rows()}
    score = next(iter(rows.values()))
    found = [] if score.label == "parameters" else [(score.label, score.pruned, f"dense {score.dense}")]
    for label in ("parameters", "MACs"):
        share = saved(*(getattr(each, label.lower()) for each in (report.dense, report.pruned)))
        found.append(
            (
                label,
                "unchanged" if not share else f"{-share:+.0%}".replace("-", "\N{MINUS SIGN}"),
                rows[label].pruned,
            )
        )
    latency = next((row for row in report.rows() if row.label.startswith("latency")), None)
    if latency is not None:
        times, _, rest = latency.change.partition(" ")
        found.append(
            ("latency", times.rstrip(":").replace("x", "\N{MULTIPLICATION SIGN}"), rest or latency.pruned)
        )
    return found


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
