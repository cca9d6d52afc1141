"""The task causal_lm: every token predicted once, prompts out of the loss, exact means, bytes, refusals, saving."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data import text
from trainer.data.token_rows import IGNORED
from trainer.errors import UserError
from trainer.tasks.causal_lm import CausalLM

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}
PROSE = "To be, or not to be:\nthat is the question — «é日🎭».\n" * 12
RECORDS = [{"prompt": f"{i}+{i % 7}=", "completion": str(i + i % 7) + "!" * (i % 3)} for i in range(40)]


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def prose(tmp_path: Path) -> str:
    (tmp_path / "prose.txt").write_bytes(PROSE.encode())
    return str(tmp_path / "prose.txt")


@pytest.fixture
def records(tmp_path: Path) -> str:
    return lines(tmp_path / "records.jsonl", RECORDS)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(**options: Any) -> tuple[CausalLM, Any, Any]:
    """A task with its splits and its model."""
    task = CausalLM(**{"model": GPT2, **options})
    splits = task.splits()
    torch.manual_seed(0)
    return task, splits, task.model()


def mean_nll(model: Any, split: Any) -> float:
    """The mean over all valid tokens, in float64, by nothing but the definition."""
    total, count = 0.0, 0
    model = model.double().eval()
    with torch.no_grad():
        for ids, targets in zip(split.arrays["input_ids"], split.arrays["targets"], strict=True):
            logits = model(input_ids=ids[None]).logits[0]  # (tokens, vocabulary)
            for place, target in enumerate(targets.tolist()):
                if target != IGNORED:
                    z = logits[place]
                    total += float(torch.log(torch.exp(z - z.max()).sum()) + z.max() - z[target])
                    count += 1
    model.float()
    return total / count


def test_every_token_of_a_text_but_its_first_is_predicted_once(prose: str) -> None:
    task, splits, _ = made(data=prose, validation_fraction=0.2, test_fraction=0.1)
    tokenizer = task._tokenizer()
    pieces = []
    for name in ("train", "validation", "test"):
        arrays = splits[name].arrays
        ids, targets = arrays["input_ids"], arrays["targets"]
        valid = targets != IGNORED
        first = tokenizer.decode([ids[0, 0]])
        said = first + tokenizer.decode(targets[valid])
        pieces.append(said)
        assert ids.shape[1] == 16
        assert (valid[:-1]).all(), "only the last row may be cut short"
        shifted = ids.flatten()[1:][valid.flatten()[:-1]]
        np.testing.assert_array_equal(shifted[: int(valid.sum()) - 1], targets[valid][:-1])
        np.testing.assert_array_equal(splits[name].counts, valid.sum(1).float())
        np.testing.assert_array_equal(splits[name].lengths, valid.sum(1))
        assert int(arrays["bytes"].sum()) == len(said.encode()) - len(first.encode()), "exact"
    assert "".join(pieces) == PROSE, "contiguous parts, in order"
    assert len(pieces[1]) == round(len(PROSE) * 0.2)


def test_prompts_are_masked_and_completions_end(records: str) -> None:
    task, splits, _ = made(data=records)
    tokenizer = task._tokenizer()
    train = splits["train"]
    assert train.padded == ("input_ids", "targets")
    assert {name: len(split) for name, split in splits.items()} == {"train": 36, "validation": 4}
    answers = {row["prompt"]: row["completion"] for row in RECORDS}
    for ids, targets, length, size in zip(
        train.arrays["input_ids"], train.arrays["targets"], train.lengths.tolist(), train.arrays["bytes"].tolist()
    ):
        valid = targets != IGNORED
        whole = tokenizer.decode(ids[:length], skip_special_tokens=True)
        prompt = whole[: whole.index("=") + 1]
        assert tokenizer.decode(targets[valid]) == answers[prompt] + "<|endoftext|>"
        assert size == len(answers[prompt])
        assert not valid[: len(prompt) - 1].any(), "no loss for what is given"
        assert (ids[length:] == tokenizer.pad_token_id).all()
    _, packed, _ = made(data=records, packed=True)
    assert packed["train"].arrays["tokens"].sum() == train.arrays["tokens"].sum()
    assert len(packed["train"]) < len(train)


def test_padding_changes_nothing_though_nothing_masks_it(records: str) -> None:
    _, splits, model = made(data=records)
    train = splits["train"]
    model = model.double().eval()
    with torch.no_grad():
        logits = model(input_ids=train.arrays["input_ids"]).logits
        for i, length in enumerate(train.lengths.tolist()):
            alone = model(input_ids=train.arrays["input_ids"][i : i + 1, :length]).logits
            torch.testing.assert_close(alone[0], logits[i, :length], atol=1e-10, rtol=1e-10)
            masked = model(
                input_ids=train.arrays["input_ids"][i : i + 1],
                attention_mask=(torch.arange(train.arrays["input_ids"].shape[1]) < length)[None].long(),
            ).logits
            torch.testing.assert_close(masked[0, :length], logits[i, :length], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["prose", "records"])
def test_the_loss_is_the_mean_over_the_valid_tokens_of_all_micro_batches(
    kind: str, request: pytest.FixtureRequest
) -> None:
    task, splits, model = made(data=request.getfixturevalue(kind), validation_fraction=0)
    split = splits["train"]
    expected = mean_nll(model, split)
    model.eval()
    sums, means, rows = [], [], list(range(len(split)))
    with torch.no_grad():
        for part in (rows[:5], rows[5:6], rows[6:-1], rows[-1:]):  # micro-batches of unequal size
            indices = torch.tensor(part)
            batch = split.gather(indices)
            loss, count = task.loss(task.forward(model, batch), batch)
            assert float(count) == split.count_of(indices)
            sums.append(float(loss))
            means.append(float(loss) / float(count))
        outputs = task.forward(model, split.arrays)
    assert math.fsum(sums) / split.count_of(torch.arange(len(split))) == pytest.approx(expected, rel=1e-6)
    naive = sum(means) / len(means)
    assert abs(naive - expected) > 1e-4, "the mean of the means is another number"

    metrics = task.metrics(outputs, split.arrays)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    size = int(split.arrays["bytes"].sum())
    bits = expected * int(split.arrays["tokens"].sum()) / math.log(2) / size
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert 0 <= metrics["token_accuracy"] <= 1
    assert set(task.forward(model.train(), split.gather(torch.tensor([0])))) == {"nll"}, "no argmax in training"
    huge = {"nll": torch.full((1,), 1e6), "correct": torch.zeros(1)}
    one = {"tokens": torch.ones(1), "bytes": torch.zeros(1)}
    assert math.isfinite(task.metrics(huge, one)["perplexity"])
    assert "bits_per_byte" not in task.metrics(huge, one)


def test_a_second_start_needs_no_tokenizer(prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cold, _ = made(data=prose)
    with monkeypatch.context() as patch:
        for name in ("encode_with_bytes", "build_for_generation", "wrap"):
            patch.setattr(text, name, None)
        _, warm, _ = made(data=prose)
    for name, split in cold.items():
        assert split.data_hash() == warm[name].data_hash()
    Path(prose).write_bytes(PROSE.encode() * 2)
    assert len(made(data=prose)[1]["train"]) > len(cold["train"])


def test_what_is_saved_is_what_the_auto_classes_load(records: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task, splits, model = made(data=records, max_new_tokens=5)
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model.eval(), folder)
    assert "generation_config.json" in {p.name for p in folder.iterdir()}
    again, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        a, b = (task.forward(m, splits["validation"].arrays)["nll"] for m in (model, again))
    assert torch.equal(a, b)
    config: Any = model.config
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.vocab_size == len(tokenizer)

    fresh = CausalLM(data="gone.jsonl", model=GPT2, max_new_tokens=5)
    source = lines(tmp_path / "new.jsonl", [{"prompt": "1+2="}, {"prompt": "3" * 40}])
    found = list(fresh.predict(fresh.load(folder), source, 8))
    assert [row["prompt"] for row in found] == ["1+2=", "3" * 40], "a prompt longer than the model keeps its end"
    ids = tokenizer("1+2=", return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            nxt = again(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, nxt.view(1, 1)], 1)
        if int(nxt) == tokenizer.eos_token_id:
            break
    assert found[0]["completion"] == tokenizer.decode(ids[0, 4:], skip_special_tokens=True)
    (tmp_path / "prompts.txt").write_text("1+1=\n2+2=\n")
    assert [row["prompt"] for row in fresh.predict(again, tmp_path / "prompts.txt", 8)] == ["1+1=", "2+2="]


def test_a_saved_folder_is_a_pretrained_model(records: str, tmp_path: Path) -> None:
    task, splits, model = made(data=records)
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model, folder)
    _, tuned_splits, tuned = made(data=records, model=str(folder))
    assert tuned_splits["train"].data_hash() == splits["train"].data_hash(), "its own tokenizer"
    for a, b in zip(model.state_dict().values(), tuned.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r'(?s)has no weights .*"pretrained": false'):
        made(data=records, model=str(folder))


def test_records_of_text_and_words(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [{"text": f"row number {i} is here"} for i in range(30)])
    task, splits, _ = made(data=file, tokenizer="words", packed=False)
    tokenizer = task._tokenizer()
    ends = splits["train"].arrays["targets"]
    assert (ends == tokenizer.eos_token_id).sum() == 27, "each record ends"
    assert any("are unknown to the tokenizer" in note for note in task.notes), "numbers that come once"
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"the book {name}. " * 9)
    _, books, _ = made(data=str(folder))
    assert set(books) == {"train", "validation"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_column": "a"}, "go together"),
        ({"prompt_column": "a", "completion_column": "b", "text_column": "c"}, "give a text_column, or prompt_column"),
        ({"packed": True, "truncate": True}, 'truncate" has no effect on packed rows'),
        ({"packed": "yes"}, 'packed" must be true or false, not "yes"'),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "leave nothing to train on"),
        ({"sequence_length": 1}, "at least 2"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"model": {"n_layer": 2}}, "or a configuration to build one from"),
        ({"model": "folder", "tokenizer": "characters"}, "were trained with another one"),
        ({"tokenizer": "folder", "vocabulary": 9}, "has an effect on the tokenizers"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CausalLM(**{"data": "a.txt", "model": GPT2, **options})


def test_bad_data_is_refused(prose: str, records: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequence_length\" is 17, but the model takes 16 tokens at most"):
        made(data=prose, sequence_length=17)
    with pytest.raises(UserError, match=r'"trainer.task_options.text_column" has no effect on text files'):
        made(data=prose, text_column="text")
    with pytest.raises(UserError, match="does not exist"):
        made(data=str(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="no effect on packed rows"):
        made(data=prose, truncate=True)
    long = lines(tmp_path / "long.jsonl", [*RECORDS[:9], {"prompt": "1+", "completion": "2" * 30}])
    options = {"data": long, "validation_fraction": 0}
    with pytest.raises(
        UserError,
        match=r'(?s)1 of the 10 records of train is longer than 16 tokens \(.*row 10, has 32\).*"truncate": true',
    ):
        made(**options)
    task, splits, _ = made(**options, truncate=True)
    assert splits["train"].lengths.tolist()[-1] == 16
    assert "row 10, has 32): cut there" in task.notes[0]
    hidden = lines(tmp_path / "hidden.jsonl", [*RECORDS[:9], {"prompt": "1" * 20, "completion": "2"}])
    task, splits, _ = made(data=hidden, validation_fraction=0, truncate=True)
    assert len(splits["train"]) == 9
    assert "1 record of train with nothing left to predict left out" in task.notes[1]
    none = lines(tmp_path / "none.jsonl", [*RECORDS[:9], {"prompt": "1", "completion": ""}])
    with pytest.raises(UserError, match=r'1 value of the column "completion" in train is missing \(row 10'):
        made(data=none)
    other = lines(tmp_path / "other.jsonl", [{"a": "x", "b": "y"}])
    with pytest.raises(UserError, match=r"text_column.* is needed.*The data has: a, b"):
        made(data=other)
    with pytest.raises(UserError, match="too few to hold out validation"):
        made(data=lines(tmp_path / "one.jsonl", RECORDS[:1]))
    with pytest.raises(UserError, match="embeddings for 7"):
        made(data=prose, model=GPT2 | {"vocab_size": 7})
    same, _, _ = made(data={"train": records, "test": lines(tmp_path / "t.jsonl", RECORDS[:3])}, validation_fraction=0)
    assert same.notes == ["3 of the 3 samples of test are also in train, so its metrics are too good"]
    (tmp_path / "short.txt").write_text("abcdef")
    with pytest.raises(UserError, match=r"too short|too few"):
        made(data=str(tmp_path / "short.txt"), validation_fraction=0.1)


# --- data as the user gave it -----------------------------------------------------------------------------------------


def test_an_instruction_and_its_input_are_one_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{i}+1" if i else "", "output": str(i + 1)} for i in range(40)]
    task, splits, model = made(data=lines(tmp_path / "alpaca.jsonl", rows), test_fraction=0.1)
    assert task.data_lines[0] == "40 records: train 32, validation 4 (held out of train), test 4 (held out of train)"
    assert task.data_lines[1].startswith('prompt from "instruction", its input from "input", completion from "output"')
    tokenizer = task._tokenizer()
    said = {tokenizer.decode(ids[:n]) for ids, n in zip(splits["train"].arrays["input_ids"], splits["train"].lengths)}
    assert any(text.startswith("Add.\n7+1") for text in said), said
    new = lines(
        tmp_path / "new.jsonl", [{"instruction": "Add.", "input": "3+1"}, {"instruction": "Add.", "input": None}]
    )
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model.eval(), folder)
    assert [row["prompt"] for row in task.predict(task.load(folder), new, 8)] == ["Add.\n3+1", "Add."]


@pytest.mark.parametrize("columns", [("question", "context", "answer"), ("prompt", "system", "completion")])
def test_a_second_column_of_prompts_is_not_left_out_silently(tmp_path: Path, columns: tuple[str, ...]) -> None:
    file = lines(tmp_path / "a.jsonl", [dict.fromkeys(columns, "ab") for _ in range(20)])
    with pytest.raises(UserError, match=rf"{columns[0]} and {columns[1]} may all belong to the prompt"):
        made(data=file)
    task, _, _ = made(data=file, prompt_column=columns[0], completion_column=columns[2])
    assert f"not read: {columns[1]}" in task.data_lines[1]


def test_the_same_bytes_with_another_suffix_are_read_in_another_way(tmp_path: Path) -> None:
    content = "text\tlabel\n" + "hello world\tx\n" * 40
    lengths = []
    for name in ("a.txt", "a.tsv"):
        (tmp_path / name).write_text(content)
        lengths.append(int(made(data=str(tmp_path / name), validation_fraction=0)[1]["train"].arrays["tokens"].sum()))
    assert lengths[0] > lengths[1]


def test_prompts_come_from_the_column_of_training(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", [{"ask": f"{i}?", "say": "yes", "prompt": "no"} for i in range(20)])
    task, _, model = made(data=data, prompt_column="ask", completion_column="say")
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model.eval(), folder)
    with pytest.raises(UserError, match=r'--input .* has no column "ask". It has: prompt'):
        list(task.predict(task.load(folder), lines(tmp_path / "b.jsonl", [{"prompt": "1?"}]), 8))
    (tmp_path / "c.txt").write_text("1?\n2?\n")
    assert [row["prompt"] for row in task.predict(model, tmp_path / "c.txt", 8)] == ["1?", "2?"]


def test_a_latin_corpus_needs_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("d\xe9j\xe0 vu\n".encode("latin-1") * 30)
    with pytest.raises(UserError, match=r'(?s)a.txt is not UTF-8 text: byte 1 is 0xe9.*"encoding"'):
        made(data=str(tmp_path / "a.txt"))
    task, _, _ = made(data=str(tmp_path / "a.txt"), encoding="latin-1")
    assert "d\xe9j\xe0" in task.data_lines[2]
