"""Which rank reports an error: the user sees one message, even if several ranks have found the error."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable

from ..colours import signalled
from ..errors import LostRankError, Stopped, TrainerError
from .launchers import launch_name
from .place import Ranks

_claim: socket.socket | None = None


def print_error(error: TrainerError) -> None:
    """Prints an error, even if the terminal is gone."""
    kind = "" if isinstance(error, Stopped) else "error: "
    with contextlib.suppress(OSError, ValueError):
        print("\n" + signalled(f"{kind}{error}", sys.stderr), file=sys.stderr, flush=True)


# How this process tells a person why the run has ended. A rank that `workers` has started tells the process that
# started it, which speaks for all ranks.
speak: Callable[[TrainerError], None] = print_error


def first_to_speak(ranks: Ranks) -> bool:
    """Whether this process is the first of its launch, on this machine, to report an error.

    It is for errors before there is a process group. Every rank then finds the same error, and only one should report
    it. The claim is a name in Linux's abstract socket namespace: only one process can have it, and it disappears with
    the process.
    """
    global _claim
    if ranks.world_size == 1 or not sys.platform.startswith("linux"):
        return ranks.first
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0strong-scaling-trainer-{launch_name()}")
    except OSError:
        claim.close()
        return False
    _claim = claim
    return True


def report(error: TrainerError, ranks: Ranks) -> None:
    """Prints an error on one rank only. Then waits some seconds before it returns.

    A launcher ends all ranks as soon as one has ended. So the rank that prints waits until the others have found the
    error, too. That takes moments.
    """
    speaks = error.speaks
    if speaks is None:
        speaks = ranks.first if error.agreed else first_to_speak(ranks)
    if speaks:
        speak(error)
    if isinstance(error, LostRankError) and (speaks or ranks.first):
        # The others may notice the loss some seconds later. Until then this rank must hold its claim to report, and
        # rank 0 must hold the store in which they read about it.
        time.sleep(4.5)
    elif ranks.world_size > 1 and speaks != error.agreed:
        time.sleep(3.0 if speaks else 2.0)
