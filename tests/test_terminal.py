"""Commands as a person types them: on a terminal of their own, with Ctrl-C in the middle."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.leaving import leaving_at_once
from lightning_prune.reporting.waiting import with_bar

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
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


# As the installed script begins. It says when Python has started, which answers Ctrl-C by itself until then.
SCRIPT = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
from {0} import {1}
os.write(1, b"begun ")
{1}()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5, 1, 2, 3])
def test_ctrl_c_while_a_command_begins_is_one_line(seconds: float, tmp_path: Path) -> None:
    script = SCRIPT.format(*PROJECT["project"]["scripts"]["lightning-prune"].split(":"))
    command = [sys.executable, "-c", script, "train", "trainer.enable_progress_bar=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 6) == b"begun "
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1].decode()
    assert process.returncode == 130, said
    assert said.count("Stopped") == said.count("\n") == 1


# Ctrl-C falls into the loading of a library that loses the exception: finalizers and bare excepts do.
LOSES_IT = """
import os, signal, sys
from contextlib import suppress
from lightning_prune.__main__ import main

class Library:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[-1]:
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Library())
main()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("library", ["omegaconf", "torch"])
def test_a_library_that_loses_exceptions_does_not_lose_ctrl_c(library: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", LOSES_IT, "plan", "--help", library]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")


@pytest.mark.parametrize("answer", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
def test_a_ctrl_c_that_others_have_answered_stays_so_while_a_command_loads(answer: Any) -> None:
    before = signal.signal(signal.SIGINT, answer)
    try:
        with leaving_at_once():
            assert signal.getsignal(signal.SIGINT) is answer
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_an_exception_again_once_a_command_is_loaded() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with leaving_at_once():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


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
