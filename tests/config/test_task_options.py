"""Options of tasks: a type, a range and a meaning each."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import pytest

from trainer.config.schema import option
from trainer.config.task_options import check_options, is_number, read_arguments, read_options, refuse, required
from trainer.errors import UserError
from trainer.tasks.protocol import load_task

if TYPE_CHECKING:
    from elsewhere import OnlyForTypeCheckers


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Any = required("a file")
    kind: Literal["a", "b"] = option("a", "which")
    width: int = option(4, "units", minimum=1, maximum=8)
    share: float = option(0.1, "held out", minimum=0, below=1)
    name: str | None = option(None, "a column")


def test_what_is_given_and_what_is_not() -> None:
    found = read_options(Options, {"data": ["anything"], "share": 0, "width": 8})
    assert found == Options(data=["anything"], share=0.0, width=8)
    assert isinstance(found.share, float)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r'"trainer\.task_options\.data" is missing: a file\.'),
        ({"data": "x", "widht": 3}, r'unknown key "trainer\.task_options\.widht"\. Did you mean "width"\?'),
        ({"data": "x", "width": 9}, r'width" is 9\. It must be at most 8'),
        ({"data": "x", "width": True}, r'width" must be a whole number, not true'),
        ({"data": "x", "share": 1}, r'share" is 1\.0\. It must be below 1'),
        ({"data": "x", "kind": "c"}, r'kind" is "c"\. It must be one of "a", "b"'),
        ({"data": "x", "name": ""}, r"name\" is ''\. It must be a name, or left out"),
    ],
)
def test_what_breaks_a_rule(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_options(Options, given)


def test_a_rule_of_a_tasks_own() -> None:
    with pytest.raises(UserError, match=r'"trainer\.task_options\.size" is 0\. It must be a side in pixels\.'):
        refuse("size", 0, "a side in pixels")
    assert is_number(3.0) and not is_number(False) and not is_number("3")


@dataclass
class Size:
    height: int
    width: int = 3


class Shade(enum.Enum):
    DARK = "dark"


class Constructed:
    """A user's task, with annotations of every kind."""

    def __init__(
        self,
        hidden: int = 64,
        rate: float = 0.1,
        deep: bool = False,
        kind: Literal["a", 2, True] = "a",
        sizes: list[int] = [],  # noqa: B006
        window: tuple[int, int] = (3, 3),
        scales: tuple[float, ...] = (),
        weights: Optional[dict[str, float]] = None,  # noqa: UP045
        layers: Union[int, list[int]] = 1,  # noqa: UP007
        places: Sequence[Mapping[str, int]] = (),
        size: Size | None = None,
        sloppy: int = None,  # type: ignore[assignment]  # noqa: RUF013
        limited: Annotated[int, "at most 3"] = 1,
        path: Path = Path(),
        shade: Shade = Shade.DARK,
        unknown: OnlyForTypeCheckers | None = None,
        nonsense: [int] = 0,  # type: ignore[valid-type]
        bare=None,
    ) -> None: ...


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("hidden", "many", '"trainer.task_options.hidden" must be a whole number, not "many" (a string).'),
        ("hidden", 2.5, '"trainer.task_options.hidden" must be a whole number, not 2.5 (a number).'),
        ("hidden", None, '"trainer.task_options.hidden" must be a whole number, not null.'),
        ("rate", True, '"trainer.task_options.rate" must be a number, not true.'),
        ("deep", 1, '"trainer.task_options.deep" must be true or false, not 1 (a whole number).'),
        ("kind", 1, '"trainer.task_options.kind" is 1. It must be one of "a", 2, true.'),
        ("sizes", 3, '"trainer.task_options.sizes" must be a list [...], not 3 (a whole number).'),
        ("sizes", [1, "b"], '"trainer.task_options.sizes[1]" must be a whole number, not "b" (a string).'),
        ("window", [1], '"trainer.task_options.window" has 1 elements. It must have 2.'),
        ("scales", [1, "x"], '"trainer.task_options.scales[1]" must be a number, not "x" (a string).'),
        ("weights", {"a": "b"}, '"trainer.task_options.weights.a" must be a number, not "b" (a string).'),
        ("layers", "x", '"trainer.task_options.layers" must be a whole number or a list [...], not "x" (a string).'),
        ("layers", [1, "x"], '"trainer.task_options.layers[1]" must be a whole number, not "x" (a string).'),
        ("places", [{"a": "b"}], '"trainer.task_options.places[0].a" must be a whole number, not "b" (a string).'),
        ("size", 3, '"trainer.task_options.size" must be a block {...}, not 3 (a whole number).'),
        ("size", {"width": 1}, '"trainer.task_options.size.height" is missing.'),
        ("size", {"height": 1, "widht": 1}, 'unknown key "trainer.task_options.size.widht". Did you mean "width"?'),
        ("sloppy", "x", '"trainer.task_options.sloppy" must be a whole number, not "x" (a string).'),
        ("limited", "x", '"trainer.task_options.limited" must be a whole number, not "x" (a string).'),
    ],
)
def test_an_argument_that_its_annotation_does_not_allow(name: str, value: Any, words: str) -> None:
    with pytest.raises(UserError) as refused:
        read_arguments(Constructed, {name: value})
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden", 3, 3),
        ("rate", 1, 1.0),
        ("kind", 2, 2),
        ("kind", True, True),
        ("sizes", [1, 2], [1, 2]),
        ("window", [1, 2], (1, 2)),
        ("scales", [1, 2.5, 3], (1.0, 2.5, 3.0)),
        ("weights", None, None),
        ("layers", 2, 2),
        ("layers", [2], [2]),
        ("places", [{"a": 1}], [{"a": 1}]),
        ("size", {"height": 2}, Size(2, 3)),
        ("sloppy", None, None),
        ("path", "data.csv", "data.csv"),
        ("shade", "dark", "dark"),
        ("unknown", {"any": ["thing"]}, {"any": ["thing"]}),
        ("nonsense", "any", "any"),
        ("bare", [None], [None]),
    ],
)
def test_an_argument_that_fits_or_cannot_be_checked(name: str, value: Any, expected: Any) -> None:
    (found,) = read_arguments(Constructed, {name: value}).values()
    assert found == expected
    assert type(found) is type(expected)


@dataclass
class PlainOptions:
    """A dataclass as users write it, without the trainer's `option`."""

    width: int
    names: list[str] = field(default_factory=list)
    derived: int = field(default=0, init=False)
    other: OnlyForTypeCheckers | None = None

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"the width {self.width} must be even")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r'"trainer\.task_options\.width" is missing\.'),
        ({"width": "x"}, r'"trainer\.task_options\.width" must be a whole number, not "x"'),
        ({"width": 2, "nmaes": []}, r'unknown key "trainer\.task_options\.nmaes"\. Did you mean "names"\?'),
        ({"width": 2, "derived": 1}, r'unknown key "trainer\.task_options\.derived"'),
        ({"width": 3}, r'"trainer\.task_options": the width 3 must be even'),
    ],
)
def test_a_plain_dataclass_is_checked_as_well(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_options(PlainOptions, given)
    check_options(PlainOptions, {"width": 2, "names": ["a"], "other": "anything"})


TASK = """
from dataclasses import dataclass

class Methods:
    def splits(self): ...
    def model(self): ...
    def forward(self, model, batch): ...
    def loss(self, outputs, batch): ...
    def metrics(self, outputs, batch): ...

class Plain(Methods):
    def __init__(self, hidden: int = 3, window: "tuple[int, int]" = (1, 1)):
        self.hidden, self.window = hidden, window

class Declared(Methods):
    @dataclass
    class Options:
        hidden: int = 3

    def __init__(self, **given):
        self.hidden = self.Options(**given).hidden

class Constants(Methods):
    class Options:
        BIG = 7

    def __init__(self, hidden=3):
        self.hidden = hidden

@dataclass
class Itself(Methods):
    hidden: int = 3

class Even(Methods):
    def __init__(self, hidden=2):
        if hidden % 2:
            raise ValueError(f"hidden is {hidden} and must be even")
        int("7" if hidden else "x")
        self.rows = self.read(hidden)

    def read(self, hidden):
        if hidden > 10:
            raise ValueError("a slip far from the options")

class ByPosition(Methods):
    def __init__(self, hidden, /): ...

instance = Plain()
"""


@pytest.mark.parametrize("name", ["Plain", "Declared", "Constants", "Itself"])
def test_the_options_of_a_users_own_task(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"options_of_{name.lower()}.py"
    file.write_text(TASK)
    task: Any = load_task(f"{file}:{name}", {"hidden": 5})
    assert task.hidden == 5
    with pytest.raises(UserError, match=r'unknown key "trainer\.task_options\.hiden".* Did you mean "hidden"\?'):
        load_task(f"{file}:{name}", {"hiden": 5})
    if name != "Constants":
        with pytest.raises(UserError, match=r'"trainer\.task_options\.hidden" must be a whole number, not "big"'):
            load_task(f"{file}:{name}", {"hidden": "big"})


def test_a_rule_of_a_users_own_constructor_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "options_of_a_rule.py"
    file.write_text(TASK)
    assert load_task(f"{file}:Even", {"hidden": 2})
    with pytest.raises(UserError, match=r"Even refuses them: hidden is 3 and must be even$"):
        load_task(f"{file}:Even", {"hidden": 3})
    with pytest.raises(ValueError, match="a slip far from the options") as raised:
        load_task(f"{file}:Even", {"hidden": 12})
    assert not isinstance(raised.value, UserError), "its traceback shows where"
    with pytest.raises(UserError, match="ByPosition takes hidden only by position"):
        load_task(f"{file}:ByPosition", {})


def test_a_task_is_a_class(tmp_path: Path) -> None:
    file = tmp_path / "options_of_an_instance.py"
    file.write_text(TASK)
    assert load_task(f"{file}:Plain", {"window": [2, 3]}).window == (2, 3)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"instance is not a class, but a Plain\."):
        load_task(f"{file}:instance", {})
