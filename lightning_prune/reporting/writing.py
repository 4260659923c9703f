"""A report on disk: every file appears whole or not at all."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lightning_prune.files import write_whole
from lightning_prune.reporting.markdown import to_markdown
from lightning_prune.reporting.page import to_html
from lightning_prune.reporting.pictures.drawing import draw
from lightning_prune.reporting.report import Report

__all__ = ["write_report"]

log = logging.getLogger(__name__)


def write_report(report: Report, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write report.html, report.md with its pictures, and report.json.

    A picture that cannot be drawn is replaced by a remark that says why.

    Args:
        report: What to write.
        folder: Where to; made if missing.

    Returns:
        The files written, report.json last: once it is there, the others are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn, remarks = draw(report)
    for remark in remarks:
        log.warning(remark)
    files = {f"{each.name}.png": each.png for each in drawn}
    files["report.html"] = to_html(report, drawn, remarks=remarks).encode()
    pictures = {each.name: f"{each.name}.png" for each in drawn}
    files["report.md"] = to_markdown(report, pictures=pictures, remarks=remarks).encode()
    files["report.json"] = report.to_json().encode()
    return tuple(write_whole(folder / name, data) for name, data in files.items())
