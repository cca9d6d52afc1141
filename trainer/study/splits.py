"""`study.splits`: each judged run has its own split of the data, so that the split is drawn as the seed is.

With one split for all runs, a study speaks about this one test set. Instead, the k-th judged run of every arm uses the
k-th split. So the differences paired by seed are independent draws of seed and split together. The sign test stays
exact, now for random splits of these data. A search uses the split of the run that it is made for, so no rate is chosen
on another split's test samples.

A few of the splits get more sequential seeds. These runs tell which part of a metric's variance comes from the split
(see `variance`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.keys import Config
from ..config.schema import option
from ..errors import UserError
from .tuning import FIRST_SEED

# In tables, the arm of a sequential run that is made only because its split has several seeds. It is not judged.
REPEATED = "sequential_repeated"
# Splits with several seeds: at least, if there are any, and by default.
_FEWEST, _USUAL = 3, 10
KEY = "trainer.task_options.split_seed"


@dataclass(frozen=True)
class Splits:
    """`study.splits`: a split of the data for each judged run, and more seeds to tell its part of the variance."""

    first: int = option(0, "split_seed of the first judged run; each further run takes the next number", minimum=0)
    repeated: int | None = option(
        None,
        "splits that get more sequential seeds, to tell the split's variance from the seed's; 0 for none, null for ten "
        "or all there are",
        minimum=0,
    )
    seeds: int = option(3, "sequential seeds of each of them, the judged run's among them", minimum=2)

    def repeated_of(self, runs: int) -> int:
        """How many splits get more seeds, in a study with this many judged runs."""
        if self.repeated is not None:
            return self.repeated
        return min(_USUAL, runs) if runs >= _FEWEST else 0


def split_of(splits: Splits | None, seeds: Sequence[int], seed: int) -> int | None:
    """The split_seed of the judged run with this seed; None where all runs of a study share one split."""
    return None if splits is None else splits.first + list(seeds).index(seed)


def splits_of(splits: Splits | None, seeds: Sequence[int]) -> list[int | None]:
    """The split_seed of each judged run."""
    return [split_of(splits, seeds, seed) for seed in seeds]


def on_split(config: Config, split: int | None) -> Config:
    """A base config with a split of the data; as it is for None."""
    if split is None:
        return config
    options = {**config.trainer.task_options, "split_seed": split}
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, task_options=options))


def more_seeds(splits: Splits | None, seeds: Sequence[int]) -> list[tuple[int, int]]:
    """(the judged run's seed, the run's seed) of all sequential runs of the splits that have several seeds.

    The seeds of two splits are never the same. A seed that all splits share would have the same effect in all of them,
    and the variance within a split would lack it.
    """
    if splits is None:
        return []
    own, after = splits.seeds - 1, max(seeds) + 1
    return [
        (judged, seed)
        for k, judged in enumerate(seeds[: splits.repeated_of(len(seeds))])
        for seed in (judged, *range(after + k * own, after + (k + 1) * own))
    ]


def check_splits(splits: Splits | None, seeds: Sequence[int]) -> None:
    """Raises UserError where the declared numbers contradict one another."""
    if splits is None:
        return
    repeated = splits.repeated_of(len(seeds))
    if repeated > len(seeds):
        raise UserError(
            f'"study.splits.repeated" ({repeated}) must be at most the number of "study.seeds" ({len(seeds)}): '
            "there is one split for each."
        )
    if 0 < repeated < _FEWEST:
        raise UserError(
            f'"study.splits.repeated" is {repeated}. So few splits say nothing of their variance: use {_FEWEST} or '
            "more, or 0 for none."
        )
    last = max((seed for _, seed in more_seeds(splits, seeds)), default=0)
    if last >= FIRST_SEED:
        raise UserError(
            f'"study.splits" would use seed {last}, and seeds from {FIRST_SEED} on belong to searches. Use smaller '
            '"study.seeds".'
        )


def check_base_splits(splits: Splits | None, config: Config, source: str) -> None:
    """Raises UserError where a base config sets what `study.splits` sets, or splits its data in another way."""
    if splits is None:
        return
    for key, is_set in ((KEY, "split_seed" in config.trainer.task_options), ("trainer.fold", config.trainer.fold)):
        if is_set:
            raise UserError(
                f'{source}: "{key}" has no place beside "study.splits", which gives each judged run a split of its '
                "own. Leave one of the two out."
            )


def check_probes(probes: Mapping[int | None, Mapping[str, Any]], metric: str, name: str = "") -> None:
    """Raises UserError where the data of a base config are not what `study.splits` needs.

    Args:
        probes: split_seed -> {"samples", "data_sha256"} of its splits.
        metric: <split>/<metric> that is judged.
        name: of the variant.
    """
    split, where = metric.split("/")[0], f' of variant "{name}"' if name else ""
    # The same test samples with every split_seed: the split is not drawn at all.
    hashes = {probe["data_sha256"].get(split) for probe in probes.values()}
    if None in hashes:
        raise UserError(f'"study.metric" is "{metric}", but the data{where} have no {split} split.')
    if len(hashes) == 1 and len(probes) > 1:
        raise UserError(
            f'"study.splits" needs data whose {split} split is drawn with split_seed, but all {len(probes)} split '
            f"seeds give the same {split} samples{where}. A {split} split that the data bring with them is never "
            f"drawn, nor is the end of a single text. Give the data as one set with "
            f'"trainer.task_options.{split}_fraction", or leave "study.splits" out.'
        )
    counts = sorted({probe["samples"]["train"] for probe in probes.values()})
    if len(counts) > 1:
        raise UserError(
            f'"study.splits" needs the same number of training samples in each split, but there are {counts[0]:,} to '
            f"{counts[-1]:,} of them{where}. So equal epochs would be unequal updates. Set "
            f'"trainer.train_samples" to at most {counts[0]:,}.'
        )
