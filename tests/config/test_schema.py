"""How JSON becomes checked values: files, --set, types, ranges, and errors that name the key and the nearest one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from trainer.config.schema import build, check_arguments, lay_over, near, option, parse_override, read_json
from trainer.errors import UserError


def write(folder: Path, text: str, name: str = "run.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def check_words(message: str, words: tuple[str, ...]) -> None:
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


# Files


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    """Some editors write one."""
    assert read_json(write(tmp_path, '\ufeff{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "train_batch_size": 64,\n  "seed" 3\n}', ("run.json", "not valid JSON", "line 3, column 10")),
        ('{"train_batch_size": 64,}', ("not valid JSON", "line 1, column")),
        ("", ("run.json is no config", "it is empty")),
        ('{"trainer": {"seed": 1, "seed": 2}}', ("run.json", '"seed"', "twice")),
        ('{"train_batch_size": 8, "optimizer": {}, "train_batch_size": 9}', ('"train_batch_size"', "twice")),
        ('{"gradient_clipping": NaN}', ("not valid JSON", "NaN")),
        ('{"gradient_clipping": -Infinity}', ("not valid JSON", "-Infinity")),
        ("[1, 2]", ("run.json", "JSON object", "a list [...]")),
        ("3", ("JSON object", "3 (a whole number)")),
        ("null", ("JSON object", "null")),
        ("[" * 100_000, ("not valid JSON",)),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        read_json(write(tmp_path, text))
    check_words(str(caught.value), words)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "{}", "weak.json")
    write(tmp_path, "{}", "strong.json")
    write(tmp_path, "", "notes.txt")
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "stong.json")
    check_words(str(caught.value), (str(tmp_path / "stong.json"), "does not exist", "strong.json, weak.json"))
    assert "notes.txt" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "nowhere" / "run.json")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: .*directory"):
        read_json(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"trainer": "\xe9"}')
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("trainer.epochs=5", ("trainer.epochs", 5)),
        ("a.b=2.5", ("a.b", 2.5)),
        ("a=true", ("a", True)),
        ("a=null", ("a", None)),
        ("a=[0.9, 0.99]", ("a", [0.9, 0.99])),
        ('a={"b": 1}', ("a", {"b": 1})),
        ('a="5"', ("a", "5")),
        ("a=cosine", ("a", "cosine")),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
        ("a=NaN", ("a", "NaN")),
    ],
)
def test_set_values_are_json_where_they_read_as_json(text: str, wanted: tuple[str, Any]) -> None:
    key, value = parse_override(text)
    assert (key, value) == wanted and type(value) is type(wanted[1])


@pytest.mark.parametrize("text", ["trainer.epochs", "=3", ""])
def test_set_without_key_or_value(text: str) -> None:
    with pytest.raises(UserError, match=r"expected dotted\.key=value") as caught:
        parse_override(text)
    assert text in str(caught.value)


@pytest.mark.parametrize("depth", [101, 500, 100_000])
def test_set_of_a_value_too_deep_to_work_with(depth: int) -> None:
    """As in a file: copies of a config would end in a traceback."""
    with pytest.raises(UserError, match=r"--set trainer\.task_options\.x has blocks or lists more than 100 deep"):
        parse_override(f"trainer.task_options.x={'[' * depth}{']' * depth}")
    assert parse_override(f"a={'[' * 100}{']' * 100}")[0] == "a"


def test_set_changes_one_key_and_leaves_the_rest() -> None:
    values: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": 3}
    lay_over(values, "a.b", 5)
    lay_over(values, "d", {"e": 4})
    lay_over(values, "new.block.key", None)
    assert values == {"a": {"b": 5, "c": 2}, "d": {"e": 4}, "new": {"block": {"key": None}}}


def test_set_of_a_key_inside_of_a_value_is_refused() -> None:
    with pytest.raises(UserError, match=r'--set a\.b\.c: "b" is "x" \(a string\), not a block'):
        lay_over({"a": {"b": "x"}}, "a.b.c", 1)


def test_set_of_the_whole_block_trainer_is_refused() -> None:
    """It would silently drop the file's keys. Its inner blocks are replaced."""
    values: dict[str, Any] = {"trainer": {"seed": 3, "task_options": {"width": 4}}}
    with pytest.raises(
        UserError, match=r'"trainer" is the whole block.*\nName single keys, for example "trainer\.epochs"'
    ):
        lay_over(values, "trainer", {"epochs": 3})
    lay_over(values, "trainer.task_options", {})
    assert values == {"trainer": {"seed": 3, "task_options": {}}}


# Names


@pytest.mark.parametrize(
    ("name", "valid", "sentence"),
    [
        ("epoch", ["seed", "epochs"], 'Did you mean "epochs"?'),
        ("WARMUPLR", ["WarmupLR", "OneCycle"], 'Did you mean "WarmupLR"?'),
        ("zero", ["seed", "epochs"], "Known: seed, epochs."),
        ("anything", [], "It takes none."),
    ],
)
def test_the_nearest_name(name: str, valid: list[str], sentence: str) -> None:
    assert near(name, iter(valid)) == sentence


# Blocks


@dataclass(frozen=True)
class Inner:
    depth: int = option(1, "how deep")


@dataclass(frozen=True)
class Outer:
    count: int = option(1, "how many", minimum=1, maximum=8)
    share: float = option(0.5, "how much", above=0, below=1)
    name: str | None = option(None, "a name")
    flag: bool = option(False, "whether")
    kind: Literal["a", 2] = option("a", "which")
    inner: Inner = option(Inner, "a block")
    maybe: Inner | None = option(None, "a block or none")
    free: dict[str, Any] = option({"x": 1}, "a free block")
    items: list[Any] = option([1, 2], "a list")
    anything: Any = option(None, "what its owner checks")


def test_a_block_of_every_kind_of_value() -> None:
    values = {
        "count": 8, "share": 1e-9, "name": "n", "flag": True, "kind": 2, "inner": {"depth": 3}, "maybe": {"depth": 4},
        "free": {"y": [2]}, "items": [], "anything": {"z": None},
    }  # fmt: skip
    built = build(Outer, values, "")
    assert dataclasses.asdict(built) == values
    assert built.inner == Inner(3)


def test_defaults_belong_to_one_instance() -> None:
    one, other = build(Outer, {}, ""), build(Outer, {}, "")
    one.free["x"] = 2
    one.items.append(3)
    assert (other.free, other.items, other.inner, other.maybe) == ({"x": 1}, [1, 2], Inner(1), None)


def test_none_is_a_value_only_where_it_may_be() -> None:
    assert build(Outer, {"name": None, "maybe": None, "anything": None}, "") == Outer()
    with pytest.raises(UserError, match='"count" must be a whole number, not null'):
        build(Outer, {"count": None}, "")
    with pytest.raises(UserError, match=r'"inner" must be a block \{\.\.\.\}, not null'):
        build(Outer, {"inner": None}, "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, '"at.count" is 0. It must be at least 1.'),
        ({"count": 9}, '"at.count" is 9. It must be at most 8.'),
        ({"count": 1.0}, '"at.count" must be a whole number, not 1.0 (a number).'),
        ({"count": True}, '"at.count" must be a whole number, not true.'),
        ({"count": 1 << 63}, '"at.count" has 19 digits. It must fit into 64 bits.'),
        ({"share": 0}, '"at.share" is 0.0. It must be above 0.'),
        ({"share": 1}, '"at.share" is 1.0. It must be below 1.'),
        ({"share": math.nan}, '"at.share" is nan. It must be finite.'),
        ({"share": 10**400}, '"at.share" has 401 digits. It must fit into 64 bits.'),
        ({"share": False}, '"at.share" must be a number, not false.'),
        ({"name": ["n"]}, '"at.name" must be a string, not a list [...].'),
        ({"flag": 1}, '"at.flag" must be true or false, not 1 (a whole number).'),
        ({"kind": "b"}, '"at.kind" is "b". It must be one of "a", 2.'),
        ({"kind": [2]}, '"at.kind" is [2]. It must be one of "a", 2.'),
        ({"inner": 3}, '"at.inner" must be a block {...}, not 3 (a whole number).'),
        ({"inner": {"dept": 3}}, 'unknown key "at.inner.dept". Did you mean "depth"?'),
        ({"maybe": {"depth": "x"}}, '"at.maybe.depth" must be a whole number, not "x" (a string).'),
        ({"free": []}, '"at.free" must be a block {...}, not a list [...].'),
        ({"items": {}}, '"at.items" must be a list [...], not a block {...}.'),
        ({"cuont": 3}, 'unknown key "at.cuont". Did you mean "count"?'),
    ],
)
def test_what_breaks_a_rule_is_named_with_its_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Outer, values, "at.")
    assert str(caught.value) == message


# Free blocks

ARGUMENTS: dict[str, tuple[type, ...]] = {
    "lr": (int, float),
    "steps": (int,),
    "rate": (int, float, list),
    "on": (bool,),
}


def test_a_free_block_in_order() -> None:
    check_arguments({"lr": 1, "steps": 3, "rate": [0.1], "on": False}, ARGUMENTS, "params")
    check_arguments({}, ARGUMENTS, "params")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, 'unknown key "params.step". Did you mean "steps"?'),
        ({"lr": "auto"}, '"params.lr" is "auto", which only the Hugging Face Trainer fills in. Give a value.'),
        ({"lr": "0.1"}, '"params.lr" must be a number, not "0.1" (a string).'),
        ({"lr": True}, '"params.lr" must be a number, not true.'),
        ({"steps": 1.5}, '"params.steps" must be a whole number, not 1.5 (a number).'),
        ({"steps": True}, '"params.steps" must be a whole number, not true.'),
        ({"steps": 10**30}, '"params.steps" has 31 digits. It must fit into 64 bits.'),
        ({"on": 1}, '"params.on" must be true or false, not 1 (a whole number).'),
    ],
)
def test_a_free_block_with_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments(values, ARGUMENTS, "params")
    assert str(caught.value) == message
