"""A folder of event files as TensorBoard's own plugins read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def provider_of(folder: Path) -> Any:
    """Reads all runs in a folder."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder)).Reload()
    return data_provider.MultiplexerDataProvider(multiplexer, str(folder))


def tab(folder: Path) -> tuple[Any, list[Any]]:
    """What the HParams tab gets when it asks for the columns and for all rows."""
    from tensorboard import context
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    provider = provider_of(folder)
    asked = context.RequestContext()
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    experiment = get_experiment.Handler(asked, backend, "x", api_pb2.GetExperimentRequest()).run()
    every = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_UNKNOWN]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10_000, allowed_statuses=every, aggregation_type=api_pb2.AGGREGATION_AVG,
        col_params=[api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos]
        + [api_pb2.ColParams(metric=info.name, include_in_result=True) for info in experiment.metric_infos],
    )  # fmt: skip
    return experiment, list(list_session_groups.Handler(asked, backend, "x", request).run().session_groups)


def value(part: Any) -> Any:
    return getattr(part, part.WhichOneof("kind"))
