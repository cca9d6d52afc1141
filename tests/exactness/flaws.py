"""What random tasks do wrong on purpose, and the words with which the trainer has to say so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flaw:
    """One way to make a result depend on who computes what.

    Attributes:
        reason: a regular expression that the reason against bitwise has to match, in the label or the refusal.
        layer: the class in fuzz_flaws.py; None where the task itself is flawed (random_task.FLAWS).
        several_ranks: whether it can only be seen with two ranks or more.
        tokens: whether it needs an embedding.
        later: whether it may begin after the rehearsal, where chance has it so.
        late: whether it begins in the third step, where the audit has to find it.
    """

    reason: str
    layer: str | None = None
    several_ranks: bool = False
    tokens: bool = False
    later: bool = False
    late: bool = False


FLAWS: dict[str, Flaw] = {
    "python_random": Flaw(r"Python's random module"),
    "numpy_random": Flaw(r"numpy's global generator"),
    "task_generator": Flaw(r"generator"),
    "task_random": Flaw(r"generator"),
    "task_numpy": Flaw(r"generator"),
    "global_generator": Flaw(r"generator"),
    "module_generator": Flaw(r"generator", "FlawedGenerator"),
    "task_counter": Flaw(r"times_called"),
    "global_counter": Flaw(r"CALLS_OF_ALL"),
    "class_counter": Flaw(r"total_calls"),
    "nested_counter": Flaw(r"settings"),
    # State out of sight: that there is some is all that can be said.
    "hidden_counter": Flaw(r"state"),
    "hidden_start": Flaw(r"state|rank", several_ranks=True),
    "module_counter": Flaw(r"calls_so_far.*changes|changes.*calls_so_far", "FlawedCounter"),
    "task_memory": Flaw(r"recent_means"),
    "module_memory": Flaw(r"memory_bank", "FlawedMemory"),
    "own_buffer": Flaw(r"buffer .*own_average", "FlawedBuffer"),
    "tally": Flaw(r"buffer .*own_tally", "FlawedTally"),
    # Its power iteration may have converged to the last bit before the weights first move.
    "spectral_norm": Flaw(r"buffer .*_[uv]\b", "FlawedSpectral", later=True),
    "writes_parameter": Flaw(r"(parameter|optimizer) .*shrinking", "FlawedWriter"),
    "first_batch": Flaw(r"(parameter|optimizer) .*first_scale|started", "FlawedStart"),
    "max_norm": Flaw(r"(parameter|optimizer) .*layers\.0\.inner\.weight", tokens=True),
    "rank": Flaw(r"\brank", several_ranks=True),
    "clock": Flaw(r"computed again"),
    # The rehearsal finds them where it looks at the end of an epoch.
    "late_random": Flaw(r"audit|Python's random module", late=True),
    "late_counter": Flaw(r"audit|times_called", late=True),
    # Only micro-batches of the smallest size draw: of those that are rehearsed, it may be a single one. A LayerNorm of
    # one feature behind it takes the effect away, but for rounding that shows later.
    "ragged_random": Flaw(r"Python's random module", later=True),
}
