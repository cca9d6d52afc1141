"""`python -m trainer report FOLDER ... --paper FILE`: several studies as one short paper.

Everything in it follows from the studies' folders: the rules are those that were declared, and numbers and verdicts are
those of the report pages. What speaks against the claim has a section of its own, and so has what is undecided. The
paper is a page that opens in any browser, with the same text as Markdown beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..files import whole_file
from . import figures
from .album import budget_figures, metric_figure, size_figures, target_figures
from .arms import title_of
from .causes import cause_sentences
from .definitions import definitions
from .interaction import interaction_sentences
from .judgement import Comparison
from .paper_text import (
    QUESTION,
    Block,
    abstract,
    by_data,
    cost,
    design_table,
    in_short,
    name_of,
    threats,
    trained,
    weighed,
)
from .results import Results
from .sentences import (
    budget_sentences,
    headline,
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


def check_paper(folders: Sequence[str], file: str) -> None:
    """Raises UserError if a paper cannot be written. Called before anything else is written."""
    if Path(file).suffix != ".html":
        raise UserError(f"--paper names the page to write. It has to end in .html, but is {file}.")
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"The folder {path} is given twice. Name each study once.")
    names = [Path(folder).resolve().name for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"Two of the folders are called {twice[0]}. A paper tells studies apart by these names: rename one of them."
        )


def write_paper(folders: Sequence[str], file: str) -> Path:
    """Writes the paper of some studies. Returns its path; the Markdown has the same name with .md.

    Raises:
        UserError: a folder is not a study's.
    """
    path = Path(file)
    studies = [Results(Path(folder).resolve()) for folder in folders]
    blocks = list(_blocks(studies))
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f"{path.stem}-figures")
    pictures = [picture for study in studies for picture in _pictures(study, folder)]
    # Each file appears whole, so that nobody reads half of a paper.
    for target, text in ((path, _page(blocks, pictures)), (path.with_suffix(".md"), _markdown(blocks))):
        with whole_file(target, synced=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


# ---- what it says ----------------------------------------------------------------------------------------------------


def _blocks(studies: Sequence[Results]) -> Iterable[Block]:
    yield Block("h2", ["Abstract"])
    yield Block("p", [abstract(studies)])
    yield by_data(studies)
    yield Block("h2", ["Question"])
    yield Block("p", [QUESTION])
    yield Block("h2", ["Design, declared before the runs"])
    yield design_table(studies)
    yield Block("p", ["What was trained:"])
    yield Block("list", [trained(study) for study in studies])
    yield Block("h2", ["Results"])
    for study in studies:
        yield from _results_of(study)
    yield Block("h2", ["Strong scaling"])
    for study in studies:
        lines = strong_sentences(study)
        if lines:
            yield Block("p", [f"{name_of(study)}:"])
            yield Block("list", lines)
    yield from weighed(studies)
    yield Block("h2", ["Threats to validity"])
    yield Block("list", threats(studies))
    yield Block("h2", ["In short"])
    yield Block(
        "p",
        ["How many rules for weak scaling are shown to lose more than the margin, and how many are shown not to:"],
    )
    yield in_short(studies)
    yield Block("h2", ["Cost"])
    yield Block("p", [cost(studies)])
    yield Block("h2", ["Appendix: rules and words, declared before the runs"])
    yield Block("list", definitions(studies[0]))
    for study in studies[1:]:
        own = [line for line in definitions(study) if line not in definitions(studies[0])]
        if own:
            yield Block("p", [f"Of {name_of(study)} these differ:"])
            yield Block("list", own)
    yield Block("h2", ["Appendix: further numbers"])
    for study in studies:
        if more := _further(study):
            yield Block("p", [f"{name_of(study)}:"])
            yield Block("list", more)


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
    if more := [*cause_sentences(study), *trend_sentences(study)]:
        yield Block("list", more)


def _further(study: Results) -> list[str]:
    """What is not needed to follow the paper."""
    more = [*size_sentences(study), *budget_sentences(study), *target_sentences(study), *interaction_sentences(study)]
    return [*more, *variance_sentences(study), *search_sentences(study), *noise_sentences(study)]


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


class Picture(NamedTuple):
    """A figure: its SVG and its caption."""

    svg: str
    caption: str


# A study with more blocks than this shows only the first in the paper; its page has them all.
_BLOCKS = 4


def _pictures(study: Results, folder: Path) -> list[Picture]:
    """The metric over W of each variant and budget, or over what the study varies instead."""
    blocks, name = study.blocks(), study.folder.name
    drawn = [*size_figures(study), *budget_figures(study), *target_figures(study)[-1:]]
    shown = blocks[:1] if drawn or len(blocks) > _BLOCKS else blocks
    found = [(name if i == 0 else f"{name}-{i}", *metric_figure(study, *block)) for i, block in enumerate(shown)]
    found += [(f"{name}-{what}", figure, caption) for what, figure, caption in drawn]
    return [
        Picture(figures.save(figure, folder, file), f"{name_of(study)}: {caption}") for file, figure, caption in found
    ]


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
