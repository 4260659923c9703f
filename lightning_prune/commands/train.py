"""``lightning-prune train``: Hydra composes the configuration, this command runs it."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_prune.commands import running
from lightning_prune.commands.answering import USER_ERRORS, Refused
from lightning_prune.commands.configuring import CONF, PRIMARY, let_ratio_win, rehearse

__all__ = ["run"]


def run(words: Sequence[str]) -> None:
    """Hand the words to Hydra, which answers ``--help``, ``--cfg`` and ``--multirun`` itself."""
    sys.argv[1:] = words  # Hydra reads them there
    _train()


@hydra.main(version_base="1.3", config_path=f"pkg://{CONF}", config_name=PRIMARY)
def _train(cfg: DictConfig) -> float:
    """Do one run; what it returns is for sweepers."""
    has_begun = False
    try:
        let_ratio_win(cfg, HydraConfig.get().overrides.task)
        rehearse(cfg)
        has_begun = True
        return running.run(cfg)
    except USER_ERRORS as error:
        if not has_begun:
            _discard(Path(HydraConfig.get().runtime.output_dir))
        if HydraConfig.get().mode == RunMode.RUN:
            raise Refused(error) from error
        raise  # in a sweep, Hydra's line says which job it was


def _discard(folder: Path) -> None:
    """Remove what Hydra wrote for a run that never began, and the folders that this leaves empty."""
    for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
        if Path(handler.baseFilename).parent == folder:
            handler.close()
            logging.getLogger().removeHandler(handler)
            Path(handler.baseFilename).unlink(missing_ok=True)
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    with suppress(OSError):  # a folder with other content stays
        for place in (folder, *folder.parents[:2]):
            place.rmdir()
