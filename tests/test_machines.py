"""Several machines: hostfile runs over pdsh and without ssh, a cut link, machines that come and go, SLURM.

The hosts are network namespaces with an sshd each (tests/machines); those tests need root, and packages that
tests/machines/install.sh installs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import (
    LONG,
    Server,
    Workload,
    bare_environment,
    carriers,
    checkout,
    curve,
    disagreement,
    workloads,
)
from tests.machines import cluster as clusters

_REASON = clusters.why_not()
pytestmark = pytest.mark.slow
needs_hosts = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """A run of some seconds, and how it ends undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    project = checkout(folder / "project")  # of one state, however long the tests take
    workload = next(w for w in workloads(folder, long_epochs=60) if w.name == LONG)
    with Server(project) as server:
        end = server.run(folder / "session", 2, workload.config, folder / "run", [])
    assert end.codes == [0, 0], end.text
    workload.summary = json.loads((folder / "run" / "summary.json").read_text())
    workload.steps, workload.curve = workload.summary["steps"], curve(folder / "run")
    return workload


def project_of(workload: Workload) -> Path:
    return workload.config.parent / "project"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[clusters.Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    with clusters.cluster(2, folder) as found:
        yield found


@pytest.fixture
def marker() -> Iterator[str]:
    """Marks processes; none may be left at the end, and none is."""
    value = uuid.uuid4().hex
    yield value
    left = carriers(value)
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    assert left == {}


def steps_made(run: Path) -> int:
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def wait_until(reached: Callable[[], bool], limit_s: float, what: str) -> float:
    """Waits; returns the seconds it took."""
    began_s = time.monotonic()
    while not reached():
        assert time.monotonic() - began_s < limit_s, what
        time.sleep(0.05)
    return time.monotonic() - began_s


def hostfile_run(
    hosts: clusters.Cluster, workload: Workload, tmp_path: Path, marker: str, ssh: bool, *extra: str
) -> dict[str, subprocess.Popen[bytes]]:
    """Starts `deepspeed --hostfile` as launch/hostfile.example says: on the first host, or on each."""
    (tmp_path / "hostfile").write_text(f"{hosts.names[0]} slots=2\n{hosts.names[1]} slots=1\n")
    arguments = ["trainer/main.py", "--ds_config", str(workload.config), "--output_dir", str(tmp_path / "run")]
    arguments += ["--resume", "auto", *extra]
    environment = bare_environment() | {"TEST_MARKER": marker}
    if ssh:
        command = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), *arguments]
        return {
            "": hosts.start(
                hosts.names[0], *command, cwd=project_of(workload), environment=environment, output=tmp_path / "out0"
            )
        }
    started = {}
    for number, name in enumerate(hosts.names):
        command = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", str(number)]
        command += ["--master_addr", hosts.addresses[0], *arguments]
        output = tmp_path / f"out{number}"
        started[name] = hosts.start(name, *command, cwd=project_of(workload), environment=environment, output=output)
    return started


def printed(tmp_path: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(tmp_path.glob("out*")))


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if ("error: " in line and "Rank" in line) or "Traceback" in line]


@needs_hosts
@pytest.mark.parametrize("ssh", [True, False], ids=["pdsh", "no_ssh"])
def test_hostfile(hosts: clusters.Cluster, long_run: Workload, tmp_path: Path, marker: str, ssh: bool) -> None:
    """Three ranks on two hosts: the bits of two ranks on one."""
    started = hostfile_run(hosts, long_run, tmp_path, marker, ssh)
    for process in started.values():
        assert process.wait(timeout=180) == 0, printed(tmp_path)
    assert disagreement(long_run, tmp_path / "run") is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 3
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {host.split()[0] for host in manifest["hosts"]} == set(hosts.names)


@needs_hosts
def test_a_cut_link(hosts: clusters.Cluster, long_run: Workload, tmp_path: Path, marker: str) -> None:
    """Both sides leave within hang_timeout_s and say who is gone; later the run goes on to the same bits."""
    started = hostfile_run(hosts, long_run, tmp_path, marker, ssh=False)
    wait_until(lambda: steps_made(tmp_path / "run") >= 20, 90, "no step was made")
    hosts.network.link(hosts.names[1], "down")
    limit_s = json.loads(long_run.config.read_text())["trainer"]["hang_timeout_s"]
    # The launchers look at their ranks once a second and take a while to end themselves.
    wait_until(lambda: not any(r.isdigit() for r in carriers(marker).values()), limit_s + 2, printed(tmp_path))
    codes = [process.wait(timeout=60) for process in started.values()]
    assert 0 not in codes
    found = errors(printed(tmp_path))
    assert 1 <= len(found) <= 2, found  # one a side: they cannot agree any more
    assert all(" on " in line and ", in step " in line for line in found)
    hosts.network.link(hosts.names[1], "up")
    for process in hostfile_run(hosts, long_run, tmp_path, marker, ssh=False).values():
        assert process.wait(timeout=180) == 0, printed(tmp_path)
    assert disagreement(long_run, tmp_path / "run") is None


@needs_hosts
@pytest.mark.parametrize("to", ["runner", "rank"])
def test_a_signal_over_pdsh(hosts: clusters.Cluster, long_run: Workload, tmp_path: Path, marker: str, to: str) -> None:
    """SIGTERM to the runner or to a rank: a checkpoint, and no process left on either host."""
    stop_alone = ["--set", "trainer.checkpoint.every_steps=0"]  # so that the one checkpoint is that of the stop
    (process,) = hostfile_run(hosts, long_run, tmp_path, marker, True, *stop_alone).values()
    wait_until(lambda: steps_made(tmp_path / "run") >= 20, 90, "no step was made")
    target = process.pid if to == "runner" else rank_on(hosts.names[1], tmp_path / "run")
    os.kill(target, signal.SIGTERM)
    wait_until(lambda: ranks_of(tmp_path / "run") == [], 30, f"ranks are left after a signal to the {to}")
    assert process.wait(timeout=60) != 0
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*")).name
    assert int(newest[5:]) >= 20
    assert not (tmp_path / "run" / "summary.json").exists()
    if to == "rank":  # the runner ends pdsh first, over which the ranks speak
        assert printed(tmp_path).count("stopped after step") == 1, printed(tmp_path)
        assert f"stopped after step {int(newest[5:]):,}" in printed(tmp_path)
    (again,) = hostfile_run(hosts, long_run, tmp_path, marker, ssh=True).values()
    assert again.wait(timeout=180) == 0, printed(tmp_path)
    assert disagreement(long_run, tmp_path / "run") is None


def ranks_of(run: Path) -> list[int]:
    """Processes of ranks that write into a folder, on whichever host."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            # python -u trainer/main.py --local_rank=0 ...: launchers and ssh carry the same further right.
            if words[2:3] == [b"trainer/main.py"] and str(run).encode() in words:
                found.append(int(folder.name))
    return found


def rank_on(host: str, run: Path) -> int:
    """The one rank of a host."""
    inode = os.stat(f"/run/netns/{host}").st_ino
    (found,) = [p for p in ranks_of(run) if os.stat(f"/proc/{p}/ns/net").st_ino == inode]
    return found


@needs_hosts
def test_a_slow_link(hosts: clusters.Cluster, long_run: Workload, tmp_path: Path, marker: str) -> None:
    slow = ["tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "10ms", "3ms"]
    done = subprocess.run(hosts.command(hosts.names[1], *slow), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this kernel has no netem: {done.stderr.strip()}")
    for process in hostfile_run(hosts, long_run, tmp_path, marker, ssh=False).values():
        assert process.wait(timeout=240) == 0, printed(tmp_path)
    assert disagreement(long_run, tmp_path / "run") is None


# ---- without hosts of their own --------------------------------------------------------------------------------


def test_machines_come_and_go(long_run: Workload, tmp_path: Path, marker: str) -> None:
    """launch/elastic.sh twice on this machine: one is killed, then one joins; the same bits."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    run = tmp_path / "run"

    def machine(number: int, ranks: int) -> subprocess.Popen[bytes]:
        environment = bare_environment() | {"TEST_MARKER": marker, "RANKS": str(ranks), "JOIN_S": "3"}
        with (tmp_path / f"out{number}").open("wb") as file:
            return subprocess.Popen(
                ["bash", "launch/elastic.sh", address, "--ds_config", str(long_run.config), "--output_dir", str(run)],
                cwd=project_of(long_run),
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def world_sizes() -> list[int]:
        try:
            history = json.loads((run / "manifest.json").read_text())["history"]
        except (OSError, ValueError):
            return []
        return [session["world_size"] for session in history]

    first = machine(0, 2)
    time.sleep(2.0)
    second = machine(1, 1)
    wait_until(lambda: world_sizes()[-1:] == [3] and steps_made(run) >= 10, 120, printed(tmp_path))
    second.kill()
    wait_until(lambda: world_sizes()[-1:] == [2], 90, printed(tmp_path))
    machine(2, 3)
    wait_until(lambda: world_sizes()[-1:] == [5] or first.poll() is not None, 90, printed(tmp_path))
    assert first.wait(timeout=180) == 0, printed(tmp_path)
    assert world_sizes() == [3, 2, 5]
    assert disagreement(long_run, run) is None
    wait_until(lambda: not carriers(marker), 30, "processes are left")


def test_slurm_script(long_run: Workload, tmp_path: Path, marker: str) -> None:
    """launch/slurm.sbatch with stand-ins for srun and scontrol: stopped by USR1, requeued, goes on to the same bits."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo localhost || echo "$@" >> "$REQUEUED"\n')
    (programs / "srun").write_text(
        f"""#!{sys.executable}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    del command[0]
ranks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}})
    for r in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [r.send_signal(number) for r in ranks])
sys.exit(max(r.wait() for r in ranks))
"""
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    run = tmp_path / "run"

    def job(ranks: int, restart: int) -> subprocess.Popen[bytes]:
        environment = bare_environment() | {"TEST_MARKER": marker, "REQUEUED": str(tmp_path / "requeued")}
        environment |= {"SLURM_NTASKS": str(ranks), "SLURM_NTASKS_PER_NODE": str(ranks), "SLURM_NNODES": "1"}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restart)}
        environment |= {"SLURM_SUBMIT_DIR": str(project_of(long_run)), "PATH": f"{programs}:{environment['PATH']}"}
        with (tmp_path / f"out{restart}").open("wb") as file:
            return subprocess.Popen(
                ["bash", "launch/slurm.sbatch", "--ds_config", str(long_run.config), "--output_dir", str(run)],
                cwd=project_of(long_run),
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    first = job(3, 0)
    wait_until(lambda: steps_made(run) >= 20, 90, "no step was made")
    first.send_signal(signal.SIGUSR1)  # as SLURM signals the batch script; the ranks get it through srun
    assert first.wait(timeout=40) == 75, printed(tmp_path)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert printed(tmp_path).count("stopped after step") == 1
    assert job(2, 1).wait(timeout=120) == 0, printed(tmp_path)
    assert disagreement(long_run, run) is None
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
