"""Trains one trial on several workers, on one node or several. Ray Train starts and watches the workers.

Tune's own actor of the trial trains nothing and reserves no resources. It passes the reports of the first worker to
Tune. The worker continues when Tune has answered, as a trial in one process does. With Ray's TuneReportCallback (2.60)
the workers would continue immediately, so a trial that was stopped or paused would train on into the next epoch.
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
"""How long to wait for news of a lost node; Ray (2.60) declares a silent node dead after some 15 s."""
_CONNECTION_ERRORS = re.compile(r"onnection (closed|reset|refused)|peer|NCCL|gloo", re.IGNORECASE)
"""What torch's collectives raise in one process when another one is gone."""


class _WorkerFailure(NamedTuple):
    """Why a worker ended. error: None if the exception cannot be pickled."""

    error: BaseException | None
    text: str
    node_id: str


class _ReportChannel:
    """Passes reports from the workers to Tune's actor, on whose node it runs."""

    def __init__(self) -> None:
        self._reports: asyncio.Queue[Any] = asyncio.Queue()
        self._answers: asyncio.Queue[None] = asyncio.Queue()
        self._nodes: dict[int, str] = {}

    async def register_worker(self, rank: int, node_id: str) -> None:
        self._nodes[rank] = node_id

    async def send_report(self, values: Mapping[str, Any]) -> None:
        """Send a report. Returns when Tune lets the trial continue."""
        await self._reports.put(dict(values))
        await self._answers.get()

    async def send_failure(self, failure: bytes) -> None:
        await self._reports.put(failure)

    async def receive(self) -> Any:
        """Return the next report or failure; None if there is none for some time."""
        try:
            return await asyncio.wait_for(self._reports.get(), _ANSWER_EVERY_S)
        except TimeoutError:
            return None

    async def send_answer(self) -> None:
        await self._answers.put(None)

    async def list_nodes(self) -> set[str]:
        """Return the ids of the nodes that the workers run on."""
        return set(self._nodes.values())


def make_trainable(trial_function: TrialFunction, slots: Slots | None = None) -> Callable[[dict[str, Any]], None]:
    """Make the function that Tune calls in a worker with the configuration from the driver.

    Args:
        trial_function: trains a segment.
        slots: the resources of a trial; None: one worker.
    """
    if slots is None or slots.num_workers == 1:
        return lambda config: trial_function(config[SEGMENT_KEY][0])
    packed = cloudpickle.dumps(trial_function)  # only the workers have to import what it needs
    return lambda config: train_in_group(packed, config[SEGMENT_KEY][0], slots, avoided=config[AVOIDED_NODES_KEY][0])


def train_in_group(packed: bytes, segment: TrialSegment, slots: Slots, avoided: Sequence[str]) -> None:
    """Run the trial function in every worker of a group, and report to Tune what the first worker reports.

    Call this in Tune's function. It does not return if the segment ends at a report; the driver then ends the group by
    `release_group`.

    Args:
        packed: the pickled trial function.
        segment: the segment to train.
        slots: the number of workers, and the resources of each.
        avoided: ids of nodes that no worker may run on.

    Raises:
        LostWorkerError: a worker died, or its node did.
        Exception: what a worker raised.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    channel: Any = ray.remote(_ReportChannel)  # max_concurrency allows a waiting call of each worker
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
    """Return the name of the placement group that holds the workers of a segment."""
    return f"{ray.get_runtime_context().get_job_id()}-{segment.name}"


def release_group(segment: TrialSegment) -> None:
    """End the workers of a segment that is over, even if Tune's actor died, and free their resources."""
    with contextlib.suppress(ValueError):  # the group no longer exists
        remove_placement_group(get_placement_group(make_group_name(segment)))


def _start_training_thread(
    packed: bytes, segment: TrialSegment, slots: Slots, avoided: Sequence[str], channel: Any
) -> "Future[None]":
    """Run Ray Train in a daemon thread, which ends with the process."""
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
    from ray.train.torch import TorchConfig  # imported here, since it imports torch

    from handpose.sweep.execution.group_trainer import GroupTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)

    def train_worker() -> None:
        context = ray.train.get_context()
        rank, node_id = context.get_world_rank(), ray.get_runtime_context().get_node_id()
        ray.get(channel.register_worker.remote(rank, node_id))

        def send_report(values: Mapping[str, Any]) -> None:
            if rank == 0:
                ray.get(channel.send_report.remote(values))

        try:
            with set_worker_context(WorkerContext(rank, slots.num_workers, send_report)):
                cloudpickle.loads(packed)(segment)
        except BaseException as error:
            ray.get(channel.send_failure.remote(_pickle_failure(error, node_id)))
            raise

    elsewhere = {"ray.io/node-id": f"!in({','.join(avoided)})"} if avoided else None
    scaling: Any = ScalingConfig  # Train V2's class has more arguments than the one type checkers see
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
        # Only Train's own files: checkpoints are stored like those of other trials. Retries are left to the sweep:
        # Train would retry without end, each time from the first epoch of the segment.
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
            if avoided and left < slots.num_workers:  # the sweep may retry on the avoided nodes when no others are left
                raise LostWorkerError("lost", "the nodes that it could run on were lost") from error


def _pickle_failure(error: BaseException, node_id: str) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        return cloudpickle.dumps(_WorkerFailure(error, text, node_id))
    except Exception:
        return cloudpickle.dumps(_WorkerFailure(None, text, node_id))


def _make_worker_error(failure: _WorkerFailure, channel: Any) -> BaseException:
    """Return the exception to raise for a failed worker. The real reason may be that another worker is gone."""
    if not _is_connection_error(failure.error):
        error = failure.error or RuntimeError(failure.text)
        error.__cause__ = None
        error.node_id = failure.node_id  # type: ignore[attr-defined]
        return error
    return _make_lost_worker_error(failure.text, channel)


def _make_group_error(error: BaseException, channel: Any) -> BaseException:
    """Return the exception to raise when Ray Train has ended the group and no worker has sent a reason."""
    if isinstance(error, PreemptionError):
        return LostWorkerError("preempted", str(error), min(error.preemption_info.preempted_node_to_ranks))
    reason = error.controller_failure if isinstance(error, ControllerError) else error
    if any(getattr(each, "preempted", False) for each in getattr(reason, "worker_failures", {}).values()):
        return LostWorkerError("preempted", str(reason))
    if isinstance(reason, RayTaskError) and not _is_connection_error(reason):  # raised while the group was set up
        return error
    is_gone = isinstance(reason, (RayError, WorkerGroupError, WorkerGroupStartupFailedError))
    return _make_lost_worker_error(str(reason), channel) if is_gone else error


def _is_connection_error(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and _CONNECTION_ERRORS.search(str(error)) is not None


def _make_lost_worker_error(text: str, channel: Any) -> LostWorkerError:
    node_id = _find_lost_node(channel)
    return LostWorkerError("lost" if node_id else "killed", text, node_id)


def _find_lost_node(channel: Any) -> str:
    """Return the id of a worker's node that is dead, as soon as Ray knows; empty if there is none."""
    nodes, end = ray.get(channel.list_nodes.remote()), time.monotonic() + _NODE_TIMEOUT_S
    nodes -= {ray.get_runtime_context().get_node_id()}  # this node is alive
    while nodes and time.monotonic() < end:
        alive = {node["NodeID"] for node in filter(itemgetter("Alive"), ray.nodes())}
        if gone := nodes - alive:
            return str(min(gone))
        time.sleep(1.0)
    return ""


_MAX_PICKLED_BYTES = 50_000_000


def check_picklable(trial_function: TrialFunction) -> None:
    """Check that workers can receive the trial function.

    Raises:
        UserError: it cannot be pickled, is too large, or is not the same after unpickling.
    """
    name = (
        type(trial_function).__name__
        if is_dataclass(trial_function)
        else getattr(trial_function, "__qualname__", repr(trial_function))
    )
    try:
        pickled = cloudpickle.dumps(make_trainable(trial_function))
        cloudpickle.loads(pickled)
        copied = cloudpickle.loads(cloudpickle.dumps(trial_function))
    except Exception as error:  # objects may raise any exception when they are pickled
        raise UserError(f"{name} cannot be sent to a worker: {type(error).__name__}: {error}") from error
    if len(pickled) > _MAX_PICKLED_BYTES:
        raise UserError(
            f"{name} has {len(pickled) / 1e6:.0f} MB, which would be sent to every worker; let it read its data on "
            "the worker instead"
        )
    if is_dataclass(trial_function) and copied != trial_function:
        raise UserError(f"{name} changes when it is sent to a worker: it is {copied}, not {trial_function}")
