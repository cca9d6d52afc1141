"""Errors for the user: any console can print them, and their class survives the way from one rank to another."""

from __future__ import annotations

import pytest

from trainer import errors
from trainer.errors import BY_EXIT_CODE, LostRankError, Stopped, TrainerError, UserError, readable

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, TrainerError)]


def test_every_class_has_an_exit_code_of_its_own() -> None:
    """A rank is sent the exit code of another rank's error, and raises the class that belongs to it."""
    assert {c.exit_code: c for c in CLASSES} == BY_EXIT_CODE
    assert len({c.exit_code for c in CLASSES}) == len(CLASSES)
    assert 0 not in BY_EXIT_CODE


def test_the_exit_codes_that_scripts_rely_on() -> None:
    """launch/slurm.sbatch puts a job back into the queue after 75, and tries again after 5."""
    assert (UserError.exit_code, LostRankError.exit_code, Stopped.exit_code) == (2, 5, 75)


def test_wrong_input_is_a_value_error_to_a_program() -> None:
    with pytest.raises(ValueError, match="train_batch_size"):
        raise UserError("train_batch_size (512) must be smaller")


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    """They could colour, move or overwrite what a person reads."""
    text = str(UserError("a file says \x1b[2Jhello\x07\r\u202e\n\tnext"))
    assert text == "a file says \\x1b[2Jhello\\x07\\r\\u202e\n\tnext"
    assert readable("größer \u2713 \u6570") == "größer \u2713 \u6570", "letters of all languages stay"


def test_a_long_text_is_shortened_in_the_middle() -> None:
    text = "begin" + "x" * 10_000 + "end"
    short = str(TrainerError(text))
    assert short.startswith("begin") and short.endswith("end")
    assert "[... 6,008 characters ...]" in short
    assert len(short) < 4100
    assert readable("x" * 4000) == "x" * 4000
