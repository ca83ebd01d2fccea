"""Machines of a cluster that share the retraining of a winner, where the driver's own has not the room for it."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from handpose.config import REPOSITORY
from handpose.errors import UserError
from handpose.sweep.controller.slots import Slots, count_slots, num_fitting
from handpose.sweep.execution.group_trainer import interface
from handpose.sweep.execution.nodes import live_nodes
from handpose.sweep.execution.worker_death import describe_exit
from handpose.sweep.execution.worker_start import PATIENCE_S, never_started
from handpose.sweep.record.settings import SweepSettings

_TAIL_LINES = 5


class Crew(NamedTuple):
    """nodes: ids, the first one's process speaks for all. devices: on each. cpus, gpus: that each device holds."""

    nodes: Sequence[str]
    devices: int
    cpus: int
    gpus: float

    @property
    def size(self) -> int:
        return len(self.nodes) * self.devices


def find_crew(
    sweep: SweepSettings, *, devices: int | None, batch_size: int, without: Collection[str] = ()
) -> Crew | None:
    """Who is to retrain the winner; None where the driver's machine does. To be called within Ray.

    without: names of nodes that are not to. devices: that are to share each batch. By default as many as a trial had
    workers, which its memory may need, and all GPUs of a machine: of the driver's, or of another where that has none.
    """
    nodes = [node for node in live_nodes() if node.name not in without]
    trial = count_slots(sweep, [node.resources for node in nodes])
    worker = Slots(0, trial.cpus, float(trial.gpus > 0), 1)
    here = ray.get_runtime_context().get_node_id()
    rooms = {node.id: num_fitting(worker, node.resources) for node in nodes}
    own, largest = rooms.get(here, 0), max(rooms.values(), default=0)
    wanted = devices or max(sweep.workers_per_trial, (own or largest) if worker.gpus else 1)
    if wanted <= max(own, 0 if worker.gpus else 1):
        return None
    order = sorted(rooms, key=lambda node: (node != here, -rooms[node]))
    found = divided({node: rooms[node] for node in order}, wanted, batch_size)
    return None if found is None else Crew(*found, worker.cpus, worker.gpus)


def divided(rooms: Mapping[str, int], wanted: int, batch_size: int) -> tuple[list[str], int] | None:
    """The nodes, and the devices on each, that share batches equally: as many in all, on as few nodes, as there can be.

    rooms: node -> devices, those first that are preferred.
    """
    for total in range(wanted, 0, -1):
        for number in range(1, len(rooms) + 1):
            each = total // number
            fitting = [node for node, room in rooms.items() if room >= each]
            if batch_size % total == total % number == 0 and len(fitting) >= number:
                return fitting[:number], each
    return None


def run_crew(crew: Crew, module: str, arguments: Sequence[str], *, tell: Callable[[str], None]) -> None:
    """Run a program on all nodes of a crew until it has ended, each in Lightning's environment for several nodes.

    module: the program; arguments: of its command line. tell: takes each line of the first one's output. Raises
    UserError where one fails; all others are ended then.
    """
    on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in crew.nodes]
    meeting = _first_answer(ray.remote(num_cpus=0)(_meeting_point).options(scheduling_strategy=on[0]).remote())
    member: Any = ray.remote(_member)
    held = {"num_cpus": crew.cpus * crew.devices, "num_gpus": crew.gpus * crew.devices, "max_retries": 0}
    # What the configuration reads from the driver's environment, which nodes need not have.
    known = {name: os.environ[name] for name in ("MP_DATA", "DIR_SCRATCH") if name in os.environ}
    running: dict[Any, int] = {}
    for rank, node in enumerate(on):
        started = member.options(num_returns="streaming", scheduling_strategy=node, **held)
        environment = known | meeting | {"NODE_RANK": str(rank)}
        running[started.remote(module, list(arguments), environment, os.getcwd())] = rank
    last: dict[int, list[str]] = {rank: [] for rank in running.values()}
    try:
        while running:
            ready: Any = ray.wait(list(running), num_returns=1)[0][0]
            rank = running[ready]
            try:
                said = ray.get(next(ready))
            except StopIteration:
                del running[ready]
                continue
            if isinstance(said, str):
                last[rank] = [*last[rank], said][-_TAIL_LINES:]
                if rank == 0:
                    tell(said)
            elif said:
                where, lines = f"on node {rank + 1} of {len(on)}", " ".join(last[rank])
                raise UserError(f"it {describe_exit(said)} {where}: {lines}")
    except ray.exceptions.RayError as error:
        raise UserError(f"it broke off ({' '.join(str(error).split())[:200]})") from error
    finally:
        for each in running:
            with suppress(Exception):
                ray.cancel(each, force=True)


def _first_answer(asked: Any) -> dict[str, str]:
    """What a task that needs no resources returns; raises UserError where no worker is started for it."""
    try:
        answer: dict[str, str] = ray.get(asked, timeout=PATIENCE_S)
    except GetTimeoutError as error:
        raise never_started() from error
    return answer


def _meeting_point() -> dict[str, str]:
    """Where the processes of a crew find each other: on this node."""
    address = ray.util.get_node_ip_address()
    with closing(socket.create_server((address, 0))) as free:
        return {"MASTER_ADDR": address, "MASTER_PORT": str(free.getsockname()[1])}


def _member(module: str, arguments: list[str], more: dict[str, str], folder: str) -> Iterator[Any]:
    """Run the program on this node; each line that it prints, then its exit status. Without this process it ends."""
    environment = program_environment() | more | {"PYTHONUNBUFFERED": "1"}
    environment.pop("OMP_NUM_THREADS", None)  # that Ray sets
    if (name := interface(ray.util.get_node_ip_address())) is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder if os.path.isdir(folder) else None,  # to which paths on the command line may be relative
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:  # noqa: UP028  # Ray sends into its generators, which a file does not take
        yield line
    yield process.wait()


def program_environment() -> dict[str, str]:
    """This process's, for a program that is a module of this project, wherever it is started."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
