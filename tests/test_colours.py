"""Colours are for terminals, and only for people who want them."""

from __future__ import annotations

import io

import pytest

from trainer.colours import painted, signalled


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")  # empty counts as not set
    assert painted("a", "bold", Terminal()) == "\x1b[1ma\x1b[0m"
    monkeypatch.setenv(variable, value)
    assert painted("a", "bold", Terminal()) == "a"


def test_a_file_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream in (None, io.StringIO()):
        assert signalled("error: no", stream) == "error: no"
    assert signalled("error: no", Terminal()) == "\x1b[31merror:\x1b[0m no"
    assert signalled("an error: no", Terminal()) == "an error: no"
