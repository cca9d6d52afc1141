"""How a task is found and built; each slip in its name, file, class or options is one message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import USER_TASKS
from trainer.errors import UserError
from trainer.tasks import protocol
from trainer.tasks.digits import Digits
from trainer.tasks.first_look import BUILT_IN
from trainer.tasks.protocol import load_task

METHODS = """
    def splits(self): ...
    def model(self): ...
    def forward(self, model, batch): ...
    def loss(self, outputs, batch): ...
    def metrics(self, outputs, batch): ...
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Any:
    """Writes a file with a class Task of the given constructor, and other lines before it."""

    def write(constructor: str = "", before: str = "", methods: str = METHODS) -> str:
        (tmp_path / "a_task.py").write_text(f"{before}\nclass Task:\n    {constructor}\n{methods}")
        return f"{tmp_path}/a_task.py:Task"

    return write


def test_the_built_in_tasks_are_the_files_of_the_folder_that_say_task() -> None:
    folder = Path(protocol.__file__).parent
    assert tuple(sorted(p.stem for p in folder.glob("*.py") if "\nTASK = " in p.read_text())) == BUILT_IN


def test_a_built_in_task_gets_its_options() -> None:
    task: Any = load_task("digits", {"width": 8})
    assert isinstance(task, Digits)
    assert task.model()[0].out_channels == 8


def test_a_task_of_the_users_gets_its_options_by_name() -> None:
    task: Any = load_task(f"{USER_TASKS}/my_task.py:MyTask", {"hidden": 5})
    assert (task.hidden, task.dropout) == (5, 0.2)


def test_a_task_file_imports_its_neighbours_and_leaves_the_path_alone(task_file: Any, tmp_path: Path) -> None:
    (tmp_path / "a_neighbour_of_the_task.py").write_text("VALUE = 7\n")
    before = list(sys.path)
    task: Any = load_task(task_file("value = VALUE", "from a_neighbour_of_the_task import VALUE"), {})
    assert task.value == 7
    assert sys.path == before
    with pytest.raises(UserError, match="cannot be imported: No module named 'of_nobody'"):
        load_task(task_file(before="import of_nobody"), {})
    assert sys.path == before


def test_a_task_with_open_ended_options_checks_them_itself(task_file: Any) -> None:
    task: Any = load_task(task_file("def __init__(self, **options): self.options = options"), {"anything": 1})
    assert task.options == {"anything": 1}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", 'unknown task "digit". Did you mean "digits"?'),
        ("segmentation", "Your own is given as path/to/file.py:ClassName."),
        ("os", 'unknown task "os"'),
        ("protocol", 'unknown task "protocol"'),
        ("my_task.py", 'The task "my_task.py" must be given as path/to/file.py:ClassName.'),
        (":MyTask", "must be given as path/to/file.py:ClassName"),
        ("my_task.py:", "must be given as path/to/file.py:ClassName"),
        ("nowhere.py:MyTask", "The task file nowhere.py does not exist (looked from "),
        (f"{USER_TASKS}:MyTask", "does not exist"),
        (f"{USER_TASKS}/my_task.py:Mytask", 'has no class Mytask. Did you mean "MyTask"?'),
        (f"{USER_TASKS}/my_task.py:Other", "Known: Net, MyTask."),
    ],
)
def test_a_name_that_leads_nowhere(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(name, {})
    assert words in str(caught.value)


def test_a_file_that_is_not_python(tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_text("no code")
    with pytest.raises(UserError, match=r"task\.txt is not a Python file"):
        load_task(f"{tmp_path}/task.txt:Task", {})
    (tmp_path / "task.py").write_text("x = 1\nclass Task\n")
    with pytest.raises(UserError, match=r"task\.py has a syntax error in line 2: "):
        load_task(f"{tmp_path}/task.py:Task", {})


def test_methods_that_are_missing_are_all_named(task_file: Any) -> None:
    some = "    loss = None\n    def splits(self): ...\n    def model(self): ...\n"
    with pytest.raises(UserError) as caught:
        load_task(task_file("pass", methods=some), {})
    assert "lacks forward(), loss(), metrics()." in str(caught.value)
    assert "A task has: splits, model, forward, loss, metrics." in str(caught.value)


@pytest.mark.parametrize(
    ("constructor", "options", "words"),
    [
        ("def __init__(self, hidden=1): ...", {"hiden": 2}, 'unknown key "trainer.task_options.hiden"'),
        ("def __init__(self, hidden=1): ...", {"hiden": 2}, 'Did you mean "hidden"?'),
        ("", {"hidden": 2}, "It takes none."),
        ("def __init__(self, data): ...", {}, '"trainer.task_options.data" is missing: the task '),
        ("def __init__(self, *, data): ...", {}, '"trainer.task_options.data" is missing'),
    ],
)
def test_options_that_a_constructor_does_not_take(
    constructor: str, options: dict[str, Any], words: str, task_file: Any
) -> None:
    with pytest.raises(UserError) as caught:
        load_task(task_file(constructor), options)
    assert words in str(caught.value)


def test_an_option_of_a_built_in_task_that_is_misspelt() -> None:
    with pytest.raises(UserError, match=r'task_options\.modle" for the task digits\. Did you mean "model"\?'):
        load_task("digits", {"modle": "cnn"})
