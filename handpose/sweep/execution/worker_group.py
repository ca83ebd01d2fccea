"""A trial on several workers, of one node or of several, that share its steps: Ray Train starts them and watches them.

Tune's own actor of the trial trains nothing and holds nothing. What the first worker reports it passes on to Tune, and
the worker goes on when Tune has answered, as a trial in one process does. Ray's TuneReportCallback (2.60) lets workers
go on at once, so that a trial that was stopped or paused would train on into the next epoch.
"""

import asyncio
import contextlib
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import is_dataclass
from operator import itemgetter
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.v2.api.exceptions import PreemptionError
from ray.util.placement_group import get_placement_group, remove_placement_group

from handpose.errors import UserError
from handpose.sweep.controller.slots import Slots, count_fitting_workers
from handpose.sweep.execution.nodes import list_live_nodes
from handpose.sweep.execution.ray_internals import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.trainable.reporting import (
    AVOIDED_NODES_KEY,
    SEGMENT_KEY,
    LostWorkerError,
    TrialFunction,
    WorkerContext,
    set_worker_context,
)

_ANSWER_EVERY_S = 1.0
_NODE_TIMEOUT_S = 25.0
"""Ray (2.60) finds a node that does not answer dead after some 15 s."""
_CONNECTION_ERRORS = re.compile(r"onnection (closed|reset|refused)|peer|NCCL|gloo", re.IGNORECASE)
"""What torch's collectives raise in one process when another is gone."""


class _WorkerFailure(NamedTuple):
    """The end of a member. error: None where it cannot be pickled."""

    error: BaseException | None
    text: str
    node_id: str


class _ReportChannel:
    """Between the workers and Tune's actor, which runs it on its own node."""

    def __init__(self) -> None:
        self._reports: asyncio.Queue[Any] = asyncio.Queue()
        self._answers: asyncio.Queue[None] = asyncio.Queue()
        self._nodes: dict[int, str] = {}

    async def register_worker(self, rank: int, node_id: str) -> None:
        self._nodes[rank] = node_id

    async def send_report(self, values: Mapping[str, Any]) -> None:
        """Returns when Tune lets the trial go on."""
        await self._reports.put(dict(values))
        await self._answers.get()

    async def send_failure(self, failure: bytes) -> None:
        await self._reports.put(failure)

    async def receive(self) -> Any:
        """What was told, None where that takes long."""
        try:
            return await asyncio.wait_for(self._reports.get(), _ANSWER_EVERY_S)
        except TimeoutError:
            return None

    async def send_answer(self) -> None:
        await self._answers.put(None)

    async def list_nodes(self) -> set[str]:
        """Ids of those that members run on."""
        return set(self._nodes.values())


def make_trainable(trial_function: TrialFunction, slots: Slots | None = None) -> Callable[[dict[str, Any]], None]:
    """The function that Tune calls in a worker, with the configuration that the driver made."""
    if slots is None or slots.num_workers == 1:
        return lambda config: trial_function(config[SEGMENT_KEY][0])
    packed = cloudpickle.dumps(trial_function)  # so that only the workers have to import what it needs
    return lambda config: train_in_group(packed, config[SEGMENT_KEY][0], slots, avoided=config[AVOIDED_NODES_KEY][0])


def train_in_group(packed: bytes, segment: TrialSegment, slots: Slots, avoided: Sequence[str]) -> None:
    """Run an objective in every worker of a group; the reports of the first one are the stretch's.

    To be called in Tune's function. packed: the objective, pickled. slots: what each worker holds, and how many there
    are. avoided: ids of nodes that none is to run on. Does not return when the stretch ends at a report; the driver
    ends the group then, by `release`. Raises what a worker raised, and LostMemberError where one is gone.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    channel: Any = ray.remote(_ReportChannel)  # which has room for a waiting call of each worker
    channel = channel.options(num_cpus=0, max_concurrency=16 + slots.num_workers, label_selector=here).remote()
    training = _start_training_thread(packed, segment, slots, avoided, channel)
    while True:
        report = ray.get(channel.receive.remote())
        if isinstance(report, bytes):
            raise _make_worker_error(cloudpickle.loads(report), channel)
        if report is not None:
            tune.report(report)
            ray.get(channel.send_answer.remote())
        elif training.done():
            if (error := training.exception()) is not None:
                raise _make_group_error(error, channel) from error
            return


def make_group_name(segment: TrialSegment) -> str:
    """Of the placement group that holds the workers of a stretch."""
    return f"{ray.get_runtime_context().get_job_id()}-{segment.name}"


def release_group(segment: TrialSegment) -> None:
    """End the workers of a stretch that is over, whatever became of its own process, and give back what they hold."""
    with contextlib.suppress(ValueError):  # there is none any more
        remove_placement_group(get_placement_group(make_group_name(segment)))


def _start_training_thread(
    packed: bytes, segment: TrialSegment, slots: Slots, avoided: Sequence[str], channel: Any
) -> "Future[None]":
    """Ray Train's run, in a thread that ends with the process."""
    training: Future[None] = Future()
    place = str(Path(tune.get_context().get_trial_dir() or ".").absolute())

    def run() -> None:
        try:
            _run_trainer(packed, segment, slots, avoided, channel, place)
        except BaseException as error:
            training.set_exception(error)
        else:
            training.set_result(None)

    Thread(target=run, daemon=True).start()
    return training


def _run_trainer(
    packed: bytes, segment: TrialSegment, slots: Slots, avoided: Sequence[str], channel: Any, place: str
) -> None:
    from ray.train.torch import TorchConfig  # here, since it brings torch

    from handpose.sweep.execution.group_trainer import GroupTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)

    def train_worker() -> None:
        context = ray.train.get_context()
        rank, node_id = context.get_world_rank(), ray.get_runtime_context().get_node_id()
        ray.get(channel.register_worker.remote(rank, node_id))
        tell = _make_report_function(channel) if rank == 0 else _ignore_report
        try:
            with set_worker_context(WorkerContext(rank, slots.num_workers, tell)):
                cloudpickle.loads(packed)(segment)
        except BaseException as error:
            ray.get(channel.send_failure.remote(_pickle_failure(error, node_id)))
            raise

    elsewhere = {"ray.io/node-id": f"!in({','.join(avoided)})"} if avoided else None
    scaling: Any = ScalingConfig  # of Train V2, which has more than the class that type checkers are shown
    failures: Any = FailureConfig
    trainer = GroupTrainer(
        make_group_name(segment),
        train_worker,
        scaling_config=scaling(
            num_workers=slots.num_workers,
            use_gpu=slots.gpus > 0,
            resources_per_worker={"CPU": slots.cpus, "memory": slots.process_bytes}
            | ({"GPU": slots.gpus} if slots.gpus else {}),
            label_selector=elsewhere,
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if slots.gpus else "gloo"),
        # Its own bookkeeping; checkpoints go where those of other trials go. Who begins again, and where, the sweep
        # decides: Train itself would begin for ever, from the first epoch of the stretch.
        run_config=RunConfig(
            name="workers",
            storage_path=place,
            failure_config=failures(controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    while True:
        try:
            trainer.fit()
            return
        except ControllerError as error:
            if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                raise
            left = sum(
                count_fitting_workers(slots, node.resources) for node in list_live_nodes() if node.id not in avoided
            )
            if (
                avoided and left < slots.num_workers
            ):  # it may run elsewhere again, as a failure of before counts no more
                raise LostWorkerError("lost", "the nodes that it could run on were lost") from error


def _make_report_function(channel: Any) -> Any:
    def tell(values: Mapping[str, Any]) -> None:
        ray.get(channel.send_report.remote(values))

    return tell


def _ignore_report(values: Mapping[str, Any]) -> None:
    pass


def _pickle_failure(error: BaseException, node_id: str) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        return cloudpickle.dumps(_WorkerFailure(error, text, node_id))
    except Exception:
        return cloudpickle.dumps(_WorkerFailure(None, text, node_id))


def _make_worker_error(failure: _WorkerFailure, channel: Any) -> BaseException:
    """What is to be raised for a member's end; that of another one may be the reason."""
    if not _is_connection_error(failure.error):
        error = failure.error or RuntimeError(failure.text)
        error.__cause__ = None
        error.node_id = failure.node_id  # type: ignore[attr-defined]
        return error
    return _make_lost_worker_error(failure.text, channel)


def _make_group_error(error: BaseException, channel: Any) -> BaseException:
    """What is to be raised when Ray Train has ended the group, and no member has told why."""
    if isinstance(error, PreemptionError):
        return LostWorkerError("preempted", str(error), min(error.preemption_info.preempted_node_to_ranks))
    reason = error.controller_failure if isinstance(error, ControllerError) else error
    if any(getattr(each, "preempted", False) for each in getattr(reason, "worker_failures", {}).values()):
        return LostWorkerError("preempted", str(reason))
    if isinstance(reason, RayTaskError) and not _is_connection_error(reason):  # what setting up the group has raised
        return error
    is_gone = isinstance(reason, (RayError, WorkerGroupError, WorkerGroupStartupFailedError))
    return _make_lost_worker_error(str(reason), channel) if is_gone else error


def _is_connection_error(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and _CONNECTION_ERRORS.search(str(error)) is not None


def _make_lost_worker_error(text: str, channel: Any) -> LostWorkerError:
    node_id = _find_lost_node(channel)
    return LostWorkerError("lost" if node_id else "killed", text, node_id)


def _find_lost_node(channel: Any) -> str:
    """Id of a member's node that is dead, as soon as Ray knows; empty where none is."""
    nodes, end = ray.get(channel.list_nodes.remote()), time.monotonic() + _NODE_TIMEOUT_S
    nodes -= {ray.get_runtime_context().get_node_id()}  # which is well
    while nodes and time.monotonic() < end:
        alive = {node["NodeID"] for node in filter(itemgetter("Alive"), ray.nodes())}
        if gone := nodes - alive:
            return str(min(gone))
        time.sleep(1.0)
    return ""


_MAX_PICKLED_BYTES = 50_000_000


def check_picklable(trial_function: TrialFunction) -> None:
    """See that what trials run reaches a worker, whole and not as a heavy load; raises UserError."""
    name = (
        type(trial_function).__name__
        if is_dataclass(trial_function)
        else getattr(trial_function, "__qualname__", repr(trial_function))
    )
    try:
        pickled = cloudpickle.dumps(make_trainable(trial_function))
        cloudpickle.loads(pickled)
        copied = cloudpickle.loads(cloudpickle.dumps(trial_function))
    except Exception as error:  # pickle raises whatever the objects in it do
        raise UserError(f"{name} cannot be sent to a worker: {type(error).__name__}: {error}") from error
    if len(pickled) > _MAX_PICKLED_BYTES:
        raise UserError(
            f"{name} has {len(pickled) / 1e6:.0f} MB, which would be sent to every worker; let it read what it needs "
            "there instead of carrying it"
        )
    if is_dataclass(trial_function) and copied != trial_function:
        raise UserError(f"{name} does not arrive at a worker as it was sent: it is {copied}, not {trial_function}")
