"""What a paper of several studies says: its abstract, its design, what speaks for the claim and what against it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..wording import counted
from .arms import SEQUENTIAL, Place, title_of
from .judgement import Comparison
from .results import Results, speed_ups
from .sentences import listed

QUESTION = (
    "Cunha, Rodrigues, Viana and Oliveira (2018, arXiv 1807.09161) argue that on small datasets weak scaling, which "
    "grows the global batch with the number of GPUs W, loses accuracy and mostly does not converge, while strong "
    "scaling, which splits one global batch, scales well and keeps the accuracy of a sequential run. Only the abstract "
    "of that paper was at hand, so its numbers are not repeated here. The question is tested anew: does the typical "
    "weak run lose against the sequential run of its seed, how many runs fail, and what does strong scaling give?"
)
_THREATS = (
    "The models and datasets are not those of the paper. They are small enough for many seeds. Large models may behave "
    "in another way.",
    "A weak run on W ranks was computed exactly on fewer: its bits follow from its global batch and its micro-batches. "
    "So its accuracy is that of W ranks. Its time says nothing about the speed of W ranks.",
    "Strong scaling can use as many ranks as a batch has micro-batches. Where weak scaling loses at more ranks than "
    "that, strong scaling is no alternative at the same number of ranks, but only at fewer.",
    "Rules start from the base's rate. With another rate a rule may lose more or less. So a loss of a rule is the loss "
    "of this rule. Tuned arms ask what a larger batch costs, with the fewer updates that go with it, within the ranges "
    "that were searched.",
    "The control of as few updates also sees W times fewer samples. So no cause here tells updates from samples.",
    "At equal epochs a loss may come from a budget that is too short for the sequential run as well.",
    "Alpha holds for each study by itself. Over several studies wrong verdicts add up, and margins differ.",
    "A verdict is about the typical run. The rate of collapses that is not ruled out is given with each comparison.",
    "A run that is counted as not converged was trained less far than sequential runs. It may predict as well.",
    "A folder shows that its runs follow its declaration. It cannot show what was known when the declaration was "
    "written: a design may follow earlier studies.",
)


class Block(NamedTuple):
    """A part of the paper.

    Attributes:
        kind: "h2", "h3", "p", "list" or "table".
        texts: the text, the items, or the header of a table.
        rows: of a table.
    """

    kind: str
    texts: Sequence[str]
    rows: Sequence[Sequence[str]] = ()


def name_of(study: Results) -> str:
    """A study in a paper: its folder's name and its task."""
    return f"{study.folder.name} ({study.task})"


def abstract(studies: Sequence[Results]) -> str:
    """The counts of all verdicts, and what strong scaling does."""
    comparisons = [c for study in studies for c in study.weak]
    parts = []
    for budget in ("epochs", "updates"):
        own = [c for c in comparisons if c.place.budget == budget]
        counts = {kind: sum(_kind_of(c) == kind for c in own) for kind in _KINDS}
        more = sum(c.verdicts["unconverged"] == "more often" for c in own)
        said = ", ".join(f"{words} in {counts[kind]}" for kind, words in _KINDS.items() if counts[kind])
        if own:
            parts.append(
                f"At equal {budget}, {counted(len(own), 'comparison')}: {said}. Runs fail to converge, by their "
                f"training loss, more often than sequential runs in {more or 'none'} of them."
            )
    asked = [[W for W, answer in study.declared["strong"] if isinstance(answer, int)] for study in studies]
    most = max((W for sizes in asked for W in sizes), default=0)
    strong = (
        f" Strong scaling gives the sequential run's bits, by construction, at every W that its micro-batches allow: "
        f"up to {most} in {counted(sum(map(bool, asked)), 'study', 'studies')} that asked for it."
    )
    speeds = [f"{speed:.2f} ({name_of(study)})" for study in studies for W, speed in _speeds(study).items() if W == 2]
    strong += f" At two real ranks it was {', '.join(speeds)} times as fast as at one." if speeds else ""
    shared = _shared_runs(studies)
    return (
        f"{counted(len(studies), 'study', 'studies')} of weak scaling, each comparison with sequential "
        f"runs of the same seeds. {' '.join(parts)}"
        + (strong if most else "")
        + (f" {shared:,} runs are the same in several studies, so these studies are not independent." if shared else "")
    )


def _speeds(study: Results) -> dict[int, float]:
    """W -> how many times as fast strong scaling was as one rank, of those that were timed."""
    measured, _ = speed_ups(study)
    return {W: speed for W, speed in measured.items() if W > 1}


def _shared_runs(studies: Sequence[Results]) -> int:
    """How many models several studies have in common. Equal parameters count, even if the configs differ."""
    counts = Counter(h for study in studies for h in {run["parameters_sha256"] for run in study.runs.values()} if h)
    return sum(count > 1 for count in counts.values())


_SIZE_OPEN = "loses, size open"
_KINDS: dict[str, str] = {
    "material loss": "the typical run loses more than the margin",
    "small loss": "it loses, but less than the margin,",
    "ruled out": "such a loss is ruled out",
    _SIZE_OPEN: "it loses, and whether by more than the margin is undecided",
    "undecided": "nothing is shown either way",
}


def _kind_of(c: Comparison) -> str:
    return _SIZE_OPEN if c.size_open else c.verdicts["loses"]


def by_data(studies: Sequence[Results]) -> Block:
    """How often each verdict was found at equal epochs, by task and data. Several studies may share these."""
    found: dict[str, list[Comparison]] = {}
    for study in studies:
        own = [c for c in study.weak if c.place.budget == "epochs"]
        found.setdefault(_data_of(study), []).extend(own)
    rows = [
        [
            data,
            *(str(sum(_kind_of(c) == kind for c in own)) for kind in _KINDS),
            str(sum(c.verdicts["unconverged"] == "more often" for c in own)),
            str(len(own)),
        ]
        for data, own in found.items()
    ]
    return Block("table", ["task and data, equal epochs", *_KINDS, "converges less often", "of"], rows)


def _data_of(study: Results) -> str:
    options = study.declared["base"]["trainer"].get("task_options", {})
    return f"{study.task} {Path(options['data']).name}" if isinstance(options.get("data"), str) else study.task


def trained(study: Results) -> str:
    """What a study trains, and with which settings, as its base config has it."""
    base = study.declared["base"]
    trainer, optimizer = base["trainer"], base["optimizer"]
    options = {**trainer.get("task_options", {})}
    if isinstance(options.get("data"), str):
        options["data"] = Path(options["data"]).name
    params = {k: v for k, v in optimizer.get("params", {}).items() if k not in ("torch_adam", "fused")}
    rate = trainer.get("learning_rate", {})
    best = next((run["best"] for run in study.runs.values() if run.get("best")), None)
    kept = f"the model with the {best['mode']}imal validation {best['metric']}" if best else "the last model"
    return (
        f"{name_of(study)}: {_settings(options) or 'the default model'}; {optimizer['type']}, {_settings(params)}; "
        f"learning rate: {_settings(rate) or 'constant'}; a run keeps {kept}."
    )


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {json.dumps(v) if isinstance(v, (dict, list)) else v}" for k, v in values.items())


def design_table(studies: Sequence[Results]) -> Block:
    """The design of each study in numbers."""
    rows = []
    for study in studies:
        sequential = study.results_at(Place("", SEQUENTIAL, "epochs", 1))
        first = sequential[0] if sequential else next(iter(study.runs.values()))
        sizes = sorted({c.place.world_size for c in study.judgement.comparisons})
        margin, metric = f"{study.rules.margin:g}", study.study.metric
        row = [name_of(study), f"{first['samples']:,}", f"{first['global_batch_size']:,}", f"{first['epochs']:,}"]
        row += [f"{first['steps']:,}", listed(sizes), str(len(study.study.seeds)), f"{margin} of {metric}"]
        rows.append([*row, str(study.judgement.tests), f"{len(study.runs):,}"])
    header = ["study", "training samples", "batch of one rank", "epochs", "updates", "W", "seeds", "margin"]
    return Block("table", [*header, "comparisons", "runs"], rows)


def weighed(studies: Sequence[Results]) -> Iterable[Block]:
    """What speaks for the claim that weak scaling loses and strong scaling pays, what against it, and what is open."""
    sections: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("What speaks for the claim", ("material loss",)),
        ("What speaks against the claim", ("ruled out", "small loss")),
        ("What is undecided", (_SIZE_OPEN, "undecided")),
    )
    for title, kinds in sections:
        yield Block("h2", [title])
        lines = []
        for study in studies:
            own = [c for c in study.weak if _kind_of(c) in kinds]
            by_arm: dict[str, list[str]] = {}
            for c in own:
                words = "" if _kind_of(c) in ("material loss", "undecided") else f" ({_kind_of(c)})"
                by_arm.setdefault(_arm_of(study, c), []).append(f"{c.place.world_size}{words}")
            if "material loss" in kinds:
                # The claim is also about convergence, so this counts even where the typical run loses nothing.
                for c in study.weak:
                    if c.verdicts["unconverged"] == "more often" and c not in own:
                        less_often = f"{_arm_of(study, c)} converges less often"
                        by_arm.setdefault(less_often, []).append(str(c.place.world_size))
            said = [f"{arm} at W = {', '.join(sizes)}" for arm, sizes in by_arm.items()]
            # The claim says that strong scaling pays. So a run that is slower on more ranks speaks against it.
            for W, speed in _speeds(study).items():
                if kinds == (("material loss",) if speed > 1 else ("ruled out", "small loss")):
                    said.append(f"strong scaling is {speed:.2f} times as fast as one rank at W = {W}")
            lines.append(f"{name_of(study)}: {'; '.join(said) or 'nothing'}.")
        yield Block("list", lines)


def in_short(studies: Sequence[Results]) -> Block:
    """For each study how many of its rules lose and how many do not, by W."""
    groups: dict[tuple[str, str, str], dict[int, list[str]]] = {}
    for study in studies:
        for c in study.weak:
            key = (name_of(study), study.named(c.place.variant, "", ""), c.place.budget)
            groups.setdefault(key, {}).setdefault(c.place.world_size, []).append(_kind_of(c))
    sizes = sorted({W for by_size in groups.values() for W in by_size})
    rows = [
        [name, variant or "-", f"equal {budget}", *(_tally(by_size[W]) if W in by_size else "-" for W in sizes)]
        for (name, variant, budget), by_size in groups.items()
    ]
    return Block("table", ["study", "variant", "at", *(f"W = {W}" for W in sizes)], rows)


def _tally(kinds: Sequence[str]) -> str:
    groups = {"lose": ("material loss",), "lose, size open": (_SIZE_OPEN,), "ruled out": ("ruled out", "small loss")}
    counts = {words: sum(kind in group for kind in kinds) for words, group in groups.items()}
    return ", ".join([f"{words} {n}" for words, n in counts.items() if n] or ["nothing shown"]) + f" (of {len(kinds)})"


def threats(studies: Sequence[Results]) -> list[str]:
    """What limits the results: of every study, and then of each of these by itself."""
    lines = [*_THREATS]
    for study in studies:
        name = name_of(study)
        lines += [f"{name}: {line}" for line in [*study.doubts(), *_short_batches(study)]]
    return lines


def _short_batches(study: Results) -> list[str]:
    """The last batches of an epoch that are smaller than the others, of the base's runs."""
    base = study.declared["base"]
    if base["trainer"].get("drop_last"):
        return []
    sequential = study.results_at(Place("", SEQUENTIAL, "epochs", 1))
    first = sequential[0] if sequential else next(iter(study.runs.values()))
    n, one = first["samples"], first["global_batch_size"]
    sizes = sorted({c.place.world_size for c in study.weak if c.place.variant == ""})
    found = [f"{n % (W * one):,} of {W * one:,} at W = {W}" for W in sizes if n % (W * one)]
    if not found:
        return []
    return [f"the last batch of an epoch has fewer samples: {', '.join(found)}. It is an update like any other."]


def _arm_of(study: Results, c: Comparison) -> str:
    place = c.place
    extra = [own] if (own := study.named(place.variant, "", "")) else []
    return ", ".join([title_of(place.arm, place.budget), *extra, *(["equal updates"] * (place.budget == "updates"))])


def cost(studies: Sequence[Results]) -> str:
    """How many runs the studies took, and how long."""
    runs = [run for study in studies for run in study.runs.values()]
    hours = math.fsum(run["wall_time_s"] or 0.0 for run in runs) / 3600
    models = sorted({str(run["device_model"]) for run in runs})
    return (
        f"{len(runs):,} runs, {hours:,.1f} hours of runs on one rank each, on {' and '.join(models)}. A study "
        "that is interrupted continues where it was."
    )
