"""The page of a search, its table as csv, and TensorBoard's HParams. All are made from the search's folder alone."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..config.schema import read_json
from ..study.album import Album
from ..study.hparams import write_hparams
from ..study.sheet import document, table
from . import figures
from .declaration import Plan
from .ledger import Ledger
from .results import BEST, CHOICE, PAGE, TIMES, best_of, counts, sentences, tests_in, ties, trials_in
from .space import shown

_STATES = {"complete": "finished", "pruned": "ended early", "failed": "failed"}


def write_page(plan: Plan, ledger: Ledger) -> Path:
    """Writes report.html, figures/, trials.csv and tensorboard/ into a search's folder. Returns the page."""
    folder, trials = plan.folder, trials_in(plan.folder)
    choice, declared = read_json(folder / CHOICE), read_json(folder / "search.json")
    best = next((trial for trial in trials if trial["number"] == choice["number"]), None)
    tied = {trial["number"] for trial in (ties(trials, best) if best is not None else ())}
    rows = [_row(plan, trial, choice["number"], tied) for trial in trials]
    _write_csv(folder / "trials.csv", rows)
    _write_hparams(plan, trials)
    album = Album(folder / "figures")
    shares = {_name(plan, key): share for key, share in ledger.importances().items()}
    _draw(plan, album, trials, choice, shares)
    text = plan.space.text(choice["point"])
    headline, *more = sentences(folder, choice, trials, text)
    base = json.dumps(read_json(folder / BEST), indent=2)
    parts = [
        f"<h1>Search: {escape(plan.base.trainer.task)}, validation {escape(choice['metric'])}</h1>",
        f"<p><strong>{escape(headline[0].upper() + headline[1:])}.</strong></p>",
        *(f"<p>{escape(line.strip()[0].upper() + line.strip()[1:])}.</p>" for line in more),
        "<p>Trials were compared on validation alone. The test split was not evaluated in any of them.</p>",
        "<h2>The best configuration</h2>",
        _parameters(plan, choice, trials),
        f"<details><summary>{BEST}: the whole config, which runs as it is</summary><pre>{escape(base)}</pre></details>",
        "<h2>Fresh seeds</h2>",
        _tests(plan.folder, choice),
        "<h2>Figures</h2>",
        *album.parts,
        *([] if shares else ["<p>Too few trials have finished to say which key matters.</p>"]),
        "<h2>Every trial</h2>",
        _trials(plan, rows),
        *_reasons(trials),
        "<h2>How it came about</h2>",
        f"<p><code>{escape(declared['command'])}</code></p>",
        f"<p>{escape(', '.join(f'{name} {value}' for name, value in declared['facts'].items()))}</p>",
        *_measured(folder),
        "<details><summary>What was declared</summary>",
        f"<pre>{escape(json.dumps(declared['search'], indent=2))}</pre></details>",
    ]
    page = folder / PAGE
    page.write_text(document(f"Search: {plan.base.trainer.task}", parts), encoding="utf-8")
    return page


def _name(plan: Plan, key: str) -> str:
    return next(p.name for p in plan.space.parameters if p.key == key)


def _draw(
    plan: Plan, album: Album, trials: list[dict[str, Any]], choice: Mapping[str, Any], shares: dict[str, float]
) -> None:
    metric, mode = choice["metric"], choice["mode"]
    album.add("history", figures.history(trials, metric, mode), f"Validation {metric} of {counts(trials)}.")
    if shares:
        album.add(
            "importance",
            figures.importance(shares),
            "How much of the variance of the metric over the finished trials each key explains. With few trials this "
            "is a rough guess; trials that were ended early have no part in it.",
        )
    what = "The metric over the values of each key. A best value at the edge of its range may not be the best there is."
    album.add("slices", figures.slices(plan.space.parameters, trials, metric, mode), what)
    album.add("curves", figures.curves(trials, metric, mode), "Validation after each epoch, a line for each trial.")


def _parameters(plan: Plan, choice: Mapping[str, Any], trials: list[dict[str, Any]]) -> str:
    own = plan.space.own_point(plan.values)
    header, rows = ["key", "best", "in the file", "tried", "where"], []
    for p in plan.space.parameters:
        value = choice["point"][p.key]
        tried = ", ".join(map(shown, p.choices)) if p.choices else f"{shown(p.low)} to {shown(p.high)}"
        edge = not p.choices and _at_edge(p, value)
        rows.append(
            [p.key, shown(value), shown(own[p.key]) if p.key in own else "-", tried, "at the edge" if edge else ""]
        )
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return table(rows, header)


def _at_edge(p: Any, value: float) -> bool:
    """Whether a value lies within 5 % of the range from one of its ends; on a logarithmic scale if `log` is set."""
    scale = math.log if p.log else float
    low, high, own = scale(p.low), scale(p.high), scale(value)
    return min(own - low, high - own) < 0.05 * (high - low)


def _tests(folder: Path, choice: Mapping[str, Any]) -> str:
    rows, tests = [], tests_in(folder)
    columns = list(dict.fromkeys((s, m) for test in tests for s, values in test["metrics"].items() for m in values))
    # The test split comes first, and in each split the metric that decided.
    columns.sort(key=lambda column: (column[0] != "test", column[1] != choice["metric"]))
    for test in tests:
        cells = [test["metrics"].get(split, {}).get(name) for split, name in columns]
        rows.append([test["seed"], test["status"], *cells, test["parameters_sha256"]])
    header = [f"{split} {name}" for split, name in columns]
    return table(rows, ["seed", "status", *header, "parameters sha256"])


def _measured(folder: Path) -> list[str]:
    """A sentence on the measured times of one device and of all of them; nothing if nothing was measured."""
    file = folder / TIMES
    if not file.exists():
        return []
    times = read_json(file)
    line = (
        f"With the file's own values a trial takes {times['on_one_s']:.3g} s on one of {times['devices']} devices "
        f"while all are in use, and {times['on_all_s']:.3g} s on all of them together. The bits are the same."
    )
    return [f"<p>{escape(line)}</p>"]


def _row(plan: Plan, trial: Mapping[str, Any], taken: int, tied: Collection[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial["number"] + 1, "state": _STATES[trial["state"]], "value": trial["value"]}
    row["choice"] = "taken" if trial["number"] == taken else "a tie" if trial["number"] in tied else None
    row["last epoch"] = trial["epoch"]
    for p in plan.space.parameters:
        value = trial["point"].get(p.key)
        row[p.name] = value if isinstance(value, (int, float)) and not isinstance(value, bool) else shown(value)
    row["seconds"] = trial.get("wall_time_s")
    row["as trial"] = trial["as"] + 1 if "as" in trial else None
    row["parameters sha256"] = trial.get("parameters_sha256")
    return row


def _trials(plan: Plan, rows: list[dict[str, Any]]) -> str:
    """The table of all trials, without their hashes. These are in the csv; here they would hide what matters."""
    names = {p.name for p in plan.space.parameters}
    shorter = [{k: shown(v) if k in names else v for k, v in row.items() if "sha256" not in k} for row in rows]
    if not any(row["as trial"] for row in rows):
        shorter = [{k: v for k, v in row.items() if k != "as trial"} for row in shorter]
    return table([list(row.values()) for row in shorter], list(shorter[0]))


def _reasons(trials: list[dict[str, Any]]) -> list[str]:
    failed = [trial for trial in trials if trial["state"] == "failed"]
    if not failed:
        return []
    items = "".join(f"<li>trial {t['number'] + 1}: {escape(str(t['reason']))}</li>" for t in failed)
    return [f"<h3>Failed trials</h3><ul>{items}</ul>"]


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_hparams(plan: Plan, trials: list[dict[str, Any]]) -> None:
    keys = [p.key for p in plan.space.parameters]
    best = best_of(trials, read_json(plan.folder / CHOICE)["mode"])
    rows = [_session(keys, trial, f"trial-{trial['number'] + 1:04d}") for trial in trials]
    if best is not None:
        rows += [
            _session(keys, test | {"point": best["point"]}, f"test-seed-{test['seed']}")
            for test in tests_in(plan.folder)
        ]
    write_hparams(plan.folder, rows, [*keys, "status"], lambda row: str(row["session"]))


def _session(keys: list[str], result: Mapping[str, Any], name: str) -> dict[str, Any]:
    point = {key: result["point"].get(key) for key in keys}
    plain = {
        key: value if isinstance(value, (int, float)) and not isinstance(value, bool) else shown(value)
        for key, value in point.items()
    }
    metrics = {
        f"{split}/{metric}": value for split, values in result["metrics"].items() for metric, value in values.items()
    }
    about = {name: result.get(name) for name in ("started_at_s", "wall_time_s")}
    return {"session": name, **plain, "status": result.get("status") or "failed", **about, **metrics}
