"""Nodes of a cluster that retrain the winner together, when the driver's own node has too few devices."""

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

from handpose.config_files import REPOSITORY
from handpose.errors import UserError, join_lines
from handpose.sweep.controller.slots import Slots, count_fitting_workers, count_slots
from handpose.sweep.execution.group_trainer import find_interface
from handpose.sweep.execution.nodes import list_live_nodes
from handpose.sweep.execution.worker_death import describe_exit
from handpose.sweep.execution.worker_start import PATIENCE_S, never_started
from handpose.sweep.record.settings import SweepSettings

_TAIL_LINES = 5


class RetrainNodes(NamedTuple):
    """The nodes that retrain the winner.

    Attributes:
        node_ids: ids of the nodes; the process on the first one prints the output.
        devices_per_node: number of devices on each node.
        cpus_per_device: cores for each device.
        gpus_per_device: 1 if the devices are GPUs, 0 if they are CPUs.
    """

    node_ids: Sequence[str]
    devices_per_node: int
    cpus_per_device: int
    gpus_per_device: float

    @property
    def num_devices(self) -> int:
        return len(self.node_ids) * self.devices_per_node

    @property
    def num_gpus(self) -> int:
        return self.num_devices if self.gpus_per_device else 0


def find_retrain_nodes(
    sweep: SweepSettings, *, devices: int | None, batch_size: int, excluded_nodes: Collection[str] = ()
) -> RetrainNodes | None:
    """Choose the nodes that retrain the winner. Call this while connected to Ray.

    Args:
        sweep: the settings of the sweep.
        devices: number of devices that share each batch. None: the number of workers of a trial, whose memory may be
            needed, but at least all GPUs of the driver's node, or of the largest node if the driver's has none.
        batch_size: size of the batch that the devices share equally.
        excluded_nodes: names of nodes that must not be used.

    Returns:
        The nodes; None: the driver's machine retrains the winner.
    """
    nodes = [node for node in list_live_nodes() if node.name not in excluded_nodes]
    trial = count_slots(sweep, [node.resources for node in nodes])
    worker = Slots(0, trial.cpus, float(trial.gpus > 0), 1)
    here = ray.get_runtime_context().get_node_id()
    devices_by_node = {node.id: count_fitting_workers(worker, node.resources) for node in nodes}
    own, largest = devices_by_node.get(here, 0), max(devices_by_node.values(), default=0)
    wanted = devices or max(sweep.workers_per_trial, (own or largest) if worker.gpus else 1)
    if wanted <= max(own, 0 if worker.gpus else 1):
        return None
    order = sorted(devices_by_node, key=lambda node: (node != here, -devices_by_node[node]))
    found = divide_devices({node: devices_by_node[node] for node in order}, wanted, batch_size)
    return None if found is None else RetrainNodes(*found, worker.cpus, worker.gpus)


def divide_devices(devices_by_node: Mapping[str, int], wanted: int, batch_size: int) -> tuple[list[str], int] | None:
    """Choose nodes with an equal number of devices each, so that all devices share a batch equally.

    Prefers more devices in total, then fewer nodes.

    Args:
        devices_by_node: node -> number of devices, preferred nodes first.
        wanted: the largest number of devices in total.
        batch_size: must be divisible by the total number of devices.

    Returns:
        The nodes, and the number of devices on each; None if there are none.
    """
    for total in range(wanted, 0, -1):
        for number in range(1, len(devices_by_node) + 1):
            each = total // number
            fitting = [node for node, capacity in devices_by_node.items() if capacity >= each]
            if batch_size % total == total % number == 0 and len(fitting) >= number:
                return fitting[:number], each
    return None


def run_on_nodes(
    retrain_nodes: RetrainNodes, module: str, arguments: Sequence[str], *, print_line: Callable[[str], None]
) -> None:
    """Run a program on all nodes until it has ended, each in Lightning's environment for several nodes.

    Args:
        retrain_nodes: the nodes.
        module: the program.
        arguments: the arguments of its command line.
        print_line: takes each line of the output of the first node.

    Raises:
        UserError: the program fails on a node. It is then ended on all others.
    """
    on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in retrain_nodes.node_ids]
    meeting = _first_answer(ray.remote(num_cpus=0)(_find_rendezvous).options(scheduling_strategy=on[0]).remote())
    worker: Any = ray.remote(_run_program)
    held = {
        "num_cpus": retrain_nodes.cpus_per_device * retrain_nodes.devices_per_node,
        "num_gpus": retrain_nodes.gpus_per_device * retrain_nodes.devices_per_node,
        "max_retries": 0,
    }
    # A training reads these from its environment. Other nodes may not have them.
    names = ("MP_DATA", "DIR_SCRATCH", "OMP_NUM_THREADS")
    driver_variables = {name: os.environ[name] for name in names if name in os.environ}
    running: dict[Any, int] = {}
    for rank, node in enumerate(on):
        started = worker.options(num_returns="streaming", scheduling_strategy=node, **held)
        environment = driver_variables | meeting | {"NODE_RANK": str(rank)}
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
                    print_line(said)
            elif said:
                where, lines = f"on node {rank + 1} of {len(on)}", " ".join(last[rank])
                raise UserError(f"it {describe_exit(said)} {where}: {lines}")
    except ray.exceptions.RayError as error:
        raise UserError(f"it failed ({join_lines(error)[:200]})") from error
    finally:
        for each in running:
            with suppress(Exception):
                ray.cancel(each, force=True)


def _first_answer(asked: Any) -> dict[str, str]:
    """Return the result of a task that needs no resources; raise UserError if Ray starts no worker for it."""
    try:
        answer: dict[str, str] = ray.get(asked, timeout=PATIENCE_S)
    except GetTimeoutError as error:
        raise never_started() from error
    return answer


def _find_rendezvous() -> dict[str, str]:
    """Return the address on this node at which the processes of all nodes meet."""
    address = ray.util.get_node_ip_address()
    with closing(socket.create_server((address, 0))) as free:
        return {"MASTER_ADDR": address, "MASTER_PORT": str(free.getsockname()[1])}


def _run_program(module: str, arguments: list[str], extra_environment: dict[str, str], folder: str) -> Iterator[Any]:
    """Run the program on this node. Yield each line that it prints, then its exit status.

    The program has to end by itself when this process is gone.
    """
    environment = make_program_environment()
    environment.pop("OMP_NUM_THREADS", None)  # set by Ray
    environment |= extra_environment | {"PYTHONUNBUFFERED": "1"}
    if (name := find_interface(ray.util.get_node_ip_address())) is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder if os.path.isdir(folder) else None,  # paths in the arguments may be relative
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:  # noqa: UP028  # Ray sends to its generators; files have no send()
            yield line
    yield process.wait()


def make_program_environment() -> dict[str, str]:
    """Return this process's environment for a program that is a module of this project, whatever its working folder."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
