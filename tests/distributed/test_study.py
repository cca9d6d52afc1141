"""Studies for real: what one rank computes is what W do, and a study that is killed loses and repeats nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.distributed.jobs import ROOT, train
from trainer.config.keys import parse
from trainer.errors import UserError
from trainer.ranks.workers import run_ranks
from trainer.study.arms import Settings, values_of
from trainer.study.declaration import expand
from trainer.study.load import load_study
from trainer.study.results import Results, finished
from trainer.study.runner import study


def write(folder: Path, study: dict[str, Any] | None = None, **trainer: Any) -> Path:
    """A study of 14 short runs."""
    values = json.loads((ROOT / "ds_configs" / "study.json").read_text())
    values["trainer"] |= {"epochs": 2, **trainer}
    values["study"] |= {
        "output_dir": str(folder / "study"), "seeds": 2, "world_sizes": [2, 4, 8], "budgets": ["epochs"],
        "arms": ["sequential", "strong", "weak", "weak_linear_warmup"], "max_epochs": None, "max_parallel": 2,
        "timing": None, "dataset_sizes": [], "variants": {}, "splits": None,
    } | (study or {})  # fmt: skip
    path = folder / "study.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("arm", ["weak_linear_warmup", "weak_sqrt_adam", "weak_lamb", "weak_adascale"])
def test_a_weak_arm_is_the_run_of_w_real_ranks(tmp_path: Path, world_size: int, arm: str) -> None:
    """Real weak scaling: the batch keys say so, and the learning rate's base is one rank's batch by itself."""
    _, (base,) = load_study(str(write(tmp_path, task_options={"model": "cnn"}, epochs=1)))
    one = values_of(base.values, arm, world_size, "epochs", 7, 1200, settings=Settings(0.01))
    one["trainer"]["output_dir"] = str(tmp_path / "one")
    many = json.loads(json.dumps(one))
    del many["train_batch_size"], many["trainer"]["learning_rate"]["base_global_batch_size"]
    many["gradient_accumulation_steps"] = 4
    many["trainer"]["output_dir"] = str(tmp_path / "many")
    assert parse(many).plan(world_size).scaling == "weak"
    emulated = run_ranks(train, 1, parse(one))[0]
    real = run_ranks(train, world_size, parse(many))[0]
    assert real["trace"] == emulated["trace"]
    assert real["parameters_sha256"] == emulated["parameters_sha256"]
    assert real["metrics"] == emulated["metrics"]
    assert real["world_size"] == world_size


def test_a_study_that_is_killed_repeats_no_run_and_loses_none(tmp_path: Path) -> None:
    path = write(tmp_path)
    runs = tmp_path / "study" / "runs"
    command = [sys.executable, "-m", "trainer", "study", str(path)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 200
    while not runs.is_dir() or len(list(runs.glob("*.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in runs.glob("*.json")}
    assert 3 <= len(before) < 14
    for _, data in before.values():
        json.loads(data)

    began_at_s = time.time()
    assert study(str(path)) == 0
    results = finished(tmp_path / "study")
    declared, (base,) = load_study(str(path))
    plan = expand(declared, [dataclasses.replace(base, samples=1200)])
    assert set(results) == set(plan.configs)
    assert len(results) == 14
    for name, (changed_ns, data) in before.items():
        assert ((runs / name).stat().st_mtime_ns, (runs / name).read_bytes()) == (changed_ns, data)
    made = [r for r in results.values() if r["started_at_s"] > began_at_s]
    assert len(made) == 14 - len(before)
    assert sorted(os.listdir(tmp_path / "study")) == [
        ".lock", "figures", "report.html", "results.csv", "results.parquet", "runs", "study.json", "tensorboard",
    ]  # fmt: skip

    # The last of many in one process is the run of a fresh one: nothing leaks from run to run.
    last = max(results.values(), key=lambda r: r["started_at_s"])
    values = json.loads(json.dumps(last["config"])) | {"scheduler": None}
    values["trainer"]["output_dir"] = str(tmp_path / "fresh")
    fresh = run_ranks(train, 1, parse({k: v for k, v in values.items() if v is not None}))[0]
    for name in ("parameters_sha256", "model_sha256", "metrics", "steps"):
        assert fresh[name] == last[name]

    # What is said of updates to a target is read from these.
    for run in results.values():
        for name in ("train/loss", "eval/validation/accuracy"):
            assert run["curves"][name]["step"][-1] == run["steps"]

    # A finished study makes no run, and its declaration stands.
    stamps = {file.name: file.stat().st_mtime_ns for file in runs.iterdir()}
    assert study(str(path)) == 0
    assert {file.name: file.stat().st_mtime_ns for file in runs.iterdir()} == stamps
    write(tmp_path, {"margin": 0.5})
    with pytest.raises(UserError, match="with another declaration: study differs in margin"):
        study(str(path))

    # Nor does it help to change study.json as well: each run knows what was declared before it.
    file = tmp_path / "study" / "study.json"
    declared_before = file.read_text()
    values = json.loads(declared_before)
    file.write_text(json.dumps(values | {"study": values["study"] | {"margin": 0.5}}))
    with pytest.raises(UserError, match=r"study\.json has been changed: 14 runs of 14 had another declaration"):
        study(str(path))
    (doubt,) = Results(tmp_path / "study").doubts()
    assert "was not declared before the runs" in doubt
    file.write_text(declared_before)
    assert Results(tmp_path / "study").doubts() == []


def stopped_after(count: int, path: Path, runs: Path) -> None:
    """Starts a study, which gets a SIGTERM when so many runs are finished."""

    def ask() -> None:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s and len(list(runs.glob("*.json"))) < count:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    assert study(str(path)) == 75
    asking.join()


def test_a_study_that_is_asked_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, epochs=6)
    runs = tmp_path / "study" / "runs"

    stopped_after(1, path, runs)
    done = len(list(runs.glob("*.json")))
    assert 1 <= done < 14
    said = capsys.readouterr().out
    assert f"stopped: {done} of 14 runs are finished and kept. The same command continues from there." in said
    assert not (tmp_path / "study" / "running").exists()
    assert signal.getsignal(signal.SIGTERM) != signal.default_int_handler


def test_runs_that_stop_being_finite_are_results(tmp_path: Path) -> None:
    path = write(tmp_path, {"arms": ["sequential", "weak"], "world_sizes": [32], "max_parallel": 1})
    optimizer = {"type": "SGD", "params": {"lr": 1e30}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"optimizer": optimizer}))
    assert study(str(path)) == 0
    results = finished(tmp_path / "study").values()
    assert {r["status"] for r in results} == {"not finite"}
    assert all("is not finite" in r["reason"] and r["metrics"] == {} for r in results)
    assert "2 of 2 runs" in (tmp_path / "study" / "report.html").read_text()


def test_a_metric_that_the_task_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path, {"metric": "test/acuracy"}, epochs=1)
    with pytest.raises(UserError, match=r'does not measure. Did you mean "test/accuracy"'):
        study(str(path))
    assert finished(tmp_path / "study") == {}


def test_a_task_that_is_changed_between_runs(tmp_path: Path) -> None:
    """Runs of two models in one study would be compared as if they differed in W alone."""
    task = tmp_path / "task.py"
    task.write_text((ROOT / "tests" / "user_tasks" / "my_task.py").read_text())
    few = {"arms": ["sequential", "weak"], "world_sizes": [2], "metric": "test/acuracy"}
    write(tmp_path, few, task=f"{task}:MyTask", task_options={}, epochs=1)
    with pytest.raises(UserError, match="does not measure"):
        study(str(tmp_path / "study.json"))
    # What was declared before any run may be mended in its own folder.
    (tmp_path / "other.py").write_text(task.read_text().replace("F.gelu", "F.relu"))
    variants = {"relu": {"trainer.task": f"{tmp_path}/other.py:MyTask"}}  # whose code is another one from the start
    few |= {"metric": "test/accuracy", "variants": variants}
    path = write(tmp_path, few, task=f"{task}:MyTask", task_options={}, epochs=1)
    assert study(str(path)) == 0
    assert len(finished(tmp_path / "study")) == 8
    before = task.read_text()
    task.write_text(before.replace("F.gelu", "F.relu"))
    with pytest.raises(UserError, match=r"holds runs of another version of the task"):
        study(str(path))
    # Each run loads the task anew, so it can change between two runs of one command, too.
    task.write_text(before.replace("def model(self):", "def model(self):\n        _edit()"))
    editing = "def _edit():\n    with open(__file__, 'a') as file:\n        file.write('X = 1\\n')\n\n\n"
    task.write_text(task.read_text().replace("class Net", editing + "class Net", 1))
    few |= {"output_dir": str(tmp_path / "edited")}
    path = write(tmp_path, few, task=f"{task}:MyTask", task_options={}, epochs=1)
    with pytest.raises(UserError, match=r"was changed while the study ran\. \d of 8 runs are finished and kept"):
        study(str(path))


def test_a_metric_of_a_split_that_is_not_evaluated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='"train/accuracy", but the splits that are evaluated are validation, test'):
        study(str(write(tmp_path, {"metric": "train/accuracy"})), dry_run=True)


def test_runs_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The optimizer is refused when it is built, whatever the arm: the study gives up after a few."""
    path = write(tmp_path)
    optimizer = {"type": "SGD", "params": {"lr": 0.1, "nesterov": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"optimizer": optimizer}))
    assert study(str(path)) == 1
    said = capsys.readouterr().out
    assert "3 runs could not be made. The same command tries them again. The first:" in said
    assert "sequential, seed 0: The optimizer SGD cannot be built: Nesterov" in said
    assert finished(tmp_path / "study") == {}


def test_a_process_that_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (ROOT / "tests" / "user_tasks" / "my_task.py").read_text()
    (tmp_path / "task.py").write_text(
        source.replace("        return Net(", "        __import__('os').abort()\n        Net(")
    )
    path = write(tmp_path, task=f"{tmp_path}/task.py:MyTask", task_options={})
    assert study(str(path)) == 1
    assert "a process that makes runs died (exit code" in capsys.readouterr().out


def test_two_studies_in_one_folder(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "study").mkdir()
    with FileLock(tmp_path / "study" / ".lock"), pytest.raises(UserError, match="another study runs there"):
        study(str(path))


@pytest.mark.slow
def test_a_study_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Searched rates, subsets, another model, real ranks; stopped in the middle of the searches, and gone on with."""
    path = write(
        tmp_path,
        {
            "arms": ["sequential", "strong", "weak", "weak_tuned", "weak_lamb", "weak_adascale"],
            "world_sizes": [4],
            "budgets": ["epochs", "updates"],
            "tuning": {"spread": 2, "warmup_epochs": [], "momentum": [], "seeds": 2},
            "dataset_sizes": [200],
            "variants": {"wide": {"trainer.task_options.width": 160}},
            "timing": {"world_sizes": [2], "max_steps": 20, "repeats": 2},
        },
        train_samples=400,
    )
    folder = tmp_path / "study"
    runs = folder / "runs"

    stopped_after(5, path, runs)
    stamps = {file.name: file.stat().st_mtime_ns for file in runs.iterdir()}
    assert study(str(path)) == 0
    assert stamps.items() <= {file.name: file.stat().st_mtime_ns for file in runs.iterdir()}.items()

    # Three variants, two seeds: a search at W = 1 and two at W = 4 for weak_tuned, one at W = 1 for LAMB.
    found = json.loads((folder / "tuning" / "found.json").read_text())
    assert len(found) == 3 * 4 * 2
    results = finished(folder)
    of_trials = {this for search in found.values() for trial in search["trials"] for this in trial["runs"]}
    assert len(of_trials) == 3 * 4 * 2 * 3  # of two rates, one gets a second seed
    assert not {results[this]["seed"] for this in of_trials} & {0, 1}
    for name, search in found.items():
        (best,) = (trial for trial in search["trials"] if len(trial["runs"]) == 2)
        assert search["best"]["lr"] == best["lr"]
        for this in search["ids"].values():
            assert results[this]["learning_rate"] == search["best"]["lr"], name

    # (Where the best rate is the base's, a run of one place is another's as well.)
    cells = [cell for cell in Results(folder).cells if cell["seed"] == 0]
    rows = {(c["variant"], c["arm"], c["budget"], c["world_size"]): results[c["id"]] for c in cells}
    assert len(rows) == 3 * (3 + 2 * 4)
    assert rows["200 samples", "weak", "epochs", 4]["samples"] == 200
    assert rows["", "weak_lamb", "epochs", 4]["config"]["optimizer"]["type"] == "LAMB"
    assert rows["", "sequential_lamb", "epochs", 1]["config"]["optimizer"]["type"] == "LAMB"
    assert rows["", "weak_adascale", "updates", 4]["adascale"]["position"] >= 26
    assert rows["", "sequential", "epochs", 1]["gradient_noise"]["scale_samples"] > 0
    curve = rows["", "sequential", "epochs", 1]["curves"]["train/loss"]
    assert len(curve["epoch"]) == len(curve["value"]) > 20
    assert curve["epoch"][-1] == 2
    assert rows["", "weak", "epochs", 4]["curves"]["train/loss"]["epoch"][-1] == 2  # its last batch is smaller

    # Real ranks: 20 steps twice at W = 1 and 2, to the same bits, and never again.
    said = capsys.readouterr().out
    assert "strong scaling on real ranks: runs of 20 steps of seed 0 at W = 1, 2 ended with the same bits" in said
    timed = sorted((folder / "timing").iterdir())
    assert [file.name for file in timed] == ["W1-0.json", "W1-1.json", "W2-0.json", "W2-1.json", "network.json"]
    assert len({json.loads(file.read_text())["parameters_sha256"] for file in timed[:4]}) == 1
    before = {file: file.stat().st_mtime_ns for file in [*runs.iterdir(), *timed[:4]]}
    assert Results(folder).timings.given is False  # type: ignore[union-attr]
    # Another network can be given afterwards: what is judged does not follow from it.
    values = json.loads(path.read_text())
    values["study"]["timing"] |= {"latency_us": 7.0, "bandwidth_gb_per_s": 3.0}
    path.write_text(json.dumps(values))
    assert study(str(path)) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    timings = Results(folder).timings
    assert timings is not None and timings.measured is not None and timings.given
    assert (timings.measured.latency_s, timings.measured.bytes_per_s) == pytest.approx((7e-6, 3e9))
