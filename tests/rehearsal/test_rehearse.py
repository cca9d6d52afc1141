"""What is called bitwise has been rehearsed: each way to lose exactness is labelled or refused, with its cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import (
    USER_TASKS,
    kept_state,
    rehearsal_work,
    rehearsed_state,
    small_config,
    train,
    train_unrehearsed,
)
from trainer.errors import UserError
from trainer.ranks.workers import run_ranks

INEXACT = f"{USER_TASKS}/inexact_tasks.py"
BAD = f"{USER_TASKS}/bad_tasks.py"

CAUSES = [
    (f"{INEXACT}:CountsInTheModel", ["attribute n of the module 0 (CountingNet) changes", "keyword `progress`"]),
    (f"{INEXACT}:AnnealsByCounting", ["the task's attribute calls changes", "loss() depends on it", "annealing"]),
    (f"{INEXACT}:CountsInAGlobal", ["the global calls_of_all of inexact_tasks.py changes", "forward()"]),
    (f"{INEXACT}:CountsInTheClass", ["the class attribute CountsInTheClass.calls changes"]),
    (f"{INEXACT}:RemembersTheFirst", ["the task's attribute center changes"]),
    (f"{INEXACT}:OwnGenerator", ["a generator of its own (the task's attribute noise_of)", "torch.rand"]),
    (f"{INEXACT}:ReadsTheClock", ["forward() gives another result when the same micro-batch is computed again"]),
    (f"{INEXACT}:AsksForTheRank", ["forward() depends on the rank", ""]),
    (f"{INEXACT}:AssignsBuffers", ["the model's buffer average changes in its forward", "buffer last changes"]),
    (f"{INEXACT}:DrawsForTheSmallest", ["forward() draws from Python's random module"]),
    (f"{INEXACT}:CountsTheSmallest", ["the task's attribute small changes"]),
    (f"{INEXACT}:ConvergedNorm", ["buffer 0.parametrizations.weight.0._"]),
    (f"{INEXACT}:SetsInLate", ["the task's attribute calls changes", "loss() depends on it"]),
    (f"{INEXACT}:CountsOnlyOnceCalled", ["the class attribute CountsOnlyOnceCalled.calls_of_the_class changes"]),
    (f"{INEXACT}:DrawsRarely", ["forward() draws from numpy's global generator"]),
    (f"{INEXACT}:TeacherInTheModel", ["the parameter teacher.weight changes in the forward"]),
    (f"{INEXACT}:CountsFromTheSecondEpoch", ["the model's buffer updates changes in its forward"]),
    (f"{INEXACT}:DividesByTheWorld", ["loss() depends on the rank"]),
    (f"{INEXACT}:AsksTheEnvironment", ["loss() depends on the rank", "WORLD_SIZE"]),
    (f"{INEXACT}:MaxNorm", ["the parameter embedding.weight changes", "Embedding with max_norm", "Leave max_norm out"]),
    (
        f"{INEXACT}:ChangesAParameter",
        ["the parameter 0.weight changes in the forward", "Leave the change to the optimizer"],
    ),
    (f"{BAD}:PythonRandom", ["forward() draws from Python's random module", "torch.rand"]),
    (f"{BAD}:NumpyRandom", ["forward() draws from numpy's global generator", "torch.rand"]),
    (f"{BAD}:RankNoise", ["a generator of its own", "torch's default generator"]),
    (f"{BAD}:StatefulModel", ["the model's buffer seen changes in its forward", "rank 0's"]),
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("task", "words"), CAUSES, ids=[task.rpartition(":")[2] for task, _ in CAUSES])
def test_each_cause_is_labelled_or_refused(tmp_path: Path, task: str, words: list[str], world_size: int) -> None:
    """Labelled, a run goes on to its end at any number of ranks; no guard blames the hardware."""
    auto = small_config(tmp_path / "auto", task=task, epochs=2, guard_every_steps=1)
    summaries = run_ranks(train, world_size, auto)
    assert summaries[0]["exactness"] == "tolerance"
    assert words[0] in "; ".join(summaries[0]["inexact"])
    assert len({summary["model_sha256"] for summary in summaries}) == 1, "every rank holds the same model"
    manifest = json.loads((tmp_path / "auto" / "manifest.json").read_text())
    assert (manifest["exactness"], manifest["inexact"]) == ("tolerance", summaries[0]["inexact"])

    bitwise = small_config(tmp_path / "bitwise", task=task, exactness="bitwise")
    with pytest.raises(UserError, match=r'trainer\.exactness is "bitwise", but ') as refused:
        run_ranks(train, world_size, bitwise)
    for word in words:
        assert word in str(refused.value)
    assert not (tmp_path / "bitwise").exists()


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("AugmentsByPowers", {"train_batch_size": 100, "train_micro_batch_size_per_gpu": 25}),
        ("AugmentsBySigmoids", {"train_batch_size": 35, "train_micro_batch_size_per_gpu": 7}),
        ("ClaimsChunks", {"train_batch_size": 35, "train_micro_batch_size_per_gpu": 7}),
        ("ClaimsChunksAndDraws", {}),
        ("CachesATable", {}),
        ("NormOverPlaces", {"train_batch_size": 13, "train_micro_batch_size_per_gpu": 1, "max_steps": 4}),
        ("HooksLazily", {}),
        ("MixesInTheMiddle", {}),
        ("ChannelsLast", {}),
        ("TwoNorms", {}),
        ("FrozenStatistics", {}),
        ("MixesUp", {}),
        ("MixesSamples", {}),
        ("AugmentsFromElsewhere", {}),
        ("HarmlessState", {}),
        ("AnnealsByProgress", {}),
    ],
)
def test_what_only_looks_inexact_is_exact(tmp_path: Path, task: str, changes: dict[str, Any]) -> None:
    """One hash at W = 1, 2, 3, 4; state that no number follows from is nobody's fault."""
    file = BAD if task in ("MixesSamples", "AugmentsFromElsewhere") else INEXACT
    summaries = [
        run_ranks(
            train,
            W,
            small_config(tmp_path / str(W), task=f"{file}:{task}", exactness="bitwise", epochs=2, **changes),
        )[0]
        for W in (1, 2, 3, 4)
    ]
    assert {summary["exactness"] for summary in summaries} == {"bitwise"}
    assert [summary["trace"] for summary in summaries] == [summaries[0]["trace"]] * 4
    assert len({summary["model_sha256"] for summary in summaries}) == 1


@pytest.mark.parametrize(
    "task", ["my_task.py:MyTask", "inexact_tasks.py:HarmlessState", "bad_tasks.py:UnusedParameters"]
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_rehearsal_changes_nothing(tmp_path: Path, task: str, world_size: int) -> None:
    """The run is the one that would have been made without it: parameters, statistics, random numbers, data."""
    config = small_config(tmp_path / "with", task=f"{USER_TASKS}/{task}")
    with_it = run_ranks(train, world_size, config)[0]
    config = small_config(tmp_path / "without", task=f"{USER_TASKS}/{task}")
    assert run_ranks(train_unrehearsed, world_size, config)[0]["trace"] == with_it["trace"]


@pytest.mark.parametrize(
    "task", ["CountsInTheModel", "AssignsBuffers", "MaxNorm", "CountsInAGlobal", "OwnGenerator", "HarmlessState"]
)
def test_what_a_rehearsal_finds_changed_is_put_back(tmp_path: Path, task: str) -> None:
    """Also where the search for the cause computed many micro-batches."""
    before, after = run_ranks(rehearsed_state, 1, small_config(tmp_path / "run", task=f"{INEXACT}:{task}"))[0]
    assert before == after


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("TalksToOthers", r"TalksToOthers calls torch\.distributed \(allreduce\) in its forward or loss"),
        (
            "Unpools",
            r"Here the module unpool \(MaxUnpool1d\) uses max_unpooling2d_forward_out\. .* x\.new_zeros",
        ),
        ("SetsMomentum", "SetsMomentum sets the momentum of a normalisation layer in its forward"),
        ("LazyLayer", r"The parameter weight has no shape yet. Call the model once in model\(\)"),
        ("SparseRows", r"The gradient of 0\.weight is sparse"),
        ("Unfreezes", r"Unfreezes freezes the parameter inner\.weight in its forward"),
        ("ReadsStatistics", r"(?s)ReadsStatistics reads the running statistics of a normalisation layer.*train\(\)"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_cannot_work_is_refused(tmp_path: Path, task: str, words: str, world_size: int) -> None:
    with pytest.raises(UserError, match=words):
        run_ranks(train, world_size, small_config(tmp_path / "run", task=f"{INEXACT}:{task}"))
    assert not (tmp_path / "run").exists()


def test_a_step_in_which_nothing_counts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The counts .* of the \d+ samples of step \d+ add up to 0"):
        run_ranks(train, 2, small_config(tmp_path / "run", task=f"{INEXACT}:NothingCounts"))


def test_a_wrong_claim_of_chunks_is_said_and_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.commands.check_task import check_task

    overrides = {"train_batch_size": 35, "train_micro_batch_size_per_gpu": 7}
    assert check_task(f"{INEXACT}:ClaimsChunks", overrides) == 0
    assert "its augment() is called for one micro-batch at a time, because it calls sigmoid" in capsys.readouterr().out


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("task", "kept"), [("CachesATable", []), ("AnnealsByCounting", ["the task's attribute calls"])]
)
def test_a_table_of_constants_is_no_state(tmp_path: Path, task: str, kept: list[str], world_size: int) -> None:
    """A run that goes on warns of state that checkpoints do not hold; what is made once and kept is none."""
    config = small_config(tmp_path / "run", task=f"{INEXACT}:{task}")
    assert run_ranks(kept_state, world_size, config) == [kept] * world_size


def test_a_rehearsal_costs_less_than_two_steps(tmp_path: Path) -> None:
    """(forwards, of them with a backward): of 13 micro-batches a step, three sizes of batches and BatchNorm.

    One of rank 0 is for the count of operations.
    """
    for W, expected in ((1, [(14, 9)]), (3, [(11, 6), (10, 5), (10, 5)])):
        config = small_config(tmp_path / str(W), epochs=1)
        assert run_ranks(rehearsal_work, W, config) == expected
