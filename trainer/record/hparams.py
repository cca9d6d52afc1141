"""What TensorBoard's HParams tab gets: the settings of a run, when it began and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.schema import flat

# Settings in which runs often differ: column -> key in the config. A key that the config leaves out is not shown.
_KEYS = {
    "task": "trainer.task",
    "optimizer": "optimizer.type",
    "learning_rate": "optimizer.params.lr",
    "schedule": "trainer.learning_rate.schedule",
    "warmup_epochs": "trainer.learning_rate.warmup_epochs",
    "scaling_rule": "trainer.learning_rate.scaling_rule",
    "epochs": "trainer.epochs",
    "max_steps": "trainer.max_steps",
    "seed": "trainer.seed",
    "train_samples": "trainer.train_samples",
    "gradient_clipping": "gradient_clipping",
    "lora_rank": "trainer.lora.rank",
    "zero_stage": "zero_optimization.stage",
}
# Blocks of which every number, text and switch is shown.
_BLOCKS = {"optimizer.params.": "optimizer.", "trainer.task_options.": "task_options."}
_LONGEST = 100  # letters of a text: the tab is a table


def settings(config: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """The settings that the tab shows, of a config as a dictionary without secrets: name -> number, text or switch."""
    values = flat(config)
    shown = {name: values.get(key) for name, key in _KEYS.items()}
    for block, prefix in _BLOCKS.items():
        own = {key: value for key, value in values.items() if key.startswith(block) and key not in _KEYS.values()}
        shown |= {prefix + key.removeprefix(block): value for key, value in own.items()}
    return {
        name: value[:_LONGEST] if isinstance(value, str) else value
        for name, value in shown.items()
        if isinstance(value, (str, bool, int, float))
    }


def start(values: Mapping[str, str | float | bool], began_at_s: float, group: str = "") -> Any:
    """The summary that begins a row of the tab.

    Args:
        values: of the row, by column.
        began_at_s: when the run began, as from time.time().
        group: rows of one group are shown as their mean; "" for a row of its own.
    """
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    info = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=began_at_s)
    for key, value in values.items():
        if isinstance(value, bool):
            info.hparams[key].bool_value = value
        elif isinstance(value, str):
            info.hparams[key].string_value = value
        else:
            info.hparams[key].number_value = value
    return told(metadata.SESSION_START_INFO_TAG, session_start_info=info)


def end(good: bool, ended_at_s: float) -> Any:
    """The summary that ends a row."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if good else api_pb2.STATUS_FAILURE
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=ended_at_s)
    return told(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def told(tag: str, **content: Any) -> Any:
    """A summary that is for the HParams plugin."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])
