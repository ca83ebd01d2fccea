"""A sweep in TensorBoard: one run a trial, scalars by epoch, hyper-parameters in the HParams tab.

No experiment summary is written, unlike `SummaryWriter.add_hparams`, which puts one into every run: the HParams tab
takes the first that it finds for the whole sweep, so that parameters which only some trials have would get no column.
Without one it joins the parameters and metrics of all runs (tensorboard/plugins/hparams/backend_context.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch.utils.tensorboard import SummaryWriter


class TrialLog:
    """The event file of one trial.

    folder: of the run; one that has event files already is gone on with. name: how the HParams tab calls it. params:
    configuration key -> value. started_s: time since the epoch.
    """

    def __init__(self, folder: Path, *, name: str, params: Mapping[str, Any], started_s: float) -> None:
        goes_on = any(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder))
        if goes_on:
            return
        start = SessionStartInfo(group_name=name, start_time_secs=started_s)
        for key, value in params.items():
            _set(start, key, value)
        self._add(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))
        self._writer.flush()

    def report(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an epoch."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, epoch)
        self._writer.flush()

    def close(self, *, failed: bool, ended_s: float) -> None:
        """Note how and when the trial ended, and close the file."""
        status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
        end = SessionEndInfo(status=status, end_time_secs=ended_s)
        self._add(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))
        self._writer.close()

    def pause(self) -> None:
        """Close the file; the trial may go on."""
        self._writer.close()

    def _add(self, tag: str, data: HParamsPluginData) -> None:
        value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
        self._writer._get_file_writer().add_summary(Summary(value=[value]))


def _set(start: SessionStartInfo, key: str, value: Any) -> None:
    """Set a parameter with its type. None is left out: the tab hides runs whose parameter has none (tensorboard
    #2942)."""
    if value is None:
        return
    if isinstance(value, bool):
        start.hparams[key].bool_value = value
    elif isinstance(value, (int, float)):
        start.hparams[key].number_value = value
    else:
        start.hparams[key].string_value = str(value)
