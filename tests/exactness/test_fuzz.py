"""Thirty cases of the fuzzer, and that its verdict can fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from tests.exactness.cases import KINDS, Case, random_case
from tests.exactness.flaws import FLAWS
from tests.exactness.fuzz import LIMIT_S, failure, table
from tests.exactness.pool import Outcome, Pool
from tests.exactness.verdict import BAD, GOOD, judge

SEED, CASES = 7, 30
# So many cases are one item of pytest.
AT_ONCE = 10


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as standing:
        yield standing


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(AT_ONCE, CASES, AT_ONCE))]
)
def test_random_cases_end_with_one_hash_or_the_right_reason(pool: Pool, first: int) -> None:
    failures = []
    for number in range(first, first + AT_ONCE):
        case = random_case(SEED, number)
        verdict = judge(case, pool.run(case.config, case.world_sizes, LIMIT_S))
        if not verdict.good:
            failures.append(failure(case, verdict))
    assert not failures, "\n" + "\n".join(failures)


def test_a_case_is_a_function_of_its_seed_and_number() -> None:
    assert random_case(3, 5) == random_case(3, 5)
    assert random_case(3, 5).config != random_case(4, 5).config


def test_cases_have_every_kind_every_flaw_and_uneven_world_sizes() -> None:
    cases = [random_case(SEED, number) for number in range(5 * len(FLAWS))]
    assert {case.kind for case in cases} == {*KINDS, *(f"flaw: {flaw}" for flaw in FLAWS)}
    for case in cases:
        B, m = case.config["train_batch_size"], case.config["train_micro_batch_size_per_gpu"]
        M = -(-B // m)
        assert case.world_sizes[0] == 1
        assert len(case.world_sizes) == min(4, M)
        assert case.world_sizes[-1] <= M
        # Of 1 to 2 ranks none is uneven if M is even.
        assert M < 3 or any(M % W for W in case.world_sizes)
    assert {case.config["train_micro_batch_size_per_gpu"] for case in cases} == set(range(1, 10))


# ---- the verdict, fed with results that are made up ----------------------------------------------------------------


def case_of(flaw: str | None, exactness: str = "auto") -> Case:
    case = random_case(SEED, 0)
    config = {**case.config, "trainer": {**case.config["trainer"], "exactness": exactness}}
    return dataclasses.replace(case, config=config, world_sizes=(1, 2), flaw=flaw)


def finished(loss: str = "[1.0]", accuracy: float = 0.5, reasons: tuple[str, ...] = ()) -> Outcome:
    trace = [{"loss": "[2.0]", "parameter w": "aa"}, {"loss": loss, "parameter w": "bb"}]
    label = "tolerance" if reasons else "bitwise"
    return Outcome("finished", label, list(reasons), trace, {"metrics": {"accuracy": accuracy}})


def refused(message: str, error: str = "UserError") -> Outcome:
    return Outcome("error", message=message, error=error)


def everywhere(outcome: Outcome) -> dict[int, list[Outcome]]:
    return {1: [outcome], 2: [outcome, outcome]}


RANDOM = "Python's random module changes"
NON_FINITE = refused("Step 2 is not finite", "NonFiniteError")


@pytest.mark.parametrize(
    ("flaw", "exactness", "results", "expected"),
    [
        (None, "auto", everywhere(finished()), "one hash"),
        (None, "auto", everywhere(NON_FINITE), "one hash"),
        (None, "auto", {1: [finished()], 2: [finished("[1.5]")] * 2}, "silent difference"),
        (None, "auto", {1: [finished()], 2: [finished(accuracy=0.25)] * 2}, "silent difference"),
        (None, "auto", {1: [finished()], 2: [finished(), finished("[1.5]")]}, "silent difference"),
        (None, "auto", {1: [finished()], 2: [NON_FINITE] * 2}, "silent difference"),
        (None, "auto", everywhere(refused("no")), "wrongly refused"),
        (None, "auto", everywhere(refused("ranks differ", "RanksDifferError")), "wrongly refused"),
        (None, "auto", everywhere(finished(reasons=("it changes",))), "wrongly refused"),
        (None, "auto", everywhere(Outcome("traceback", message="KeyError")), "traceback"),
        (None, "auto", {1: [finished()], 2: [finished(), Outcome("hung")]}, "traceback"),
        ("python_random", "auto", everywhere(finished(reasons=(RANDOM,))), "labelled"),
        ("python_random", "auto", everywhere(finished(reasons=("a buffer changes",))), "wrong reason"),
        ("python_random", "auto", everywhere(refused(RANDOM)), "wrongly refused"),
        ("python_random", "auto", {1: [finished()], 2: [finished("[1.5]")] * 2}, "silent difference"),
        ("python_random", "auto", {1: [finished()], 2: [finished(reasons=(RANDOM,))] * 2}, "silent difference"),
        ("python_random", "auto", everywhere(finished()), "one hash"),  # it had no effect
        ("python_random", "auto", {1: [finished()]}, "unnoticed"),
        ("python_random", "bitwise", everywhere(refused(RANDOM)), "refused"),
        ("python_random", "bitwise", everywhere(refused("a buffer changes")), "wrong reason"),
        ("python_random", "bitwise", everywhere(finished(reasons=(RANDOM,))), "wrong reason"),
        ("rank", "auto", {1: [finished()], 2: [finished(reasons=("depends on the rank",))] * 2}, "labelled"),
        ("rank", "auto", {1: [finished()], 2: [refused("ranks differ", "RanksDifferError")] * 2}, "stopped"),
        ("late_random", "auto", everywhere(refused("an audit", "RanksDifferError")), "stopped"),
        ("python_random", "auto", everywhere(refused("an audit", "RanksDifferError")), "wrongly refused"),
        ("rank", "auto", {1: [finished()], 2: [finished("[1.5]")] * 2}, "silent difference"),
    ],
)
def test_the_verdict(flaw: str | None, exactness: str, results: dict[int, list[Outcome]], expected: str) -> None:
    verdict = judge(case_of(flaw, exactness), results)
    assert verdict.name == expected, verdict
    assert verdict.good == (expected in GOOD) == (expected not in BAD)


def test_a_failure_names_what_differs_and_the_command_that_repeats_it() -> None:
    case = case_of(None)
    verdict = judge(case, {1: [finished()], 2: [finished("[1.5]")] * 2})
    assert "W=1 and W=2: step 2 differs in loss" in failure(case, verdict)
    assert f"fuzz.py --seed {SEED} --case 0" in failure(case, verdict)
    assert table([(case, verdict)]).splitlines()[-1] == "| all | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 1 | 0 |"
