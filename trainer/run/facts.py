"""What a run's bits depend on besides config and data: versions, device, code. All ranks must agree on it."""

from __future__ import annotations

import importlib.metadata
import socket
from typing import Any

import torch
from torch import nn

from ..config.deepspeed_keys import LAYERWISE
from ..config.keys import Config
from ..engine import device as devices
from ..errors import UserError
from ..exact.splits import Split
from ..ranks.collectives import common_value, gather_objects
from ..tasks.own_code import task_code_sha256
from ..tasks.protocol import Task

# Facts in which ranks may differ; the run is then labelled tolerance. Any other difference is an error: the ranks would
# not train the same thing.
_OF_THE_DEVICE = ("device_model", "cpu_capability", "math_settings")


def facts_of(task: Task, config: Config, device: torch.device, model: nn.Module) -> dict[str, Any]:
    """The facts of this rank: versions, the device, the hash of the code of the user's task. Name -> value."""
    from ..engine.deepspeed_engine import VERSION

    facts = devices.facts(device, VERSION)
    own_code = task_code_sha256(task, config.trainer.task)
    if own_code is not None:
        facts["task_code_sha256"] = own_code
    # Only a run that uses these packages depends on their versions.
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        facts["transformers"] = importlib.metadata.version("transformers")
    if config.optimizer.type.lower() in LAYERWISE:
        facts["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
    return facts


def compare_facts(facts: dict[str, Any], config: Config, splits: dict[str, Split]) -> list[str]:
    """Compares over the ranks everything that the bits depend on. Collective: every rank.

    Returns:
        A reason against bitwise if the device models differ.

    Raises:
        UserError: on every rank, if anything else differs.
    """
    own: dict[str, Any] = {**facts, "config": repr(config.as_dict())}
    own.update({f"data of {name}": split.data_hash() for name, split in splits.items()})
    everyone = gather_objects((socket.gethostname(), own))
    unlike: list[str] = []
    for name in sorted({name for _, facts_of in everyone for name in facts_of}):
        if name == "cpu_model":  # may differ: rank 0 draws the first weights, and sends them to all
            continue
        values = [facts_of.get(name) for _, facts_of in everyone]
        usual = common_value(values)
        for rank, value in enumerate(values):
            if value == usual:
                continue
            where = f"rank {rank} on {everyone[rank][0]}"
            if name in _OF_THE_DEVICE:
                usually, this = (v or "default settings of math libraries" for v in (usual, value))
                unlike.append(f"{where} runs on {this}, others on {usually}")
                break
            shown = "" if name == "config" else f": {value}, others {usual}"
            raise UserError(f"{where} has another {name} than the other ranks{shown}.", agreed=True)
    return unlike[:1]
