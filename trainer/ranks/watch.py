"""Watches everything outside that can end a run: signals, time, a lost launcher, ranks that no longer answer.

One thread of each rank watches beside the step. A request to stop is noted here and travels with the next gradient
exchange, so that all ranks stop after the same step. If a rank is killed, no longer answers, or keeps all others
waiting, the others name it and leave.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from ..errors import LostRankError, TrainerError
from . import speech
from .collectives import COLLECTIVE_TIMEOUT_S, gather_objects, meetings
from .heartbeat import BEAT_S, Heartbeat
from .launchers import remembered_launchers
from .neighbours import Neighbours
from .place import Ranks
from .speech import first_to_speak
from .stopping import SignalPipe, StopWish

# This thread has noticed a failure: the run's own thread has this time to notice it as well.
_MOMENT_S = 1.5
# All ranks have left this long after one was given up.
_LEAVING_S = 12.0
# After a broken connection, a rank that is silent for this long is lost.
_SILENT_S = 3.5 * BEAT_S


class Watch:
    """Watches one run: its ranks from the start, signals from `begin` on.

    Collective: every rank makes one.

    Attributes:
        step: the present step of this rank, for messages; the run sets it.
        way_on: says what to do after a rank is lost; the run sets it.

    Args:
        ranks: this rank, and how many.
        hang_timeout_s: how long a rank may not answer.
        deadline_s: time.monotonic() at which the run stops by itself; None for never.
        guest: the process belongs to a user's program, which goes on after the run. So a second signal does not end
            the process, but raises KeyboardInterrupt in the run.
    """

    def __init__(self, ranks: Ranks, hang_timeout_s: float, deadline_s: float | None, *, guest: bool = False) -> None:
        self._ranks, self._timeout_s, self._guest = ranks, hang_timeout_s, guest
        self.step = 0
        self.way_on: Callable[[], str] = lambda: "Start the run again."
        self._begun, self._failing = False, False
        self._closing = threading.Event()
        self._wish = StopWish(deadline_s)
        self._signals = SignalPipe()
        self._launchers = remembered_launchers()
        meetings.restart()
        self._hosts = gather_objects(socket.gethostname())
        self._neighbours = Neighbours(ranks)
        self._heartbeat = Heartbeat(ranks, self._closing)
        self._lost: str | None = None  # this rank's sentence on a rank that is lost
        self._looked_at_s = time.monotonic()
        self._woke_at_s = -math.inf
        self._least_count, self._together_at_s, self._told = -1, 0.0, 0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # ---- what the run's own thread says and asks -------------------------------------------------------------

    def begin(self) -> None:
        """From now on, a signal stops the run after a step instead of ending the process."""
        if self._guest:
            self._signals.install(self._interrupt)
        else:
            self._signals.install()
        self._begun = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals in a guest's process, in its main thread."""
        if self._wish.signalled(signal.Signals(number).name):
            raise KeyboardInterrupt

    def ask(self, reason: str) -> None:
        """Requests a stop after a step, as a signal does."""
        self._wish.ask(reason)

    @property
    def stop_reason(self) -> str | None:
        """Why this rank has been asked to stop; None if it has not."""
        return self._wish.reason

    def tell_failure(self, error: BaseException) -> None:
        """Tells the other ranks that this one ends with an error that it reports itself."""
        if self._heartbeat.alone:
            return
        self._failing = True
        self._heartbeat.say_failed(error.exit_code if isinstance(error, TrainerError) else 1)
        if self._ranks.first:
            # Rank 0's process holds the store. The others must read the failure before this process ends.
            self._closing.wait(2 * BEAT_S)

    def explain(self, error: BaseException) -> TrainerError | None:
        """Why a collective failed: another rank's error, which that rank reports, or a lost rank. None if unknown."""
        if self._heartbeat.alone:
            return None
        deadline_s = time.monotonic() + 3 * _SILENT_S
        while time.monotonic() < deadline_s:
            time.sleep(0.2)  # gives the heartbeat's thread time to read
            if time.monotonic() - self._looked_at_s > 2 * BEAT_S:
                continue  # this process was stopped for a while, and its thread has not looked since
            failed = self._failed_elsewhere()
            if failed is not None:
                return failed
            lost = self._lost or self._heartbeat.lost or self._killed() or self._unreachable(_SILENT_S)
            if lost is not None:
                return self._lost_error(lost)
        return None

    def close(self) -> None:
        """Ends the watching; signals have their usual effect again."""
        self._closing.set()
        self._neighbours.leave()
        self._signals.restore()
        self._thread.join(timeout=10.0)
        self._signals.close()
        self._neighbours.close()

    # ---- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            self._heed_signals(BEAT_S, self._neighbours.running())  # the end of a process is seen at once, too
            if self._closing.is_set():
                return
            now_s = time.monotonic()
            if now_s - self._looked_at_s > _SILENT_S:
                # This process was stopped for a while (SIGSTOP, a suspended job).
                self._woke_at_s = now_s
                self._heartbeat.forgive(now_s)
            self._looked_at_s = now_s
            if self._launchers.gone():
                self._wish.ask("the launcher is gone")  # before the first step, the request counts from that step on
            # A rank that fails is about to end. If a signal ends it, the same signal may end others: they are not lost.
            if not self._heartbeat.alone and not self._failing:
                self._look_after_ranks()

    def _heed_signals(self, wait_s: float, also: Sequence[int] = ()) -> None:
        for number in self._signals.read(wait_s, also):
            if self._wish.signalled(number.name) and not self._guest:
                os._exit(128 + number)

    def _look_after_ranks(self) -> None:
        """Leaves if a rank has failed or is lost, unless the run's own thread does so first."""
        failed = self._failed_elsewhere()
        if failed is None and self._heartbeat.lost is not None:
            # Another rank has reported the loss. Leave at once: a rank that leaves breaks the connections on which
            # others wait. Rank 0 leaves a little later, because it holds the store.
            self._closing.wait(4 * BEAT_S if self._ranks.first else 0.5)
            self._leave(LostRankError.exit_code)
        lost = None if failed else self._judge()
        if failed is None and lost is None:
            return
        if lost is not None:
            self._lost = lost
        # The run's own thread may be stuck in a collective. It gets a moment to notice by itself. A second signal ends
        # this rank at once: the same signal may have ended the rank that is lost.
        until_s = time.monotonic() + _MOMENT_S
        while not self._closing.is_set() and (wait_s := until_s - time.monotonic()) > 0:
            self._heed_signals(wait_s)
        if self._closing.is_set() or self._failing:
            return
        if failed is not None:
            self._leave(failed.exit_code)
        error = self._lost_error(str(lost))
        if error.speaks:
            speech.speak(error)
        if error.speaks or self._ranks.first:
            # The others come to the same end, but a launcher ends them as soon as one rank has ended. They also
            # read about the loss in rank 0's store. So this rank waits.
            time.sleep(3.0)
        self._leave(error.exit_code)

    def _leave(self, exit_code: int) -> NoReturn:
        """Ends this process, whose own thread may be stuck. The others must not take it for the rank that was lost."""
        self._neighbours.leave()
        os._exit(exit_code)

    def _judge(self) -> str | None:
        """A sentence on ranks that are lost, or None."""
        limit_s = max(0.4 * self._timeout_s, self._timeout_s - _LEAVING_S)
        lost = self._killed() or self._unreachable(limit_s)
        if lost is not None:
            return lost
        # All ranks answer, but one of them may hang while the others wait for it. They wait in a collective, or, on a
        # GPU, in any later call, when the device can queue no more. Where they wait does not matter. What counts is
        # that they came to a collective long ago, and another rank has not. If all have come to the same collective,
        # they may be computing. Before the first step, a long wait is no sign of a hang: a rank may build a cache or
        # compile DeepSpeed's kernel. Then rank 0 only says who is waited for.
        if not self._begun:
            limit_s = COLLECTIVE_TIMEOUT_S - _LEAVING_S
            if self._ranks.first:
                self._tell_of_waiting(limit_s)
        counts = {rank: entered for rank, entered in self._heartbeat.counts().items() if rank != self._ranks.rank}
        least = min(counts.values(), default=meetings.count)
        since_s = meetings.since_s(least)
        if since_s is None or time.monotonic() - max(since_s, self._woke_at_s) <= limit_s:
            return None
        # Only the ranks with the lowest count: a rank between them and this one waits for them as well.
        behind = [rank for rank, entered in counts.items() if entered == least]
        # On a busy machine a rank may be late, while another one is stopped. The late rank still answers.
        silent = self._heartbeat.silent(_SILENT_S)
        behind = [rank for rank in behind if rank in silent] or behind
        what = f"did not come to the {'exchange' if self._begun else 'others'} within {limit_s:g} s"
        stopped = self._neighbours.stopped()  # a stopped rank is the cause, even if another one is late as well
        if stopped:
            return self._sentence(stopped, what, "its process is stopped (SIGSTOP, a suspended job, a debugger)")
        where = self._where(behind)
        return self._sentence(behind, what, where=f"\nLast seen: {where}." if where else "")

    def _killed(self) -> str | None:
        """A sentence on ranks of this machine whose processes are gone, or None."""
        killed = self._neighbours.killed()
        why = "killed (as by the system, if memory runs out), or crashed"
        return self._sentence(killed, "ended without a message", why) if killed else None

    def _tell_of_waiting(self, limit_s: float) -> None:
        """Says which ranks take long to prepare the first step, and where they are. Says it again after twice the time.

        Args:
            limit_s: how long ranks wait for others.
        """
        counts, now_s = self._heartbeat.counts(), time.monotonic()
        if min(counts.values(), default=0) != self._least_count:
            self._least_count, self._together_at_s, self._told = min(counts.values(), default=0), now_s, 0
        waited_s = now_s - max(self._together_at_s, self._woke_at_s)
        if not counts or waited_s < self._timeout_s * 2**self._told:
            return
        self._told += 1
        behind = [rank for rank, entered in counts.items() if entered < max(counts.values())]
        if behind:
            who = self._where(behind) or self._names(behind)
            text = f"the other ranks have been waiting for {who}. They wait for up to {limit_s:g} s"
        else:
            text = (
                "the ranks have been preparing the first step: "
                f"{self._where(list(counts)) or self._names(list(counts))}"
            )
        print(f"\nnote: for {waited_s:.0f} s {text}.", file=sys.stderr, flush=True)

    def _unreachable(self, silent_s: float) -> str | None:
        """A sentence on ranks that have not answered for `silent_s` seconds, or None."""
        answered_at_s = max(self._heartbeat.answered_at_s, self._woke_at_s)
        if self._heartbeat.broken or time.monotonic() - answered_at_s > silent_s:
            return self._sentence([0], "cannot be reached")
        silent = self._heartbeat.silent(silent_s)
        return self._sentence(silent, f"did not answer for {silent_s:g} s") if silent else None

    def _names(self, ranks: list[int]) -> str:
        names = [f"{r} on {self._hosts[r]}" for r in ranks[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(names)}{more}"

    def _where(self, ranks: list[int]) -> str:
        places: dict[str, list[int]] = {}
        for rank in ranks:
            places.setdefault(self._heartbeat.where(rank), []).append(rank)
        return "; ".join(f"{self._names(group)} in {place}" for place, group in places.items() if place)

    def _sentence(
        self, ranks: list[int], what: str, why: str = "killed, hanging, or cut off from the network", where: str = ""
    ) -> str:
        when = f"in step {self.step + 1}" if self._begun else "before the first step"
        return f"R{self._names(ranks)[1:]} {what}, {when}: {why}.{where}\nThe other ranks leave. {self.way_on()}"

    def _failed_elsewhere(self) -> TrainerError | None:
        if self._heartbeat.failed is None:
            return None
        rank, code = self._heartbeat.failed
        error = TrainerError(f"rank {rank} has failed", agreed=True)
        error.exit_code = code
        error.speaks = False
        return error

    def _lost_error(self, sentence: str) -> LostRankError:
        """The error for a lost rank; `speaks` is true on one rank only."""
        error = LostRankError(sentence)
        # If this rank was stopped for a while, it finds that the others have left. They have reported the reason.
        asleep = time.monotonic() - self._woke_at_s < 2 * self._timeout_s
        # On a busy machine this rank may be the last to notice. Another one may have reported the loss and left.
        silent = asleep or self._neighbours.spoken()
        try:
            # The others must hear of it now: then they leave with this rank, and do not report it as lost, too.
            self._heartbeat.say_lost(sentence)
            speaks = not silent and self._heartbeat.first_to_report()
            if speaks:
                # A rank of this machine that can no longer reach the store asks here instead.
                first_to_speak(self._ranks)
        except Exception:  # the store went down with its rank
            speaks = not silent and first_to_speak(self._ranks)
        error.speaks = speaks
        if speaks:
            self._neighbours.speak()
        return error
