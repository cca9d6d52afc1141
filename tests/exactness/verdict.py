"""What the runs of a case say together: one hash, a label, a refusal, or a way in which the promise is broken."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.exactness.cases import Case
from tests.exactness.flaws import FLAWS
from tests.exactness.pool import Outcome

GOOD = ("one hash", "labelled", "refused", "stopped")
BAD = ("wrongly refused", "silent difference", "traceback", "wrong reason", "unnoticed")


@dataclass(frozen=True)
class Verdict:
    """One of GOOD or BAD, and a sentence for the bad ones.

    "stopped" is what the audit does, for flaws that nothing else can see.

    "wrongly refused" stands for every accusation of a run that is exact: refused, labelled or stopped. "unnoticed" is
    a flaw that no label and no refusal names, where bits cannot be compared.
    """

    name: str
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether the promise was kept."""
        return self.name in GOOD


def judge(case: Case, results: dict[int, list[Outcome]]) -> Verdict:
    """The verdict over a case: `results` is W -> outcomes by rank."""
    for W, ranks in results.items():
        for rank, outcome in enumerate(ranks):
            if outcome.kind in ("traceback", "died", "hung"):
                return Verdict("traceback", f"W={W}, rank {rank}: {outcome.kind}\n{outcome.message}")
        broken = _ranks_differ(ranks)
        if broken:
            return Verdict("silent difference", f"W={W}: {broken}")
    firsts = {W: ranks[0] for W, ranks in results.items()}
    return _exact(firsts) if case.flaw is None else _flawed(case, firsts)


def _ranks_differ(ranks: list[Outcome]) -> str:
    """How the ranks of one run contradict one another; a labelled run promises nothing of their state."""
    for rank, outcome in enumerate(ranks[1:], start=1):
        if (outcome.kind, outcome.label, outcome.error) != (ranks[0].kind, ranks[0].label, ranks[0].error):
            ends = [f"{o.kind} {o.label}{o.error} {o.message}" for o in (ranks[0], outcome)]
            return f"rank 0 ended with {ends[0]!r}, rank {rank} with {ends[1]!r}"
        if outcome.label == "bitwise" or outcome.error == "NonFiniteError":
            difference = first_difference(ranks[0], outcome)
            if difference:
                return f"ranks 0 and {rank}: {difference}"
    return ""


def first_difference(a: Outcome, b: Outcome) -> str:
    """The first step and tensors in which two runs differ; empty if they are the same."""
    if len(a.trace) != len(b.trace):
        return f"{len(a.trace)} steps and {len(b.trace)}"
    for step, (ours, theirs) in enumerate(zip(a.trace, b.trace), start=1):
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if names:
            return f"step {step} differs in {', '.join(names[:6])}"
    for name in a.facts | b.facts:
        # As text: a metric that is not a number is equal to itself here.
        if repr(a.facts.get(name)) != repr(b.facts.get(name)):
            return f"{name} differs: {a.facts.get(name)} and {b.facts.get(name)}"
    return ""


def _compare(firsts: dict[int, Outcome]) -> str:
    """The first difference between world sizes; empty where all agree."""
    reference_size, reference = next(iter(firsts.items()))
    for W, outcome in firsts.items():
        difference = first_difference(reference, outcome)
        if difference:
            return f"W={reference_size} and W={W}: {difference}"
    return ""


def _exact(firsts: dict[int, Outcome]) -> Verdict:
    stopped = {W: o for W, o in firsts.items() if o.kind == "error" and o.error != "NonFiniteError"}
    if stopped:
        W, outcome = next(iter(stopped.items()))
        return Verdict("wrongly refused", f"W={W}: {outcome.error}: {outcome.message}")
    labelled = {W: o for W, o in firsts.items() if o.kind == "finished" and o.label != "bitwise"}
    if labelled:
        W, outcome = next(iter(labelled.items()))
        return Verdict("wrongly refused", f"W={W}: labelled {outcome.label}: {'; '.join(outcome.reasons)}")
    if len({(o.kind, o.error) for o in firsts.values()}) > 1:
        ends = {W: f"{o.kind} {o.message}" for W, o in firsts.items()}
        return Verdict("silent difference", f"runs end differently: {ends}")
    difference = _compare(firsts)
    return Verdict("silent difference", difference) if difference else Verdict("one hash")


def _flawed(case: Case, firsts: dict[int, Outcome]) -> Verdict:
    flaw = FLAWS[case.flaw or ""]
    strict = case.config["trainer"].get("exactness") == "bitwise"
    # With one rank, what depends on the rank may go unseen; a reason that is given has to be right all the same.
    unseen = [W for W, o in firsts.items() if W == 1 and flaw.several_ranks and o.label == "bitwise"]
    concerned = {W: o for W, o in firsts.items() if W not in unseen}
    silent, stopped = {}, False
    for W, outcome in concerned.items():
        said = "; ".join(outcome.reasons) if outcome.kind == "finished" else outcome.message
        if outcome.kind == "finished" and outcome.label == "bitwise":
            silent[W] = outcome
        elif outcome.kind == "finished" and strict:
            return Verdict("wrong reason", f'W={W}: labelled, though the config says "bitwise": {said}')
        elif outcome.error == "RanksDifferError" and (flaw.several_ranks or flaw.late or flaw.later):
            stopped = True
        elif outcome.kind == "error" and (outcome.error != "UserError" or not strict):
            return Verdict("wrongly refused", f"W={W}: {outcome.error}: {said}")
        elif not re.search(flaw.reason, said, re.DOTALL):
            return Verdict("wrong reason", f"W={W}: expected {flaw.reason!r} for {case.flaw}, got: {said}")
    if silent:
        bitwise = {W: o for W, o in firsts.items() if o.kind == "finished" and o.label == "bitwise"}
        difference = _compare(bitwise)
        if difference or len(silent) < len(concerned):
            return Verdict("silent difference", f"{case.flaw}: bitwise at W={sorted(bitwise)}; {difference}")
        if len(bitwise) > 1:
            return Verdict("one hash")  # the flaw has no effect here, as before a layer that removes it
        return Verdict("unnoticed", f"{case.flaw}: bitwise at W={sorted(bitwise)}, with nothing to compare")
    if stopped:
        return Verdict("stopped")
    return Verdict("refused" if strict else "labelled")
