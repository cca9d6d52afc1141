"""The package as it is installed: what is in it, and its program in an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel. Everything else is shared with this one, as torch is large."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (own / "shared.pth").write_text("\n".join(shared) + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), *install], check=True)
    return folder


def run(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = environment / "bin" / "strong-scaling-trainer"
    return subprocess.run([str(program), *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_wheel_holds_every_file_of_the_code_and_the_ready_configs(wheel: Path) -> None:
    files = {file.relative_to(ROOT) for top in ("trainer", "ds_configs") for file in (ROOT / top).rglob("*.*")}
    files = {file for file in files if file.suffix != ".pyc" and (ROOT / file).is_file()}
    files = {file for file in files if file.parent.name != "evidence"}  # results of studies, which nobody imports
    wanted = {str("trainer" / file if file.parts[0] == "ds_configs" else file) for file in files}
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"trainer/study/digits.svg", "trainer/ds_configs/strong.json"} <= wanted <= inside
    assert not [name for name in inside if not name.startswith(("trainer/", "strong_scaling_trainer-"))]
    assert not [name for name in inside if "evidence" in name]


def test_in_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    (installed,) = environment.glob("lib/python*/site-packages/trainer")
    planned = run(environment, tmp_path, "plan", "--ds_config", "strong.json")
    assert planned.returncode == 0 and planned.stdout.startswith("strong scaling, micro-batches of 8 samples")
    own = installed / "ds_configs" / "strong.json"
    assert planned.stderr == f"strong.json is not in this folder, so the trainer's own is used: {own}\n"
    started = run(environment, tmp_path, "init", "text_classification")
    assert (started.returncode, started.stderr) == (0, "")
    assert "`strong-scaling-trainer keys text_classification`" in started.stdout
    values = json.loads((tmp_path / "text_classification.json").read_text())
    assert json.loads((tmp_path / values["$schema"]).read_text()) == json.loads(
        run(environment, tmp_path, "schema").stdout
    )
    assert run(environment, tmp_path, "plan", "--ds_config", "text_classification.json").stderr == ""
    assert "commit" not in run(environment, tmp_path, "--version").stdout


def test_ranks_are_started_with_the_installed_code(environment: Path, tmp_path: Path) -> None:
    """What a launcher starts finds the configs as well. The last flag ends it before torch is loaded."""
    python = environment / "bin" / "python"
    command = [str(python), "-m", "trainer.main", "--ds_config", "strong.json", "--task", "digit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "the trainer's own is used: " in done.stderr and 'Did you mean "digits"?' in done.stderr
