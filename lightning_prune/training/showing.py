"""The report in the user's loggers: TensorBoard and W&B. Other loggers have the files."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_prune.reporting.markdown import to_markdown
from lightning_prune.reporting.pictures.drawing import draw, drawings
from lightning_prune.reporting.report import BEFORE_AFTER, Report

__all__ = ["show"]


def show(trainer: Trainer, report: Report) -> None:
    """Hand a report to every logger that can show one; one that fails is a warning.

    Args:
        trainer: Its loggers and its step.
        report: What to show.
    """
    for logger in trainer.loggers:
        for kind, hand_over in SHOWS.items():
            if isinstance(logger, kind):
                try:
                    hand_over(logger, report, trainer.global_step)
                except Exception as error:
                    rank_zero_warn(
                        f"{kind.__name__} did not take the report: {type(error).__name__}: {error}"
                    )


def _show_on_tensorboard(logger: Any, report: Report, step: int) -> None:
    board = logger.experiment
    board.add_text("prune/report", to_markdown(report), step)
    try:
        for name, figure in drawings(report):
            board.add_figure(f"prune/{name}", figure, step)
    except ImportError:  # matplotlib is optional
        return


def _show_on_wandb(logger: Any, report: Report, step: int) -> None:
    lines = [[row.label, row.dense, row.pruned, row.change] for row in report.rows()]
    logger.log_table("prune/report", columns=["measure", *BEFORE_AFTER[1:]], data=lines, step=step)
    drawn, _ = draw(report)
    if drawn:
        from PIL import Image

        for each in drawn:
            image = Image.open(BytesIO(each.png))
            logger.log_image(f"prune/{each.name}", [image], step=step, caption=[each.alt])


SHOWS: dict[type[Logger], Callable[[Any, Report, int], None]] = {
    TensorBoardLogger: _show_on_tensorboard,
    WandbLogger: _show_on_wandb,
}
