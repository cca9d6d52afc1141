"""Starts ranks as processes forked from one that has everything imported, and disturbs them from within.

Each session has a leader, forked first: it is the parent of the ranks, as a launcher is, but unless asked it ends
none of them, so that a rank that doesn't leave by itself is found. One JSON line in is a session, one out its result.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLONE_NEWNET, _CLONE_NEWUTS = 0x40000000, 0x04000000


def enter_host(name: str) -> None:
    """Moves this process into a network namespace, with its name as that of the host. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}", "rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "setns")
    import socket

    socket.sethostname(name)


class Disturbance:
    """One thing that happens to this rank, at most once.

    Keys: "rank" (None for all), "at" ("start", "step" or "write"), "step" (made at the earliest), "moment" (of a
    checkpoint's writing), "delay_s", and "do": "signal" ("signals", "gap_s" between them), "hang", "fill" ("folder",
    "leave_bytes"), "rename" ("from", "to"), "run" ("command"), "fail" ("errno"), "flip" ("seed"), "claim"
    ("folder"), "fork", "notice", "exit".
    """

    def __init__(self, facts: dict[str, Any], folder: Path) -> None:
        self._facts, self._folder, self._done = facts, folder, False
        self._step = 0

    def reached(self, at: str, step: int, moment: str = "") -> None:
        f = self._facts
        if self._done or f["at"] != at or step < f.get("step", 0) or f.get("moment", "") != moment:
            return
        self._done, self._step = True, step
        if at == "step" and f["do"] == "signal":
            # A moment later: in the middle of whatever this rank then does.
            threading.Thread(target=self._act, daemon=True).start()
        else:
            self._act()

    def _note(self) -> None:
        with (self._folder / "faults").open("a") as file:
            file.write(f"{time.monotonic()}\n")

    def _act(self) -> None:
        f = self._facts
        time.sleep(f.get("delay_s", 0.0))
        if f["do"] == "signal":
            for number, signal_number in enumerate(f["signals"]):
                if number:
                    time.sleep(f["gap_s"])
                self._note()
                os.kill(os.getpid(), signal_number)
            return
        self._note()
        if f["do"] == "hang":
            while True:
                time.sleep(1.0)
        elif f["do"] == "fill":
            fill(Path(f["folder"]), f["leave_bytes"])
        elif f["do"] == "rename":
            os.rename(f["from"], f["to"])
        elif f["do"] == "run":
            subprocess.run(f["command"], check=True)
        elif f["do"] == "flip":
            print(f"bits are flipped from step {self._step + 1} on", flush=True)
            flip_bits(random.Random(f["seed"]))
        elif f["do"] == "claim":
            print(f"the second run was {_claimed(f['folder'])}", flush=True)
        elif f["do"] == "fork":
            if os.fork() == 0:
                os.setsid()
                time.sleep(60.0)
                os._exit(0)
        elif f["do"] == "notice":
            _leave_notice()
        elif f["do"] == "exit":
            sys.exit(0)
        elif f["do"] == "fail":
            raise OSError(f["errno"], os.strerror(f["errno"]))
        else:
            raise ValueError(f["do"])


def _claimed(folder: str) -> str:
    import trainer.record.folder as folders
    from trainer.errors import UserError

    folders._LEAVING_S = 0.5
    try:
        folders.OutputFolder.claim(folder, "second", again=True)
    except UserError as error:
        return "refused" if "is in use" in str(error) else str(error)
    return "let in"


def _leave_notice() -> None:
    """What rank 0 of a killed start has left, unless rank 0 of this one was quicker."""
    from trainer.ranks.rendezvous import _notice_path

    with contextlib.suppress(FileExistsError), _notice_path().open("x") as file:
        file.write(f"1 {2**22 + 1} 1")


def fill(folder: Path, leave_bytes: int) -> None:
    """Leaves at most so much room in a file system."""
    place = os.statvfs(folder)
    size = place.f_bavail * place.f_frsize - leave_bytes
    if size > 0:
        with (folder / "filler").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def flip_bits(chance: random.Random) -> None:
    """From now on, one bit of the gradient of every micro-batch of this rank is wrong: a device that fails."""
    import torch

    from trainer.exact.own_block import OwnBlock

    original = OwnBlock._gradients

    def flipped(self: Any, loss: Any) -> Any:
        gradients = original(self, loss)
        chosen = chance.choice([gradient for gradient in gradients if gradient is not None])
        words = chosen.reshape(-1).view(torch.int32)  # the gradient itself, as it is contiguous
        words[chance.randrange(len(words))] ^= (1 << chance.randrange(31)) if chance.random() < 0.9 else -(1 << 31)
        return gradients

    OwnBlock._gradients = flipped  # type: ignore[method-assign]


def _rank(session: dict[str, Any], rank: int) -> None:
    """Runs trainer/main.py's `main` in this process, and ends it."""
    folder = Path(session["folder"])
    code = 1
    try:
        output = os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR2, file=output)  # where it stands, should it be overdue
        os.chdir(folder)
        os.environ.update({"RANK": str(rank), **session["environment"], **session["rank_environment"][rank]})
        if session["hosts"]:
            enter_host(session["hosts"][rank])
        sys.argv = ["trainer/main.py", *session["arguments"]]
        for name in session["without"]:
            sys.modules.pop(name, None)  # a manifest names what is imported, here by the server
        import trainer.main
        import trainer.record.checkpoints
        import trainer.run.resume
        import trainer.run.run

        trainer.main._STARTED_AT_S, trainer.main._BEGAN_S = time.time(), time.monotonic()
        mine = [Disturbance(d, folder) for d in session["disturbances"] if d["rank"] in (None, rank)]
        steps = [0]

        def reached(at: str, moment: str = "") -> None:
            for disturbance in mine:
                disturbance.reached(at, steps[0], moment)

        def made(step: int, engine: Any, losses: Any) -> None:
            steps[0] = step
            reached("step")

        trainer.run.run.run = functools.partial(trainer.run.run.run, trace=made)  # type: ignore[assignment]
        writer: Callable[..., Any] = functools.partial(
            trainer.record.checkpoints.Checkpoints, fault=lambda moment: reached("write", moment)
        )
        trainer.run.resume.Checkpoints = writer  # type: ignore[misc,assignment]
        for disturbance in mine:
            threading.Thread(target=disturbance.reached, args=("start", 0), daemon=True).start()
        code = trainer.main.main(session["arguments"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lead(session: dict[str, Any]) -> dict[str, Any]:
    """Starts the ranks, waits for their ends, and looks whether anything is left."""
    os.setsid()
    # Where a rank's own processes would go if it ended before them.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    ranks: dict[int, int] = {}
    began_s = time.monotonic()
    for rank in range(session["world_size"]):
        process = os.fork()
        if process == 0:
            _rank(session, rank)
        ranks[process] = rank
    alive, stopped = dict(ranks), dict[int, float]()
    codes: dict[int, int] = {}
    ended_s: dict[int, float] = {}
    deadline_s = began_s + session["limit_s"]
    overdue: list[int] = []
    while alive:
        process, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        now_s = time.monotonic()
        if process in alive and os.WIFSTOPPED(status):
            stopped[process] = now_s
        elif process in alive:
            rank = alive.pop(process)
            codes[rank], ended_s[rank] = os.waitstatus_to_exitcode(status), now_s
        elif process == 0:
            time.sleep(0.02)
        for waiting, since_s in list(stopped.items()):
            # A moment later, or when all others have left.
            if now_s - since_s > session["stopped_for_s"] or (set(alive) <= set(stopped) and len(alive) < len(ranks)):
                os.kill(waiting, signal.SIGCONT)
                del stopped[waiting]
        if session["ends_others"] and any(codes.values()):
            session["ends_others"] = False
            for process in alive:
                os.kill(process, signal.SIGTERM)
        if now_s > deadline_s:
            overdue = sorted(alive.values())
            for number in (signal.SIGUSR2, signal.SIGKILL):
                for process in alive:
                    os.kill(process, number)
                time.sleep(1.0)
            deadline_s = float("inf")
    left = _session_members(os.getpid())
    for process in left:
        os.kill(process, signal.SIGKILL)
    return {
        "codes": [codes[r] for r in range(session["world_size"])],
        "ended_s": [ended_s[r] for r in range(session["world_size"])],
        "began_s": began_s,
        "overdue": overdue,
        "left": len(left),
    }


def _session_members(leader: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, number = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, ValueError):
            continue
        if int(number) == leader and int(folder.name) != leader and state != "Z":
            found.append(int(folder.name))
    return found


def main() -> None:
    """Serves sessions until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import importlib

    import trainer.ranks.workers

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in trainer.ranks.workers._PRELOAD:
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        session = json.loads(line)
        result = Path(session["folder"]) / "result.json"
        leader = os.fork()
        if leader == 0:
            try:
                result.write_text(json.dumps(_lead(session)))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.waitpid(leader, 0)
        print(result.read_text() if result.exists() else json.dumps(None), file=answers, flush=True)


if __name__ == "__main__":
    main()
