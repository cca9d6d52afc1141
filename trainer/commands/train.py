"""`python -m trainer train`: starts the ranks of a run itself, on this machine."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from ..api import launch
from ..config.keys import Config
from ..config.loggers import refuse_missing
from ..errors import TrainerError, UserError
from ..ranks.speech import print_error
from ..ranks.stopping import EndedBySignal, end_at_once_no_more
from ..ranks.workers import WorkerError
from ..record.folder import check_content, refuse_nothing_to_resume
from ..tasks.first_look import look


def train(config: Config, flags: argparse.Namespace) -> int:
    """Runs a config and prints what rank 0 prints. An error is the last thing on the screen.

    Args:
        config: what the flags describe.
        flags: of the command line; --ranks is None for as many as there are GPUs.

    Returns:
        The exit code, as of trainer/main.py.
    """
    try:
        return _train(config, flags)
    except TrainerError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped from the keyboard before the first step", file=sys.stderr)
        return 130
    except EndedBySignal as end:
        print(f"\nstopped by {end.signal.name} before the first step", file=sys.stderr)
        return 128 + end.signal


def _train(config: Config, flags: argparse.Namespace) -> int:
    launch.refuse_launchers("python -m trainer train")
    if flags.ranks is not None and flags.ranks < 1:
        raise UserError(f"--ranks {flags.ranks}: it must be at least 1.")
    config.plan(flags.ranks or 1)  # fails early: before torch is loaded
    look(config.trainer.task, config.trainer.task_options)
    refuse_missing(config)
    refuse_nothing_to_resume(flags.resume)
    folder, name = config.trainer.output_dir, Path(flags.ds_config).stem
    if folder and flags.resume in ("none", "auto"):  # the run checks it again; here it costs no start of ranks
        check_content(Path(folder).expanduser(), name, flags.resume == "auto")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run has its own way to stop
    from ..engine.gpus import usable_gpus

    order = launch.Order.of(config, name, flags.resume, flags.allow_changed_config)
    ranks = flags.ranks or max(1, usable_gpus(config.trainer.device))
    if ranks == 1:
        launch.on_this_rank(order)
        return 0
    config.plan(ranks)
    end_at_once_no_more()
    try:
        launch.on_ranks(order, ranks)
    except WorkerError as error:
        print(f"\n{error}", file=sys.stderr)  # a traceback
        return 1
    return 0
