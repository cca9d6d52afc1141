"""How much each micro-batch of texts of different lengths has to compute, for `plan --data`."""

from __future__ import annotations

import torch

from ..config.keys import Config
from ..exact.micro_batches import GlobalBatches
from ..exact.plan import steps_per_epoch
from ..exact.splits import Split
from ..run.build import train_split
from .show_plan import Work


def text_work(config: Config) -> list[Work]:
    """Reads the config's data, and returns its `work_of`."""
    return work_of(config, train_split(config))


def work_of(config: Config, train: Split) -> list[Work]:
    """The tokens of each step of the first epoch; an empty list for samples without lengths, or for weak scaling."""
    B, m = config.train_batch_size, config.train_micro_batch_size_per_gpu
    if train.lengths is None or B is None or m is None:
        return []
    batches = GlobalBatches(
        train,
        torch.device("cpu"),
        seed=config.trainer.seed,
        global_batch_size=B,
        micro_batch_size=m,
        drop_last=config.trainer.drop_last,
        total_steps=steps_per_epoch(len(train), B, config.trainer.drop_last),
        one_shape=config.trainer.compile,
    )
    found = []
    for batch in batches.starting_at(0):
        # Without `longest`, micro-batches are not cut: each is as long as the longest text of the split.
        longest = batch.longest or [int(train.lengths.max())] * len(batch.bounds)
        found.append(Work([n * (stop - start) for n, (start, stop) in zip(longest, batch.bounds)], batch.tokens))
    return found
