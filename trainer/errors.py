"""The errors that a user can meet, each with the exit code of the process."""

from __future__ import annotations

# The most characters of a message. They are enough for a list of ten files, and still short enough to read.
_LONGEST = 4000


def readable(text: str) -> str:
    """A message that any console can print. Long texts are shortened, and control characters are escaped.

    Messages quote files and libraries. A control character in them could change what is on the terminal.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1000]} [... {len(text) - _LONGEST:,} characters ...] {text[-1000:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class TrainerError(Exception):
    """An error whose message is for the user: it is printed without a traceback.

    Attributes:
        exit_code: the exit code of the process.
        agreed: whether every rank raises this same error. Then only rank 0 prints it.
        speaks: whether this rank prints it; None if that is not decided yet.
    """

    exit_code = 1
    speaks: bool | None = None

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(readable(message))
        self.agreed = agreed


class UserError(TrainerError, ValueError):
    """The user must change something first: the config, the command line, the task or the machine.

    It is a ValueError as well, so that a program that uses the trainer can catch it as one.
    """

    exit_code = 2


class NonFiniteError(TrainerError):
    """The loss or the gradient stopped being finite during training.

    Attributes:
        good_steps: the number of optimizer steps in the parameters that are kept.
    """

    exit_code = 3
    good_steps = 0


class RanksDifferError(TrainerError):
    """Ranks that must be identical are not."""

    exit_code = 4


class LostRankError(TrainerError):
    """A rank was killed, hangs or cannot be reached, so the others cannot go on."""

    exit_code = 5


class Stopped(TrainerError):
    """The run was asked to stop, and has written a checkpoint: nothing is lost.

    The exit code 75 is EX_TEMPFAIL of sysexits.h, "try again".

    Attributes:
        reason: who or what asked: the name of a signal such as SIGINT, or a clause.
    """

    exit_code = 75
    reason = ""


# An agreed error is rebuilt on every rank from its exit code (see ranks.collectives.raise_together).
BY_EXIT_CODE = {
    cls.exit_code: cls for cls in (TrainerError, UserError, NonFiniteError, RanksDifferError, LostRankError, Stopped)
}
