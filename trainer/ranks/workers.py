"""Starts the ranks of a run as processes of this program, for `train`, `verify` and the tests.

On the CPU they are forked from a server that has already imported torch and DeepSpeed. So a run starts in tenths of a
second, because the ranks need not import them. On a GPU they are new processes, because CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import queue
import signal
import socket
import sys
import threading
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from . import messages, server
from .group import Group, handled_by
from .messages import Console, Died, Line, WorkerError
from .place import Ranks

__all__ = ["Died", "WorkerError", "jobs_from", "run_ranks", "worker_context"]

_PRELOAD = ["trainer.engine.deepspeed_engine", "trainer.run.run", "trainer.run.evaluate", "torch._dynamo"]
# DeepSpeed imports these when an engine is made, which takes a fifth of a second in each rank. Some are optional: the
# server ignores what is not installed.
_PRELOAD += ["setuptools", "deepspeed.ops.op_builder.all_ops", "deepspeed.comm.mori", "deepspeed.moe.ep_repack"]
_PRELOAD += ["deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.ep_router", "peft", "pytorch_optimizer"]
# The tasks of trainer/tasks import these late.
_PRELOAD += ["sklearn.metrics", "transformers.modeling_utils", "transformers.models.auto", "tokenizers"]
# What ranks on the CPU have in their environment: they see no GPU, and DeepSpeed does not look for one.
_ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def jobs_from(pipe: multiprocessing.connection.Connection) -> queue.SimpleQueue[Any]:
    """The objects that arrive through a pipe. When its other end is closed, this process ends at once."""
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                jobs.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return jobs


def worker_context(cuda: bool) -> BaseContext:
    """How processes are started: forked from a server that has imported everything; for CUDA as new ones."""
    if cuda:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([server.__name__, *_PRELOAD])
    # The ranks have the environment that the server starts with. This process keeps its own: it may start ranks on
    # GPUs later. When a rank dies, torch's stores would print C++ stack traces beside our message.
    more = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    multiprocessing.resource_tracker.ensure_running()  # must be first: its start would lift the mask below
    # A Ctrl-C in the terminal reaches the server, too, and would end it while it imports. It inherits this mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _environment(_ON_THE_CPU | more | _path()):
            multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _path() -> dict[str, str]:
    """Variables with which the server imports this very trainer, not an installed one or one in the working folder.

    Before Python 3.13 the server does not get the import path of the process that starts it.
    """
    folder, own = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")
    restored = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    path = folder if own is None else f"{folder}{os.pathsep}{own}"
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", server.RESTORED: json.dumps(restored)}


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_the_program(function: Callable[..., Any]) -> Iterator[None]:
    """New processes do not import the program that starts them, unless the function is in it.

    They need nothing of it. A script may lack the guard `if __name__ == "__main__"`: imported in a rank, it would start
    ranks again.
    """
    program = sys.modules["__main__"]
    if function.__module__ == "__main__":
        yield
        return
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _rank_main(
    pipe: multiprocessing.connection.Connection,
    function: Callable[..., Any],
    ranks: Ranks,
    arguments: Sequence[Any],
    environment: Mapping[str, str],
    console: Console,
    terminal: bool,
    heard: bool,
) -> None:
    from tqdm import tqdm

    if heard:
        # A new session, so that signals of the terminal reach only the starting process. It passes them on.
        os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as the server has blocked it
    # If the starting process is gone, even after SIGKILL, this rank ends as well.
    line = Line(pipe, messages.stop_this_process if heard else lambda: os._exit(0))
    messages.speak_over(line)
    os.environ.update(environment)
    if ranks.world_size > 1:
        # Launchers set these variables, too. A task that reads the environment finds what it would find in a run.
        places = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.world_size}
        os.environ.update(
            {name: str(value) for name, value in (places | {"LOCAL_SIZE": ranks.local_world_size}).items()}
        )
    # tqdm's own lock is a semaphore of the system. It would be left behind, because this process ends with os._exit.
    tqdm.set_lock(threading.RLock())
    more = (line.tell,) if heard else ()
    with messages.console(console, line, ranks.first, terminal):
        result = messages.call(function, ranks, *arguments, *more)
    line.send(*result)
    line.close()
    # Skips the clean-up of the interpreter and of DeepSpeed, which takes seconds.
    os._exit(0)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    cuda: bool = False,
    quiet: bool = True,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    hear: Callable[[Any], str | None] | None = None,
) -> list[Any]:
    """Calls `function(ranks, *arguments)` in `world_size` processes that can join one process group.

    Args:
        function: importable by name in a new process; its arguments and result must be picklable.
        world_size: how many ranks, all on this machine.
        cuda: whether they use GPUs.
        quiet: whether to drop what they print.
        environment: variables set in every rank.
        timeout_s: after this time they are ended.
        hear: for runs, which handle signals themselves. `function` gets one more argument, `tell`. `hear` is called in
            this thread with what a rank tells. If it returns a reason to stop, the rank's next `tell` returns it.
            Signals are passed on to the ranks. If this process ends, they stop as well. This process prints their
            output: all of rank 0, and stderr of the others.

    Returns:
        The results, by rank.

    Raises:
        TrainerError: of the kind a rank raised.
        WorkerError: a rank failed otherwise, died or took too long.
        KeyboardInterrupt, EndedBySignal: with `hear`: a signal has ended the ranks before they heeded it themselves.
    """
    context = worker_context(cuda)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TRAINER_LAUNCH": uuid.uuid4().hex}
    common = dict(environment or {}) | common | ({} if cuda else _ON_THE_CPU)
    kinds: tuple[Console, Console] = ("dropped", "inherited") if hear is None else ("errors", "shown")
    terminal = sys.stderr is not None and sys.stderr.isatty()
    group = Group(timeout_s)
    try:
        with _without_the_program(function):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                place = Ranks(rank, world_size, rank, world_size)
                settings = (theirs, function, place, arguments, common, kinds[not quiet], terminal, hear is not None)
                process = context.Process(target=_rank_main, args=settings, daemon=True)  # type: ignore[attr-defined]
                process.start()
                theirs.close()
                group.add(process, ours)
        with handled_by(group.pass_on if hear is not None else None):
            group.wait(hear or (lambda value: None))
            group.end(gently=hear is not None)
    finally:
        group.end()
    error = group.error()
    if error is not None:
        raise error
    return [group.results[rank] for rank in range(world_size)]
