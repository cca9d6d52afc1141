"""Reads and judges a study's folder: verdicts as sentences, runs as rows. The report is made of these."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.schema import build, read_json
from ..errors import UserError
from ..record.console import say
from .arms import SEQUENTIAL, WEAK, Place, title_of
from .declaration import Study
from .inference import Comparison, Judgement, Reference, Rules, judge
from .prediction import speed_up
from .timing import Timings, check_bits, read_timings

CLAIMS = {"loses": "loses against its sequential runs", "fails": "fails to converge more often than not"}


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Run id -> result, of all finished runs. Other files in runs/ are passed over with a note."""
    results = {}
    for file in sorted((folder / "runs").glob("*.json")):
        try:
            result = read_json(file)
        except UserError:
            result = {}
        # A copy has another name than its content says.
        if result.get("id") == file.stem and {"metrics", "status", "facts"} <= result.keys():
            results[file.stem] = result
        else:
            say(f"note: {file} is not the result of a run, and is passed over")
    return results


def metric_of(result: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a result, named <split>/<metric>; None if the run stopped being finite."""
    split, name = metric.split("/")
    value = result["metrics"].get(split, {}).get(name)
    return None if value is None else float(value)


class Results:
    """A study's folder, read and judged.

    Attributes:
        declared: study.json.
        study: the declaration in it.
        runs: id -> result.
        cells: those with a result, each with its id.
        searches: name -> trials and best rate, of searches that have ended.
        judgement: all numbers and verdicts.
        timings: of real ranks; None if there are none.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "study.json").is_file():
            raise UserError(f"{folder} is not a study's folder: it has no study.json.")
        self.declared = read_json(folder / "study.json")
        self.study: Study = build(Study, self.declared["study"], "study.")
        self.runs = finished(folder)
        found = folder / "tuning" / "found.json"
        self.searches: dict[str, dict[str, Any]] = read_json(found) if found.is_file() else {}
        ids = {key: this for search in self.searches.values() for key, this in search["ids"].items()}
        self.cells: list[dict[str, Any]] = []
        sequential: dict[Place, dict[int, float | None]] = {}
        weak: dict[Place, dict[int, float | None]] = {}
        self._declared_runs: set[str] = set()
        planned = set()
        for cell in self.declared["cells"]:
            place, seed = place_of(cell), cell["seed"]
            name = f"{place} seed {seed}"
            this = cell["id"] or ids.get(name)
            self._declared_runs.add(this or name)
            values = (weak if cell["arm"] in WEAK else sequential).setdefault(place, {})
            if cell["arm"] in WEAK:
                planned.add(place)
            if this in self.runs:
                self.cells.append({**cell, "id": this})
                values[seed] = metric_of(self.runs[this], self.study.metric)
        if not self.cells:
            raise UserError(f"{folder} holds no finished run yet.")
        weak = {place: values for place, values in weak.items() if values}
        self.judgement: Judgement = judge(sequential, weak, self.study.rules, len(planned), len(self.study.seeds))
        self.timings: Timings | None = read_timings(folder)

    @property
    def rules(self) -> Rules:
        """What was declared for the verdicts."""
        return self.study.rules

    @property
    def task(self) -> str:
        """What the study trains."""
        return str(self.declared["base"]["trainer"].get("task", "digits"))

    @property
    def variants(self) -> list[str]:
        """Names of the variants; the base's is empty."""
        return list(dict.fromkeys(cell["variant"] for cell in self.declared["cells"]))

    def budget(self, name: str) -> str:
        """A budget in words."""
        most = self.study.max_epochs
        return f"equal {name}" + (f", at most {most} epochs" if name == "updates" and most is not None else "")

    def missing(self) -> int:
        """Runs that are declared and not finished."""
        return len(self._declared_runs - self.runs.keys())

    def results_at(self, place: Place) -> list[dict[str, Any]]:
        """The results of a place, one a seed."""
        return [self.runs[cell["id"]] for cell in self.cells if place_of(cell) == place]

    def groups(self, variant: str, budget: str) -> dict[str, list[Comparison]]:
        """Arm -> its comparisons by W, of one variant and budget."""
        groups: dict[str, list[Comparison]] = {}
        for c in self.judgement.comparisons:
            if (c.place.variant, c.place.budget) == (variant, budget):
                groups.setdefault(c.place.arm, []).append(c)
        return groups

    def blocks(self) -> list[tuple[str, str]]:
        """(variant, budget) of all comparisons, in order."""
        return list(dict.fromkeys((c.place.variant, c.place.budget) for c in self.judgement.comparisons))


def place_of(cell: dict[str, Any]) -> Place:
    """Where a cell or a result stands."""
    return Place(cell["variant"], cell["arm"], cell["budget"], cell["world_size"])


# ---- sentences ---------------------------------------------------------------------------------------------------


def verdicts(folder: Path) -> list[str]:
    """The verdicts of a study as lines of text."""
    results = Results(folder)
    lines = [*sequential_sentences(results)]
    if results.missing():
        lines.append(f"{results.missing():,} declared runs are missing.")
    lines += strong_sentences(results)
    for claim, what, comparisons in claims(results):
        lines.append(f"{what}: {CLAIMS[claim]}?")
        lines += [f"  W = {c.place.world_size}: {c.verdicts[claim]}. {c.sentences[claim]}" for c in comparisons]
    return lines + size_sentences(results) + noise_sentences(results)


def claims(results: Results) -> Iterable[tuple[str, str, list[Comparison]]]:
    """(claim, what it is about, its comparisons by W), for each arm, budget and variant."""
    for variant, budget in results.blocks():
        for arm, comparisons in results.groups(variant, budget).items():
            for claim in CLAIMS:
                what = f"{title_of(arm)}, {results.budget(budget)}"
                yield claim, f"{variant}: {what}" if variant else what, comparisons


def sequential_sentences(results: Results) -> list[str]:
    """The results of the sequential runs of each variant."""
    return [
        reference_sentence(results, place, reference)
        for place, reference in results.judgement.references.items()
        if reference.values
    ]


def reference_sentence(results: Results, place: Place, reference: Reference) -> str:
    """The numbers of one set of sequential runs."""
    return (
        f"{place}: {results.study.metric} {reference.mean:.4f}, standard deviation {reference.deviation:.4f}, "
        f"{100 * (1 - results.rules.alpha):g} % interval of the mean {reference.interval[0]:.4f} to "
        f"{reference.interval[1]:.4f}, {len(reference.values)} seeds; target {reference.target:.4f}"
    )


def listed(numbers: Sequence[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(f"{n:,}" for n in numbers)


def strong_sentences(results: Results) -> list[str]:
    """What is known of strong scaling: by equal plans, and by runs on real ranks."""
    strong, timings = results.declared["strong"], results.timings
    lines = []
    possible = [W for W, answer in strong if isinstance(answer, int)]
    sequential = results.results_at(Place("", SEQUENTIAL, "epochs", 1))
    if possible:
        micro_batches = next(answer for _, answer in strong if isinstance(answer, int))
        hashes = [r["parameters_sha256"] for r in sequential if r["parameters_sha256"]]
        lines.append(
            f"strong scaling has the accuracy of the sequential runs: supported at W = {listed(possible)}, by "
            f"construction and not by a test. At each of these W the plan is the sequential run's: the same "
            f"{micro_batches} micro-batches a step, each dealt to one rank, added along the same tree. Its parameters "
            f"are those of the {len(hashes)} sequential runs (sha256 {', '.join(h[:8] for h in hashes[:3])}"
            f"{', ...' if len(hashes) > 3 else ''})."
        )
    if timings is not None and len(timings.hashes) > 1:
        first = next((r["parameters_sha256"] for r in sequential if r["seed"] == results.study.seeds[0]), None)
        same, others = check_bits(timings, first)
        what = "whole runs" if timings.max_steps is None else f"runs of {timings.max_steps:,} steps"
        if same:
            lines.append(
                f"strong scaling on real ranks: {what} of seed {results.study.seeds[0]} at W = {listed(same)} ended "
                f"with the same bits (sha256 {timings.hashes[same[0]][0][:8]})."
            )
        if others:
            lines.append(f"strong scaling on real ranks: NOT the same bits at W = {listed(others)}.")
        for W, ratios in timings.speed_ups().items():
            if W > 1:
                middle = statistics.median(ratios)
                lines.append(
                    f"strong scaling at W = {W} is {middle:.2f} times as fast as one rank (efficiency "
                    f"{middle / W:.2f}; {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} runs)."
                )
    elif possible:
        lines.append("These are equal plans, not runs on W ranks; `python -m trainer verify` makes those.")
    lines += [
        f"strong scaling at W = {W}: impossible here. {answer}" for W, answer in strong if isinstance(answer, str)
    ]
    return lines


def size_sentences(results: Results) -> list[str]:
    """From which number of training samples on an arm is no longer seen to lose, for studies of dataset sizes."""
    sizes = sizes_of(results)
    if len(sizes) < 2:
        return []
    lines = []
    pairs = dict.fromkeys((c.place.arm, c.place.budget, c.place.world_size) for c in results.judgement.comparisons)
    for arm, budget, W in pairs:
        by_size = {
            sizes[c.place.variant]: c
            for c in results.judgement.comparisons
            if (c.place.arm, c.place.budget, c.place.world_size) == (arm, budget, W) and c.place.variant in sizes
        }
        if len(by_size) < 2:
            continue
        shown = ", ".join(
            f"{n:,}: {by_size[n].difference:+.4f} {by_size[n].verdicts['loses']}" for n in sorted(by_size)
        )
        hurts = [n for n in by_size if by_size[n].verdicts["loses"] == "supported"]
        harmless = [n for n in by_size if by_size[n].verdicts["loses"] == "contradicted" and n > max(hurts, default=0)]
        if not hurts:
            end = "a loss is shown at no size"
        elif harmless:
            end = f"a loss is shown up to {max(hurts):,} samples and ruled out from {min(harmless):,} on"
        else:
            end = f"a loss is shown up to {max(hurts):,} samples, and ruled out at no larger size"
        what = f"{title_of(arm)}, {results.budget(budget)}, W = {W}"
        lines.append(f"{what}, by training samples: {end} ({shown}).")
    return lines


def sizes_of(results: Results) -> dict[str, int]:
    """Variant -> its training samples, of the base and its subsets; empty where none was declared."""
    if not results.study.dataset_sizes:
        return {}
    known = results.declared["variant_samples"]
    names = ["", *(f"{n:,} samples" for n in results.study.dataset_sizes)]
    return {name: int(known[name]) for name in names}


def noise_scale(results: Results) -> tuple[float, float, float] | None:
    """(median, lowest, highest) gradient noise scale over the sequential runs, in samples; None if not measured."""
    runs = results.results_at(Place("", SEQUENTIAL, "epochs", 1))
    found = [
        r["gradient_noise"]["scale_samples"]
        for r in runs
        if r.get("gradient_noise") and r["gradient_noise"]["scale_samples"]
    ]
    return (statistics.median(found), min(found), max(found)) if found else None


def noise_sentences(results: Results) -> list[str]:
    """The batch that gradient noise calls harmless, next to where weak scaling was seen to fail."""
    scale = noise_scale(results)
    if scale is None:
        return []
    runs = results.results_at(Place("", SEQUENTIAL, "epochs", 1))
    B = runs[0]["global_batch_size"]
    line = (
        f"gradient noise scale of the sequential runs (McCandlish et al. 2018): {scale[0]:,.0f} samples "
        f"({scale[1]:,.0f} to {scale[2]:,.0f} over seeds). Batches well below it should cost few samples more, and "
        f"{scale[0]:,.0f} about twice as many: W = {max(1.0, scale[0] / B):.3g} times the batch of {B}. "
    )
    seen, groups = [], results.groups("", "epochs")
    for arm, comparisons in groups.items():
        bad = [c.place.world_size for c in comparisons if c.verdicts["loses"] == "supported"]
        if bad:
            seen.append(f"{arm} from W = {min(bad)} (a batch of {min(bad) * B:,}) on")
    if not groups:
        line += "That is at equal epochs, at which this study compares nothing."
    elif seen:
        line += f"The study shows a loss of {'; '.join(seen)}."
    else:
        line += "No loss is shown in this study."
    return [line]


# ---- rows --------------------------------------------------------------------------------------------------------


def rows_of(results: Results) -> list[dict[str, Any]]:
    """One row for each cell that has a result: plain values, and the same keys in all rows."""
    names = sorted({f"{s}/{m}" for run in results.runs.values() for s, ms in run["metrics"].items() for m in ms})
    kept = ["status", "global_batch_size", "micro_batch_size", "learning_rate", "samples", "epochs", "steps"]
    kept += ["exactness", "parameters_sha256", "started_at_s", "wall_time_s", "step_time_s", "samples_per_s"]
    kept += ["code_sha256", "device_model"]
    rows = []
    for cell in results.cells:
        run = results.runs[cell["id"]]
        facts = {f"version_{name}": run["facts"].get(name) for name in ("trainer", "python", "torch", "deepspeed")}
        noise = run.get("gradient_noise") or {}
        row = {k: cell[k] for k in ("variant", "arm", "budget", "world_size", "seed")} | {"config_sha256": cell["id"]}
        row |= {k: run.get(k) for k in kept} | {"noise_scale_samples": noise.get("scale_samples")}
        rows.append(row | facts | {name: metric_of(run, name) for name in names})
    return rows


def speed_ups(results: Results) -> tuple[dict[int, float], dict[int, float]]:
    """W -> median measured and W -> predicted speed-up of strong scaling, for every W that its plan allows."""
    timings = results.timings
    if timings is None:
        return {}, {}
    measured = {W: statistics.median(ratios) for W, ratios in timings.speed_ups().items() if ratios}
    predicted: dict[int, float] = {}
    if timings.measured is not None:
        sizes = {1, *(W for W, answer in results.declared["strong"] if isinstance(answer, int)), *measured}
        predicted = {W: speed_up(timings.measured, W) for W in sorted(sizes)}
    return measured, predicted
