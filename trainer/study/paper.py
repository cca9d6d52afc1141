"""`python -m trainer report FOLDER ... --paper FILE`: several studies as one short paper.

Everything in it follows from the studies' folders. The rules are those that were declared; numbers and verdicts are
those of their pages. What speaks against the claim has a section of its own, and so has what is undecided. It is
written as a page that opens in any browser, and as Markdown beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..files import whole_file
from . import figures
from .album import metric_figure
from .arms import SEQUENTIAL, Place, title_of
from .causes import cause_sentences
from .definitions import definitions
from .interaction import interaction_sentences
from .judgement import Comparison, Verdict
from .results import Results
from .sentences import (
    budget_sentences,
    headline,
    listed,
    noise_sentences,
    search_sentences,
    sequential_sentences,
    size_sentences,
    strong_sentences,
)
from .sheet import document
from .to_target import target_sentences
from .trend import trend_sentences
from .variance import variance_sentences

_QUESTION = (
    "Cunha, Rodrigues, Viana and Oliveira (2018, arXiv 1807.09161) argue that on small datasets weak scaling, which "
    "grows the global batch with the number of GPUs W, loses accuracy and mostly does not converge, while strong "
    "scaling, which splits one global batch, keeps the accuracy of a sequential run. Only the abstract of that paper "
    "was at hand, so its numbers are not repeated here. The question is tested anew: does the typical weak run lose "
    "against the sequential run of its seed, how many runs fail, and what does strong scaling give?"
)
_THREATS = (
    "The models and datasets are not those of the paper. They are small enough for many seeds, and large models may "
    "behave in another way.",
    "A weak run on W ranks was computed exactly on fewer: its bits follow from its global batch and its micro-batches. "
    "So accuracy is that of W ranks, and speed is not measured by it.",
    "Rules start from the base's rate, and with another one a rule may lose more or less. A loss of a rule is the "
    "rule's. Tuned arms ask what the batch itself costs, within the ranges that were searched.",
    "The control of as few updates sees W times fewer samples. So no cause here tells updates from samples.",
    "Alpha holds for each study by itself. Over several studies wrong verdicts add up.",
    "A verdict is about the typical run. The rate of collapses that is not ruled out is given with each comparison.",
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


def check_paper(folders: Sequence[str], file: str) -> None:
    """Raises UserError if a paper cannot be written: before anything else is."""
    if Path(file).suffix != ".html":
        raise UserError(f"--paper names the page to write. It has to end in .html, and is {file}.")
    names = [Path(folder).resolve().name for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"Two of the folders are called {twice[0]}. A paper tells studies apart by these names.")


def write_paper(folders: Sequence[str], file: str) -> Path:
    """Writes the paper of some studies. Returns its path; the Markdown has the same name with .md.

    Raises:
        UserError: a folder is none of a study.
    """
    path = Path(file)
    studies = [Results(Path(folder).resolve()) for folder in folders]
    blocks = list(_blocks(studies))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(study, path.with_name(f"{path.stem}-figures")) for study in studies if study.blocks()]
    for target, text in ((path, _page(blocks, pictures)), (path.with_suffix(".md"), _markdown(blocks))):
        with whole_file(target, synced=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


# ---- what it says ----------------------------------------------------------------------------------------------------


def _blocks(studies: Sequence[Results]) -> Iterable[Block]:
    yield Block("h2", ["Abstract"])
    yield Block("p", [_abstract(studies)])
    yield Block("h2", ["Question"])
    yield Block("p", [_QUESTION])
    yield Block("h2", ["Design, declared before the runs"])
    yield _design_table(studies)
    yield Block("list", definitions(studies[0]))
    for study in studies[1:]:
        own = [line for line in definitions(study) if line not in definitions(studies[0])]
        if own:
            yield Block("p", [f"Of {name_of(study)} these differ:"])
            yield Block("list", own)
    yield Block("h2", ["Results"])
    for study in studies:
        yield from _results_of(study)
    yield Block("h2", ["Strong scaling"])
    for study in studies:
        lines = strong_sentences(study)
        if lines:
            yield Block("p", [f"{name_of(study)}:"])
            yield Block("list", lines)
    yield from _weighed(studies)
    yield Block("h2", ["Threats to validity"])
    yield Block("list", [*_THREATS, *(f"{name_of(s)}: {line}" for s in studies for line in s.doubts())])
    yield Block("h2", ["Cost"])
    yield Block("p", [_cost(studies)])


def name_of(study: Results) -> str:
    """A study in a paper: its folder's name and its task."""
    return f"{study.folder.name} ({study.task})"


def _abstract(studies: Sequence[Results]) -> str:
    comparisons = [c for study in studies for c in study.weak]
    parts = []
    for budget in ("epochs", "updates"):
        own = [c for c in comparisons if c.place.budget == budget]
        counts = {v: sum(c.verdicts["loses"] == v for c in own) for v in _KINDS}
        more = sum(c.verdicts["unconverged"] == "more often" for c in own)
        said = ", ".join(f"{words} in {counts[v]}" for v, words in _KINDS.items() if counts[v])
        if own:
            parts.append(
                f"At equal {budget}, {len(own)} comparisons: {said}. Runs fail to converge more often than sequential "
                f"runs in {more or 'none'} of them."
            )
    asked = [[W for W, answer in study.declared["strong"] if isinstance(answer, int)] for study in studies]
    most = max((W for sizes in asked for W in sizes), default=0)
    strong = (
        f" Strong scaling gives the sequential run's bits, by construction, at every W that its micro-batches allow: "
        f"up to {most} in the {sum(map(bool, asked))} studies that asked for it."
    )
    shared = _shared_runs(studies)
    return (
        f"{len(studies)} stud{'ies' if len(studies) > 1 else 'y'} of weak scaling, each comparison with sequential "
        f"runs of the same seeds. {' '.join(parts)}"
        + (strong if most else "")
        + (f" {shared:,} runs are the same in several studies, so these are not independent." if shared else "")
    )


def _shared_runs(studies: Sequence[Results]) -> int:
    """Models that several studies have in common, whatever else their configs say."""
    counts = Counter(h for study in studies for h in {run["parameters_sha256"] for run in study.runs.values()} if h)
    return sum(count > 1 for count in counts.values())


_KINDS: dict[Verdict, str] = {
    "material loss": "the typical run loses more than the margin",
    "small loss": "it loses, but less than the margin,",
    "ruled out": "such a loss is ruled out",
    "undecided": "nothing is shown either way",
}


def _design_table(studies: Sequence[Results]) -> Block:
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


def _results_of(study: Results) -> Iterable[Block]:
    yield Block("h3", [name_of(study)])
    yield Block("p", [" ".join(headline(study))])
    yield Block("list", [f"{line}." for line in sequential_sentences(study)])
    for variant, budget in study.blocks():
        groups = study.groups(variant, budget)
        sizes = sorted({c.place.world_size for cs in groups.values() for c in cs})
        rows = []
        for arm, comparisons in groups.items():
            at = {c.place.world_size: c for c in comparisons}
            rows.append([title_of(arm, budget), *(cell_of(at[W]) if W in at else "-" for W in sizes)])
        what = study.named(variant, study.budget(budget), ", ")
        yield Block("p", [f"Difference of {study.study.metric} to the sequential run of the same seed, {what}:"])
        yield Block("table", ["arm", *(f"W = {W}" for W in sizes)], rows)
    more = [*size_sentences(study), *budget_sentences(study), *cause_sentences(study), *target_sentences(study)]
    more += [*trend_sentences(study), *interaction_sentences(study), *variance_sentences(study)]
    more += [*search_sentences(study), *noise_sentences(study)]
    if more:
        yield Block("list", more)


def cell_of(c: Comparison) -> str:
    """A comparison in a table: the typical difference, its verdict and interval, and how many runs failed."""
    number = f"{c.difference:+.4f}" if math.isfinite(c.difference) else "not finite"
    low, high = c.difference_interval
    known = math.isfinite(low) or math.isfinite(high)
    text = f"{number}, {c.verdicts['loses']}"
    if known:
        text += f" ({low:+.3f} to {high:+.3f})"
    runs, unconverged = len(c.losses), c.counts["unconverged"].failed
    text += f", {c.collapsed} of {runs} collapsed" if c.collapsed else ""
    often = " (more often)" if c.verdicts["unconverged"] == "more often" else ""
    return text + (f", {unconverged} of {runs} not converged{often}" if unconverged else "")


def _weighed(studies: Sequence[Results]) -> Iterable[Block]:
    """What speaks for the claim that weak scaling loses, what against it, and what is open."""
    sections: tuple[tuple[str, tuple[Verdict, ...]], ...] = (
        ("What speaks for the claim", ("material loss",)),
        ("What speaks against the claim", ("ruled out", "small loss")),
        ("What is undecided", ("undecided",)),
    )
    for title, verdicts in sections:
        yield Block("h2", [title])
        lines = []
        for study in studies:
            own = [c for c in study.weak if c.verdicts["loses"] in verdicts]
            by_arm: dict[str, list[str]] = {}
            for c in own:
                words = "" if len(verdicts) == 1 else f" ({c.verdicts['loses']})"
                by_arm.setdefault(_arm_of(study, c), []).append(f"{c.place.world_size}{words}")
            if "material loss" in verdicts:
                # The claim is about convergence, too, whatever the typical run loses.
                for c in study.weak:
                    if c.verdicts["unconverged"] == "more often" and c not in own:
                        by_arm.setdefault(_arm_of(study, c), []).append(f"{c.place.world_size} (converges less often)")
            said = "; ".join(f"{arm} at W = {', '.join(sizes)}" for arm, sizes in by_arm.items())
            lines.append(f"{name_of(study)}: {said or 'nothing'}.")
        yield Block("list", lines)


def _arm_of(study: Results, c: Comparison) -> str:
    place = c.place
    extra = [own] if (own := study.named(place.variant, "", "")) else []
    return ", ".join([title_of(place.arm, place.budget), *extra, *(["equal updates"] * (place.budget == "updates"))])


def _cost(studies: Sequence[Results]) -> str:
    runs = [run for study in studies for run in study.runs.values()]
    hours = math.fsum(run["wall_time_s"] or 0.0 for run in runs) / 3600
    models = sorted({str(run["device_model"]) for run in runs})
    return (
        f"{len(runs):,} runs, {hours:,.1f} hours of runs on one rank each, on {' and '.join(models)}. A study "
        "that is interrupted goes on where it was."
    )


class Picture(NamedTuple):
    """A figure: its SVG and its caption."""

    svg: str
    caption: str


def _picture(study: Results, folder: Path) -> Picture:
    figure, caption = metric_figure(study, *study.blocks()[0])
    return Picture(figures.save(figure, folder, study.folder.name), f"{name_of(study)}: {caption}")


# ---- how it looks ----------------------------------------------------------------------------------------------------


def _page(blocks: Sequence[Block], pictures: Sequence[Picture]) -> str:
    parts = ["<h1>Weak and strong scaling on small datasets, tested anew</h1>"]
    for block in blocks:
        parts.append(_html(block))
        if block.kind == "h2" and block.texts[0] == "Results":
            parts += [
                f'<figure><img alt="{escape(picture.caption)}" src="{figures.data_uri(picture.svg)}">'
                f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
                for picture in pictures
            ]
    return document("Weak and strong scaling on small datasets", parts)


def _html(block: Block) -> str:
    if block.kind == "table":
        head = "".join(f"<th>{escape(text)}</th>" for text in block.texts)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if block.kind == "list":
        return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in block.texts) + "</ul>"
    return f"<{block.kind}>{escape(block.texts[0])}</{block.kind}>"


def _markdown(blocks: Sequence[Block]) -> str:
    parts = ["# Weak and strong scaling on small datasets, tested anew"]
    for block in blocks:
        if block.kind == "table":
            lines = [block.texts, ["---"] * len(block.texts), *block.rows]
            parts.append("\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines))
        elif block.kind == "list":
            parts.append("\n".join(f"- {text}" for text in block.texts))
        else:
            parts.append({"h2": "## ", "h3": "### "}.get(block.kind, "") + block.texts[0])
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
