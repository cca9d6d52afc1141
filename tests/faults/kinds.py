"""The kinds of faults: what is done, and how the session has to end."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.harness import AUDIT_EVERY_STEPS, HANG_TIMEOUT_S, Session

KILL, TERM, INT, USR1, STOP, HUP, XCPU = (
    int(n)
    for n in (
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGUSR1,
        signal.SIGSTOP,
        signal.SIGHUP,
        signal.SIGXCPU,
    )
)
STOPPED, LOST, DIFFER, NOT_FINITE = 75, 5, 4, 3
# How long a session may take to end.
STOP_LIMIT_S = 30.0
LOST_LIMIT_S = float(HANG_TIMEOUT_S)


@dataclass
class Plan:
    """One fault: what happens, and what is promised.

    Attributes:
        disturbances: for `server.Disturbance`.
        promise: takes the session's end, returns what of the promise was broken, or None.
        after: done to the run's folder when the session has ended; False if it could not be done.
        stopped_for_s: when a stopped rank is continued.
        ends_others: whether the others are ended, as launchers do.
        launcher: (role, signal) where the session runs under `deepspeed`.
        small_disk, hosts: whether the session needs them.
        says: what the next session has to say.
        refused: (flags, words): a start with these flags, when the session has ended, is refused with these words.
        remains: files in the run's folder that are still there at its end.
    """

    disturbances: list[dict[str, Any]]
    promise: Callable[[Session], str | None]
    after: Callable[[Path], Any] | None = None
    stopped_for_s: float = 1e9
    ends_others: bool = False
    launcher: tuple[str, int] | None = None
    small_disk: bool = False
    hosts: bool = False
    says: str | None = None
    refused: tuple[list[str], str] | None = None
    remains: tuple[str, ...] = ()


def _messages(text: str) -> list[str]:
    found = re.findall(r"^(?:error: .*|stopped after step .*|Traceback .*|terminate called.*|Fatal .*)$", text, re.M)
    return [str(line) for line in found]


def ends_itself(limit_s: float, codes: Callable[[list[int]], bool], *words: str) -> Callable[[Session], str | None]:
    """The promise: in time, with such exit codes, one message with such words in it, and nothing left."""

    def check(end: Session) -> str | None:
        messages = _messages(end.text)
        if not end.disturbed:
            return "the fault did not happen"
        if end.overdue:
            return f"ranks {end.overdue} did not end:\n{end.text}"
        if end.left:
            return f"{end.left} processes left"
        if end.seconds > limit_s:
            return f"took {end.seconds:.1f} s of {limit_s:g}"
        if not codes(end.codes):
            return f"exit codes {end.codes}"
        if words and len(messages) != 1:
            return f"{len(messages)} messages: {messages}"
        if not all(word in messages[0] for word in words):
            return f"the message is {messages[0]!r}"
        return None

    return check


def stopped(reason: str) -> Callable[[Session], str | None]:
    return ends_itself(STOP_LIMIT_S, lambda codes: set(codes) == {STOPPED}, "stopped after step", reason)


def lost(victims: list[int], codes_of_victims: set[int], limit_s: float = LOST_LIMIT_S) -> Any:
    """The others leave with one message that names a victim, its host and the step."""

    def right(codes: list[int]) -> bool:
        return all(code in codes_of_victims if r in victims else code == LOST for r, code in enumerate(codes))

    # Which of several victims is named first depends on who is noticed first.
    return ends_itself(limit_s, right, "in step", *([f"{victims[0]} on {socket.gethostname()}"] if victims else []))


def signalled(rank: int | None, step: int, chance: random.Random, *signals: int, gap_s: float = 0.0) -> dict[str, Any]:
    return {
        "rank": rank, "at": "step", "step": step, "do": "signal", "signals": signals, "gap_s": gap_s,
        "delay_s": 0.0 if rank is None else chance.choice([0.0, chance.uniform(0.0, 0.06)]),
    }  # fmt: skip


def kill(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    victim = chance.randrange(W)
    promise = lost([victim], {-KILL})
    if W == 1:
        promise = ends_itself(5.0, lambda codes: codes == [-KILL])
    return Plan([signalled(victim, step, chance, KILL)], promise)


def kill_rank_0(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    promise = lost([0], {-KILL}) if W > 1 else ends_itself(5.0, lambda codes: codes == [-KILL])
    return Plan([signalled(0, step, chance, KILL)], promise)


def kill_all(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """As when the power fails."""
    return Plan([signalled(None, step, chance, KILL)], ends_itself(5.0, lambda codes: set(codes) <= {-KILL, LOST}))


def kill_while_starting(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    victim = chance.randrange(W)
    act = {
        "rank": victim,
        "at": "start",
        "do": "signal",
        "signals": [KILL],
        "delay_s": chance.uniform(0.0, 0.5),
    }  # a short run takes a second

    def codes(found: list[int]) -> bool:
        return found[victim] == -KILL and all(code not in (0, STOPPED) for code in found)

    # Before the first step it is the launcher that ends the others.
    return Plan([act], ends_itself(LOST_LIMIT_S, codes), ends_others=True)


MOMENTS = ("before model", "before optimizer", "before best", "before manifest", "before rename")


def kill_while_writing(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    moment = chance.choice([*MOMENTS, "before deleting"])
    if moment == "before deleting":
        step = 9  # there are too many checkpoints only then
    act = {"rank": 0, "at": "write", "moment": moment, "step": step, "do": "signal", "signals": [KILL]}
    return Plan([act], lost([0], {-KILL}) if W > 1 else ends_itself(5.0, lambda codes: codes == [-KILL]))


def ask(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    number = chance.choice([TERM, INT, USR1])
    return Plan([signalled(chance.randrange(W), step, chance, number)], stopped(signal.Signals(number).name))


def hang_up(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """The terminal is gone, or the limit of processor time is near."""
    number = chance.choice([HUP, XCPU])
    return Plan([signalled(chance.randrange(W), step, chance, number)], stopped(signal.Signals(number).name))


def ask_all(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    number = chance.choice([TERM, INT, USR1])
    return Plan([signalled(None, step, chance, number)], stopped(signal.Signals(number).name))


def ask_twice(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """All get a signal, one hangs, all get another one."""
    number, stuck = chance.choice([TERM, INT, USR1]), chance.randrange(W)
    acts = [signalled(None, step, chance, number, number, gap_s=2.5)]
    acts.append({"rank": stuck, "at": "step", "step": step, "do": "hang"})
    return Plan(acts, ends_itself(3.0, lambda codes: set(codes) == {128 + number}))


def stop_and_continue(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """Stopped for a moment, a rank is waited for."""
    victim = chance.randrange(W)

    def promise(end: Session) -> str | None:
        return ends_itself(60.0, lambda codes: set(codes) == {0})(end) or (_messages(end.text) or [None])[0]

    return Plan([signalled(victim, step, chance, STOP)], promise, stopped_for_s=chance.uniform(0.5, 2.5))


def stop(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """Stopped for good: the others leave; continued when they have, so does it."""
    victim = chance.randrange(W)
    others = lost([victim], {LOST})

    def promise(end: Session) -> str | None:
        # The victim's own time begins when the others have left.
        seconds = max(s for rank, s in enumerate(end.rank_seconds) if rank != victim)
        late = end.seconds - seconds > LOST_LIMIT_S
        return "it stayed when the others had left" if late else others(dataclasses.replace(end, seconds=seconds))

    return Plan([signalled(victim, step, chance, STOP)], promise)


def suspend(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """All ranks are stopped for longer than hang_timeout_s, as SLURM suspends a job, and continued."""
    held = stop_and_continue(W, step, chance, run)
    return Plan([signalled(None, step, chance, STOP)], held.promise, stopped_for_s=HANG_TIMEOUT_S + 2.0)


def second_run(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """Another start asks for the folder of a run that goes on."""
    held = stop_and_continue(W, step, chance, run)
    act = {"rank": 0, "at": "step", "step": step, "do": "claim", "folder": str(run)}

    def promise(end: Session) -> str | None:
        return held.promise(end) or (None if "the second run was refused" in end.text else "the second run was let in")

    return Plan([act], promise)


def stale_notice(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """A killed start has left the port at which its ranks were to meet."""
    held = stop_and_continue(W, step, chance, run)
    return Plan([{"rank": W - 1, "at": "start", "do": "notice"}], held.promise)


def leaves_a_child(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """The task has forked a process, which outlives a run that is killed."""
    killed = kill_all(W, step + 1, chance, run)
    act = {"rank": 0, "at": "step", "step": step, "do": "fork"}
    return Plan([act, *killed.disturbances], killed.promise)


def exits(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """The task calls sys.exit(0) on a rank, or on all."""
    act = {"rank": chance.choice([None, chance.randrange(W)]), "at": "step", "step": step, "do": "exit"}
    promise = ends_itself(STOP_LIMIT_S, lambda codes: set(codes) == {1}, "The task ended the process")
    return Plan([act], promise)


def changed(flags: list[str], words: str) -> Callable[[int, int, random.Random, Path], Plan]:
    """Killed at once, and then started again as another run."""

    def plan(W: int, step: int, chance: random.Random, run: Path) -> Plan:
        whole = kill_all(W, max(step, 8), chance, run)
        return Plan(whole.disturbances, whole.promise, refused=(flags, words))

    return plan


FOREIGN = ("notes.txt", "logs/mine.log", "checkpoints/step-best", "checkpoints/step-000000004 (copy)")


def foreign_files(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """Killed at once, and then the user puts files and copies of checkpoints beside the run's own."""
    whole = kill_all(W, max(step, 8), chance, run)

    def put(run: Path) -> bool:
        if not (run / "logs").is_dir() or not list((run / "checkpoints").glob("step-*")):
            return False
        for name in FOREIGN:
            if name.startswith("checkpoints/"):
                shutil.copytree(_newest(run), run / name, dirs_exist_ok=True)
            else:
                (run / name).write_text("the user's")
        return True

    return Plan(whole.disturbances, whole.promise, put, remains=FOREIGN)


def hang(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """The main thread of a rank stands still."""
    victim = chance.randrange(W)
    return Plan([{"rank": victim, "at": "step", "step": step, "do": "hang"}], lost([victim], {LOST}))


def full_disk(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    leave = chance.choice([0, chance.randrange(4096, 200_000)])
    act = {"rank": 0, "at": "step", "step": step, "do": "fill", "folder": str(run.parent), "leave_bytes": leave}
    if os.geteuid() != 0:  # no file system of our own: the error alone
        act = {"rank": 0, "at": "write", "moment": chance.choice(MOMENTS), "step": step, "do": "fail", "errno": 28}
    promise = ends_itself(STOP_LIMIT_S, lambda codes: set(codes) == {1}, "cannot be written", "No space left")
    return Plan([act], promise, lambda run: (run.parent / "filler").unlink(missing_ok=True), small_disk=True)


def folder_gone(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    away = run.with_name("away")
    act = {"rank": 0, "at": "step", "step": step, "do": "rename", "from": str(run), "to": str(away)}

    def back(run: Path) -> None:
        shutil.rmtree(run, ignore_errors=True)
        away.rename(run)

    promise = ends_itself(STOP_LIMIT_S, lambda codes: set(codes) == {1}, "cannot be written", "No such file")
    return Plan([act], promise, back)


def flipped_bits(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """A rank computes wrongly: from a step on, one bit in the gradient of each of its micro-batches."""
    victim = chance.randrange(W)
    act = {"rank": victim, "at": "step", "step": step, "do": "flip", "seed": chance.randrange(1 << 30)}
    leaves = ends_itself(STOP_LIMIT_S, lambda codes: set(codes) == {DIFFER}, "The audit of step", f"rank {victim} on")

    # A bit of an exponent may leave no number at all, which is found before the next audit.
    not_finite = ends_itself(STOP_LIMIT_S, lambda codes: set(codes) == {NOT_FINITE}, "is not finite")

    def promise(end: Session) -> str | None:
        if set(end.codes) == {NOT_FINITE}:
            return not_finite(end)
        broken = leaves(end)
        if broken is not None:
            return broken
        since = int(re.findall(r"bits are flipped from step (\d+) on", end.text)[0])
        found = int(re.findall(r"The audit of step (\d+) found", end.text)[0])
        return None if since <= found < since + AUDIT_EVERY_STEPS else f"flipped from {since} on, found in {found}"

    return Plan([act], promise)


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*[0-9]"))


def _damage(name: str, chance: random.Random) -> Callable[[Path], bool]:
    def act(run: Path) -> bool:
        if len(list((run / "checkpoints").glob("step-*[0-9]"))) < 2:
            return False  # killed before the second was written: with its only one damaged a run cannot go on
        file = chance.choice(sorted(_newest(run).iterdir()))
        data = bytearray(file.read_bytes())
        if name == "truncated":
            file.write_bytes(data[: chance.randrange(len(data))])
        elif name == "flipped":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
        else:
            file.unlink()
        return True

    return act


def damaged(name: str) -> Callable[[int, int, random.Random, Path], Plan]:
    """Killed at once, and then the newest checkpoint is damaged."""

    def plan(W: int, step: int, chance: random.Random, run: Path) -> Plan:
        whole = kill_all(W, max(step, 8), chance, run)
        return Plan(whole.disturbances, whole.promise, _damage(name, chance), says="is damaged")

    return plan


def cut_link(W: int, step: int, chance: random.Random, run: Path) -> Plan:
    """Two hosts in network namespaces; the second one's link goes down."""
    act = {"rank": W - 1, "at": "step", "step": step, "do": "run"}
    act["command"] = ["ip", "link", "set", "eth0", "down"]

    def promise(end: Session) -> str | None:
        # Each side sees the other one gone, and says so once.
        one = Session(end.codes, end.seconds, "", end.overdue, end.left, end.disturbed)
        broken = ends_itself(LOST_LIMIT_S, lambda codes: set(codes) == {LOST})(one)
        messages = _messages(end.text)
        if broken is None and not (1 <= len(messages) <= 2 and all("node1 " in m or "node2 " in m for m in messages)):
            return f"{len(messages)} messages: {messages}"
        return broken

    return Plan([act], promise, hosts=True)


def launcher(role: str, *signals: int) -> Callable[[int, int, random.Random, Path], Plan]:
    """Through `deepspeed`: a signal to the runner, to the launcher of the ranks, or to a rank."""

    def plan(W: int, step: int, chance: random.Random, run: Path) -> Plan:
        number = chance.choice(signals)
        to = str(chance.randrange(W)) if role == "rank" else role
        if number == KILL and role == "rank":
            promise = ends_itself(LOST_LIMIT_S + 30.0, lambda codes: codes != [0], *([f"{to} on "] if W > 1 else []))
        else:
            # The launchers' own exit codes are DeepSpeed's, and can be 0; the rank's comes through where it ends first.
            promise = ends_itself(STOP_LIMIT_S, lambda codes: codes == [STOPPED] or role != "rank", "stopped after")
        return Plan([], promise, launcher=(to, number))

    return plan


STARTING = "SIGKILL of a rank that starts"
STALE = "stale rendezvous"
# Kind -> (its plan, how often it is drawn).
KINDS: dict[str, tuple[Callable[[int, int, random.Random, Path], Plan], int]] = {
    "SIGKILL of a rank": (kill, 14),
    "SIGKILL of rank 0": (kill_rank_0, 6),
    "SIGKILL of all ranks at once": (kill_all, 6),
    STARTING: (kill_while_starting, 8),
    "SIGKILL inside a checkpoint write": (kill_while_writing, 12),
    "SIGTERM, SIGINT, SIGUSR1 to a rank": (ask, 10),
    "SIGHUP, SIGXCPU to a rank": (hang_up, 4),
    "the same to all ranks": (ask_all, 5),
    "a second signal": (ask_twice, 4),
    "SIGSTOP of a rank": (stop, 5),
    "SIGSTOP for a moment": (stop_and_continue, 4),
    "all ranks suspended": (suspend, 2),
    "a rank that hangs": (hang, 5),
    "cut link": (cut_link, 4),
    "sys.exit in a task": (exits, 4),
    "two runs in one folder": (second_run, 3),
    "a child that outlives the run": (leaves_a_child, 3),
    STALE: (stale_notice, 3),
    "foreign files and checkpoints": (foreign_files, 4),
    "fewer steps": (
        changed(["--max_steps", "2"], "steps already, but trainer.epochs and trainer.max_steps now give only 2"),
        3,
    ),
    "another seed": (changed(["--seed", "9"], "trainer.seed: 0 before, 9 now"), 2),
    "bits flipped in the gradients of a rank": (flipped_bits, 6),
    "disk full": (full_disk, 6),
    "output folder gone": (folder_gone, 3),
    "truncated checkpoint": (damaged("truncated"), 4),
    "bit-flipped checkpoint": (damaged("flipped"), 5),
    "missing checkpoint file": (damaged("missing"), 3),
    "deepspeed: signal to the runner": (launcher("runner", TERM, INT, USR1), 3),
    "deepspeed: signal to the launcher": (launcher("launch", TERM, INT, USR1), 3),
    "deepspeed: signal to a rank": (launcher("rank", TERM, INT, USR1), 3),
    "deepspeed: SIGKILL of the launcher": (launcher("launch", KILL), 2),
    "deepspeed: SIGKILL of a rank": (launcher("rank", KILL), 3),
}
# Kinds that need a second rank, and kinds after which a run goes on to its end.
TOGETHER = ("SIGSTOP of a rank", "a rank that hangs", "cut link", STALE)
ENDS = ("SIGSTOP for a moment", "all ranks suspended", "two runs in one folder", STALE)
