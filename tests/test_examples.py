"""Every file of examples/, run in its short form: real training, real files, in an empty folder.

quickstart.py is the first block of the README, which tests/test_readme.py runs.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from brevity import measure_briefly

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGE = (EXAMPLES / "README.md").read_text(encoding="utf-8")

pytestmark = [  # Lightning 2.6 on torch 2.13, and advice that an example does not need
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*LeafSpec",
        ".*does not have many workers",
        ".*number of training batches",
        "Checkpoint directory .* exists",
        "Found .* module.s. in eval mode",
        "Trying to infer the .batch_size.",
    )
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Give a function that runs an example with few epochs, in this process, and returns its names."""
    loggers = [logging.getLogger(name) for name in (None, "lightning.pytorch")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    measure_briefly(monkeypatch)

    def start(name: str, *words: str, epochs: int = 2) -> dict[str, Any]:
        monkeypatch.setenv("EPOCHS", str(epochs))
        monkeypatch.setattr(sys, "argv", [name, *words])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    yield start
    signal.signal(signal.SIGINT, handler)
    for logger, level, handlers in before:  # Hydra sets up logging for good
        for extra in set(logger.handlers) - set(handlers):
            extra.close()
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_the_page_lists_every_example_and_no_other() -> None:
    listed = set(re.findall(r"^\| \[`[^`]+`\]\(([^)]+)\)", PAGE, flags=re.MULTILINE))
    there = {file.relative_to(EXAMPLES).as_posix() for file in EXAMPLES.rglob("*.py")}
    assert listed == there


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.py")), ids=lambda file: file.name)
def test_an_example_says_what_it_shows_and_how_it_is_started(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith('"""') or "quickstart" in file.name
    place = file.relative_to(EXAMPLES.parent).as_posix()
    assert f"python {place}" in text + PAGE
    assert len(text.splitlines()) <= 120 or "study" in file.name, "an example is a page"


def test_the_picture_of_a_residual_group(run, tmp_path) -> None:
    run("residual_group.py", "group.png")
    assert (tmp_path / "group.png").read_bytes().startswith(b"\x89PNG")


def test_char_language_model(run, capsys) -> None:
    names = run("char_language_model.py")
    net, out = names["model"].net, capsys.readouterr().out
    for layer in net.model.layers:
        attention = layer.self_attn
        assert attention.q_proj.out_features == 6 * attention.head_dim  # of 8 heads on 4
        assert attention.k_proj.out_features == 3 * attention.head_dim
        assert layer.mlp.up_proj.out_features < 256
    assert net.lm_head.out_features == len(names["letters"])
    assert "perplexity (val)" in out
    assert out.splitlines()[-1].startswith("The statement ")


def test_custom_layer(run, capsys) -> None:
    names = run("custom_layer.py")
    out = capsys.readouterr().out
    assert "without a rule: 256 stay: no rule for this operation: examples::wave" in out
    assert "with the rule:  1.weight dim 0: 256 of 256 positions can be removed" in out
    assert names["net"][2].frequency.shape == (64,)
    assert names["net"](torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_custom_importance(run) -> None:
    names = run("custom_importance.py", epochs=1)
    assert list(names["found"]) == ["random", "l1", "group_norm", "fpgm", "filters_only"]
    assert all(0 < accuracy <= 1 for accuracy in names["found"].values())


def test_hydra_app(run, tmp_path) -> None:
    run("hydra_app/app.py", "epochs=2", "model.net.widths=[16,32]", "model.net.depth=1")
    (folder,) = (tmp_path / "outputs" / "hydra_app").glob("*/*")
    config = (folder / ".hydra" / "config.yaml").read_text()
    assert "round_to: 4" in config
    assert "macs: 0.5" in config  # of the package's half_macs
    assert "MACs" in (folder / "report.md").read_text()


def test_lightning_cli(run, capsys, monkeypatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's, not ours
    words = ["fit", f"--config={EXAMPLES / 'lightning_cli' / 'config.yaml'}", "--trainer.max_epochs=5"]
    run("lightning_cli/train.py", *words)
    out = capsys.readouterr().out
    assert "units removed: asked 50.00%" in out


def test_deploy(run, capsys) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    names = run("deploy.py")
    assert float(names["difference"]) < 1e-4
    sizes = [float(kib) for kib in re.findall(r"\.onnx +(\d+) KiB", capsys.readouterr().out)]
    assert sizes[1] < 0.5 * sizes[0]


def test_from_torch_pruning(run, capsys) -> None:
    run("from_torch_pruning.py")
    assert capsys.readouterr().out == "8 16 (8, 10)\n"


@pytest.mark.skipif(find_spec("torch_pruning") is None, reason="torch-pruning is not installed")
@pytest.mark.filterwarnings("ignore")  # of the other library
def test_the_same_lines_run_in_torch_pruning(capsys) -> None:
    """What the example says of the other library is true: two lines differ, the sizes are the same."""
    text = (EXAMPLES / "from_torch_pruning.py").read_text(encoding="utf-8")
    theirs = re.search(r"begins with\n\n(.*?)\n\nand every line", text, flags=re.DOTALL)[1]
    _, _, code = text.partition('"""\n\n')
    code = code.replace(
        "from lightning_prune import GroupNormPruner\n", re.sub("^    ", "", theirs, flags=re.M) + "\n"
    )
    code = code.replace('importance = "group_norm"\n', "")
    assert "lightning_prune" not in code
    exec(compile(code, "torch_pruning_script", "exec"), {"__name__": "script"})
    assert capsys.readouterr().out.endswith("8 16 (8, 10)\n")


@pytest.mark.slow
def test_schedule_study(run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SEEDS", "1")
    names = run("schedule_study.py", "0.3", epochs=3)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(names["SETTINGS"])
    assert rows[-1].startswith("| no pruning |  |")


@pytest.mark.multiprocess
def test_ddp(tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EPOCHS": "3"}
    command = [sys.executable, str(EXAMPLES / "ddp.py")]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = dict(re.findall(r"rank (\d): (.*)", done.stdout))
    assert set(ranks) == {"0", "1"}
    assert ranks["0"] == ranks["1"]
    assert "stem of 8 channels" in ranks["0"]


@pytest.mark.zoo_fast
def test_timm_model(run, capsys) -> None:
    pytest.importorskip("timm")
    run("timm_model.py")
    assert capsys.readouterr().out.count(": 2 heads of ") == 3  # of 3


@pytest.mark.zoo_fast
@pytest.mark.filterwarnings("ignore")  # torchao tries kernels for other machines
def test_quantize(run, capsys) -> None:
    pytest.importorskip("torchao")
    run("quantize.py")
    dense, pruned, quantised = re.findall(r"(\d+) KiB", capsys.readouterr().out)
    assert int(quantised) < 0.7 * int(pruned) < 0.7 * int(dense)


def test_quantize_without_torchao_names_the_extra(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SystemExit, match=r"lightning-prune\[quantize\]"):
        run("quantize.py")
