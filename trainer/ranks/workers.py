"""Starts the ranks of a run as processes of this program, for `verify` and the tests.

On the CPU they are forked from a server that has already imported torch and DeepSpeed. So a run starts
in tenths of a second, without W imports. On a GPU they are new processes, because CUDA does not
survive a fork.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import queue
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from typing import Any

from ..errors import BY_EXIT_CODE, TrainerError
from .place import Ranks

_PRELOAD = ["trainer.engine.deepspeed_engine", "trainer.run.run", "trainer.run.evaluate", "torch._dynamo"]
# DeepSpeed imports these when an engine is made, which takes a fifth of a second in each rank. Some are optional: the
# server ignores what is not installed.
_PRELOAD += ["setuptools", "deepspeed.ops.op_builder.all_ops", "deepspeed.comm.mori", "deepspeed.moe.ep_repack"]
_PRELOAD += ["deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.ep_router", "peft", "pytorch_optimizer"]
# The tasks of trainer/tasks import these late.
_PRELOAD += ["sklearn.metrics", "transformers.modeling_utils", "transformers.models.auto", "tokenizers"]
# After a rank has failed, the others have this time to end by themselves.
_GRACE_S = 10.0


class WorkerError(Exception):
    """A rank ended with something other than a TrainerError; the message holds its traceback."""


class _Died(WorkerError):
    """A rank has ended without a message."""


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
    """How to start processes: forked from a server that has imported everything, or, for CUDA, new ones."""
    if cuda:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # The ranks have the environment that the server starts with. They see no GPU, and DeepSpeed does not look for one.
    # This process keeps its own environment: it may start ranks on GPUs later.
    with _environment({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}):
        multiprocessing.forkserver.ensure_running()
    return context


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


def _rank_main(
    pipe: multiprocessing.connection.Connection,
    function: Callable[..., Any],
    ranks: Ranks,
    arguments: Sequence[Any],
    environment: Mapping[str, str],
    quiet: bool,
) -> None:
    from tqdm import tqdm

    jobs_from(pipe)  # none come, but it ends this rank when the process that started it is gone, even by SIGKILL
    os.environ.update(environment)
    if ranks.world_size > 1:
        # Launchers set these variables, too. A task that reads the environment finds what it would find in a run.
        places = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.world_size}
        os.environ.update(
            {name: str(value) for name, value in (places | {"LOCAL_SIZE": ranks.local_world_size}).items()}
        )
    # tqdm's own lock is a semaphore between processes. It would be left behind, because these processes end at once.
    tqdm.set_lock(threading.RLock())
    console: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if quiet:
        console = contextlib.redirect_stdout(io.StringIO())
    try:
        with console:
            result = ("result", function(ranks, *arguments))
    except TrainerError as error:
        result = ("error", (error.exit_code, str(error), error.speaks))
    except BaseException:
        result = ("traceback", traceback.format_exc())
    pipe.send(result)
    pipe.close()
    # Skips the clean-up of the interpreter and of DeepSpeed, which takes seconds.
    os._exit(0)


def _silence(error: Exception) -> int:
    """How little a rank's error says of why the ranks have failed, compared with those of other ranks."""
    if isinstance(error, TrainerError):
        # True: it reports for all. None: its own error. False: it left because of another rank, whose error says more.
        return {True: 0, None: 1, False: 3}[error.speaks]
    return 4 if isinstance(error, _Died) else 2  # a traceback may be of a connection that another rank has broken


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    cuda: bool = False,
    quiet: bool = True,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> list[Any]:
    """Calls `function(ranks, *arguments)` in `world_size` processes that can join one process group.

    Args:
        function: importable by name in a new process; its arguments and result must be picklable.
        world_size: how many ranks, all on this machine.
        cuda: whether they use GPUs.
        quiet: whether to drop what they print.
        environment: variables set in every rank.
        timeout_s: after this time they are ended.

    Returns:
        The results, by rank.

    Raises:
        TrainerError: of the kind a rank raised.
        WorkerError: a rank failed otherwise, died or took too long.
    """
    context = worker_context(cuda)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TRAINER_LAUNCH": uuid.uuid4().hex}
    common |= environment or {}
    processes: list[Any] = []
    pipes: list[Any] = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        ranks = Ranks(rank, world_size, rank, world_size)
        process = context.Process(  # type: ignore[attr-defined]
            target=_rank_main, args=(theirs, function, ranks, arguments, common, quiet), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    results: dict[int, Any] = {}
    failures: dict[int, Exception] = {}
    deadline_s = time.monotonic() + timeout_s
    try:
        while len(results) + len(failures) < world_size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline_s - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    kind, value = pipes[rank].recv()
                except EOFError:
                    failures[rank] = _Died(f"rank {rank} died without a message")
                else:
                    if kind == "result":
                        results[rank] = value
                    elif kind == "error":
                        known = BY_EXIT_CODE.get(value[0], TrainerError)(value[1], agreed=True)
                        known.speaks = value[2]
                        failures[rank] = known
                    else:
                        failures[rank] = WorkerError(f"rank {rank} failed:\n{value}")
                if failures:
                    deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
    finally:
        for process in processes:
            if process.is_alive() and len(results) < world_size:
                process.kill()
            process.join()
    if failures:
        raise failures[min(failures, key=lambda rank: (_silence(failures[rank]), rank))]
    if len(results) < world_size:
        missing = sorted(set(range(world_size)) - set(results))
        raise WorkerError(f"ranks {missing} did not end within {timeout_s:g} s")
    return [results[rank] for rank in range(world_size)]
