"""What the command that makes a study's runs says of them. Whole studies are in tests/distributed/test_study.py."""

from __future__ import annotations

from trainer.study.many_runs import duration


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 99, 600, 36_000)] == ["4 s", "99 s", "10 min", "10.0 h"]
