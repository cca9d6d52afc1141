#!/usr/bin/env python
"""Random small tasks, each at four world sizes: one hash, or a label or a refusal with the right reason.

    python tests/exactness/fuzz.py --cases 1000 --seed 0
    python tests/exactness/fuzz.py --seed 0 --case 17      # one of them, with all that was said

A line for each case that breaks the promise, with the command that repeats it, and a table of all at the end. Exit
code 1 if there is any such case.
"""

from __future__ import annotations

import argparse
import collections
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.exactness.cases import Case, random_case
from tests.exactness.pool import Outcome, Pool
from tests.exactness.verdict import Verdict, judge

# Far longer than a run of some steps takes on a busy machine, and longer than `hang_timeout_s`.
LIMIT_S = 90.0


def cases(seed: int, count: int, pool: Pool, first: int = 0) -> Iterator[tuple[Case, Verdict, float]]:
    """Runs and judges `count` cases, from one on. Gives each with its verdict and its seconds."""
    for number in range(first, first + count):
        case, began_s = random_case(seed, number), time.monotonic()
        results = pool.run(case.config, case.world_sizes, LIMIT_S)
        yield case, judge(case, results), time.monotonic() - began_s


def failure(case: Case, verdict: Verdict) -> str:
    """What a person needs to know of a case that broke the promise."""
    detail = verdict.detail if len(verdict.detail) < 3000 else f"{verdict.detail[:500]} ... {verdict.detail[-2400:]}"
    sizes = ", ".join(map(str, case.world_sizes))
    return f"{verdict.name.upper()} ({case.kind}; W = {sizes}): {detail}\n    {case.command}"


def table(judged: list[tuple[Case, Verdict]]) -> str:
    """One row a kind of case."""
    columns = (
        "one hash",
        "labelled",
        "refused",
        "stopped",
        "wrongly refused",
        "wrong reason",
        "silent difference",
        "traceback",
    )
    rows = [f"| kind | cases | {' | '.join(columns)} |", f"|---|{'---|' * (len(columns) + 1)}"]
    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case, verdict in judged:
        # A flaw that nobody has noticed is one that would differ silently elsewhere.
        name = "silent difference" if verdict.name == "unnoticed" else verdict.name
        for kind in (case.kind, "all"):
            by_kind[kind]["cases"] += 1
            by_kind[kind][name] += 1
    last = [kind for kind in by_kind if kind == "all"]
    for kind in sorted((k for k in by_kind if k != "all"), key=lambda k: (k.startswith("flaw"), k)) + last:
        counts = by_kind[kind]
        rows.append(f"| {kind} | {counts['cases']} | {' | '.join(str(counts[c]) for c in columns)} |")
    return "\n".join(rows)


def show(case: Case, results: dict[int, list[Outcome]]) -> None:
    """Prints a case and how each of its runs ended."""
    print(json.dumps(case.config, indent=1))
    print(f"kind: {case.kind}")
    for W, ranks in results.items():
        first = ranks[0]
        last = first.trace[-1] if first.trace else {}
        print(f"\nW={W}: {first.kind} {first.label}{first.error}, {len(first.trace)} steps, loss {last.get('loss')}")
        for said in [*first.reasons, *{outcome.message for outcome in ranks if outcome.message}]:
            print(f"    {said}")
        print(f"    {first.facts}")


def main() -> int:
    """Parses, runs, prints the table."""
    parser = argparse.ArgumentParser(description="Random tasks at several world sizes: one hash, or the right reason.")
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="K", help="go on from case K, where a run has ended")
    parser.add_argument("--case", type=int, metavar="K", help="only case K, with all that was said")
    parser.add_argument("--output", metavar="FILE", help="where failures and the table go as well")
    flags = parser.parse_args()
    # A shell starts what runs in its background with SIGINT ignored, and so would be all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Pool() as pool:
        if flags.case is not None:
            case = random_case(flags.seed, flags.case)
            results = pool.run(case.config, case.world_sizes, LIMIT_S)
            show(case, results)
            verdict = judge(case, results)
            print(f"\nverdict: {verdict.name if verdict.good else failure(case, verdict)}")
            return int(not verdict.good)
        began_s, said = time.monotonic(), []
        judged: list[tuple[Case, Verdict]] = []
        for case, verdict, _ in cases(flags.seed, flags.cases, pool, flags.first):
            judged.append((case, verdict))
            if not verdict.good:
                said.append(f"case {case.number}: {failure(case, verdict)}")
                print(said[-1], flush=True)
            if len(judged) % 100 == 0:
                print(f"{len(judged)} cases, {time.monotonic() - began_s:.0f} s", flush=True)
        spent_s = time.monotonic() - began_s
    bad = sum(not verdict.good for _, verdict in judged)
    said.append(
        f"\nseed {flags.seed}, {len(judged)} cases from {flags.first} on, {spent_s:.0f} s "
        f"({spent_s / len(judged):.2f} s a case), {bad} broke the promise, "
        f"{pool.restarts} groups started again\n\n{table(judged)}"
    )
    print(said[-1])
    if flags.output is not None:
        Path(flags.output).write_text("\n".join(said) + "\n", encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
