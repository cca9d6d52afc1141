"""What a study's folder says, in sentences and in rows."""

from __future__ import annotations

from pathlib import Path

from tests.study.made_up import results
from trainer.study.results import verdicts


def test_verdicts_of_a_folder(tmp_path: Path) -> None:
    lines = verdicts(results(tmp_path))
    text = "\n".join(lines)
    assert text.startswith("sequential: test/accuracy 0.95")
    assert "strong scaling has the accuracy of the sequential runs: supported at W = 2, 4, by construction" in text
    assert "strong scaling at W = 8: impossible here" in text
    at = lines.index("weak, learning rate unchanged, equal epochs: loses against its sequential runs?")
    assert lines[at + 1].startswith("  W = 2: contradicted. ")
    assert lines[at + 2].startswith("  W = 8: supported. 0.2")
    at = lines.index("weak, learning rate unchanged, equal epochs: fails to converge more often than not?")
    assert lines[at + 1].startswith("  W = 2: contradicted. 0 of 10 runs")
    assert lines[at + 2].startswith("  W = 8: supported. 10 of 10 runs (95 % interval 0.69 to 1.00)")


def test_the_noise_scale_speaks_of_equal_epochs(tmp_path: Path) -> None:
    """Where it stands beside what the study saw: W = 8 times 32 samples lose, at equal epochs."""
    noise = {"scale_samples": 146.0}
    (tmp_path / "epochs").mkdir()
    said = verdicts(results(tmp_path / "epochs", noise=noise))[-1]
    assert "146 about twice as many: W = 4.56 times the batch of 32" in said
    assert said.endswith("The study shows a loss of weak from W = 8 (a batch of 256) on.")
    (tmp_path / "updates").mkdir()
    said = verdicts(results(tmp_path / "updates", budget="updates", noise=noise))[-1]
    assert said.endswith("at equal epochs, at which this study compares nothing.")
