"""The heartbeat: every second, each rank writes a message into the store at which the ranks met.

The message holds the number of collectives that the rank has entered, and where its own thread is. A rank also reads
there whether another rank has failed, or has been given up as lost.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from .collectives import gather_objects, meetings
from .place import Ranks
from .rendezvous import side_store
from .whereabouts import whereabouts

BEAT_S = 1.0
# How long to wait for the store. It is short, because the callers have another way if the store does not answer.
_STORE_TIMEOUT_S = 2.0


class Heartbeat:
    """Sends this rank's heartbeat, and reads those of the others. Collective: every rank makes one.

    Attributes:
        broken: whether the store can no longer be reached.
        answered_at_s: time.monotonic() of the store's last answer.

    Args:
        ranks: this rank, and how many.
        closing: set when the run has ended.
    """

    def __init__(self, ranks: Ranks, closing: threading.Event) -> None:
        self._ranks, self._closing = ranks, closing
        # The run's own thread reads nothing from it, so a long timeout is harmless.
        self._store = side_store(86400.0)
        self._names = [f"beat/{r}" for r in range(ranks.world_size)]
        self._count, self._entered = 0, -1
        self._heard: dict[int, tuple[bytes, float]] = {}  # the last beat of a rank, and when it was read
        self._said: dict[str, str] = {}
        self.broken = False
        self.answered_at_s = time.monotonic()
        if self._store is not None:
            self._beat()
            gather_objects(None)  # a barrier: afterwards every rank's first beat is in the store
            threading.Thread(target=self._talk, name="beat", daemon=True).start()

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self._store is None

    def _beat(self) -> None:
        self._count += 1
        # Reading another thread's stack is not without risk. If the thread has entered a new collective since the last
        # beat, it does not hang, so its place is not needed.
        entered, before = meetings.count, self._entered
        self._entered = entered
        place = whereabouts() if entered == before else ""
        self._store.set(self._names[self._ranks.rank], json.dumps([self._count, entered, place]))

    def _talk(self) -> None:
        """The thread: sends beats, and notes the others' messages. It has no time limit: cut off, it waits forever."""
        while not self._closing.is_set():
            try:
                self._beat()
                names = [name for name in ("failed", "lost") if self._store.check([name])]
                said = {name: self._store.get(name).decode() for name in names}
                beats = self._store.multi_get(self._names)
            except Exception:
                self.broken = True
                return
            self._said, self.answered_at_s = said, time.monotonic()
            for rank, beat in enumerate(beats):
                if rank not in self._heard or self._heard[rank][0] != beat:
                    self._heard[rank] = (beat, self.answered_at_s)
            self._closing.wait(BEAT_S)

    # ---- what the others have said ---------------------------------------------------------------------------

    def silent(self, silent_s: float) -> list[int]:
        """The other ranks that have sent no beat for `silent_s` seconds."""
        found = [r for r, (_, heard_s) in list(self._heard.items()) if self.answered_at_s - heard_s > silent_s]
        return [r for r in found if r != self._ranks.rank]

    def counts(self) -> dict[int, int]:
        """Rank -> the collectives that it has entered. Ranks that wait for one another have the same count."""
        return {rank: json.loads(beat)[1] for rank, (beat, _) in sorted(self._heard.items())}

    def where(self, rank: int) -> str:
        """Where a rank's own thread was at its last beat; "" if it had just come from one collective to another."""
        return str(json.loads(self._heard[rank][0])[2])

    def forgive(self, now_s: float) -> None:
        """Counts every rank as heard now: this process itself was stopped for a while, the others were not silent."""
        self._heard = {rank: (beat, now_s) for rank, (beat, _) in self._heard.items()}

    @property
    def lost(self) -> str | None:
        """Another rank's sentence on a rank that is lost; None if there is none."""
        return self._said.get("lost")

    @property
    def failed(self) -> tuple[int, int] | None:
        """(rank, exit code) of another rank that has failed and reports it."""
        if "failed" not in self._said:
            return None
        rank, code = json.loads(self._said["failed"])
        return None if rank == self._ranks.rank else (rank, int(code))

    # ---- what this rank says ---------------------------------------------------------------------------------

    def say_failed(self, exit_code: int) -> None:
        """Tells the others that this rank ends with an error that it reports itself."""
        with contextlib.suppress(Exception):
            _within(_STORE_TIMEOUT_S, lambda: self._store.set("failed", json.dumps([self._ranks.rank, exit_code])))

    def say_lost(self, sentence: str) -> None:
        """Tells the others that a rank is lost, unless another rank has said so. Raises if the store is gone."""
        if self.broken:
            raise ConnectionError
        _within(_STORE_TIMEOUT_S, lambda: self._store.compare_set("lost", "", sentence))

    def first_to_report(self) -> bool:
        """Whether this rank is the first to ask, and so reports the loss. Raises if the store is gone."""
        return bool(_within(_STORE_TIMEOUT_S, lambda: self._store.add("spoken", 1)) == 1)


def _within(limit_s: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns or raises; TimeoutError if it does not come back in time."""
    came: list[Any] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            came.append(ask())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if failures:
        raise failures[0]
    if not came:
        raise TimeoutError
    return came[0]
