#!/usr/bin/env python
"""Disturbs runs in every way that has to leave no trace, and compares their ends with undisturbed ones.

    python tests/faults/run.py --faults 100 --seed 0

Each run is disturbed one to three times, every time at another number of ranks (1 to 8), and then goes to its end.
A fault is survived if its session ended in time, as promised, with one message and no process left. It is identical
if its run ended with the parameters, metrics and loss curve of the run that nobody disturbed. As root, full disks
and cut links are real (tmpfs, network namespaces). Exit code 1 if a fault is not survived or not identical.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.faults.harness import (
    MAX_WORLD_SIZE,
    Server,
    Workload,
    checkout,
    curve,
    disagreement,
    launched,
    small_disk,
    workloads,
)
from tests.faults.kinds import ENDS, KINDS, STARTING, TOGETHER
from tests.machines.hosts import hosts, why_not


@dataclasses.dataclass
class Fault:
    """One fault and what came of it. `broken`: of its session's promise; `differs`: of its run's end."""

    kind: str
    workload: str
    world_size: int
    step: int
    seconds: float = 0.0
    broken: str | None = None
    differs: str | None = None


def deal(kinds: list[str], count: int, chance: random.Random) -> list[list[str]]:
    """Kinds for each run: every kind as often as its weight says, in an order of chance, one to three a run."""
    weights = {kind: KINDS[kind][1] for kind in kinds}
    total = sum(weights.values())
    drawn = [kind for kind in kinds for _ in range(max(1, round(count * weights[kind] / total)))]
    while len(drawn) < count:
        drawn.append(chance.choice(kinds))
    chance.shuffle(drawn)
    drawn = drawn[:count] if len(kinds) == 1 else drawn
    lives: list[list[str]] = []
    while drawn:
        size = chance.choice([1, 2, 3])
        # A run that is only held up comes to its end: nothing can be done to it afterwards.
        at_the_end = [i for i, kind in enumerate(drawn[:size]) if kind in ENDS]
        if at_the_end:
            size = at_the_end[0] + 1
        lives.append(drawn[:size])
        drawn = drawn[size:]
    return lives


def live(number: int, kinds: list[str], seed: int, workload: Workload, server: Server, place: Path) -> list[Fault]:
    """One run: disturbed as many times as there are kinds, then left alone until its end."""
    chance = random.Random(f"{seed} {number}")
    folder = place / f"life{number:03d}"
    run = folder / "disk" / "run"
    faults: list[Fault] = []
    remains: tuple[str, ...] = ()
    says: str | None = None
    step = 3
    with contextlib.ExitStack() as stack:
        mounted = "disk full" in kinds and stack.enter_context(small_disk(folder / "disk", 24 << 20))
        if not mounted:
            (folder / "disk").mkdir(parents=True, exist_ok=True)
        for session, kind in enumerate(kinds):
            W = chance.randint(1, MAX_WORLD_SIZE)
            if kind in TOGETHER:
                W = max(W, 2)
            # Room for the faults to come.
            last = min(workload.steps, 30) - 4 - 4 * (len(kinds) - session - 1)
            step = chance.randint(step + 1, max(step + 1, last))
            plan = KINDS[kind][0](W, step, chance, run)
            at = folder / f"session{session}"
            if plan.launcher is not None:
                role, signal_number = plan.launcher
                end = launched(server.project, at, W, workload.config, run, (role, signal_number, step))
            else:
                with hosts(2) if plan.hosts else contextlib.nullcontext() as network:
                    extra: dict[str, Any] = {}
                    if network is not None:
                        extra["hosts"] = [network.names[r * 2 // W] for r in range(W)]
                        extra["environment"] = {"MASTER_ADDR": network.addresses[0]}
                    extra |= {"stopped_for_s": plan.stopped_for_s, "ends_others": plan.ends_others}
                    end = server.run(at, W, workload.config, run, plan.disturbances, **extra)
            fault = Fault(kind, workload.name, W, step, end.seconds, plan.promise(end))
            if plan.refused is not None and fault.broken is None:
                fault.broken = _refusal(plan.refused, folder / f"refused{session}", W, workload, server, run)
            silent = says is not None and says not in end.text
            # Ranks that are killed while they start may not come to say it: then the next session has to.
            waits = silent and kind == STARTING
            if silent and not waits and fault.broken is None:
                fault.broken = f"nothing was said of {says!r}"
            says = plan.says or (says if waits else None)
            if plan.after is not None and plan.after(run) is False:
                says = None
            else:
                remains += plan.remains
            faults.append(fault)
        W = chance.randint(1, MAX_WORLD_SIZE)
        end = server.run(folder / "last", W, workload.config, run, [])
        differs = disagreement(workload, run)
        gone = [name for name in remains if not (run / name).exists()]
        if gone:
            differs = f"the user's {', '.join(gone)} was removed"
        if set(end.codes) != {0}:
            differs = f"the last session ended with {end.codes}: {end.text[-600:]}"
        if says is not None and says not in end.text and faults[-1].broken is None:
            faults[-1].broken = f"nothing was said of {says!r}"
        for fault in faults:
            fault.differs = differs
    if not any(f.broken or f.differs for f in faults):
        shutil.rmtree(folder)
    return faults


def _refusal(
    refused: tuple[list[str], str], at: Path, W: int, workload: Workload, server: Server, run: Path
) -> str | None:
    """What is wrong with the answer to a start that must be refused; None if nothing is."""
    if not list((run / "checkpoints").glob("step-*[0-9]")):
        return None  # killed before its first checkpoint: there is nothing to compare with
    flags, words = refused
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    end = server.run(at, W, workload.config, run, [], flags=flags)
    if set(end.codes) != {2} or words not in end.text:
        return f"a start with {' '.join(flags)} ended with {end.codes}: {end.text[-300:]}"
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return None if after == before else "a refused start has changed the run's files"


def reference(workload: Workload, server: Server, place: Path, world_sizes: tuple[int, ...] = (1, 3)) -> None:
    """Runs a workload undisturbed; at several world sizes, which have to agree."""
    for W in world_sizes:
        run = place / f"{workload.name}{W}" / "run"
        end = server.run(place / f"{workload.name}{W}" / "session", W, workload.config, run, [])
        if set(end.codes) != {0}:
            raise SystemExit(f"The undisturbed run of {workload.name} failed:\n{end.text}")
        if not workload.summary:
            workload.summary = json.loads((run / "summary.json").read_text())
            workload.steps, workload.curve = workload.summary["steps"], curve(run)
        elif differs := disagreement(workload, run):
            raise SystemExit(f"The undisturbed run of {workload.name} differs at {W} ranks: {differs}")


def suite(lives: list[list[str]], numbers: list[int], seed: int, jobs: int, place: Path) -> Iterator[list[Fault]]:
    """Lives the runs of these numbers one after the other, `jobs` of them at a time, as they end."""
    project = checkout(place / "project")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(project)) for _ in range(jobs)]
        choices = workloads(place)
        for workload in choices:
            reference(workload, servers[0], place / "undisturbed")
        free, lock = list(servers), threading.Lock()

        def one(number: int) -> list[Fault]:
            with lock:
                server = free.pop()
            try:
                workload = choices[number % 2]
                if any(kind.startswith("deepspeed") for kind in lives[number]):
                    workload = choices[2]
                return live(number, lives[number], seed, workload, server, place)
            finally:
                with lock:
                    free.append(server)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(one, numbers)


def table(faults: list[Fault]) -> str:
    """One row a kind: faults, survived, identical, median seconds from the fault to the last rank's end."""
    rows = ["| fault | injected | survived | identical | median s to the end |", "|---|---|---|---|---|"]
    by_kind: dict[str, list[Fault]] = collections.defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
        by_kind["all"].append(fault)
    for kind in [*(k for k in KINDS if k in by_kind), "all"]:
        group = by_kind[kind]
        good = [sum(f.broken is None for f in group), sum(f.differs is None for f in group)]
        seconds = statistics.median(f.seconds for f in group)
        rows.append(f"| {kind} | {len(group)} | {good[0]} | {good[1]} | {seconds:.1f} |")
    return "\n".join(rows)


def main() -> int:
    """Parses, runs, prints the table."""
    parser = argparse.ArgumentParser(description="Injects faults into runs and compares their ends.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND", help="a part of a kind's name: SIGSTOP, deepspeed, disk, ...")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--again",
        metavar="N",
        type=int,
        nargs="+",
        help="make only the runs that hold these faults, by their printed numbers",
    )
    parser.add_argument("--keep", metavar="FOLDER", help="where to work; what failed stays there")
    flags = parser.parse_args()
    # A shell starts what runs in its background with SIGINT ignored, and so would be all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and a run that is started so ignores it, too
    kinds = [kind for kind in KINDS if flags.only is None or flags.only in kind]
    reason = why_not()
    if reason is not None and "cut link" in kinds:
        print(f"no cut links: {reason}")
        kinds.remove("cut link")
    if not kinds:
        parser.error(f"no kind has {flags.only!r} in its name: {', '.join(KINDS)}")
    lives = deal(kinds, flags.faults, random.Random(flags.seed))
    first = list(itertools.accumulate((len(life) for life in lives), initial=1))  # the number of each run's first fault
    numbers = [
        i for i, life in enumerate(lives)
        if flags.again is None or any(first[i] <= n < first[i] + len(life) for n in flags.again)
    ]  # fmt: skip
    began_s, done = time.monotonic(), []
    with contextlib.ExitStack() as stack:
        if flags.keep is not None:
            place = Path(flags.keep).resolve()
            place.mkdir(parents=True)
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        for number, faults in zip(numbers, suite(lives, numbers, flags.seed, flags.jobs, place)):
            for at, fault in enumerate(faults, first[number]):
                done.append(fault)
                verdict = "ok" if fault.broken is None and fault.differs is None else "FAILED"
                where = f"{fault.workload}, {fault.world_size} ranks, after step {fault.step}"
                print(f"{at:4d} {verdict:6s} {fault.seconds:5.1f} s  {fault.kind} ({where})", flush=True)
                for what in (fault.broken, fault.differs):
                    if what is not None:
                        print(f"            {what}", flush=True)
    print(f"\nseed {flags.seed}, {len(numbers)} runs, {time.monotonic() - began_s:.0f} s\n\n{table(done)}")
    return int(any(f.broken or f.differs for f in done))


if __name__ == "__main__":
    sys.exit(main())
