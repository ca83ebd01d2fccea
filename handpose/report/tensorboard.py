"""TensorBoard log of a sweep: one run per trial, with scalars, pictures, its story, and its parameters for HParams.

No experiment summary is written. `SummaryWriter.add_hparams` writes one into every run, and the HParams tab uses the
first one that it finds for the whole sweep, so parameters that only some trials have would get no column. Without an
experiment summary, the tab joins the parameters and metrics of all runs
(tensorboard/plugins/hparams/backend_context.py).

The tab then needs complete columns: a run without a value, or with a word in a column of numbers, is missing in the
filters and in the parallel coordinates view (tensorboard #2942). So each column has one type, which `HParamsSchema`
determines, and null is written as a word, as is a parameter that the trial does not have. If a column changes its type,
for example at the first trial without the parameter, the parameters of all trials are written again. This is possible
because they are in a separate file beside the scalars of the trial. A TensorBoard that has already read this file shows
the change only after a restart.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

from simplejpeg import decode_jpeg_header
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from handpose.errors import add_file_name
from handpose.plain_values import to_json_text
from handpose.report.formatting import format_duration
from handpose.report.sweep_record import StoryLine
from handpose.report.trial_table import TrialRow
from handpose.report.utilisation import Utilisation

STATE = "(state)"
"""First column of the HParams tab: how the trial ended."""

NOT_OVER = "not over"
ABSENT = "-"
"""Shown for a parameter that the trial does not have, but other trials do."""

EPOCHS, SECONDS = "work/epochs", "work/seconds"
"""Scalars of every trial. By default, the tab shows the first five metrics by name, and these names come after val/."""

ColumnKind: TypeAlias = Literal["number", "flag", "word"]

_FILE = "events.out.tfevents.0.hparams"
"""Its name sorts before the files of scalars, because TensorBoard without its data server reads the files in order and
does not return to an earlier one."""


class HParamsSchema:
    """The type of each parameter's column, determined from all trials so far."""

    def __init__(self) -> None:
        self._num_trials = 0
        self._kinds: dict[str, set[ColumnKind]] = defaultdict(set)
        self._num_having: Counter[str] = Counter()
        self._texts: dict[str, dict[float, str]] = defaultdict(dict)  # key -> whole number -> its text

    def add(self, params: Mapping[str, Any]) -> bool:
        """Add a trial. Returns whether a column changed, so that the earlier trials must be written again."""
        before = self._columns()
        self._num_trials += 1
        for key, value in params.items():
            self._kinds[key].add(_get_kind(value))
            if _get_kind(value) == "number" and value == int(value):
                text = to_json_text(value)
                if self._texts[key].setdefault(value, text) != text:  # 1 and 1.0, or 0.0 and -0.0, differ as words
                    self._kinds[key].add("word")
            self._num_having[key] += 1
        return self._num_trials > 1 and self._columns() != before

    def to_column_values(self, params: Mapping[str, Any]) -> dict[str, float | bool | str]:
        """Convert the parameters of a trial to a value for each column, of the type of the column."""
        return {
            key: to_column_value(params[key], kind) if key in params else ABSENT
            for key, kind in self._columns().items()
        }

    def _columns(self) -> dict[str, ColumnKind]:
        return {key: self._column(key) for key in self._kinds}

    def _column(self, key: str) -> ColumnKind:
        kinds = self._kinds[key]
        return next(iter(kinds)) if len(kinds) == 1 and self._num_having[key] == self._num_trials else "word"


def _get_kind(value: Any) -> ColumnKind:
    if isinstance(value, bool):
        return "flag"
    return "number" if isinstance(value, (int, float)) and math.isfinite(value) else "word"


def to_column_value(value: Any, kind: ColumnKind) -> float | bool | str:
    """Convert the value of a parameter to the type of a column. The texts null, true and false are put in quotes."""
    if kind != "word":
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"'{value}'" if value in ("null", "true", "false") else str(value)


class TensorBoardSweepLog:
    """The TensorBoard runs of all trials of a sweep.

    Args:
        folder: the folder for the runs, which gets one folder per trial.
        run_name: returns the name of the run of a trial.
        in_tab: whether the HParams tab shows the trials.
        rows: trials that an earlier process has logged already.
    """

    def __init__(
        self, folder: Path, *, run_name: Callable[[int], str], in_tab: bool = True, rows: Iterable[TrialRow] = ()
    ) -> None:
        self._folder = folder
        self._in_tab = in_tab
        self._run_name = run_name
        self._schema = HParamsSchema()
        self._rows = {row.number: row for row in rows}
        self._writers: dict[int, SummaryWriter] = {}
        self._spent: dict[int, tuple[int, float]] = {}
        for row in self._rows.values():
            self._schema.add(row.params)
        self._describe_all()

    def open_run(self, row: TrialRow) -> None:
        """Log that a trial starts or resumes, possibly with changed parameters."""
        is_new = row.number not in self._rows
        self._rows[row.number] = row
        if is_new and self._schema.add(row.params):
            self._describe_all()
        else:
            self._describe(row)

    def log_costs(self, row: TrialRow, costs: Mapping[str, float]) -> None:
        """Log the costs of a trial, which are measured before it is trained."""
        self._add_scalars(row, 0, {f"work/{name}": value for name, value in costs.items()})

    def log_utilisation(self, row: TrialRow, used: Utilisation) -> None:
        """Log what a trial has used from its last report to the row's epoch."""
        self._add_scalars(row, row.epochs, used.to_scalars())

    def log_epoch(self, row: TrialRow, pictures: Mapping[str, Path]) -> None:
        """Log the metrics at the row's epoch.

        Args:
            row: the row of the trial.
            pictures: name -> JPEG file.
        """
        self._add_scalars(row, row.epochs, row.metrics)
        self._count_work(row)
        summary = Summary(value=[_make_picture(name, file) for name, file in pictures.items()])
        with add_file_name(self._get_run_folder(row)):
            self._get_writer(row)._get_file_writer().add_summary(summary, row.epochs)
            self._get_writer(row).flush()

    def close_run(self, row: TrialRow, *, ended_s: float, story: Sequence[StoryLine] = ()) -> None:
        """Log that a trial does not run any more, and close its files.

        Args:
            row: the row of the trial, which is over, or may run again.
            ended_s: Unix time in seconds, which is logged if the trial is over.
            story: what has happened to the trial so far, for the tab Text.
        """
        if story:
            with add_file_name(self._get_run_folder(row)):
                self._get_writer(row).add_text("story", _format_story(story), row.epochs)
        if row.is_over:
            self._describe(row)
            self._count_work(row)
            is_failure = row.state in ("diverged", "failed")
            status = api_pb2.STATUS_FAILURE if is_failure else api_pb2.STATUS_SUCCESS
            end = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=ended_s))
            summary = Summary(value=[_make_value(metadata.SESSION_END_INFO_TAG, end)] if self._in_tab else [])
            with add_file_name(self._get_run_folder(row)):
                self._get_writer(row)._get_file_writer().add_summary(summary)
        if row.number in self._writers:
            with add_file_name(self._get_run_folder(row)):
                self._writers.pop(row.number).close()

    def close(self) -> None:
        """Close all files. Trials that are not over can be continued by a later process."""
        while self._writers:
            with add_file_name(self._folder):
                self._writers.popitem()[1].close()

    def _count_work(self, row: TrialRow) -> None:
        spent = row.epochs, row.seconds
        if self._spent.get(row.number) != spent:
            self._add_scalars(row, row.epochs, dict(zip((EPOCHS, SECONDS), spent, strict=True)))
        self._spent[row.number] = spent

    def _get_run_folder(self, row: TrialRow) -> Path:
        return self._folder / self._run_name(row.number)

    def _get_writer(self, row: TrialRow) -> SummaryWriter:
        if row.number not in self._writers:
            self._writers[row.number] = SummaryWriter(str(self._get_run_folder(row)))
        return self._writers[row.number]

    def _add_scalars(self, row: TrialRow, step: int, scalars: Mapping[str, float]) -> None:
        with add_file_name(self._get_run_folder(row)):
            for tag, value in scalars.items():
                self._get_writer(row).add_scalar(tag, value, step)
            self._get_writer(row).flush()

    def _describe_all(self) -> None:
        for row in self._rows.values():
            self._describe(row)

    def _describe(self, row: TrialRow) -> None:
        """Write the parameters of a trial. The tab shows it under the name of its run, which is unique to the sweep."""
        if not self._in_tab:
            return
        start = SessionStartInfo()
        columns = self._schema.to_column_values(row.params)
        for key, value in {STATE: row.state if row.is_over else NOT_OVER, **columns}.items():
            field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
            setattr(start.hparams[key], field, value)
        value = _make_value(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))
        folder = self._get_run_folder(row)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / ".part"  # TensorBoard does not read files with this name
        try:
            with add_file_name(folder / _FILE):
                part.write_bytes(
                    _encode_events(Event(file_version="brain.Event:2"), Event(summary=Summary(value=[value])))
                )
                os.replace(part, folder / _FILE)
        finally:
            part.unlink(missing_ok=True)


def _format_story(story: Sequence[StoryLine]) -> str:
    """Format the story of a trial as a list in Markdown. TensorBoard removes HTML from it."""
    return "\n".join(f"- {format_duration(line.at_s)} {line.text}" for line in story)


def _make_value(tag: str, data: HParamsPluginData) -> Summary.Value:
    return Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)


def _encode_events(*events: Event) -> bytes:
    buffer = BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _make_picture(name: str, file: Path) -> Summary.Value:
    content = file.read_bytes()
    height, width, *_ = decode_jpeg_header(content)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    return Summary.Value(tag=f"val_pictures/{name}", image=image)
