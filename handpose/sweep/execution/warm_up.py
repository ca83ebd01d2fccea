"""Starts workers that import what a trial needs while the driver prepares the sweep, so that no slot waits for imports.

Ray gives an actor only a process that has run nothing yet and was started with exactly the actor's runtime environment;
a process that has run a task never becomes an actor's (worker_pool.cc). Therefore the imports are in the job's setup
hook, and the raylet is asked to start processes in advance. Ray does this internally, but has no public call for it. If
it fails, the sweep only starts some seconds later.
"""

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import ray

from handpose.config_files import REPOSITORY
from handpose.sweep.controller.slots import Slots, count_fitting_workers
from handpose.sweep.execution.ray_internals import prestart_workers

_KEEP_ALIVE_S = 1800
_START_TIMEOUT_S = 5.0
_IMPORT_TIMEOUT_S = 60.0


class WorkerWarmUp:
    """Starts workers before a sweep, if Ray was started with its `hook`; otherwise it does nothing.

    Args:
        module: the module that trials need; importing it also imports everything else.
        num_threads: threads of a slot, for libraries that read OMP_NUM_THREADS when they are imported.
        folder: a folder of this machine, in which its workers write marker files.

    Attributes:
        hook: the setup hook for `start_ray`.
    """

    def __init__(self, module: str, *, num_threads: int, folder: Path) -> None:
        self.hook = _make_setup_hook(module, num_threads=num_threads, folder=folder)
        self._folder = folder
        self._num_requested: Counter[str] = Counter()

    def start_workers(self, slots: Slots) -> None:
        """Start a worker for every slot that has none yet, on each node as many as fit."""
        if "worker_process_setup_hook" not in getattr(ray.get_runtime_context(), "runtime_env", {}):
            return
        for node in filter(itemgetter("Alive"), ray.nodes()):
            self._request_workers(
                node, _count_needed_workers(slots, node["Resources"]) - self._num_requested[node["NodeID"]]
            )

    def wait(self, *, num_more: int = 0) -> None:
        """Wait until the workers of this machine have imported everything, or a time limit is reached.

        Args:
            num_more: workers in addition to those of the slots, for work that ends before the first trial. They are
                requested separately, since Ray starts no more processes at a time than it has cores, and forgets the
                others.
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
        """Ids of the processes on this machine that have imported everything."""
        return self._read_marks("ready")

    def _read_marks(self, what: str) -> set[int]:
        return {int(file.stem) for file in self._folder.glob(f"*.{what}")}

    def _request_workers(self, node: dict[str, Any], num_workers: int) -> None:
        if num_workers > 0:
            with contextlib.suppress(Exception):  # not a public call: another version of Ray may lack it
                prestart_workers(node, num_workers, keep_alive_s=_KEEP_ALIVE_S)
                self._num_requested[node["NodeID"]] += num_workers


@contextlib.contextmanager
def prepare_warm_up(trial_function: object, *, num_threads: int) -> Iterator[WorkerWarmUp]:
    """Yield a WorkerWarmUp for what trials run, a function or an object."""
    with tempfile.TemporaryDirectory(prefix="handpose-workers-") as folder:
        yield WorkerWarmUp(trial_function.__module__, num_threads=num_threads, folder=Path(folder))


def _count_needed_workers(slots: Slots, resources: Mapping[str, float]) -> int:
    return min(slots.num_slots, count_fitting_workers(slots, resources)) if slots.num_workers == 1 else 0


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _make_setup_hook(module: str, *, num_threads: int, folder: Path) -> Callable[[], None]:
    """Make the function that a worker runs first.

    It is a nested function, which is pickled as a whole: the worker cannot import this package yet.
    """
    repository, marks = str(REPOSITORY), str(folder)

    def import_what_trials_need() -> None:
        import contextlib
        import importlib
        import os
        import pathlib
        import sys

        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))  # Ray sets it only after the imports
        sys.path.insert(0, repository)
        with contextlib.suppress(Exception):  # the first trial reports better what is missing
            pathlib.Path(marks, f"{os.getpid()}.started").touch()
            importlib.import_module(module)
            if "handpose.sweep.trainable.process_state" in sys.modules:
                sys.modules["handpose.sweep.trainable.process_state"].freeze_imports()
            pathlib.Path(marks, f"{os.getpid()}.ready").touch()

    return import_what_trials_need
