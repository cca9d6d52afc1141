"""The program that the launcher starts on every rank: parses, runs, reports how the run ended."""

from __future__ import annotations

import time

# Before all other imports: they take seconds, and count for the time to the first step and for the wall-time budget.
_STARTED_AT_S, _BEGAN_S = time.time(), time.monotonic()

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

if __package__ in (None, ""):
    # `deepspeed trainer/main.py` puts this folder on the path, but the package is found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.ranks.stopping import EndedBySignal, end_at_once  # noqa: E402
from trainer.ranks.streams import open_streams  # noqa: E402

# Before the slow imports: a Ctrl-C during them would otherwise end in a traceback.
if __name__ == "__main__":
    open_streams()
    signal.signal(signal.SIGINT, end_at_once)

# When a rank dies, torch's stores would print C++ stack traces beside our message.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from trainer.commands.cli import config_from, run_parser  # noqa: E402
from trainer.commands.ending import end  # noqa: E402
from trainer.config.loggers import refuse_missing  # noqa: E402
from trainer.errors import TrainerError  # noqa: E402
from trainer.ranks.launchers import remember_launchers  # noqa: E402
from trainer.ranks.place import Ranks  # noqa: E402
from trainer.ranks.rendezvous import close  # noqa: E402
from trainer.ranks.speech import first_to_speak, report  # noqa: E402
from trainer.tasks.first_look import look  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Runs a config on this rank. Returns the exit code (see trainer/commands/README.md)."""
    ranks = Ranks()
    try:
        remember_launchers()  # at once, because a launcher may end while this rank starts
        ranks = Ranks.from_environment()  # first, so that even a wrong flag is reported by one rank
        flags = run_parser().parse_args(arguments)
        ranks = Ranks.from_environment(flags.local_rank)
        if ranks.world_size > 1:
            os.environ.update(ranks.variables())  # mpirun and srun have other names for them
        config = config_from(flags)
        config.plan(ranks.world_size)  # fails early: before torch is loaded
        look(config.trainer.task, config.trainer.task_options)
        refuse_missing(config)
        from trainer.run.claim import Resume
        from trainer.run.run import run

        run(
            config,
            ranks,
            config_name=Path(flags.ds_config).stem,
            started_at_s=_STARTED_AT_S,
            began_s=_BEGAN_S,
            resume=Resume(flags.resume, flags.allow_changed_config),
        )
    except TrainerError as error:
        report(error, ranks)
        return error.exit_code
    except KeyboardInterrupt:
        if ranks.first:
            print("\nstopped from the keyboard", file=sys.stderr)
        return 130
    except EndedBySignal as end:
        if ranks.first:
            print(f"\nstopped by {end.signal.name} before the first step", file=sys.stderr)
        return 128 + end.signal
    except Exception:
        if not first_to_speak(ranks):
            time.sleep(2.0)  # another rank prints the traceback, and the launcher ends it as soon as this one ends
            return 1
        raise
    close()
    return 0


if __name__ == "__main__":
    try:
        end(main())
    except SystemExit as stop:  # --help
        end(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        end(1)
