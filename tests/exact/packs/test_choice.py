"""Which size of packs is taken."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from trainer.exact.packs import choice as by_the_clock
from trainer.exact.packs.choice import Choice

pytestmark = pytest.mark.timeout(60)  # a search that never ends fills the memory

CPU = torch.device("cpu")


class Clock:
    """Stands for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now_s: float = 100.0) -> None:
        self.now_s = now_s
        monkeypatch.setattr(by_the_clock.time, "perf_counter", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def asked(
    choice: Choice,
    clock: Clock,
    seconds: dict[int, float],
    steps: int,
    block: int = 16,
    works: Sequence[float] = (),
    refused: frozenset[int] = frozenset(),
) -> list[int]:
    """The sizes that are asked for, if a unit of work takes so many seconds with packs of each size."""
    sizes = []
    for step in range(steps):
        work = works[step] if step < len(works) else 1.0
        size = choice.begin(block, work, None, set(refused))
        sizes.append(size)
        clock.now_s += seconds[size] * work
        choice.end(tried=False)
    return sizes


class Event:
    """Stands for an event of a GPU, which is behind the host: it has happened when it was asked for a second time."""

    now_ms, queries = 0.0, 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "else a GPU notes no time"
        self.at_ms: float | None = None
        self.asked = 0

    def record(self) -> None:
        self.at_ms = Event.now_ms

    def query(self) -> bool:
        Event.queries += 1
        assert Event.queries < 1000, "nobody asks for ever"
        self.asked += 1
        return self.asked > 1

    def elapsed_time(self, ended: Event) -> float:
        assert ended.asked > 1, "a GPU would be waited for"
        assert self.at_ms is not None and ended.at_ms is not None
        return ended.at_ms - self.at_ms


def test_a_gpu_is_timed_by_events_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    choice, sizes = Choice(torch.device("cuda")), []
    milliseconds = {1: 8.0, 2: 5.0, 4: 6.0}
    for _ in range(40):
        sizes.append(choice.begin(4, 1.0, None, set()))
        Event.now_ms += milliseconds[sizes[-1]]
        choice.end(tried=False)
    assert set(sizes) == {1, 2, 4} and set(sizes[30:]) == {2}
    assert choice.speed_up == pytest.approx(8 / 5)


def test_the_fastest_size_is_chosen_by_the_clock(clock: Clock) -> None:
    choice = Choice(CPU)
    sizes = asked(choice, clock, {1: 8.0, 2: 5.0, 4: 3.0, 8: 2.5, 16: 4.0}, 30)
    assert sizes[:12] == [1] * 3 + [16] * 3 + [8] * 3 + [4] * 3, "from the largest down, as long as it gets faster"
    assert sizes[12:18] == [8, 4] * 3, "the two fastest once more"
    assert set(sizes[18:]) == {8}
    assert choice.begin(16, 128, 2, set()) == 2, "memory allows no more"


@pytest.mark.parametrize(
    ("seconds", "tried", "best"),
    [
        ({1: 8.0, 2: 1.0, 4: 2.0, 8: 3.0, 16: 4.0}, [1, 16, 8, 4, 2], 2),
        ({1: 1.0, 2: 5.0, 4: 3.0, 8: 4.0, 16: 8.0}, [1, 16, 8, 4, 2], 1),
        ({1: 8.0, 2: 9.0, 4: 3.0, 8: 5.0, 16: 9.0}, [1, 16, 8, 4, 2], 4),
        ({1: 8.0, 8: 4.0, 16: 3.0}, [1, 16, 8], 16),
        ({1: 8.0, 8: 2.875, 16: 3.0}, [1, 16, 8], 8),
    ],
)
def test_smaller_packs_are_tried_as_long_as_they_are_clearly_faster(
    seconds: dict[int, float], tried: list[int], best: int, clock: Clock
) -> None:
    choice = Choice(CPU)
    sizes = asked(choice, clock, seconds, 3 * len(tried) + 12)
    assert sizes[: 3 * len(tried)] == [size for size in tried for _ in range(3)]
    assert choice.best == best and sizes[-1] == best
    assert choice.speed_up == pytest.approx(seconds[1] / seconds[best])


def test_packs_that_save_a_twentieth_are_clearly_faster(clock: Clock) -> None:
    choice, sizes = Choice(CPU), []
    for _ in range(10):
        clock.now_s = 0.0  # so that times have no rounding errors
        sizes.append(choice.begin(8, 1.0, None, set()))
        clock.now_s = {1: 2.0, 8: 1.0, 4: 0.95, 2: 1.0}[sizes[-1]]
        choice.end(tried=False)
    assert sizes[9] == 2


def test_the_shortest_time_of_a_size_counts(clock: Clock) -> None:
    """Other work on the machine only adds to it."""
    choice = Choice(CPU)
    for step in range(20):
        size = choice.begin(4, 1.0, None, set())
        clock.now_s += {1: 4.0, 2: 3.0, 4: 2.0}[size] + (50.0 if step in (0, 3, 4) else 0.0)
        choice.end(tried=False)
    assert choice.best == 4
    assert choice.speed_up == pytest.approx(2.0)


def test_times_are_compared_for_each_unit_of_work(clock: Clock) -> None:
    """Steps of texts have more or fewer tokens."""
    choice = Choice(CPU)
    sizes = asked(choice, clock, {1: 4.0, 2: 3.0, 4: 2.0}, 20, block=4, works=[1.0] * 3 + [8.0] * 3 + [1.0] * 3)
    assert sizes[3] == 4 and choice.best == 4


def test_how_much_is_won_is_not_known_before_the_choice(clock: Clock) -> None:
    choice = Choice(CPU)
    assert choice.speed_up is None
    asked(choice, clock, {1: 4.0, 4: 2.0}, 5, block=4)
    assert choice.speed_up is None


def test_a_rank_with_one_micro_batch_has_no_choice(clock: Clock) -> None:
    choice = Choice(CPU)
    assert asked(choice, clock, {1: 1.0}, Choice.STEPS + 1, block=1) == [1] * 4
    assert choice.best == 1 and choice.speed_up == 1.0


def test_the_largest_packs_hold_all_micro_batches_of_a_rank(clock: Clock) -> None:
    assert asked(Choice(CPU), clock, {1: 1.0, 8: 1.0}, 4, block=6)[3] == 8
    assert asked(Choice(CPU), clock, {1: 1.0, 4: 1.0}, 4, block=4)[3] == 4


def test_a_step_without_micro_batches_is_not_measured() -> None:
    choice = Choice(CPU)
    assert choice.begin(0, 0.0, None, set()) == 1
    choice.end(tried=False)
    for _ in range(Choice.STEPS):
        assert choice.begin(4, 32, None, set()) == 1
        choice.end(tried=False)
    assert choice.begin(4, 32, None, set()) == 4, "only the first was not measured"


def test_a_step_without_micro_batches_has_no_packs(clock: Clock) -> None:
    choice = Choice(CPU)
    asked(choice, clock, {1: 2.0, 2: 1.5, 4: 1.0}, 20, block=4)
    assert choice.begin(4, 1.0, None, set()) == 4
    assert choice.begin(0, 0.0, None, set()) == 1


def test_smaller_steps_and_trials_are_not_measured(clock: Clock) -> None:
    choice = Choice(CPU)
    assert choice.begin(16, 1.0, None, set()) == 1
    choice.end(tried=True)
    asked(choice, clock, {1: 8.0}, 1)
    for _ in range(5):  # the last one of an epoch, say
        assert choice.begin(3, 1.0, None, set()) == 1
        choice.end(tried=False)
    assert asked(choice, clock, {1: 8.0, 16: 1.0}, 3) == [1, 1, 16]


def test_a_choice_is_not_measured_any_more(clock: Clock) -> None:
    choice, seconds = Choice(CPU), {1: 4.0, 2: 3.0, 4: 2.0}
    asked(choice, clock, seconds, 20, block=4)
    asked(choice, clock, seconds | {4: 0.5}, 5, block=4)
    assert choice.speed_up == pytest.approx(2.0)


def test_refused_sizes_are_left_out_of_the_choice(clock: Clock) -> None:
    choice = Choice(CPU)
    sizes = asked(choice, clock, {1: 8.0, 8: 1.0}, 13, block=8, refused=frozenset({2, 4}))
    assert set(sizes) == {1, 8}
    assert choice.best == 8


def test_a_choice_that_is_refused_later_is_made_anew(clock: Clock) -> None:
    choice, seconds = Choice(CPU), {1: 8.0, 2: 5.0, 4: 3.0, 8: 2.0}
    asked(choice, clock, seconds, 20, block=8)
    assert choice.best == 8
    asked(choice, clock, seconds, 20, block=8, refused=frozenset({8}))
    assert choice.best == 4
