"""A sweep in TensorBoard: one run a trial, scalars by epoch, pictures, and hyper-parameters in the HParams tab.

No experiment summary is written, unlike `SummaryWriter.add_hparams`, which puts one into every run: the HParams tab
takes the first that it finds for the whole sweep, so that parameters which only some trials have would get no column.
Without one it joins the parameters and metrics of all runs (tensorboard/plugins/hparams/backend_context.py).

What the tab then needs is columns that are whole: a run without a value, or with a word among numbers, is missing in
its filters and in the parallel coordinates view (tensorboard #2942). So each column has one type, null is a word, and
so is a parameter that a trial has not; `HParamsSchema` says which. A column that changes its type, as when the first
trial without the parameter comes, is written anew for all trials. That works because a trial's parameters stand in a
file of their own, beside its scalars; a TensorBoard that has read it already shows the change when it is started again.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
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
from handpose.report.trial_table import TrialRow

STATE = "(state)"
"""The first column of the HParams tab: how a trial ended."""

NOT_OVER = "not over"
ABSENT = "-"
"""For a parameter that other trials have."""

EPOCHS, SECONDS = "work/epochs", "work/seconds"
"""Scalars of every trial. Unless asked for more the tab shows five metrics, the first by the alphabet: after val/."""

ColumnKind: TypeAlias = Literal["number", "flag", "word"]

_FILE = "events.out.tfevents.0.hparams"
"""Sorts before the files of scalars: TensorBoard without its data server goes from file to file and never back."""


class HParamsSchema:
    """The type of each parameter's column, as the trials so far have it."""

    def __init__(self) -> None:
        self._num_trials = 0
        self._kinds: dict[str, set[ColumnKind]] = defaultdict(set)
        self._num_having: Counter[str] = Counter()
        self._texts: dict[str, dict[float, str]] = defaultdict(dict)  # of whole numbers

    def add(self, params: Mapping[str, Any]) -> bool:
        """Count a trial in; returns whether trials before it are to be written anew."""
        before = self._columns()
        self._num_trials += 1
        for key, value in params.items():
            self._kinds[key].add(_get_kind(value))
            if _get_kind(value) == "number" and value == int(value):
                text = to_json_text(value)
                if self._texts[key].setdefault(value, text) != text:  # 1 and 1.0, or 0.0 and -0.0: as words they differ
                    self._kinds[key].add("word")
            self._num_having[key] += 1
        return self._num_trials > 1 and self._columns() != before

    def to_column_values(self, params: Mapping[str, Any]) -> dict[str, float | bool | str]:
        """A trial's parameters, one for each column and of its type."""
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
    """The value of a parameter in a column of that type."""
    if kind != "word":
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"'{value}'" if value in ("null", "true", "false") else str(value)


class TensorBoardSweepLog:
    """The runs of all trials.

    folder: holds a folder a trial. run_name: of a trial. in_tab: the HParams tab lists them. rows: of trials that a
    process before has written.
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
        """A trial begins, or goes on, maybe with other parameters."""
        is_new = row.number not in self._rows
        self._rows[row.number] = row
        if is_new and self._schema.add(row.params):
            self._describe_all()
        else:
            self._describe(row)

    def log_costs(self, row: TrialRow, costs: Mapping[str, float]) -> None:
        """What the trial costs, before it is trained."""
        self._add_scalars(row, 0, {f"work/{name}": value for name, value in costs.items()})

    def log_epoch(self, row: TrialRow, pictures: Mapping[str, Path]) -> None:
        """The metrics of the row's epoch. pictures: name -> JPEG file."""
        self._add_scalars(row, row.epochs, row.metrics)
        self._count_work(row)
        summary = Summary(value=[_make_picture(name, file) for name, file in pictures.items()])
        with add_file_name(self._get_run_folder(row)):
            self._get_writer(row)._get_file_writer().add_summary(summary, row.epochs)
            self._get_writer(row).flush()

    def close_run(self, row: TrialRow, *, ended_s: float) -> None:
        """The trial does not run. ended_s: time since the epoch, noted if it is over."""
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
        """Close all files; trials may go on."""
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
        """Write the trial's parameters. The tab calls it by the name of its run, which no other sweep has."""
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
        part = folder / ".part"  # a name that TensorBoard does not take for one of its files
        try:
            with add_file_name(folder / _FILE):
                part.write_bytes(
                    _encode_events(Event(file_version="brain.Event:2"), Event(summary=Summary(value=[value])))
                )
                os.replace(part, folder / _FILE)
        finally:
            part.unlink(missing_ok=True)


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
