"""``lightning-prune report``: make the pages of a finished run again, or compare several runs."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.errors import OptionError, PruneError
from lightning_prune.reporting.comparison import print_comparison, write_comparison
from lightning_prune.reporting.console import print_report
from lightning_prune.reporting.report import Report
from lightning_prune.reporting.writing import write_report

__all__ = ["run"]

FILE = "report.json"
EXAMPLES = """\
examples:
  lightning-prune report outputs/2026-01-31/12-00-00            print it; write report.html and report.md anew
  lightning-prune report outputs/2026-01-31/12-00-00 --out web  write them elsewhere
  lightning-prune report multirun/2026-01-31/12-00-00           one table of all runs of a sweep
  lightning-prune report run1 run2 --out both                   compare two runs; write the table too"""


def run(words: Sequence[str]) -> None:
    """Read the reports of the folders and write what they say."""
    parser = ArgumentParser(
        prog="lightning-prune report",
        description="Make the report of a finished run again from its report.json, without training\n"
        "anything: report.html, report.md and the pictures. Several runs become one table.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", nargs="+", metavar="LOGDIR", help="folder of a run, or one with runs somewhere below it"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to write; else one run: its own folder, several: nowhere"
    )
    given = parser.parse_args(words)
    reports = {name: _read(file) for name, file in _files(given.folders).items()}
    if len(reports) == 1:
        ((folder, report),) = reports.items()
        print_report(report)
        written = write_report(report, given.out or folder)
    else:
        print_comparison(reports)
        written = write_comparison(reports, given.out) if given.out else ()
    for path in written:
        print(path)


def _files(folders: Sequence[str]) -> dict[str, Path]:
    """Find the reports: folder -> file, in order."""
    found: dict[str, Path] = {}
    for name in folders:
        folder = Path(name)
        if not folder.exists():
            raise OptionError(
                f"`lightning-prune report {name}` was asked for, and there is no such folder; give that of a "
                "run, as its last line names it: outputs/<date>/<time>, or where hydra.run.dir said"
            )
        own = folder if folder.is_file() else folder / FILE
        below = [own] if own.is_file() else sorted(folder.rglob(FILE))
        if not below:
            raise OptionError(
                f"`lightning-prune report {name}` was asked for, and there is no {FILE} in or below that "
                "folder. A run writes it when its fit ends; one that was stopped goes on with "
                "`lightning-prune ckpt_path=.../checkpoints/last.ckpt`."
            )
        found.update({str(file.parent): file for file in below})
    return found


def _read(file: Path) -> Report:
    try:
        return Report.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, PruneError) as error:
        raise OptionError(f"{file} was to be read as a report: {error}") from error
