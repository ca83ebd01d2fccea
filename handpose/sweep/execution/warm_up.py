"""Workers that import what a trial needs while the driver still prepares the sweep, so that no slot waits for it.

Ray gives an actor a process that has run nothing yet and was started with the very runtime environment of the actor; a
process that has run a task never becomes an actor's (worker_pool.cc). So the imports stand in the setup hook of the
job, and the raylet is asked to start processes ahead, which Ray does for itself but offers in no public call. Where
that fails the sweep only begins some seconds later.
"""

import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import ray

from handpose.config import REPOSITORY
from handpose.sweep.controller.slots import Slots, count_fitting_workers
from handpose.sweep.execution.ray_internals import prestart_workers

_KEEP_ALIVE_S = 1800
_START_TIMEOUT_S = 5.0
_IMPORT_TIMEOUT_S = 60.0


class WorkerWarmUp:
    """Starts workers ahead of a sweep, in a Ray that was started with its `hook`; in another it does nothing.

    module: that trials need imported, with all that it imports. num_threads: of a slot, for libraries that read
    OMP_NUM_THREADS when they are imported. folder: of this machine, where its workers leave word.
    """

    def __init__(self, module: str, *, num_threads: int, folder: Path) -> None:
        self.hook = _make_setup_hook(module, num_threads=num_threads, folder=folder)
        self._folder = folder
        self._num_requested: Counter[str] = Counter()

    def start_workers(self, slots: Slots) -> None:
        """Have a worker started for every slot that has none yet, on each node for as many as fit into it."""
        if "worker_process_setup_hook" not in getattr(ray.get_runtime_context(), "runtime_env", {}):
            return
        for node in filter(itemgetter("Alive"), ray.nodes()):
            self._request_workers(
                node, _count_needed_workers(slots, node["Resources"]) - self._num_requested[node["NodeID"]]
            )

    def wait(self, *, num_more: int = 0) -> None:
        """Until the workers of this machine have imported everything.

        num_more: beyond those of the slots, for what ends before the first trial. They are asked for apart, since Ray
        starts no more at a time than it has cores, and forgets the others.
        """
        if not self._num_requested:
            return
        here = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
        for num in (0, num_more):
            self._request_workers(here, num)
            _wait_until(
                lambda: len(self._read_marks("started")) >= self._num_requested[here["NodeID"]], _START_TIMEOUT_S
            )
        _wait_until(lambda: len(self.pids) >= len(self._read_marks("started")), _IMPORT_TIMEOUT_S)

    @property
    def pids(self) -> set[int]:
        """Of this machine's processes that have imported everything."""
        return self._read_marks("ready")

    def _read_marks(self, what: str) -> set[int]:
        return {int(file.stem) for file in self._folder.glob(f"*.{what}")}

    def _request_workers(self, node: dict[str, Any], num_workers: int) -> None:
        if num_workers > 0:
            with contextlib.suppress(Exception):  # it is no public call, and another version of Ray may not have it
                prestart_workers(node, num_workers, keep_alive_s=_KEEP_ALIVE_S)
                self._num_requested[node["NodeID"]] += num_workers


@contextlib.contextmanager
def prepare_warm_up(trial_function: object, *, num_threads: int) -> Iterator[WorkerWarmUp]:
    """A WarmUp for what trials run, a function or an object."""
    with tempfile.TemporaryDirectory(prefix="handpose-workers-") as folder:
        yield WorkerWarmUp(trial_function.__module__, num_threads=num_threads, folder=Path(folder))


def _count_needed_workers(slots: Slots, resources: Mapping[str, float]) -> int:
    return min(slots.num_slots, count_fitting_workers(slots, resources)) if slots.num_workers == 1 else 0


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _make_setup_hook(module: str, *, num_threads: int, folder: Path) -> Callable[[], None]:
    """What a worker does first. A function within one travels whole: the worker cannot import this package yet."""
    repository, marks = str(REPOSITORY), str(folder)

    def import_what_trials_need() -> None:
        import contextlib
        import importlib
        import pathlib
        import sys

        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))  # as Ray does later, when the libraries are there
        sys.path.insert(0, repository)
        with contextlib.suppress(Exception):  # what is missing the first trial tells better
            pathlib.Path(marks, f"{os.getpid()}.started").touch()
            importlib.import_module(module)
            if "handpose.sweep.trainable.process_state" in sys.modules:
                sys.modules["handpose.sweep.trainable.process_state"].settle()
            pathlib.Path(marks, f"{os.getpid()}.ready").touch()

    return import_what_trials_need
