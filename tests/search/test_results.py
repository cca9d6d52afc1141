"""What is said of a search's trials."""

from __future__ import annotations

from typing import Any

from trainer.search.results import best_of, tie_sentence


def trial(number: int, value: float, loss: float, **more: Any) -> dict[str, Any]:
    return {"number": number, "state": "complete", "value": value, "metrics": {"validation": {"loss": loss}}, **more}


def test_a_tie_is_named_with_what_decides() -> None:
    def said(*trials: dict[str, Any]) -> str:
        best = best_of(trials, "max")
        assert best is not None
        return tie_sentence(trials, best, "accuracy")

    again = trial(3, 0.9, 0.5, **{"as": 0})
    assert said(trial(0, 0.9, 0.5), trial(1, 0.8, 0.1), again) == ""
    first = said(trial(0, 0.9, 0.5), trial(1, 0.8, 0.1), trial(2, 0.9, 0.5))
    assert first == "a tie: trial 3 has the same accuracy. Trial 1 is taken, since it was found first"
    assert "Trial 3 is taken, since its loss on validation is the lowest" in said(
        trial(0, 0.9, 0.5), trial(2, 0.9, 0.1)
    )
