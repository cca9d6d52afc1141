"""The errors a user can meet, and the exit code each one ends the process with."""

from __future__ import annotations

# Characters of a message: enough for a list of ten files, and for a person.
_LONGEST = 4000


def readable(text: str) -> str:
    """A message that any console can print: what files put into it is shortened, and never a control character."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1000]} [... {len(text) - _LONGEST:,} characters ...] {text[-1000:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class TrainerError(Exception):
    """An error whose message is for a person: it is printed without a traceback.

    Attributes:
        exit_code: what the process ends with.
        agreed: every rank raised this same error together, so rank 0 alone prints it.
        speaks: whether this rank prints it; None where nobody has settled that yet.
    """

    exit_code = 1
    speaks: bool | None = None

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(readable(message))
        self.agreed = agreed


class UserError(TrainerError, ValueError):
    """Something in the config, the command line, the task or the machine has to change first."""

    exit_code = 2


class NonFiniteError(TrainerError):
    """The loss or the gradient stopped being finite during training.

    Attributes:
        good_steps: optimizer steps that the kept parameters have behind them.
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
    """The run was asked to stop, and did so with a checkpoint: nothing is lost (75 is EX_TEMPFAIL: try again)."""

    exit_code = 75


# An agreed error is rebuilt on every rank from its exit code (see distributed.raise_together).
BY_EXIT_CODE = {
    cls.exit_code: cls for cls in (TrainerError, UserError, NonFiniteError, RanksDifferError, LostRankError, Stopped)
}
