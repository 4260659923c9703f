"""The README: its Python runs, its console lines are understood, its names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from brevity import measure_briefly
from hydra import compose, initialize_config_module

import lightning_prune.commands  # noqa: F401  registers the resolver of the schedules

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MANUAL = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")

pytestmark = [  # Lightning 2.6 on torch 2.13, and advice that an example does not need
    pytest.mark.readme,
    *(
        pytest.mark.filterwarnings(f"ignore:{text}")
        for text in (".*LeafSpec", ".*does not have many workers", ".*number of training batches")
    ),
]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def _overrides(text: str) -> list[list[str]]:
    """Give the words of every `key=value ...` in the first or second column of a table, and of commands."""
    commands = re.findall(r"(?:^\$ |`)lightning-prune(?: plan| tune)? ([^`\n#|]*)", text, flags=re.MULTILINE)
    cells = re.findall(r"^\|[^|]*\| ((?:`[^`]+`(?:, )?)+) \|$", text, flags=re.MULTILINE)
    cells = [cell for line in cells for cell in re.findall(r"`([^`]+)`", line)]
    found = []
    for line in [*commands, *cells]:
        words = [a or b for a, b in re.findall(r"'([^']*)'|(\S+)", line)]
        words = [
            word
            for word in words
            if "=" in word and word[0] not in "[<" and "<" not in word and "..." not in word
        ]
        is_own = any(
            word.split("=")[-1] == "mine" or word.startswith("hydra.") or word == "experiment=best"
            for word in words
        )
        if words and not is_own:
            found.append(words)
    return found


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measure_briefly(monkeypatch)
    names: dict[str, object] = {"__name__": "readme"}
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_quickstart_is_the_example() -> None:
    assert QUICKSTART.partition('"""\n\n')[2] == _blocks("python")[0]
    assert len([line for line in _blocks("python")[0].splitlines() if line]) <= 12


@pytest.mark.parametrize("words", _overrides(README) + _overrides(MANUAL), ids=" ".join)
def test_every_command_composes(words: list[str]) -> None:
    words = [re.sub(r"(=[^,'{\[]*),.*", r"\1", word) for word in words]  # the first value of a grid
    searches = any("hparams_search." in word for word in words)
    words = ["hparams_search=accuracy", *words] if searches else words
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        compose("prune", overrides=["run_dir=.", *words])


def test_the_tables_of_commands_were_found() -> None:
    assert len(_overrides(MANUAL)) >= 19
    assert len(_overrides(README)) >= 7


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(tests/\w+\.py)(?:::\w+)?`", README))))
def test_every_proof_is_there(test: str) -> None:
    assert (ROOT / test).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/\w+\.py::\w+)`", README))))
def test_every_named_test_exists(name: str) -> None:
    file, _, function = name.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
