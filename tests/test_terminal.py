"""Commands as a person types them: on a terminal of their own, with Ctrl-C in the middle."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import sys
from pathlib import Path

import pytest

from lightning_prune.reporting.waiting import with_bar

COMMAND = "from lightning_prune.commands.entry import main; main()"
WORDS = ["--as-is", "model.net.widths=[8,8,8]", "model.net.depth=1", "--ratios", "0.2,0.4,0.6,0.8"]
CTRL_C = b"\x03"


def typed(*words: str, folder: Path, stop_at: str = "") -> tuple[int, str]:
    """Type a command on a terminal, and Ctrl-C once the screen matches; give exit code and what was shown."""
    process, terminal = pty.fork()
    if process == 0:  # the child, whose terminal sends Ctrl-C to all that runs in front
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored below a shell's background job
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
        os.execv(sys.executable, [sys.executable, "-c", COMMAND, *words])
    shown, is_stopped = "", not stop_at
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", piece.decode(errors="replace"))
        if not is_stopped and re.search(stop_at, shown):
            os.write(terminal, CTRL_C)
            is_stopped = True
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), shown


@pytest.mark.multiprocess
def test_ctrl_c_on_a_terminal_is_one_calm_line(tmp_path: Path) -> None:
    code, shown = typed("sensitivity", *WORDS, folder=tmp_path, stop_at=r"[2-9]/24")
    assert code == 130, shown
    assert "Traceback" not in shown
    assert (
        shown.count("Stopped; what was measured is in sensitivity.json, and the same command goes on.") == 1
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity.json"]
    points = json.loads((tmp_path / "sensitivity.json").read_text())["points"]
    measured = sum(map(len, points.values()))
    assert 2 <= measured < 24


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_of_work_that_goes_on_counts_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setenv("TERM", "xterm")
    seen = list(with_bar(["c", "d", "e"], lambda name: f"part {name}", done=2))
    assert seen == ["c", "d", "e"]
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "part e" in shown
    assert re.findall(r"(\d)/5", shown)[-1] == "5"
    assert "0/5" not in shown
