"""Runs that are disturbed, gone on with, and compared with the run that nobody disturbed.

A life is a run from its first step to its last, in sessions: each but the last is disturbed, each starts at a world
size of its own. What every kind of fault promises is in `kinds.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANG_TIMEOUT_S = 15
AUDIT_EVERY_STEPS = 3
# A session that is not disturbed, on a busy machine.
SESSION_LIMIT_S = 150.0
MAX_WORLD_SIZE = 8
LONG = "digits, long"


def bare_environment() -> dict[str, str]:
    """This process's environment without what a launcher sets."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT", "MASTER_ADDR", "TRAINER_LAUNCH")
    return {k: v for k, v in os.environ.items() if k not in ours} | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as trainer/main.py sets it before torch is loaded
    }


@dataclass
class Workload:
    """A run to disturb: its config's file, how many steps it has, and how it ends undisturbed."""

    name: str
    config: Path
    steps: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


def workloads(folder: Path, long_epochs: int = 30) -> list[Workload]:
    """Writes the configs: digits, and a small transformer on texts that are made here."""
    common: dict[str, Any] = {
        "device": "cpu",
        "epochs": 4,
        "log_every_steps": 2,
        "guard_every_steps": 5,
        "audit_every_steps": AUDIT_EVERY_STEPS,
        "hang_timeout_s": HANG_TIMEOUT_S,
        "checkpoint": {"every_steps": 3, "keep": 3},
        "learning_rate": {"schedule": "cosine", "warmup_epochs": 1},
    }
    optimizer = {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True, "fused": True}}
    digits = {
        "train_batch_size": 208,  # 13 micro-batches: no world size but 1 divides them
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": optimizer,
        "tensorboard": {"enabled": False},
        "trainer": common | {"task": "digits", "task_options": {"model": "cnn"}},
    }
    texts = random.Random(0)
    words = [f"word{i}" for i in range(60)]
    rows = ["text,label"]
    for _ in range(340):
        chosen = texts.choices(words, k=texts.randint(3, 14))
        rows.append(f"{' '.join(chosen)},{'yes' if sum(int(w[4:]) for w in chosen) > 29.5 * len(chosen) else 'no'}")
    (folder / "texts.csv").write_text("\n".join(rows) + "\n")
    model = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model |= {"intermediate_size": 64, "max_position_embeddings": 32}
    options = {"data": str(folder / "texts.csv"), "model": model, "tokenizer": "words"}
    transformer = digits | {
        "train_batch_size": 52,
        "train_micro_batch_size_per_gpu": 4,
        # Small buckets, so that faults meet an exchange under the backward, too.
        "trainer": common | {"task": "text_classification", "task_options": options, "exchange_bucket_mib": 0.01},
    }
    # A launcher looks at its ranks once a second: a run that lasts longer than that.
    long = digits | {"trainer": digits["trainer"] | {"epochs": long_epochs, "evaluate_every_epochs": 5}}
    found = []
    for name, config in (("digits", digits), ("transformer", transformer), (LONG, long)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        found.append(Workload(name, path))
    return found


def curve(run: Path) -> list[dict[str, float]]:
    """All records of a run, without times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("throughput/", "memory/", "time_s"))} for line in lines]


@dataclass
class Session:
    """How one start of a run ended.

    Attributes:
        codes: exit codes by rank (negative: the signal), or the launcher's alone.
        seconds: from the last disturbance, or the start, to the end of the last rank.
        text: what was printed, all ranks together.
        overdue: ranks that had to be killed.
        left: processes that were still there.
        disturbed: whether what should happen happened.
    """

    codes: list[int]
    seconds: float
    text: str
    overdue: list[int]
    left: int
    disturbed: bool
    rank_seconds: list[float] = field(default_factory=list)


class Server:
    """A process that forks ranks (`server.py`), started at the first session."""

    def __init__(self, project: Path = ROOT) -> None:
        self.project = project
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def _answer(self, request: dict[str, Any] | None) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.server"],
                cwd=self.project,
                env=bare_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._answer(None)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request is not None:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def run(
        self,
        folder: Path,
        world_size: int,
        config: Path,
        output: Path,
        disturbances: list[dict[str, Any]],
        *,
        limit_s: float = SESSION_LIMIT_S,
        stopped_for_s: float = 1e9,
        ends_others: bool = False,
        hosts: list[str] | None = None,
        environment: dict[str, str] | None = None,
        flags: list[str] | None = None,
    ) -> Session:
        """Starts a run, or goes on with it, and waits for its end.

        Args:
            folder: for this session's own files; empty.
            disturbances: see `server.Disturbance`.
            stopped_for_s: after which a stopped rank is continued; at the latest when all others have left.
            ends_others: end the others when a rank has failed, as launchers do.
            hosts: a network namespace for each rank.
            flags: more of the command line.
        """
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"TRAINER_LAUNCH": uuid.uuid4().hex, "TRAINER_CACHE": str(config.parent / "cache")}
        each = []
        for rank in range(world_size):
            local = [r for r in range(world_size) if hosts is None or hosts[r] == hosts[rank]]
            each.append({"LOCAL_RANK": str(local.index(rank)), "LOCAL_SIZE": str(len(local))})
        answer = self._answer(
            {
                "folder": str(folder),
                "world_size": world_size,
                "arguments": [
                    *["--ds_config", str(config), "--output_dir", str(output), "--resume", "auto"],
                    *(flags or []),
                ],
                "environment": common | (environment or {}),
                "rank_environment": each,
                "hosts": hosts,
                "without": [] if "transformer" in config.name else ["transformers"],
                "disturbances": disturbances,
                "limit_s": limit_s,
                "stopped_for_s": stopped_for_s,
                "ends_others": ends_others,
            }
        )
        assert answer is not None, "the leader of a session failed"
        faults = folder / "faults"
        disturbed = faults.exists()
        since_s = float(faults.read_text().split()[-1]) if disturbed else answer["began_s"]
        rank_seconds = [ended_s - since_s for ended_s in answer["ended_s"]]
        said = [folder / f"rank{r}" for r in range(world_size)]
        # A rank that is killed while it starts may not have come to its file.
        text = "".join(file.read_text(errors="replace") for file in said if file.exists())
        return Session(
            answer["codes"],
            max(rank_seconds),
            text,
            answer["overdue"],
            answer["left"],
            disturbed or not disturbances,
            rank_seconds,
        )


# ---- the real launcher -----------------------------------------------------------------------------------------


def carriers(marker: str) -> dict[int, str]:
    """Process -> role ("0", "1", ... for ranks, "launch", "runner" or "other") of all that carry a marker."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"TEST_MARKER={marker}".encode() not in environment:
                continue
            command = (folder / "cmdline").read_bytes()
            rank = next((e[5:].decode() for e in environment if e.startswith(b"RANK=")), None)
        except OSError:
            continue
        if rank is not None and b"main.py" in command:
            found[int(folder.name)] = rank
        elif b"deepspeed.launcher.launch" in command:
            found[int(folder.name)] = "launch"
        elif b"deepspeed" in command:
            found[int(folder.name)] = "runner"
        elif command:
            found[int(folder.name)] = "other"
    return found


def launched(
    project: Path,
    folder: Path,
    world_size: int,
    config: Path,
    output: Path,
    disturb: tuple[str, int, int] | None,
    *,
    limit_s: float = SESSION_LIMIT_S,
) -> Session:
    """As `Server.run`, through `deepspeed`.

    Args:
        project: a checkout.
        disturb: (role, signal, step): who gets which signal once the log says that the step is made.
    """
    folder.mkdir(parents=True)
    marker = uuid.uuid4().hex
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["deepspeed", "--num_gpus", str(world_size), "--master_port", port, "trainer/main.py"]
    command += ["--ds_config", str(config), "--output_dir", str(output), "--resume", "auto"]
    environment = bare_environment() | {"TEST_MARKER": marker, "TRAINER_CACHE": str(config.parent / "cache")}
    with (folder / "output").open("w") as file:
        runner = subprocess.Popen(
            command, cwd=project, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    began_s, since_s, disturbed = time.time(), time.monotonic(), disturb is None
    deadline_s = since_s + limit_s
    ended_s: float | None = None
    while time.monotonic() < deadline_s:
        if not disturbed and disturb is not None:
            role, number, step = disturb
            if _steps_logged(output, began_s) >= step:
                target = [process for process, name in carriers(marker).items() if name == role]
                if len(target) == 1:
                    since_s, disturbed = time.monotonic(), True
                    os.kill(target[0], number)
            time.sleep(0.01)
            if runner.poll() is None:
                continue
        if runner.poll() is not None:
            if ended_s is None:
                ended_s = time.monotonic()
                # Ranks that outlive the runner: they, too, have until the promised time.
                deadline_s = min(deadline_s, ended_s + 30.0)
            if not carriers(marker):
                break
        time.sleep(0.1)
    left = carriers(marker)
    ended_last_s = time.monotonic()
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    code = runner.wait()
    text = (folder / "output").read_text(errors="replace")
    # What DeepSpeed's runner itself says of a SIGINT.
    text = re.sub(r"^Traceback [^\n]*\n(?:[ \t][^\n]*\n)*KeyboardInterrupt\n", "", text, flags=re.M)
    return Session([code], ended_last_s - since_s, text, [], len(left), disturbed)


def _steps_logged(output: Path, since_s: float) -> int:
    """The last step in a run's log, if anything was written since some time.time()."""
    try:
        if (output / "metrics.jsonl").stat().st_mtime < since_s:
            return 0
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


# ---- places ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[bool]:
    """A file system of its own at a folder, as root; else the folder as it is. Gives which."""
    folder.mkdir(parents=True)
    mounted = os.geteuid() == 0 and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "faults", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)  # a process may be ending in it


def checkout(folder: Path) -> Path:
    """A copy of the project, so that a change to it in the meantime disturbs nobody."""
    for name in ("trainer", "tests", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def disagreement(workload: Workload, output: Path) -> str | None:
    """What of a finished run differs from the undisturbed one; None if nothing does."""
    try:
        summary = json.loads((output / "summary.json").read_text())
    except (OSError, ValueError):
        return "there is no summary"
    for name in ("status", "parameters_sha256", "model_sha256", "metrics", "steps", "exactness"):
        if summary.get(name) != workload.summary[name]:
            return f"{name}: {summary.get(name)} and not {workload.summary[name]}"
    if curve(output) != workload.curve:
        return "the loss curve"
    rubbish = [p.name for p in output.rglob(".*")]
    if rubbish:
        return f"left behind: {', '.join(sorted(rubbish)[:4])}"
    return None
