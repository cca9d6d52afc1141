"""`train`: a run as a function of Python."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from ..config import keys, ready
from ..config.keys import Config
from ..config.loggers import refuse_missing
from ..config.schema import lay_over
from ..errors import Stopped, TrainerError, UserError
from ..ranks.stopping import EndedBySignal
from ..ranks.workers import WorkerError
from ..tasks.first_look import look
from ..tasks.given import file_of, given, name_of
from . import launch
from .arguments import count_in, overrides_in, refuse_no_path, refuse_no_task
from .callbacks import Callbacks
from .result import Result


def load_config(config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any] | None = None) -> Config:
    """A checked config.

    Args:
        config: a JSON file, its content as a dictionary, or a Config. The bare name of a ready config, such as
            "strong.json", works in any folder; a line on stderr says which file is used.
        overrides: dotted key -> value, as --set takes them: {"trainer.seed": 3, "optimizer.params.lr": 0.001}. A block
            is replaced as a whole. The block "trainer" cannot be replaced.

    Raises:
        UserError: the file is missing or malformed, or a key or value is wrong.
    """
    return _load(config, overrides, lambda sentence: print(sentence, file=sys.stderr))


def _load(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any] | None,
    tell: Callable[[str], object],
) -> Config:
    """As `load_config`; `tell` as of `ready.find`."""
    changes = {key: _plain(value, f'overrides["{key}"]') for key, value in overrides_in(overrides).items()}
    if isinstance(config, (str, Path)):
        return keys.load_config(ready.find(str(Path(config).expanduser()), tell), changes)
    if isinstance(config, Config) and not changes:
        return config
    values = _plain(config.as_dict() if isinstance(config, Config) else config, "config")
    if not isinstance(values, dict):
        raise UserError(f"config is a {type(config).__name__}. Give a JSON file, a dictionary or a Config.")
    for key, value in changes.items():
        lay_over(values, key, value)
    return keys.parse(values)


def _plain(value: Any, where: str) -> Any:
    """A Python value as JSON would hold it. Raises UserError if JSON has no such value."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{where}[{name!r}]") for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{number}]") for number, inner in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(
            f"{where} is a {type(value).__name__}. A config holds what JSON has: numbers, texts, lists, dictionaries, "
            "True, False and None."
        )
    return value


def train(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    ranks: int = 1,
    overrides: Mapping[str, Any] | None = None,
    task: str | type | None = None,
    callbacks: Sequence[object] = (),
    output_dir: str | Path | None = None,
    resume: str | Path | None = None,
    allow_changed_config: bool = False,
    quiet: bool = False,
) -> Result:
    """Trains a config: the same run as `trainer/main.py`, with the same files, messages and bits.

    **One rank** runs in this process. During the run, torch and the random generators have the state of a new process.
    Afterwards this process has its own again: torch's settings and threads, the generators of torch, numpy and Python,
    the environment, the handlers of signals, and no process group. DeepSpeed stays imported. Each call imports anew
    what the task imports from its folder; a module that your program has imported itself stays as it is.

    **Several ranks** run in processes of their own, also from a notebook, and from a script without
    `if __name__ == "__main__"`. On the CPU they are forked from a server, a process with all imports done. The first
    call starts the server, which takes some seconds, and it ends with this program. Ranks have the environment at the
    time of the call. But what a library reads while it is imported, it has read at the first call.

    **Ctrl-C** stops the run after a step, with a checkpoint, and `train` raises KeyboardInterrupt. A SIGTERM to this
    process does the same, and `train` raises `Stopped`. The message says how to continue. A second Ctrl-C, after two
    seconds or more, ends the run at once. Signals need the main thread: in another thread, `train` leaves them alone.

    Args:
        config: a JSON file, its content as a dictionary, or what `load_config` has returned. The bare name of a ready
            config, such as "strong.json", works in any folder.
        ranks: how many, all on this machine; each has a GPU of its own, if GPUs are used.
        overrides: as of `load_config`: {"trainer.epochs": 3, "optimizer.params.lr": 0.001}.
        task: trainer.task: a name, path/to/file.py:ClassName, or the class itself. A class that is in no file of its
            own, such as a notebook's, works at one rank.
        callbacks: are told about the run, see `Callback`.
        output_dir: trainer.output_dir; default: a new folder runs/<config>-<number>, such as runs/strong-001. For a
            dictionary, and for what `load_config` has returned, it is runs/run-<number>.
        resume: "auto" continues the run in output_dir, or begins one there. A folder is the run, or the checkpoint, to
            continue from.
        allow_changed_config: continue even if a changed config changes the bits.
        quiet: print nothing.

    Returns:
        The result of the run, once all its files are written.

    Raises:
        UserError: something must change first. It is also a ValueError. No files are left behind.
        NonFiniteError: the loss stopped being finite. The last good parameters are kept in the output folder.
        RanksDifferError, LostRankError: ranks differ, or one was lost. The message names it.
        Stopped: trainer.max_wall_time_s or a signal has stopped the run with a checkpoint.
        KeyboardInterrupt: Ctrl-C has stopped it with a checkpoint.
        CallbackError: a callback has failed.
        Exception: one of the task's own. With several ranks, an exception of a class in the task's file comes as a
            WorkerError, with its traceback.
    """
    try:
        return _train(config, ranks, overrides, task, callbacks, output_dir, resume, allow_changed_config, quiet)
    except (TrainerError, KeyboardInterrupt) as error:
        # A message for a person needs no traceback. Besides, a notebook keeps the last exception, and its frames would
        # keep the model and its optimizer in memory. An error of the task's own keeps its frames, for a debugger.
        _clear(error)
        raise error.with_traceback(None)  # noqa: B904


def _clear(error: BaseException) -> None:
    """Empties the frames of an exception, and of those that caused it, and gives their memory back."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            waiting += [one.__cause__, one.__context__]
            for frame, _ in traceback.walk_tb(one.__traceback__):
                _clear_frames(frame)
    if "torch" in sys.modules:
        from .guest import give_memory_back

        give_memory_back()


def _clear_frames(frame: FrameType | None) -> None:
    """Empties a frame and its callers. An error that is caught early refers to its callers, too."""
    while frame is not None:
        with contextlib.suppress(RuntimeError):  # a frame that still runs, such as this function's caller
            frame.clear()
        frame = frame.f_back


def _train(
    config: str | Path | Mapping[str, Any] | Config,
    ranks: int,
    overrides: Mapping[str, Any] | None,
    task: str | type | None,
    callbacks: Sequence[object],
    output_dir: str | Path | None,
    resume: str | Path | None,
    allow_changed_config: bool,
    quiet: bool,
) -> Result:
    ranks = count_in("ranks", ranks)
    refuse_no_task(task)
    launch.refuse_launchers("train()")
    heard = Callbacks(callbacks)
    name = Path(config).stem if isinstance(config, (str, Path)) else "run"
    cls = task if isinstance(task, type) and file_of(task) is None else None
    changes = overrides_in(overrides)
    if task is not None:
        changes["trainer.task"] = task if isinstance(task, str) else name_of(cls) if cls else file_of(task)
    if output_dir is not None:
        refuse_no_path("output_dir", output_dir, "the path of a folder")
        changes["trainer.output_dir"] = str(output_dir)
    if resume is not None:
        refuse_no_path("resume", resume, '"auto", or the folder of a run or of a checkpoint')
    checked = _load(config, changes, lambda sentence: quiet or print(sentence, file=sys.stderr))
    checked.plan(ranks)  # fails early: before torch is loaded
    refuse_missing(checked)
    if cls is None:
        look(checked.trainer.task, checked.trainer.task_options)
    elif ranks > 1:
        raise UserError(_in_no_file(cls, ranks))
    order = launch.Order.of(checked, name, "none" if resume is None else str(resume), allow_changed_config)
    with _explained(heard):
        if ranks > 1:
            summary = launch.on_ranks(order, ranks, heard.listener, quiet=quiet)
        else:
            with given(cls):
                summary = _in_this_process(order, heard, quiet)
    assert heard.folder is not None
    result = Result(Path(heard.folder).absolute(), summary, cls)
    ended = f"The run has finished: trainer.Result.read({heard.folder!r}) has its results."
    heard.raise_failure(ended)
    heard.outside = contextlib.nullcontext
    heard.end(result)
    heard.raise_failure(ended)
    return result


def _in_no_file(cls: type, ranks: int) -> str:
    where = "this program" if cls.__module__ == "__main__" else cls.__module__
    return (
        f"The class {cls.__name__} is part of {where}. {ranks} ranks are other processes, which cannot see it. "
        f'Save it in a file of its own, with its imports, and give task="my_task.py:{cls.__name__}".\n'
        "In a notebook, begin its cell with the line %%writefile my_task.py and run it. Or use ranks=1."
    )


def _in_this_process(order: launch.Order, heard: Callbacks, quiet: bool) -> dict[str, Any]:
    from .guest import hosted

    name = order.config.trainer.task
    file = Path(name.rpartition(":")[0])
    code = file.parent if ":" in name and file.is_file() else None
    own = sys.stdout, sys.stderr
    quietly = (io.StringIO(), _Errors(sys.stderr)) if quiet else own
    with _console(*quietly), hosted(code) as host:

        @contextlib.contextmanager
        def outside() -> Iterator[None]:
            with host.at_home(), _console(*own):  # a quiet run's callbacks may print
                yield

        heard.outside = outside
        return launch.on_this_rank(order, listener=heard.listener, guest=True)


class _Errors(io.TextIOBase):
    """A stream of errors without progress bars. These are drawn only on a terminal, and it says that it is none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text)

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def _console(out: Any, errors: Any) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        yield


@contextlib.contextmanager
def _explained(heard: Callbacks) -> Iterator[None]:
    """A context that turns the errors of a run into those of `train`."""
    try:
        yield
    except Stopped as stopped:
        heard.raise_failure(f"The run was {stopped}")
        if stopped.reason == "SIGINT":
            raise KeyboardInterrupt(str(stopped)) from None
        raise
    except EndedBySignal as end:
        signal.raise_signal(end.signal)  # now it has its usual effect, which is to end this process
        raise TrainerError(f"stopped by {end.signal.name} before the first step") from None
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or "stopped from the keyboard before the first step") from None
    except WorkerError as error:
        if error.original is not None:
            raise error.original from error
        raise
