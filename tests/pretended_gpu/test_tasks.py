"""Every ready task on a pretended GPU: the CPU's bits, and no wait of the host but for the flag of two steps ago."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import jobs
from tests.distributed.jobs import ROOT, USER_TASKS, small_config
from tests.distributed.test_results import small_data
from tests.pretended_gpu.jobs import launches, train, train_counted
from tests.standing import run_ranks
from trainer.config.keys import Config, load_config
from trainer.errors import UserError
from trainer.ranks.rendezvous import GLOO_AND_NCCL

MODEL = "trainer.task_options.model"
# The config files of ready tasks, with narrow models and small images; and with fewer layers, too.
NARROW: dict[str, dict[str, Any]] = {
    "strong": {"trainer.task_options.width": 4},
    "causal_lm": {f"{MODEL}.n_embd": 16},
    "text_classification": {f"{MODEL}.hidden_size": 16, f"{MODEL}.intermediate_size": 16},
    "image_classification": {
        f"{MODEL}.hidden_sizes": [8, 16],
        f"{MODEL}.embedding_size": 8,
        "trainer.task_options.image_size": 16,
    },
    "image_classification_vit": {
        f"{MODEL}.hidden_size": 16,
        f"{MODEL}.intermediate_size": 16,
        "trainer.task_options.image_size": 16,
    },
    "audio_classification": {
        f"{MODEL}.hidden_sizes": [8, 16],
        f"{MODEL}.embedding_size": 8,
        f"{MODEL}.depths": [1, 1],
        "trainer.task_options.mel_bands": 16,
        "trainer.task_options.sample_rate": 8000,
        "trainer.task_options.max_seconds": 0.25,
    },
    "image_segmentation": {"trainer.task_options.widths": [2, 4], "trainer.task_options.crop_size": 16},
    "tabular": {"trainer.task_options.width": 8},
    "nodules": {"trainer.task_options.width": 2},
    "nodules_autoencoder": {"trainer.task_options.width": 2},
}
SHALLOW = {
    "causal_lm": {f"{MODEL}.n_layer": 1},
    "text_classification": {f"{MODEL}.num_hidden_layers": 1},
    "image_classification": {f"{MODEL}.depths": [1, 1]},
    "image_classification_vit": {f"{MODEL}.num_hidden_layers": 1},
}


def ready(name: str, folder: Path, **more: Any) -> Config:
    file = ROOT / "ds_configs" / f"{name}.json"
    overrides = {"trainer.output_dir": str(folder / "run"), "tensorboard": {"enabled": False}} | more
    data = small_data(json.loads(file.read_text())["trainer"]["task"], folder)
    if data is not None:
        overrides["trainer.task_options.data"] = str(data)
    return load_config(file, overrides)


@pytest.mark.parametrize("name", NARROW)
def test_a_ready_task_has_the_cpus_bits_and_waits_for_no_micro_batch(tmp_path: Path, name: str) -> None:
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "trainer.max_steps": 5}

    def config(run: str) -> Config:
        more = {**sizes, **NARROW[name], **SHALLOW.get(name, {}), "trainer.output_dir": str(tmp_path / run)}
        return ready(name, tmp_path, **more)

    here = run_ranks(train, 1, config("here"))[0]
    there = run_ranks(train_counted, 1, 1, config("there"))[0]
    assert there["trace"] == here["trace"] and there["exactness"] == "bitwise"
    assert there["backend"] == GLOO_AND_NCCL
    # The first step looks for unused parameters, and the last one is audited.
    first, second, *others, last = there["waits"]
    assert not any("step.py" not in place and "tasks/" not in place for _, place in first)
    assert not second
    for waits in others:
        (((what, place), count),) = waits.items()
        assert (what, count) == ("Event.synchronize", 1) and place.startswith("trainer/exact/flags.py:")
    assert any(place.startswith("exact/checks/audit.py:") for _, place in last)


@pytest.mark.parametrize("name", ["strong", "text_classification"])
def test_packs_on_a_gpu_have_the_cpus_bits(tmp_path: Path, name: str) -> None:
    """Dropout's too, whose kernel is another there."""
    sizes = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8, "trainer.max_steps": 6}

    def config(run: str, pack: int) -> Config:
        more = {**sizes, **NARROW[name], **SHALLOW.get(name, {}), "trainer.pack": pack}
        return ready(name, tmp_path, **more, **{"trainer.output_dir": str(tmp_path / run)})

    here = run_ranks(train, 1, config("here", 1))[0]
    there = run_ranks(train_counted, 1, 1, config("there", 4))[0]
    assert there["trace"] == here["trace"]
    assert there["pack"]["size"] == 4 and "refused" not in there["pack"]


@pytest.mark.parametrize("optimizer", ["NAdam", "LAMB"])
def test_an_optimizer_that_cannot_skip_an_update_waits_no_more(tmp_path: Path, optimizer: str) -> None:
    more = {"optimizer": {"type": optimizer, "params": {"lr": 0.01}}, "max_steps": 4}
    here = run_ranks(jobs.train, 1, small_config(tmp_path / "here", **more))[0]
    there = run_ranks(train_counted, 1, 1, small_config(tmp_path / "there", **more))[0]
    assert there["trace"] == here["trace"]
    assert not [place for _, place in there["waits"][1] if "exact/step.py" in place or "engine" in place]


@pytest.mark.parametrize(
    ("W", "gpus", "backend"),
    [(3, 1, "gloo"), (2, 2, GLOO_AND_NCCL), pytest.param(8, 8, GLOO_AND_NCCL, marks=pytest.mark.slow)],
    ids=["three on one GPU", "two over NCCL", "eight over NCCL"],
)
def test_ranks_on_gpus_have_the_cpus_bits(tmp_path: Path, W: int, gpus: int, backend: str) -> None:
    more = {"max_steps": 6, "ranks_per_gpu": -(-W // gpus), "device": "auto"}
    here = run_ranks(jobs.train, 2, small_config(tmp_path / "here", **more | {"ranks_per_gpu": 1}))[0]
    there = run_ranks(train_counted, W, gpus, small_config(tmp_path / "there", **more))
    assert {rank["backend"] for rank in there} == {backend}
    assert there[0]["trace"] == here["trace"]
    assert there[0]["metrics"] == here["metrics"]


def test_an_exchange_under_the_backward_has_the_cpus_bits(tmp_path: Path) -> None:
    """On a stream of its own, and without a wait of the host."""
    more = {"max_steps": 6, "device": "auto"}
    here = run_ranks(jobs.train, 2, small_config(tmp_path / "here", **more))[0]
    there = run_ranks(train_counted, 2, 2, small_config(tmp_path / "there", exchange_bucket_mib=0.0005, **more))
    assert there[0]["trace"] == here["trace"]
    for waits in there[0]["waits"][2:-1]:
        assert [what for what, _ in waits] == ["Event.synchronize"]


def test_ranks_that_share_a_gpu_have_no_exchange_under_the_backward(tmp_path: Path) -> None:
    config = small_config(tmp_path, exchange_bucket_mib=4, device="auto", ranks_per_gpu=2)
    with pytest.raises(UserError, match=r'"trainer.exchange_bucket_mib" is 4, but ranks that share a GPU'):
        run_ranks(train_counted, 2, 1, config)


# Launches of a step with one pack, at most, as a multiple of a plain loop's: at the config's own M with the first rule
# of each layer; at M = 32 with the last, which makes convolutions' weight gradients one micro-batch at a time; and with
# `trainer.cuda_graph`, at the own M.
CEILINGS: dict[str, tuple[int, float, float, float]] = {
    "strong": (32, 1.85, 3.0, 1.5),
    "causal_lm": (4, 0.95, 1.7, 0.1),
    "text_classification": (4, 1.25, 3.6, 0.2),
    "image_classification": (8, 1.2, 2.75, 0.35),
    "image_classification_vit": (4, 1.1, 2.8, 0.2),
    "audio_classification": (8, 1.25, 2.5, 0.6),
    "tabular": (4, 1.35, 2.4, 0.55),
    "nodules": (8, 1.25, 2.65, 0.4),
    "nodules_autoencoder": (8, 1.2, 2.7, 0.4),
}


def ratio_at(M: int, name: str, folder: Path, singly: bool = False, graph: bool = False) -> float:
    """Launches of a step, as a multiple of a plain loop's."""
    sizes = {"train_batch_size": 2 * M, "train_micro_batch_size_per_gpu": 2, "trainer.pack": M}
    ours, plain = run_ranks(launches, 1, ready(name, folder, **NARROW[name], **sizes), singly, graph)[0]
    return sum(ours.values()) / sum(plain.values())


# The others take as long again.
QUICK = (("strong", False), ("strong", True), ("image_classification", False), ("text_classification", False))


@pytest.mark.parametrize(
    ("name", "singly"),
    [
        pytest.param(name, singly, marks=() if (name, singly) in QUICK else pytest.mark.slow)
        for name in CEILINGS
        for singly in (False, True)
    ],
)
def test_a_pack_launches_little_more_than_a_plain_loop(tmp_path: Path, name: str, singly: bool) -> None:
    M, *ceilings = CEILINGS[name]
    assert ratio_at(32 if singly else M, name, tmp_path, singly) <= ceilings[singly]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "strong" else pytest.mark.slow) for n in CEILINGS])
def test_with_a_graph_a_pack_launches_at_most_half_as_much_again_as_a_plain_loop(tmp_path: Path, name: str) -> None:
    """At the config's own M, and at M = 32. What seeds the graph's dropout grows with M; nothing else does."""
    M, *_, ceiling = CEILINGS[name]
    assert ratio_at(M, name, tmp_path, graph=True) <= ceiling
    assert M == 32 or ratio_at(32, name, tmp_path, graph=True) <= 1.5


@pytest.mark.slow
def test_the_tests_for_gpus_pass(tmp_path: Path) -> None:
    """As they are. What the device cannot pretend is autocast of CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "tests.pretended_gpu.plugin", "-k", "not bf16"]
    environment = os.environ | {"PRETENDED_GPUS": "1", "TRAINER_CACHE": str(tmp_path)}
    run = subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "5 passed" in run.stdout


@pytest.mark.parametrize(("name", "pack"), [("strong", 4), ("strong", 1), ("image_classification", 2)])
def test_what_a_rank_computes_is_launched_as_graphs(tmp_path: Path, name: str, pack: int) -> None:
    """The host's code runs no more, so the bits tell whether everything that changes is in the graph's memory."""
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "trainer.max_steps": 9, "trainer.pack": pack}

    def config(run: str, **more: Any) -> Config:
        narrow = {**NARROW[name], **SHALLOW.get(name, {}), "trainer.output_dir": str(tmp_path / run)}
        return ready(name, tmp_path, **sizes, **narrow, **more)

    here = run_ranks(train, 1, config("here"))[0]
    there = run_ranks(train_counted, 1, 1, config("there", **{"trainer.cuda_graph": "auto"}))[0]
    assert there["trace"] == here["trace"] and there["exactness"] == "bitwise"
    assert json.loads((tmp_path / "there" / "summary.json").read_text())["cuda_graph"] == {"shapes": 1}
    later = there["launches"][-2]  # the last one is audited
    assert later["graph"] == 4 // pack
    assert sum(later.values()) < 125


@pytest.mark.parametrize(
    ("W", "gpus", "more"), [(3, 1, {"pack": 4}), (2, 2, {"pack": 1, "exchange_bucket_mib": 0.0005})]
)
def test_graphs_of_several_ranks_have_the_cpus_bits(tmp_path: Path, W: int, gpus: int, more: dict[str, Any]) -> None:
    """13 micro-batches over the ranks, and a last batch of 7: packs and micro-batches of several shapes, BatchNorm."""
    usual = {"max_steps": 14, "device": "auto"}
    here = run_ranks(jobs.train, 1, small_config(tmp_path / "here", **usual))[0]
    graphs = {"cuda_graph": "auto", "ranks_per_gpu": -(-W // gpus)}
    there = run_ranks(train_counted, W, gpus, small_config(tmp_path / "there", **usual, **more, **graphs))
    assert there[0]["trace"] == here["trace"]
    assert there[0]["metrics"] == here["metrics"]
    assert all(launches["graph"] for launches in there[W - 1]["launches"][-4:-1])


FLAWS = f"{USER_TASKS}/graph_tasks.py"


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("Anneals", "the task's forward or loss takes `progress`"),
        ("ReadsValues", "CUDA error: operation not permitted when stream is capturing"),
        ("DrawsOnTheHost", "it draws random numbers on the host"),
    ],
)
def test_what_a_graph_cannot_follow_is_computed_without_one(tmp_path: Path, task: str, reason: str) -> None:
    def config(run: str, **more: Any) -> Config:
        return small_config(tmp_path / run, task=f"{FLAWS}:{task}", epochs=1, **more)

    without = run_ranks(train_counted, 1, 1, config("without"))[0]
    there = run_ranks(train_counted, 1, 1, config("there", cuda_graph="auto"))[0]
    assert there["trace"] == without["trace"] and there["exactness"] == "bitwise"
    found = json.loads((tmp_path / "there" / "summary.json").read_text())["cuda_graph"]
    assert found == {"shapes": 0, "refused": [reason]}
