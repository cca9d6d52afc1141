"""Which rank reports an error: a person sees one message, whichever ranks have found it."""

from __future__ import annotations

import os
import socket
import sys
import time

from ..errors import LostRankError, Stopped, TrainerError
from .place import Ranks

_claim: socket.socket | None = None


def first_to_speak(ranks: Ranks) -> bool:
    """Whether this process is the first of its launch, on this machine, to report an error.

    For errors before there is a process group: every rank finds the same one, and one should say it.
    The claim is a name in Linux's abstract socket namespace: atomic, private, gone with the process.
    """
    global _claim
    if ranks.world_size == 1 or not sys.platform.startswith("linux"):
        return ranks.first
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0strong-scaling-trainer-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}")
    except OSError:
        claim.close()
        return False
    _claim = claim
    return True


def report(error: TrainerError, ranks: Ranks) -> None:
    """Prints an error once over all ranks, and keeps the process that printed it alive for its peers.

    A launcher ends the other ranks as soon as one has ended, so the speaker waits until the others
    have come to the same end; they do within moments, and the launcher then ends the wait.
    """
    speaks = error.speaks
    if speaks is None:
        speaks = ranks.first if error.agreed else first_to_speak(ranks)
    if speaks:
        kind = "" if isinstance(error, Stopped) else "error: "
        print(f"\n{kind}{error}", file=sys.stderr, flush=True)
    if isinstance(error, LostRankError) and (speaks or ranks.first):
        # The others may notice some seconds later: by then this one still holds the claim to speak, and rank 0 the
        # store at which they learn of it.
        time.sleep(4.5)
    elif ranks.world_size > 1 and speaks != error.agreed:
        time.sleep(3.0 if speaks else 2.0)
