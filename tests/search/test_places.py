"""Whether all devices are for one trial follows from what was measured."""

from __future__ import annotations

import pytest

from trainer.search.places import Times, choose


@pytest.mark.parametrize(
    ("trials", "together", "said"),
    [
        (20, False, "so one trial on each: the 20 trials left are done in 50 s instead of 80 s"),
        (5, False, "done in 20 s instead of 20 s"),  # a tie
        (4, False, "the 4 trials left are done in 10 s instead of 16 s"),
        (2, True, "so all devices for one trial: the 2 trials left are done in 8.0 s instead of 10 s"),
        (1, True, "the trial left is done in 4.0 s instead of 10 s"),
        (None, False, "more trials end in the time that is left"),
    ],
)
def test_the_sooner_end_decides(trials: int | None, together: bool, said: str) -> None:
    found, line = choose(Times(4, 10.0, 4.0), trials)
    assert found == together
    assert said in line
    assert line.startswith(
        "measured: with the file's own values a trial takes 10 s on one of 4 devices with all 4 in use, "
        "4.0 s on all together"
    )


def test_in_a_given_time_the_rate_decides() -> None:
    assert choose(Times(4, 10.0, 2.4), None)[0]
    assert not choose(Times(4, 10.0, 2.6), None)[0]
