"""What is shipped is what is in the repository: packages, YAML files, version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import lightning_prune
from lightning_prune.commands.table import COMMANDS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def _packages_on_disk() -> set[str]:
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "lightning_prune").rglob("__init__.py")
    }
    return found | {"lightning_prune.conf"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that no build folder is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("lightning_prune", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_list_of_packages_is_that_of_the_folders() -> None:
    assert (ROOT / "conf" / "__init__.py").is_file(), "Hydra finds pkg://lightning_prune.conf by this file"
    assert SETUPTOOLS["packages"] == sorted(_packages_on_disk())


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "lightning_prune").rglob("*.py")}
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert sources | {"lightning_prune/py.typed"} <= shipped


def test_the_wheel_holds_every_configuration_file(wheel: Path) -> None:
    configs = {
        f"lightning_prune/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")
    }
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")}
    assert shipped == configs
    assert configs, "conf/ holds no configuration at all"


def test_the_wheel_holds_the_templates_of_pages(wheel: Path) -> None:
    templates = {f.relative_to(ROOT).as_posix() for f in (ROOT / "lightning_prune").rglob("*.html")}
    assert templates
    assert templates <= set(zipfile.ZipFile(wheel).namelist())


ELSEWHERE = """
import sys
from importlib.metadata import distribution
from pathlib import Path
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
import lightning_prune.conf

with initialize_config_module("lightning_prune.conf", version_base="1.3"):
    Path("composed.yaml").write_text(OmegaConf.to_yaml(compose("prune", overrides=["experiment=quick"])))
Path("homes.txt").write_text(f"{lightning_prune.__file__}\\n{lightning_prune.conf.__file__}")
(script,) = distribution("lightning-prune").entry_points.select(group="console_scripts")
sys.argv = [script.name, "--help"]
script.load()()
"""


def test_the_wheel_composes_and_helps_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    """In one process, which finds the unpacked wheel before the checkout."""
    unpacked, folder = tmp_path / "unpacked", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(unpacked)
    folder.mkdir()
    command, path = (
        [sys.executable, "-W", "error::UserWarning", "-c", ELSEWHERE],
        {"PYTHONPATH": str(unpacked)},
    )
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    homes = [Path(line).relative_to(unpacked) for line in (folder / "homes.txt").read_text().splitlines()]
    assert homes == [Path("lightning_prune", "__init__.py"), Path("lightning_prune", "conf", "__init__.py")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        shipped = OmegaConf.to_yaml(compose("prune", overrides=["experiment=quick"]))
    assert (folder / "composed.yaml").read_text() == shipped
    assert all(f"lightning-prune {name} " in done.stdout for name in COMMANDS)
    assert "experiment: isomorphic_convnext, isomorphic_deit, quick, vit_heads" in done.stdout


def test_the_wheel_claims_one_top_level_name(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"lightning_prune"}


def test_the_pins_lie_within_the_ranges() -> None:
    pins = dict(
        line.split(" ;")[0].split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        name, _, bound = re.fullmatch(r"([\w.-]+)(?:\[.*\])?((?:[=>]=)?)(.*)", requirement).groups()
        if name == "lightning-prune":
            continue
        assert name in pins, f"{name} is not pinned: make lock"
        numbers = [tuple(int(part) for part in re.findall(r"\d+", text)[:3]) for text in (bound, pins[name])]
        assert numbers[0] <= numbers[1], f"{requirement}, but constraints.txt pins {pins[name]}"


def test_no_cuda_package_is_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.findall(r"^(?:nvidia|cuda).*", text, flags=re.MULTILINE)


def test_the_changelog_agrees_with_the_version() -> None:
    headings = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert headings[0] == "Unreleased"
    if ".dev" in lightning_prune.__version__:  # between releases: the version to come has no heading yet
        assert lightning_prune.__version__.partition(".dev")[0] not in headings
    else:
        assert headings[1] == lightning_prune.__version__
