"""The task text_classification: what it makes of data, keeps in its cache, refuses, saves and predicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data import tables, text
from trainer.data.cache import folder as cache_folder
from trainer.errors import UserError
from trainer.tasks.text_classification import TextClassification

BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16,
}  # fmt: skip
WORDS = ["red", "green", "blue", "cold", "warm", "old", "new", "far", "near", "big"]


def rows(count: int = 60, classes: tuple[Any, ...] = ("ham", "spam"), seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 1 to 9 words, the first of which tells the class."""
    random = np.random.default_rng(seed)
    result = []
    for i in range(count):
        extra = random.choice(WORDS, random.integers(0, 8)).tolist()
        result.append({"text": " ".join([WORDS[i % len(classes)], *extra, str(i)]), "label": classes[i % len(classes)]})
    return result


def write(path: Path, content: list[dict[str, Any]]) -> str:
    import pandas as pd

    pd.DataFrame(content).to_csv(path, index=False)
    return str(path)


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "data.csv", rows())


def made(**options: Any) -> tuple[TextClassification, Any, Any]:
    """A task with its splits and its model."""
    task = TextClassification(**{"model": BERT, **options})
    splits = task.splits()
    torch.manual_seed(0)
    return task, splits, task.model()


def test_splits_and_padding(data: str) -> None:
    task, splits, model = made(data=data)
    assert {name: len(split) for name, split in splits.items()} == {"train": 54, "validation": 6}
    assert splits["validation"].arrays["label"].bincount().tolist() == [3, 3], "of each class alike"
    tokenizer = task._tokenizer()
    kept = [r for r in rows() if r["text"] in {t["text"] for t in rows()}]
    assert len(kept) == 60
    train = splits["train"]
    ids, mask, lengths = train.arrays["input_ids"], train.arrays["attention_mask"], train.lengths
    assert ids.dtype == mask.dtype == torch.int64
    assert train.padded == ("input_ids", "attention_mask")
    np.testing.assert_array_equal(mask.sum(1), lengths)
    assert ids.shape[1] == int(lengths.max()), "no more padding than the longest text needs"
    for row, length in zip(ids, lengths.tolist(), strict=True):
        assert (row[0], row[length - 1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert (row[length:] == tokenizer.pad_token_id).all()
    config: Any = model.config
    assert (config.vocab_size, config.pad_token_id, config.id2label) == (len(tokenizer), 0, {0: "ham", 1: "spam"})


def test_padding_changes_no_logit(data: str) -> None:
    task, splits, model = made(data=data)
    train = splits["train"]
    model = model.double().eval()
    with torch.no_grad():
        together = task.forward(model, train.arrays)
        for i, length in enumerate(train.lengths.tolist()):
            alone = {name: train.arrays[name][i : i + 1, :length] for name in train.padded}
            torch.testing.assert_close(task.forward(model, alone)[0], together[i], atol=1e-9, rtol=1e-9)


def test_class_weights_are_the_counts(data: str, tmp_path: Path) -> None:
    uneven = write(tmp_path / "uneven.csv", [r for i, r in enumerate(rows()) if i % 2 == 0 or i < 20])
    task, splits, model = made(data=uneven, class_weights="balanced", label_smoothing=0.1)
    train = splits["train"]
    weights = 36 / (2 * train.arrays["label"].bincount().double())
    assert len(train) == 36
    torch.testing.assert_close(train.counts.double(), weights[train.arrays["label"]])
    logits = task.forward(model.eval(), train.arrays)
    loss, count = task.loss(logits, train.arrays)
    expected = torch.nn.functional.cross_entropy(
        logits.double(), train.arrays["label"], weight=weights, label_smoothing=0.1
    )
    assert float(loss.detach()) / train.count_of(torch.arange(36)) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(count) == pytest.approx(36.0)


def test_a_second_start_needs_neither_datasets_nor_a_tokenizer(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = {"max_length": 5, "truncate": True}
    task, cold, _ = made(data=data, **shorter)
    assert any("longer than 5 tokens" in note and note.endswith("cut there") for note in task.notes)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        for module, name in ((tables, "read"), (text, "encode"), (text, "build_words"), (text, "wrap")):
            patch.setattr(module, name, never)
        again, warm, _ = made(data=data, **shorter)
    assert again.notes == task.notes
    for name, split in cold.items():
        assert split.data_hash() == warm[name].data_hash()
        assert split.padded == warm[name].padded
    files = sorted(cache_folder().glob("*.safetensors"))
    assert len(files) == 1
    write(Path(data), rows(58))
    _, changed, _ = made(data=data, **shorter)
    assert len(changed["train"]) == 52, "another content of the same file"
    made(data=data, max_length=6, truncate=True)
    assert len(list(cache_folder().glob("*.safetensors"))) == 3


def test_a_hub_dataset_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_list(rows())
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> Any:
        calls.append(arguments)
        return datasets.DatasetDict({"train": table, "unsupervised": table.select(range(3))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _, cold, _ = made(data="someone/texts", config_name="en")
    _, warm, _ = made(data="someone/texts", config_name="en")
    assert calls == [("someone/texts", "en")] * 2
    assert len(list(cache_folder().glob("*.safetensors"))) == 1
    assert cold["train"].data_hash() == warm["train"].data_hash()
    table = table.select(range(50))
    assert len(made(data="someone/texts", config_name="en")[1]["train"]) == 46


def test_an_interrupted_build_leaves_nothing(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(text, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(data=data)
    assert not list(cache_folder().glob("*.safetensors"))
    _, splits, _ = made(data=data)
    assert len(splits["train"]) == 54


def test_what_is_saved_is_what_the_auto_classes_load(data: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task, splits, model = made(data=data, max_length=8, truncate=True)
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model.eval(), folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 8
    sample = [r["text"] for r in rows()[:7]]
    inputs = tokenizer(sample, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = torch.softmax(again(**inputs).logits, 1)

    source = tmp_path / "new.txt"
    source.write_text("\n".join([*sample, "red " * 20]) + "\n")
    fresh = TextClassification(data="gone.csv", model=BERT, max_length=8, truncate=True)
    found = list(fresh.predict(fresh.load(folder), source, 3))
    assert [row["text"] for row in found[:7]] == sample
    assert [row["label"] for row in found[:7]] == [("ham", "spam")[i] for i in expected.argmax(1)]
    np.testing.assert_allclose([row["score"] for row in found[:7]], expected.amax(1), atol=1e-5)
    assert "the longest, in row 8, has 22): cut there" in fresh.notes[0]
    # The data's own splits, through the saved model, give the outputs of the trained one.
    with torch.no_grad():
        torch.testing.assert_close(
            task.forward(again, splits["train"].arrays), task.forward(model, splits["train"].arrays)
        )


def test_a_saved_folder_is_a_pretrained_model(data: str, tmp_path: Path) -> None:
    task, _, model = made(data=data)
    folder = tmp_path / "model"
    folder.mkdir()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[1:] += 1.0
    config: Any = model.config
    config.id2label, config.label2id = {0: "Spam", 1: "Ham"}, {"Spam": 0, "Ham": 1}  # another order
    task.save(model, folder)
    tuned, splits, again = made(data=data, model=str(folder))
    assert again.config.id2label == {0: "spam", 1: "ham"}, "the folder's order, the data's names"
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert tuned.notes == []
    # Three classes need a new head, and only if somebody says so.
    three = write(tmp_path / "three.csv", rows(60, ("a", "b", "c")))
    with pytest.raises(
        UserError, match=r'(?s)was trained for 2 classes, but the data has 3 \(a, b, c\).*"new_head": true'
    ):
        made(data=three, model=str(folder))
    headed, _, head = made(data=three, model=str(folder), new_head=True)
    assert head.classifier.weight.shape == (3, 16)
    assert any("has no weights for classifier" in note for note in headed.notes)
    _, _, new = made(data=data, model=str(folder), pretrained=False)
    assert not torch.equal(new.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)
    assert len(splits["train"]) == 54
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r'(?s)has no weights .*"pretrained": false'):
        made(data=data, model=str(folder))


def test_pairs_of_texts(tmp_path: Path) -> None:
    pairs = [{"premise": r["text"], "hypothesis": "warm red", "label": i % 2} for i, r in enumerate(rows(20))]
    task, splits, model = made(
        data=write(tmp_path / "pairs.csv", pairs), text_column="premise", pair_column="hypothesis", max_length=16
    )
    arrays = splits["train"].arrays
    assert arrays["token_type_ids"].sum(1).tolist() == [3] * 18, "two words and the end mark"
    assert splits["train"].padded == ("input_ids", "attention_mask", "token_type_ids")
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model.eval(), folder)
    source = write(tmp_path / "new.csv", pairs)
    with torch.no_grad():
        kept = splits["train"].arrays
        expected = torch.softmax(task.forward(model, kept), 1).amax(1)
    found = list(task.predict(task.load(folder).eval(), source, 50))
    assert set(found[0]) == {"premise", "hypothesis", "label", "score"}
    scores = [row["score"] for row in found]
    for value in expected.tolist():
        assert min(abs(value - score) for score in scores) < 1e-5


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    renamed = [{"id": i, "headline": r["text"], "kind": r["label"]} for i, r in enumerate(rows())]
    file = write(tmp_path / "a.csv", renamed)
    with pytest.raises(UserError, match=r"label_column.*The data has: id, headline, kind"):
        made(data=file)
    with pytest.raises(UserError, match=r"text_column.*The data has: id, headline, kind"):
        made(data=file, label_column="kind")
    _, splits, _ = made(data=file, label_column="kind", text_column="headline")
    assert len(splits["train"]) == 54
    only = write(tmp_path / "b.csv", [{"headline": r["text"], "label": i % 3} for i, r in enumerate(rows())])
    _, _, model = made(data=only)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    test = write(tmp_path / "c.csv", rows())
    with pytest.raises(UserError, match=r'test has no column "headline". It has: text, label'):
        made(data={"train": only, "test": test})


def bad(tmp_path: Path, change: dict[int, dict[str, Any]]) -> str:
    return write(tmp_path / "bad.csv", [r | change.get(i, {}) for i, r in enumerate(rows())])


def test_bad_data_is_refused(tmp_path: Path, data: str) -> None:
    with pytest.raises(UserError, match=r'1 value of the column "text" in train is missing \(row 4'):
        made(data=bad(tmp_path, {3: {"text": None}}))
    with pytest.raises(UserError, match=r'2 values of the column "label" in train are missing \(rows 4, 6'):
        made(data=bad(tmp_path, {3: {"label": None}, 5: {"label": None}}))
    (tmp_path / "test.csv").write_text("text,label\na b,eggs\n")
    with pytest.raises(
        UserError, match=r"The label 'eggs' occurs 1 time in test, but never in train.* Train has: ham, spam"
    ):
        made(data={"train": data, "test": str(tmp_path / "test.csv")})
    with pytest.raises(
        UserError,
        match=r"1 of the 54 texts in train is longer than 16 tokens \(.*row 4, has 32\), which is what the model",
    ):
        made(data=bad(tmp_path, {3: {"text": "red " * 30}}))
    with pytest.raises(UserError, match=r'(?s)longer than 4 tokens .*max_length".*"truncate": true'):
        made(data=data, max_length=4)
    with pytest.raises(UserError, match=r'model.num_labels" is 5, but the data has 2 classes'):
        made(data=data, model=BERT | {"num_labels": 5})
    with pytest.raises(UserError, match=r"has 10 tokens|embeddings for 6"):
        made(data=data, model=BERT | {"vocab_size": 6})
    both = write(tmp_path / "same.csv", [*rows(10, seed=5), *rows(3)])
    task, _, _ = made(data={"train": data, "test": both}, validation_fraction=0)
    assert task.notes == ["3 of the 13 samples of test are also in train, so its metrics are too good"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": 3}, '"trainer.task_options.model" is 3'),
        ({"model": {"hidden_size": 3}}, "or a configuration to build one from"),
        ({"pretrained": "no"}, 'pretrained" must be true or false, not "no"'),
        ({"new_head": True}, 'new_head" has no effect'),
        ({"text_column": 3}, 'text_column" must be a string, not 3'),
        ({"model": "folder", "tokenizer": "words"}, "were trained with another one"),
        ({"tokenizer": "folder", "vocabulary": 10}, 'has an effect only on the tokenizers "words"'),
        ({"vocabulary": 0}, "at least 1"),
        ({"max_length": 2}, "at least 3"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"label_smoothing": 1}, "below 1"),
        ({"data": 3}, "must be a file, a folder"),
        ({"config_name": "en"}, "only on datasets of the hub"),
    ],
)
def test_options_that_make_no_sense(data: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextClassification(**{"data": data, "model": BERT, **options})


def test_options_that_only_show_with_the_model_and_the_data(data: str) -> None:
    with pytest.raises(UserError, match=r'max_length" is 17, but the model takes 16 tokens at most'):
        made(data=data, max_length=17)
    for kind, words in (("xlnet", "padding on the left"), ("bart", "an encoder with a decoder")):
        with pytest.raises(UserError, match=words):
            made(data=data, model={"model_type": kind})
    with pytest.raises(UserError, match=r'unknown model_type "bertt". Did you mean "bert"'):
        made(data=data, model=BERT | {"model_type": "bertt"})
    with pytest.raises(UserError, match=r'unknown key "hiden_size" for bert. Did you mean "hidden_size"'):
        made(data=data, model=BERT | {"hiden_size": 8})
    with pytest.raises(UserError, match=r'must be "balanced"'):
        made(data=data, class_weights="even")


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "roberta", "max_position_embeddings": 24, **SIZES},
        {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
        {"model_type": "modernbert", "max_position_embeddings": 16, **SIZES},
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
        {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 16, **SIZES},
    ],
    ids=lambda model: model["model_type"],
)
def test_models_of_other_kinds(data: str, model: dict[str, Any]) -> None:
    """Padding changes no logit: the padding token is the tokenizer's, and stands to the right."""
    task, splits, network = made(data=data, model=model)
    train = splits["train"]
    network = network.double().eval()
    with torch.no_grad():
        together = task.forward(network, train.arrays)
        for i in (0, int(train.lengths.argmin()), int(train.lengths.argmax())):
            alone = {name: train.arrays[name][i : i + 1, : int(train.lengths[i])] for name in train.padded}
            torch.testing.assert_close(task.forward(network, alone)[0], together[i], atol=1e-9, rtol=1e-9)


# --- data as the user gave it -----------------------------------------------------------------------------------------


def test_a_run_says_what_it_read(tmp_path: Path) -> None:
    named = [{"id": i, "utterance": r["text"], "stars": r["label"]} for i, r in enumerate(rows())]
    options = {"data": write(tmp_path / "a.csv", named), "text_column": "utterance", "label_column": "stars"}
    expected = [
        "60 rows: train 42, validation 6 (held out of train), test 12 (held out of train)",
        'text from "utterance", label from "stars"; not read: id',
        "2 classes (train + validation + test): ham 21 + 3 + 6, spam 21 + 3 + 6",
    ]
    for _ in range(2):  # the second time from the cache
        task, splits, _ = made(**options, test_fraction=0.2)
        assert task.data_lines[:3] == expected
        assert task.data_lines[3].startswith("first sample: '")
    assert {name: len(split) for name, split in splits.items()} == {"train": 42, "validation": 6, "test": 12}
    with pytest.raises(UserError, match="leave nothing to train on"):
        made(**options, test_fraction=0.9)


def test_a_content_that_changes_while_time_and_size_stay(tmp_path: Path) -> None:
    file = tmp_path / "z.csv"
    said = []
    for word in ("panda", "tiger"):
        write(file, [{"text": f"{word} {i % 3}", "label": i % 2} for i in range(40)])
        os.utime(file, (1_200_000_000,) * 2)
        said.append(made(data=str(file))[0].data_lines[3])
    assert said == ["first sample: 'panda 0' -> 0", "first sample: 'tiger 0' -> 0"]


def test_words_that_mean_nothing_to_pandas(tmp_path: Path) -> None:
    words = ["None", "NA", "null", "nan", "007", "012"]
    task, _, model = made(data=write(tmp_path / "a.csv", rows(60, tuple(words))))
    assert list(model.config.id2label.values()) == sorted(words)
    texts = [{"text": ("null", "NA", "cat")[i % 3], "label": i % 2} for i in range(30)]
    task, _, _ = made(data=write(tmp_path / "b.csv", texts), max_length=8)
    assert task.data_lines[3] == "first sample: 'null' -> 0"
    new = write(tmp_path / "new.csv", [{"text": "NA"}, {"text": "None"}])
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(task.model().eval(), folder)
    assert [row["text"] for row in task.predict(task.load(folder), new, 8)] == ["NA", "None"]


THAI = [{"text": f"ภาพยนตร์เรื่องนี้{'ดีมาก' if i % 2 else 'แย่มาก'}{i}", "label": i % 2} for i in range(40)]


def test_texts_without_repeated_words_get_subwords(tmp_path: Path) -> None:
    data = write(tmp_path / "thai.csv", THAI)
    longer = BERT | {"max_position_embeddings": 64}
    task, splits, _ = made(data=data, model=longer)
    assert any('the tokenizer is "subwords" instead of "words"' in note for note in task.notes)
    assert not (splits["train"].arrays["input_ids"] == task._tokenizer().unk_token_id).any()
    named, again, _ = made(data=data, model=longer, tokenizer="subwords")
    assert again["train"].data_hash() == splits["train"].data_hash()
    assert named.notes == []
    with pytest.raises(UserError, match=r'(?s)100% of train.* is unknown to the tokenizer "words".*"subwords"'):
        made(data=data, model=longer, tokenizer="words")


def test_prediction_reads_a_file_as_training_did(tmp_path: Path) -> None:
    named = [{"id": i, "utterance": r["text"], "stars": r["label"]} for i, r in enumerate(rows())]
    options = {"text_column": "utterance", "label_column": "stars", "encoding": "latin-1", "max_length": 12}
    task, _, model = made(data=write(tmp_path / "a.csv", named), **options)
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model.eval(), folder)
    fresh = TextClassification(data="gone.csv", model=BERT, **options)
    loaded = fresh.load(folder)

    def read(name: str, content: str) -> list[Any]:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        return [row[next(iter(row))] for row in fresh.predict(loaded, tmp_path / name, 8)]

    assert read("new.txt", "a red café\nNA\n") == ["a red café", "NA"]
    assert read("new[1].csv", "id;utterance\n1;a, b\n") == ["a, b"]
    assert read("new1.csv", "utterance\nanother\n") == ["another"]
    assert read("new.tsv", 'id\tutterance\n1\t"two\n2\t"words\n') == ['"two', '"words']
    with pytest.raises(UserError, match=r'--input .*new.csv has no column "utterance". It has: text, label'):
        read("new.csv", "text,label\na,b\n")
    (tmp_path / "texts" / "in").mkdir(parents=True)
    for name in ("in/1", "2.txt", "3.png"):
        (tmp_path / "texts" / name).write_text("a red\nfox")
    assert [row["file"] for row in fresh.predict(loaded, tmp_path / "texts", 8)] == ["2.txt", "in/1"]
    assert "1 file left out (no text): 3.png" in fresh.notes


def test_a_competitions_test_file_has_no_labels(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.csv", rows())
    write(folder / "test.csv", [{"text": "red"}] * 7)
    write(folder / "sample_submission.csv", [{"id": 1, "label": "ham"}])
    task, splits, _ = made(data=str(folder), test_fraction=0.1)
    assert len(splits["test"]) == 6
    assert task.notes == [
        "1 file left out (no table that is called like a split): sample_submission.csv",
        '7 rows of test left out: there is no column "label"',
    ]


def test_groups_stay_in_one_split(tmp_path: Path) -> None:
    grouped = [r | {"author": i // 5} for i, r in enumerate(rows())]
    task, splits, _ = made(data=write(tmp_path / "a.csv", grouped), group_column="author", test_fraction=0.2)
    assert {name: len(split) for name, split in splits.items()} == {"train": 45, "validation": 5, "test": 10}
    assert 'group from "author"' in task.data_lines[1]
    with pytest.raises(UserError, match=r'group_column": train has no column "writer"'):
        made(data=write(tmp_path / "a.csv", grouped), group_column="writer")
