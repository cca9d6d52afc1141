"""Ranks as processes of this program: results, errors of every kind, and no rank that stays behind."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import LostRankError, NonFiniteError, TrainerError, UserError
from trainer.ranks import group, server, workers
from trainer.ranks.place import Ranks
from trainer.ranks.workers import WorkerError, jobs_from, run_ranks, worker_context


def own_place(ranks: Ranks, *arguments: Any) -> tuple[Any, ...]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    return ranks, arguments, [os.environ.get(name) for name in names], os.environ.get("MINE"), os.getpid()


def prints_to_nowhere(ranks: Ranks) -> bool:
    return isinstance(sys.stdout, io.StringIO)


def fail(ranks: Ranks, how: dict[int, Any], pids: Path | None = None) -> str:
    """Ends rank by rank as `how` says: an exception, an exit code, or seconds to sleep."""
    if pids is not None:
        (pids / str(os.getpid())).touch()
    end = how.get(ranks.rank)
    if isinstance(end, BaseException):
        raise end
    if isinstance(end, int):
        os._exit(end)
    if isinstance(end, float):
        time.sleep(end)
    return "finished"


def with_speaker(error: TrainerError, speaks: bool | None) -> TrainerError:
    error.speaks = speaks
    return error


def fail_speaking(ranks: Ranks, how: dict[int, tuple[str, bool | None]]) -> None:
    message, speaks = how[ranks.rank]
    raise with_speaker(LostRankError(message), speaks)


def wait_for_jobs(pipe: Any) -> None:
    jobs = jobs_from(pipe)
    pipe.send(jobs.get())
    time.sleep(60)  # busy with something else when the other end goes away


def test_results_come_by_rank_from_processes_of_their_own() -> None:
    found = run_ranks(own_place, 3, "x", {"y": 1}, environment={"MINE": "3"})
    for rank, (ranks, arguments, variables, mine, pid) in enumerate(found):
        assert ranks == Ranks(rank, 3, rank, 3)
        assert arguments == ("x", {"y": 1})
        assert variables == [str(rank), str(rank), "3", "3"]  # as under a launcher
        assert mine == "3"
        assert pid != os.getpid()
    assert len({result[-1] for result in found}) == 3
    assert "MINE" not in os.environ


@pytest.mark.parametrize("quiet", [True, False])
def test_what_ranks_print_is_dropped_if_asked_for(quiet: bool) -> None:
    assert run_ranks(prints_to_nowhere, 1, quiet=quiet) == [quiet]


@pytest.mark.parametrize("kind", [UserError, NonFiniteError, LostRankError, TrainerError])
def test_a_ranks_error_keeps_its_kind_and_its_words(kind: type[TrainerError]) -> None:
    with pytest.raises(kind) as caught:
        run_ranks(fail, 1, {0: kind("micro-batch 7")})
    assert type(caught.value) is kind and str(caught.value) == "micro-batch 7"


def test_a_slip_comes_with_its_traceback() -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 0 failed:\nTraceback.*in fail\n.*ZeroDivisionError: a slip"):
        run_ranks(fail, 1, {0: ZeroDivisionError("a slip")})


def test_a_rank_that_dies_is_named_and_the_others_do_not_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(group, "_GRACE_S", 0.5)
    with pytest.raises(WorkerError, match="rank 1 died without a message"):
        run_ranks(fail, 3, {1: 9, 2: 300.0}, tmp_path)
    for process in tmp_path.iterdir():
        assert not Path(f"/proc/{process.name}").exists()


def test_ranks_that_take_too_long_are_named_and_ended(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"ranks \[1, 2\] did not end within 3 s"):
        run_ranks(fail, 3, {1: 300.0, 2: 300.0}, tmp_path, timeout_s=3.0)
    for process in tmp_path.iterdir():
        assert not Path(f"/proc/{process.name}").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({0: ("zero", False), 1: ("one", True), 2: ("two", None)}, "one"),
        ({0: ("zero", False), 1: ("one", None), 2: ("two", None)}, "one"),
        ({0: ("zero", None), 1: ("one", None), 2: ("two", False)}, "zero"),
        ({0: ("zero", False), 1: ("one", False), 2: ("two", False)}, "zero"),
    ],
)
def test_of_several_errors_the_one_that_a_person_would_see(
    how: dict[int, tuple[str, bool | None]], message: str
) -> None:
    """That of the rank that speaks for all, else of the lowest that did not leave because of another."""
    with pytest.raises(LostRankError, match=f"^{message}$"):
        run_ranks(fail_speaking, 3, how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({0: 9, 1: ZeroDivisionError("a slip")}, "rank 1 failed:\nTraceback.*a slip"),
        ({0: 9, 1: UserError("a typo")}, "^a typo$"),
        ({0: 9, 1: with_speaker(LostRankError("rank 0 on node0 is gone"), False)}, "^rank 0 on node0 is gone$"),
        ({0: ConnectionError("closed by peer"), 1: UserError("a typo")}, "^a typo$"),
        ({0: ConnectionError("closed by peer"), 1: with_speaker(TrainerError("rank 0 has failed"), False)}, "by peer"),
        ({0: ZeroDivisionError("a slip"), 1: 9, 2: ConnectionError("closed by peer")}, "a slip"),
    ],
)
def test_of_several_ends_the_one_that_says_most(how: dict[int, Any], message: str) -> None:
    """A rank that dies says nothing, and a traceback may be of the connection that another rank has broken."""
    with pytest.raises((WorkerError, TrainerError), match=f"(?s){message}"):
        run_ranks(fail, len(how), how)


def test_a_worker_ends_with_its_other_end() -> None:
    """No process stays behind a parent that was killed, whatever it does at the time."""
    context = worker_context(cuda=False)
    ours, theirs = context.Pipe()
    process = context.Process(target=wait_for_jobs, args=(theirs,), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    ours.send("a job")
    assert ours.recv() == "a job"
    ours.close()
    process.join(20)
    assert process.exitcode == 0


def test_a_gpu_needs_fresh_processes() -> None:
    """CUDA does not survive a fork."""
    assert worker_context(cuda=True).get_start_method() == "spawn"
    assert worker_context(cuda=False).get_start_method() == "forkserver"


def test_modules_that_are_imported_ahead_exist() -> None:
    """A name that nothing has is passed over in silence, and each rank would import the module itself."""
    for name in {server.__name__, *workers._PRELOAD} - {"peft", "pytorch_optimizer"}:  # optional
        package, *inner = name.split(".")
        found = importlib.util.find_spec(package)  # of the package alone: more would import it
        assert found is not None and found.submodule_search_locations, name
        module = Path(found.submodule_search_locations[0]).joinpath(*inner)
        assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), name


PARENT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.ranks.test_workers import fail
from trainer.ranks import workers
workers._PRELOAD = []
if __name__ == "__main__":
    workers.run_ranks(fail, 2, {{0: 60.0, 1: 60.0}}, Path({pids!r}))
"""


ENVIRONMENTS = """
import os, sys
sys.path.insert(0, {root!r})
from trainer.ranks import workers
workers._PRELOAD = []
def variables(ranks=None):
    return [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")]
if __name__ == "__main__":
    print(workers.run_ranks(variables, 1), variables())
"""


UNGUARDED = """
import sys
sys.path.insert(0, {root!r})
from trainer.ranks import workers
from trainer.ranks.place import Ranks
workers._PRELOAD = ["trainer.ranks.place"]
print([found["RANK"] for found in workers.run_ranks(Ranks.variables, 2)])
"""


def test_ranks_need_nothing_of_the_program_that_starts_them(tmp_path: Path) -> None:
    """Not its guard: without one it would start ranks again in each rank. They find the same trainer as it does."""
    (tmp_path / "script.py").write_text(UNGUARDED.format(root=str(Path(__file__).resolve().parents[2])))
    if sys.version_info >= (3, 11):
        (tmp_path / "trainer").mkdir()
        (tmp_path / "trainer" / "__init__.py").write_text("raise AssertionError('another trainer')")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("['0', '1']\n", "")


@pytest.mark.parametrize("values", [{}, {"CUDA_VISIBLE_DEVICES": "0,1", "DS_ACCELERATOR": "cuda"}])
def test_ranks_on_the_cpu_see_no_gpu_and_the_process_that_starts_them_does(
    tmp_path: Path, values: dict[str, str]
) -> None:
    """It may start ranks on GPUs later."""
    (tmp_path / "parent.py").write_text(ENVIRONMENTS.format(root=str(Path(__file__).resolve().parents[2])))
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    command = [sys.executable, str(tmp_path / "parent.py")]
    done = subprocess.run(command, env=kept | values, capture_output=True, text=True, check=True)
    assert done.stdout == f"[['', 'cpu']] {list(values.values()) or [None, None]}\n"


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    """Even if it can do nothing itself: a `verify` that is killed leaves no rank, and no fork server."""
    root, pids = str(Path(__file__).resolve().parents[2]), tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "parent.py").write_text(PARENT.format(root=root, pids=str(pids)))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=os.environ | {"DS_ACCELERATOR": "cpu"})
    deadline_s = time.monotonic() + 120
    while len(list(pids.iterdir())) < 2:
        assert time.monotonic() < deadline_s and parent.poll() is None
        time.sleep(0.05)
    ranks = [int(path.name) for path in pids.iterdir()]
    server = int(Path(f"/proc/{ranks[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
    parent.send_signal(number)
    parent.wait(30)
    deadline_s = time.monotonic() + 20
    while any(is_there(process) for process in [*ranks, server]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
