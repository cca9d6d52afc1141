"""Texts at every world size: the same bits, the whole batch's own gradient, and a folder that transformers loads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed.jobs import ROOT, first_gradient, small_config, train
from tests.distributed.test_exactness import BF16, same_everywhere
from tests.standing import run_ranks
from trainer.config.keys import Config, load_config
from trainer.data.token_rows import IGNORED
from trainer.exact.order import epoch_order, key
from trainer.ranks.place import Ranks
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.text_classification import TextClassification

SHARED = ROOT.parent / "shared" / "data"
BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}
WORDS = ["red", "green", "blue", "cold", "warm"]


def use_caches_beside(config: Config) -> None:
    folder = Path(config.trainer.output_dir or "").parent
    os.environ["TRAINER_CACHE"], os.environ["HF_DATASETS_CACHE"] = str(folder / "cache"), str(folder / "datasets")


def train_here(ranks: Ranks, config: Config) -> dict[str, Any]:
    """A run whose caches lie in the test's folder; its ranks build them together."""
    use_caches_beside(config)
    return train(ranks, config)


def first_gradient_here(ranks: Ranks, config: Config) -> list[Any]:
    use_caches_beside(config)
    return first_gradient(ranks, config)


pytestmark = pytest.mark.usefixtures("own_caches")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def classification(folder: Path, **options: Any) -> dict[str, Any]:
    """60 texts of 2 to 9 words in three uneven classes."""
    random = np.random.default_rng(0)
    names = [("a", "b", "c")[min(i % 6, 2)] for i in range(60)]
    texts = [" ".join([n, *random.choice(WORDS, random.integers(1, 8)).tolist(), str(i)]) for i, n in enumerate(names)]
    data = write(folder / "texts.jsonl", [{"text": t, "label": n} for t, n in zip(texts, names)])
    return {"data": data, "model": BERT, "class_weights": "balanced", "label_smoothing": 0.1} | options


def language(folder: Path, **options: Any) -> dict[str, Any]:
    """60 records whose completions have 1 to 9 characters."""
    rows = [{"prompt": f"{i}:", "completion": WORDS[i % 5] * (1 + i % 2)} for i in range(60)]
    return {"data": write(folder / "records.jsonl", rows), "model": GPT2} | options


def prose(folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "prose.txt").write_text("To be, or not to be: that is the question.\n" * 24)
    return {"data": str(folder / "prose.txt"), "model": GPT2} | options


def config(path: Path, task: str, options: dict[str, Any], **extra: Any) -> Config:
    # 54 samples: two steps of 5 micro-batches of 4, and one of 14 samples in 4.
    sizes = {"train_batch_size": 20, "train_micro_batch_size_per_gpu": 4, "epochs": 2}
    return small_config(path, task=task, task_options=options, **(sizes | extra))


@pytest.mark.parametrize(
    ("task", "make", "precision"),
    [
        ("text_classification", classification, {}),
        ("text_classification", classification, BF16),
        ("causal_lm", language, {}),
        ("causal_lm", language, BF16),
        ("causal_lm", prose, {}),
    ],
    ids=["classification-fp32", "classification-bf16", "records-fp32", "records-bf16", "packed-fp32"],
)
def test_the_same_bits_at_every_world_size(tmp_path: Path, task: str, make: Any, precision: dict[str, Any]) -> None:
    options = make(tmp_path)
    # Every rank imports transformers, which takes longer than the run: fewer world sizes where it says little more.
    world_sizes = [1, 3] if precision else [1, 2, 3]
    summary = same_everywhere(lambda W: config(tmp_path / str(W), task, options, **precision), world_sizes, train_here)
    metrics = summary["metrics"]["validation"]
    expected = {"accuracy", "macro_f1"} if task == "text_classification" else {"perplexity", "bits_per_byte"}
    assert expected <= set(metrics)
    if precision:
        return
    # What rank 0 wrote is what transformers loads, and it measures the same.
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cls = {"text_classification": TextClassification, "causal_lm": CausalLM}[task]
    auto = {"text_classification": AutoModelForSequenceClassification, "causal_lm": AutoModelForCausalLM}[task]
    ours: Any = cls(**options)
    split = ours.splits()["validation"]
    model = auto.from_pretrained(tmp_path / "2" / "model").eval()
    with torch.no_grad():
        outputs = ours.forward(model, split.arrays)
    again = ours.metrics(outputs, split.arrays)
    for name in expected:
        assert again[name] == pytest.approx(metrics[name], rel=1e-5)


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("text_classification", classification),
        pytest.param("causal_lm", language, marks=pytest.mark.slow),
    ],
    ids=["classes", "records"],
)
def test_packs_of_equal_lengths_change_no_bit(tmp_path: Path, task: str, make: Any) -> None:
    """Equal shapes lie anywhere in a rank's block: what they share is computed in another order than the block's."""
    options, packs = make(tmp_path), {2: 1, 1: 8, 3: 4}
    sizes = {"train_batch_size": 54, "train_micro_batch_size_per_gpu": 2}  # 27 micro-batches of 2 to 10 tokens
    same_everywhere(lambda W: config(tmp_path / str(W), task, options, pack=packs[W], **sizes), [2, 1, 3], train_here)
    for W in (1, 3):
        used = json.loads((tmp_path / str(W) / "summary.json").read_text())["pack"]
        assert used["size"] == packs[W] and "refused" not in used


def batch_and_model(task: Any) -> tuple[Any, Any, torch.Tensor]:
    """The first global batch of a run, and the model it starts from, in float64."""
    split = task.splits()["train"]
    torch.default_generator.manual_seed(key(0, "model"))
    model = task.model().double().eval()
    indices = epoch_order(0, 0, len(split))[:20]
    return split.gather(indices), model, split.lengths[indices]


def compare(found: list[Any], model: Any, loss: torch.Tensor, others: torch.Tensor) -> None:
    """The run's gradient is that of `loss` and not that of `others`."""
    parameters = list(model.parameters())
    right = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
    wrong = torch.cat([g.flatten() for g in torch.autograd.grad(others, parameters)])
    ours = torch.cat([torch.from_numpy(g).double().flatten() for g in found])
    distance = float((ours - right).norm() / right.norm())
    assert distance < 1e-5, distance
    assert float((wrong - right).norm() / right.norm()) > 100 * max(distance, 1e-6), "the naive way is another gradient"


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_a_weighted_gradient_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """Against torch's weighted mean with label smoothing, over the 20 samples at once, padding masked."""
    options = classification(tmp_path, model=BERT | STILL)
    task = TextClassification(**options)
    batch, model, _ = batch_and_model(task)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    share = task.splits()["train"].arrays["label"].bincount().double()
    weights = share.sum() / (3 * share)

    def mean(rows: slice) -> torch.Tensor:
        return F.cross_entropy(logits[rows], batch["label"][rows], weight=weights, label_smoothing=0.1)

    naive = torch.stack([mean(slice(i, i + 4)) for i in range(0, 20, 4)]).mean()
    run = config(tmp_path / "run", "text_classification", options, gradient_clipping=0.0)
    compare(run_ranks(first_gradient_here, 2, run)[0], model, mean(slice(0, 20)), naive)


def test_a_language_models_gradient_is_that_of_the_mean_over_all_valid_tokens(tmp_path: Path) -> None:
    """Micro-batches with different numbers of tokens: averaging their means would weigh tokens unevenly."""
    still = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    options = language(tmp_path, model=GPT2 | still)
    batch, model, lengths = batch_and_model(CausalLM(**options))
    nll: list[torch.Tensor] = []
    counts: list[int] = []
    for ids, targets, length in zip(batch["input_ids"], batch["targets"], lengths.tolist()):
        logits = model(input_ids=ids[None, :length]).logits[0]  # each row alone, without padding
        valid = targets[:length] != IGNORED
        nll.append(-torch.log_softmax(logits[valid], 1).gather(1, targets[:length][valid][:, None]).sum())
        counts.append(int(valid.sum()))
    mean = torch.stack(nll).sum() / sum(counts)
    naive = torch.stack([sum(nll[i : i + 4]) / sum(counts[i : i + 4]) for i in range(0, 20, 4)]).mean()  # type: ignore[arg-type]
    run = config(tmp_path / "run", "causal_lm", options, gradient_clipping=0.0)
    compare(run_ranks(first_gradient_here, 2, run)[0], model, mean, naive)


def real(name: str, data: str, tmp_path: Path, **extra: Any) -> Config:
    file = SHARED / data
    if not file.is_file():
        pytest.skip(f"needs the data set {data} in ../shared/data, beside the project")
    overrides = {
        "trainer.task_options.data": str(file),
        "trainer.output_dir": str(tmp_path / "run"),
        "tensorboard": {"enabled": False},
    }
    return load_config(ROOT / "ds_configs" / f"{name}.json", overrides | extra)


@pytest.mark.slow
def test_questions_are_told_apart(tmp_path: Path) -> None:
    """TREC's six kinds of questions, by the config as it is."""
    summary = run_ranks(train_here, 2, real("text_classification", "trec6/trec6.parquet", tmp_path))[0]
    assert summary["metrics"]["test"]["accuracy"] >= 0.82


@pytest.mark.slow
def test_shakespeare_is_learnt(tmp_path: Path) -> None:
    """A fifth of the config's run: far below the 3.3 nats of the characters' frequencies."""
    tiny = real("causal_lm", "tinyshakespeare/input.txt", tmp_path, **{"trainer.max_steps": 400})
    summary = run_ranks(train_here, 2, tiny)[0]
    assert summary["metrics"]["validation"]["loss"] < 2.4


def whole(path: Path, **extra: Any) -> Config:
    bert = BERT | {"num_hidden_layers": 2}
    options = {"task": "text_classification", "task_options": classification(path.parent, model=bert)}
    return small_config(
        path, **{"train_batch_size": 20, "train_micro_batch_size_per_gpu": 4, "epochs": 2} | options | extra
    )


def test_low_rank_updates_of_a_transformer(tmp_path: Path) -> None:
    """The same bits at every world size; the merged model loads in transformers, the adapter in peft."""
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    same_everywhere(lambda W: whole(tmp_path / str(W), lora={"rank": 2, "dropout": 0.1}), [1, 3], train_here)
    folder = tmp_path / "3"
    text = AutoTokenizer.from_pretrained(folder / "model")(
        ["a red cold 1", "b green 2"], padding=True, return_tensors="pt"
    )
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.inference_mode():
        expected = merged(**text).logits
    # The same weights with the updates beside them, not added: the model at its start, and the adapter.
    torch.default_generator.manual_seed(key(0, "model"))
    task = TextClassification(**classification(tmp_path, model=BERT | {"num_hidden_layers": 2}))
    task.splits()
    start = task.model()
    adapted = peft.PeftModel.from_pretrained(start, str(folder / "adapter")).eval()
    with torch.inference_mode():
        logits = adapted(**text).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_keeps_the_bits(tmp_path: Path) -> None:
    plain = run_ranks(train_here, 1, whole(tmp_path / "plain"))[0]
    saving = run_ranks(train_here, 2, whole(tmp_path / "saving", gradient_checkpointing=True))[0]
    assert saving["trace"] == plain["trace"]


@pytest.mark.slow
def test_a_compiled_transformer_is_exact(tmp_path: Path) -> None:
    same_everywhere(lambda W: whole(tmp_path / str(W), compile=True), [1, 2], train_here)
