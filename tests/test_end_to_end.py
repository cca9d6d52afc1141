"""The real launchers, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# DeepSpeed's launcher shows its ranks GPUs that the tests have hidden.
ON_CPU = ("--set", "trainer.device=cpu")
SCRIPTS = sysconfig.get_path("scripts")


def environment_with(marker: str) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")},
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        "TEST_MARKER": marker,
        "DS_ACCELERATOR": "cpu",
    }


def launch(*command: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs a command to its end; also returns a marker that its processes carry in their environment."""
    marker = uuid.uuid4().hex
    environment = environment_with(marker)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done, marker


def left_running(marker: str) -> list[str]:
    """Processes that still carry the marker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of its own, so that the default output folder is as a user has it."""
    for name in ("trainer", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_main_command(project: Path) -> None:
    """Two ranks under DeepSpeed's launcher and one under plain python: the same model."""
    done, marker = launch(
        "deepspeed", "--num_gpus", "2", "--master_port", "29611",
        "trainer/main.py", "--ds_config", "ds_configs/strong.json", "--epochs", "2", *ON_CPU,
        cwd=project,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert left_running(marker) == []
    # From the launcher come lines that begin with its time in brackets; the rest is ours.
    own = [line for line in done.stdout.splitlines() if not line.startswith("[20")]
    text = "\n".join(own)
    assert "32 micro-batches x 8 samples; 2 ranks x 16 micro-batches" in text
    assert "exactness: bitwise" in text
    assert "test accuracy" in text
    assert text.count("strong scaling:") == 1
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    summary = json.loads((project / "runs" / "strong-001" / "summary.json").read_text())
    assert summary["world_size"] == 2

    alone, _ = launch(
        sys.executable,
        "trainer/main.py",
        "--ds_config",
        "ds_configs/strong.json",
        "--epochs",
        "2",
        *ON_CPU,
        cwd=project,
    )
    assert alone.returncode == 0, alone.stderr
    # And without a launcher: nothing is printed but what one rank prints.
    itself, marker = launch(
        *(sys.executable, "-m", "trainer", "train", "--ranks", "3"),
        *("--ds_config", "ds_configs/strong.json", "--epochs", "2", *ON_CPU),
        cwd=project,
    )
    assert itself.returncode == 0 and itself.stderr == ""
    assert left_running(marker) == []
    begins = [line.split("  ")[0] for line in itself.stdout.splitlines()]
    assert begins[1:] == [line.split("  ")[0] for line in alone.stdout.splitlines()][1:]
    for number, world_size in ((2, 1), (3, 3)):
        again = json.loads((project / "runs" / f"strong-00{number}" / "summary.json").read_text())
        assert again["world_size"] == world_size
        for name in ("parameters_sha256", "model_sha256", "metrics"):
            assert again[name] == summary[name]


@pytest.mark.slow
def test_ending_the_runner_stops_the_ranks_with_a_checkpoint(project: Path) -> None:
    """DeepSpeed's runner forgets its ranks on SIGTERM; they notice, and the run goes on with three to the same bits."""
    marker = uuid.uuid4().hex
    command = ["deepspeed", "--num_gpus", "2", "trainer/main.py", "--ds_config", "ds_configs/strong.json"]
    command += ["--output_dir", "out", "--epochs", "12", *ON_CPU]
    with (project / "output.txt").open("w") as output:
        runner = subprocess.Popen(command, cwd=project, env=environment_with(marker), stdout=output, stderr=output)
        deadline_s = time.monotonic() + 120
        while not (project / "out" / "manifest.json").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)  # its first step is made
        runner.terminate()
        runner.wait(timeout=30)
        while left_running(marker) and time.monotonic() < deadline_s:
            time.sleep(0.2)
    text = (project / "output.txt").read_text()
    assert left_running(marker) == []
    assert text.count("stopped after step") == 1, text
    assert "the launcher is gone" in text
    assert "Traceback" not in text
    assert not (project / "out" / "summary.json").exists()

    done, _ = launch(*command[:2], "3", *command[3:], "--resume", "auto", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
    alone, _ = launch(sys.executable, *command[3:6], "--output_dir", "alone", "--epochs", "12", *ON_CPU, cwd=project)
    assert alone.returncode == 0, alone.stderr
    resumed, whole = (json.loads((project / n / "summary.json").read_text()) for n in ("out", "alone"))
    for name in ("parameters_sha256", "model_sha256", "metrics", "best"):
        assert resumed[name] == whole[name]


def test_torchrun_is_understood(project: Path) -> None:
    done, _ = launch(
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613",
        "trainer/main.py", "--ds_config", "ds_configs/strong.json", "--max_steps", "3", "--output_dir", "out",
        cwd=project,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "out" / "summary.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--epochs", "x"], "invalid int value", marks=pytest.mark.slow),  # before the config is read
        (["--set", "trainer.epoch=3"], 'Did you mean "epochs"?'),  # before torch is loaded
        pytest.param(
            ["--task", "nosuch"], 'unknown task "nosuch"', marks=pytest.mark.slow
        ),  # before the ranks have met
        (
            ["--task", "bad_tasks.py:MeanLoss", "--set", "trainer.task_options={}"],
            "MeanLoss.loss()",
        ),  # in the first step
    ],
)
def test_an_error_is_one_message(project: Path, arguments: list[str], words: str) -> None:
    for file in (ROOT / "tests" / "user_tasks").glob("*.py"):
        shutil.copy(file, project)
    done, marker = launch(
        "deepspeed", "--num_gpus", "3", "--master_port", "29612",
        "trainer/main.py", "--ds_config", "ds_configs/strong.json", *arguments, *ON_CPU,
        cwd=project,
    )  # fmt: skip
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert output.count("error: ") == 1, output
    assert words in output
    assert "Traceback" not in output
    assert left_running(marker) == []
    assert not list(project.glob("runs/*"))
