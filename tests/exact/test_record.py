"""The records of micro-batches: what is written for one is read as its own, by name."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.record import OwnRecords, RecordLayout, Records


@pytest.mark.parametrize("statistics_size", [0, 1, 3])
@pytest.mark.parametrize("norms", [False, True])
def test_what_is_written_is_read_by_name(statistics_size: int, norms: bool) -> None:
    layout = RecordLayout(statistics_size, norms)
    rows = torch.zeros(4, layout.size)
    own = OwnRecords(rows, layout)
    for step in range(2):  # each step writes all rows again
        for j in range(4):
            own.statistics(j).copy_(torch.arange(statistics_size) + 10.0 * j)
            own.add(j, torch.tensor(100.0 * step + j), torch.tensor(0.5 * j) if norms else None)
        records = Records(rows, layout)
        assert records.losses.tolist() == [100.0 * step + j for j in range(4)]
        assert records.statistics.tolist() == [[10.0 * j + i for i in range(statistics_size)] for j in range(4)]
        assert (records.norms is not None) == norms
        if records.norms is not None:
            assert records.norms.tolist() == [0.0, 0.5, 1.0, 1.5]
        assert records.flags.tolist() == [0.0] * 4


def test_a_record_is_no_longer_than_it_has_to_be() -> None:
    """It travels with every micro-batch: loss, statistics, a norm if there is one, and the flag."""
    assert (RecordLayout(0).size, RecordLayout(6).size, RecordLayout(6, norms=True).size) == (2, 8, 9)
    assert Records(torch.zeros(1, 8), RecordLayout(6)).norms is None


def test_a_flag_that_is_raised_stays_and_hides_nothing() -> None:
    layout = RecordLayout(1, norms=True)
    rows = torch.zeros(2, layout.size)
    own = OwnRecords(rows, layout)
    own.raise_flag()
    for _ in range(2):
        for j, value in enumerate((3.0, 4.0)):
            own.statistics(j).fill_(10 * value)
            own.add(j, torch.tensor(value), torch.tensor(-value))
        assert rows.tolist() == [[3.0, 30.0, -3.0, 1.0], [4.0, 40.0, -4.0, 1.0]]


def test_a_record_does_not_keep_the_graph_of_a_loss() -> None:
    layout = RecordLayout(0)
    rows = torch.zeros(1, layout.size)
    OwnRecords(rows, layout).add(0, torch.ones((), requires_grad=True) * 2, None)
    assert not rows.requires_grad
    assert rows[0, 0] == 2.0
