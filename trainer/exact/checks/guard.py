"""The guard: at fixed intervals the ranks compare a hash of what must be the same on all of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...errors import RanksDifferError
from ...ranks.collectives import common_value, gather_int64, gather_objects
from .hashes import hash64, hash_each


def compare_ranks(state: Mapping[str, Tensor], step: int) -> None:
    """Checks that every rank holds the same bits. Collective: every rank.

    Args:
        state: name -> tensor, the same names everywhere.
        step: for the message.

    Raises:
        RanksDifferError: on every rank, naming the ranks that differ and the first tensor in which they do.
    """
    # One hash over everything is cheap. Only if it differs, each tensor is hashed, to name the first one that differs.
    hashes = gather_int64(hash64(state.values()))
    if len(set(hashes)) == 1:
        return
    by_tensor = gather_objects(hash_each(state))
    usual = common_value(hashes)  # the most frequent one; with two ranks, nobody can say which of them is right
    wrong = [rank for rank, value in enumerate(hashes) if value != usual]
    tensor = next(
        (name for name in state if len({rank_hashes.get(name) for rank_hashes in by_tensor}) > 1), "an unnamed tensor"
    )
    if len(hashes) == 2:
        who = "ranks 0 and 1 differ"
    else:
        who = (
            f"rank{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong))} differ{'s' * (len(wrong) == 1)} from the others"
        )
    raise RanksDifferError(
        f"After step {step} {who}, first in {tensor}. All ranks apply the same gradient, so something else changed it: "
        "the task's forward or loss writes to it (`python -m trainer check-task` looks for that), a device is faulty, "
        "or the devices are not alike (then the run is labelled tolerance, and says so at its start). Nothing was "
        "saved from this step.",
        agreed=True,
    )
