"""What trials have found out."""

from __future__ import annotations

from trainer.exact.packs.findings import ALONE, Findings


def test_what_is_computed_one_micro_batch_at_a_time_is_listed() -> None:
    """A rule of a layer has a place among others: 0 is the first."""
    findings = Findings(sites={("linear", 1): 0, ("conv1d", 2): ALONE, ("add", 3): 2, ("sum", 4): ALONE})
    assert findings.alone() == [("conv1d", 2), ("sum", 4)]
    assert Findings().alone() == []
