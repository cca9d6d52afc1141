"""The end of a search: the chosen configuration is trained with fresh seeds, and each of these runs is tested once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..files import write_json
from ..record.console import say
from ..wording import counted
from .declaration import Plan
from .places import How, Job, Places
from .results import TESTS, tests_in


def test_best(plan: Plan, choice: Mapping[str, Any], places: Places, together: Callable[[int], bool]) -> str | None:
    """Makes the test runs that are missing. A seed that has been tested is never tested again.

    Args:
        plan: of the search.
        choice: as in choice.json.
        places: where to run.
        together: number of runs -> whether all devices work on one run.

    Returns:
        Why a run could not be made; None if all were made.
    """
    folder = plan.folder / TESTS
    seeds = [seed for seed in choice["seeds"] if seed not in {result["seed"] for result in tests_in(plan.folder)}]
    if not seeds:
        return None
    text = plan.space.text(choice["point"])
    runs = f"it is trained with {counted(len(choice['seeds']), 'fresh seed')} and tested"
    say("", f"trial {choice['number'] + 1} is chosen ({text}); {runs}")
    failed: list[str] = []
    waiting = list(seeds)

    def jobs() -> Job | None:
        if not waiting or failed:  # after a failure no run begins; those under way come to their end
            return None
        seed = waiting.pop(0)
        return Job(f"seed-{seed}", plan.config_of(choice["point"], seed), tested=True)

    def done(job: Job, how: How, value: Any) -> None:
        if how != "done":
            text = str(value).strip()
            failed.append(text.splitlines()[-1] if how == "traceback" else text)
            return
        seed = job.config.trainer.seed
        kept = ("status", "metrics", "steps", "wall_time_s", "started_at_s", "parameters_sha256", "exactness", "curves")
        write_json(folder / f"{job.name}.json", {"seed": seed, **{name: value.get(name) for name in kept}})
        metric = choice["metric"]
        shown = {split: values.get(metric) for split, values in value["metrics"].items()}
        words = [f"{split} {metric} {number:.4f}" for split, number in shown.items() if number is not None]
        say(f"seed {seed}  {'  '.join(words) or value['status']}  {value['wall_time_s']:.1f} s")

    places.run(together(len(seeds)), jobs, lambda job, event: None, done)
    return failed[0] if failed else None
