"""The task token_classification: its rows, loss, metrics, predictions and what it saves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.data.token_rows import IGNORED
from trainer.errors import UserError
from trainer.tasks.token_classification import TokenClassification

BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 32,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_caches")


def conll(path: Path, count: int = 60, tags: tuple[str, ...] = ("B-per", "I-per", "O")) -> str:
    """Sentences of 2 to 9 words, of which the first two are a name."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(count):
        words = [f"Ann{i % 3}", "Lee", *random.choice(["goes", "home", "again"], random.integers(0, 8)).tolist()]
        own = [tags[min(place, 2)] for place in range(len(words))]
        lines += [f"{word}\t{tag}" for word, tag in zip(words, own)] + [""]
    path.write_text("\n".join(lines))
    return str(path)


def made(**options: Any) -> tuple[TokenClassification, Any, Any]:
    """A task with its splits and its model."""
    task = TokenClassification(**{"model": BERT, **options})
    splits = task.splits()
    torch.manual_seed(0)
    return task, splits, task.model()


def test_rows_loss_and_metrics(tmp_path: Path) -> None:
    task, splits, model = made(data=conll(tmp_path / "a.conll"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 54, "validation": 6}
    train = splits["train"]
    labels = train.arrays["labels"]
    assert torch.equal(train.counts, (labels != IGNORED).sum(1).float())
    assert torch.equal(train.arrays["attention_mask"].sum(1), train.lengths)
    with torch.no_grad():
        outputs = task.forward(model.eval(), train.arrays)
    loss, count = task.loss(outputs, train.arrays)
    logits = model.eval()(input_ids=train.arrays["input_ids"], attention_mask=train.arrays["attention_mask"]).logits
    expected = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert float(loss / count) == pytest.approx(float(expected.detach()), rel=1e-5), "the mean over words"
    right = {"nll": outputs["nll"], "tags": F.pad(labels.clamp(min=0), (0, 3))}
    assert task.metrics(right, train.arrays) == {
        "accuracy": 1.0, "entity_precision": 1.0, "entity_recall": 1.0, "entity_f1": 1.0,
    }  # fmt: skip
    assert task.best_metric == ("entity_f1", "max")
    assert task.predictions(right, train.arrays)["target"][0].startswith("B-per I-per")
    assert set(task.forward(model.train(), train.arrays)) == {"nll"}


def test_padding_changes_no_loss(tmp_path: Path) -> None:
    task, splits, model = made(data=conll(tmp_path / "a.conll"))
    train, model = splits["train"], model.double().eval()
    with torch.no_grad():
        together = task.forward(model, train.arrays)["nll"]
        for i, length in enumerate(train.lengths.tolist()):
            alone = train.arrays | {name: train.arrays[name][i : i + 1, :length] for name in train.padded}
            torch.testing.assert_close(task.forward(model, alone)["nll"][0], together[i], atol=1e-5, rtol=1e-5)


def test_tags_that_are_no_entities(tmp_path: Path) -> None:
    task, splits, _ = made(data=conll(tmp_path / "a.conll", tags=("NOUN", "NAME", "VERB")))
    train = splits["train"].arrays
    assert set(task.metrics({"tags": train["labels"]}, train)) == {"accuracy", "macro_f1"}
    assert task.best_metric == ("loss", "min")


def test_what_is_saved_predicts_every_word(tmp_path: Path) -> None:
    from transformers import pipeline

    task, _, model = made(data=conll(tmp_path / "a.conll"))
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model.eval(), folder)
    fresh = TokenClassification(data="gone.conll", model=BERT)
    loaded = fresh.load(folder)
    long = ["Ann1", "Lee", *["home"] * 60]
    (tmp_path / "new.txt").write_text(f"{' '.join(long)}\n\nAnn2 Lee \u200b goes\n")
    (tmp_path / "new.jsonl").write_text('{"tokens": ["Ann1", "Lee"]}\n')
    (tmp_path / "new.conll").write_text("Ann1\nLee\n\ngoes\n")
    rows = list(fresh.predict(loaded, tmp_path / "new.txt", 2))
    assert [row["word"] for row in rows] == [*long, "Ann2", "Lee", "\u200b", "goes"], "longer than the model takes"
    assert [row["sentence"] for row in rows] == [1] * 62 + [2] * 4
    assert {row["tag"] for row in rows} <= {"O", "B-per", "I-per"}
    assert [r["word"] for r in fresh.predict(loaded, tmp_path / "new.jsonl", 2)] == ["Ann1", "Lee"]
    assert [r["sentence"] for r in fresh.predict(loaded, tmp_path / "new.conll", 2)] == [1, 1, 2]
    tagged_file = tmp_path / "test.txt"
    tagged_file.write_text("Ann1\tB-per\nLee\tI-per\n\ngoes\tO\n")
    assert [r["word"] for r in fresh.predict(loaded, tagged_file, 2)] == ["Ann1", "Lee", "goes"], "as in training"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says how it tells words apart
        shown = pipeline("token-classification", model=str(folder), aggregation_strategy="first")("Ann1 Lee goes home")
    assert all({"entity_group", "word", "score"} <= set(found) for found in shown)


def test_long_sentences_are_refused_or_cut(tmp_path: Path) -> None:
    data = conll(tmp_path / "a.conll")
    with pytest.raises(UserError, match=r"(?s)longer than 6 tokens \(the longest, in row .*\"truncate\": true"):
        made(data=data, max_length=6)
    task, splits, _ = made(data=data, max_length=6, truncate=True)
    assert any("words are neither learnt nor measured" in note for note in task.notes)
    assert splits["train"].arrays["labels"].shape[1] == 6 and int(splits["train"].counts.min()) >= 1


def test_a_tokenizer_of_bytes_gets_blanks_before_its_words(tmp_path: Path) -> None:
    """As roberta's and gpt2's: transformers refuses words that are given otherwise."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForTokenClassification, RobertaTokenizerFast

    folder = tmp_path / "roberta"
    folder.mkdir()
    built = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    built.train_from_iterator(["Ann0 Lee goes home again"] * 5, vocab_size=400, special_tokens=special)
    built.save_model(str(folder))
    tokenizer = RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=1, **sizes)
    RobertaForTokenClassification(config).save_pretrained(folder)
    task, splits, model = made(data=conll(tmp_path / "a.conll"), model=str(folder), new_head=True)
    assert int(splits["train"].counts.min()) >= 2
    target = tmp_path / "model"
    target.mkdir()
    task.save(model.eval(), target)
    fresh = TokenClassification(data="gone.conll", model=str(folder))
    (tmp_path / "new.txt").write_text("Ann1 Lee goes\n")
    assert len(list(fresh.predict(fresh.load(target), tmp_path / "new.txt", 2))) == 3


def test_csv_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("tokens,tags\n\"['a', 'b']\",\"['O', 'O']\"\n")
    with pytest.raises(UserError, match="A csv file has no lists"):
        made(data=str(tmp_path / "a.csv"))
