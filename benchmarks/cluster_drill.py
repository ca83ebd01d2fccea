"""Run a sweep on a cluster, kill, disconnect, add and break nodes, kill the driver, and count what is lost.

    python benchmarks/cluster_drill.py --output cluster_drill.json
    python benchmarks/cluster_drill.py --namespaces        # as root: hosts of their own, and one that is cut off
    python benchmarks/cluster_drill.py --namespaces --workers 2 --nodes 4 --cpus 1 --trials 20   # across nodes

The nodes are real: each runs `ray start` in its own process, with its own temporary folder and, with --namespaces, its
own network. While trials run, two nodes are killed with SIGKILL (with --namespaces one of them loses its network
instead), one is preempted with five seconds' notice, one joins, and one joins on which every trial fails. The driver is
killed and restarted. Afterwards the sweep is audited (handpose/sweep/audit). The value of every trial that has finished
must be the same as without any interruption.
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.cheap_sweep import BROKEN_NODE, EPOCH_S, EPOCHS  # noqa: E402
from benchmarks.network_hosts import HostNetwork  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from handpose.sweep.audit.audit import audit  # noqa: E402
from handpose.sweep.execution.privacy import NO_USAGE_STATS  # noqa: E402
from handpose.sweep.record.events import (  # noqa: E402
    EVENTS_FILE,
    EpochReported,
    Event,
    NodeQuarantined,
    SegmentFailed,
    SegmentStarted,
    TrialSuggested,
    read_events,
)

_METRIC = "val/pa_mpjpe_mm"
_LIMIT_S = 1500.0
_NODE_VARIABLE = "HANDPOSE_DRILL_NODE"
_PREEMPTION_NOTICE_S = 5
_PREEMPTION_SCRIPT = """
import sys, time, ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
address, name, seconds = sys.argv[1:]
ray.init(address, log_to_driver=False, logging_level="error")
node = next(each["NodeID"] for each in ray.nodes() if each["Alive"] and each["NodeName"] == name)
until = int(1000 * (time.time() + float(seconds)))
reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
is_accepted, why = ray._raylet.GcsClient(address=address).drain_node(node, reason, "drill", until)
assert is_accepted, why
"""
_COUNT_NODES_SCRIPT = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
print(sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes()))
"""
_HEAD_NODE, _JOINED_NODE, _BROKEN_NODE = "head", "joined", "broken"


@dataclass
class Cluster:
    """Ray nodes on this machine.

    Attributes:
        folder: the folder of the cluster. Its path is short, because it contains sockets.
        cpus: number of cores of each node but the head.
        epoch_s: seconds that an epoch takes.
        network: the network whose hosts all nodes but the head are; None: all are on this machine's loopback.
        port: the port of the head.
        names: the names of all nodes started so far.
        max_autoscaled: largest number of nodes that Ray's autoscaler may start for what waits; 0: there is none. It
            takes them back when they have been idle for six seconds. They have no network of their own.
    """

    folder: Path
    cpus: int
    epoch_s: float
    network: HostNetwork | None
    port: int = 0
    names: list[str] = field(default_factory=list)
    max_autoscaled: int = 0

    def __post_init__(self) -> None:
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **NO_USAGE_STATS}
        self.environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", EPOCH_S: str(self.epoch_s)}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        if self.max_autoscaled:
            self.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}

    @property
    def get_address(self) -> str:
        return f"{self._ip(_HEAD_NODE)}:{self.port}"

    def start(self, name: str, *, is_broken: bool = False, hidden: Path | None = None) -> None:
        """Start a node. The first one is the head, which runs no trials.

        Args:
            name: the name of the node.
            is_broken: every trial on it fails.
            hidden: a folder that the node cannot see; needs root.
        """
        self.names.append(name)
        if self.network and name != _HEAD_NODE:
            self.network.add_host(name)
        where = ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
        if name != _HEAD_NODE:
            where = [f"--address={self.get_address}", f"--num-cpus={self.cpus}"]
        elif self.max_autoscaled:
            where.append(f"--autoscaling-config={self._write_autoscaling_config()}")
        inside = self.network.make_command_prefix(name) if self.network and name != _HEAD_NODE else []
        if hidden is not None:
            inside += ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {hidden} && exec "$@"', "sh"]
        command = [*inside, str(Path(sys.executable).with_name("ray")), "start", *where]
        command += [f"--node-name={name}", f"--node-ip-address={self._ip(name)}", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={10**8}"]
        command += [f"--temp-dir={self.folder / name}"]
        environment = (
            self.environment | {_NODE_VARIABLE: str(self.folder / name)} | ({BROKEN_NODE: "1"} if is_broken else {})
        )
        with (self.folder / "ray.log").open("a", encoding="utf-8") as log:
            started = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log, timeout=300)
        if started.returncode:
            log_text = (self.folder / "ray.log").read_text(encoding="utf-8")
            sys.exit(f"{' '.join(command)} ended with {started.returncode}:\n{log_text}")

    def _write_autoscaling_config(self) -> Path:
        """Write the configuration of Ray's autoscaler, whose nodes are processes of this machine."""
        empty = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
        empty += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"]
        worker = {"CPU": self.cpus, "object_store_memory": 10**8}
        content: dict[str, object] = {
            "cluster_name": "drill",
            "max_workers": self.max_autoscaled,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 10,
            "provider": {"type": "fake_multinode", "gcs_address": self.get_address, "use_node_id_as_ip": True},
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": worker, "node_config": {}, "max_workers": self.max_autoscaled},
            },
            **{name: [] for name in empty},
            **{name: {} for name in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
            "file_mounts_sync_continuously": False,
        }
        file = self.folder / "autoscaling.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    def count_nodes(self) -> int:
        """Count the nodes on which trials can run."""
        command = [sys.executable, "-c", _COUNT_NODES_SCRIPT, self.get_address]
        done = subprocess.run(
            command, env=self.environment, cwd=REPOSITORY, check=True, capture_output=True, timeout=60
        )
        return int(done.stdout)

    def kill(self, name: str) -> None:
        """Send SIGKILL to all processes of a node."""
        for pid in _list_processes(str(self.folder / name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def preempt(self, name: str) -> None:
        """Take a node away with a few seconds' notice, as a cloud does with a spot machine."""
        command = [sys.executable, "-c", _PREEMPTION_SCRIPT, self.get_address, name, str(_PREEMPTION_NOTICE_S)]
        subprocess.run(command, env=self.environment, cwd=REPOSITORY, check=True, timeout=60)
        time.sleep(_PREEMPTION_NOTICE_S)
        self.kill(name)

    def stop(self) -> None:
        for name in self.names:
            self.kill(name)

    def _ip(self, name: str) -> str:
        if self.network is None:
            return "127.0.0.1"
        return self.network.get_own_address if name == _HEAD_NODE else self.network.get_address(name)


def _list_processes(mark: str) -> list[int]:
    """List the processes that have the mark in their environment. Processes inherit it from their parent."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if f"{_NODE_VARIABLE}={mark}\0".encode() in (place / "environ").read_bytes() + b"\0":
                found.append(int(place.name))
    return found


@dataclass
class DrillStep:
    """Something that was done to the sweep.

    Attributes:
        what: a description.
        after: number of trials that had ended before.
        at_s: when it was done, in seconds since the start of the drill.
        took_s: seconds until it had its effect.
    """

    what: str
    after: int
    at_s: float = 0.0
    took_s: float = 0.0


class ClusterDrill:
    """A sweep, and what is done to it.

    Args:
        cluster: the cluster.
        folder: the folder of the sweep.
        num_trials: number of trials.
        num_workers: number of workers of each trial.
        overrides: further overrides of tune.py.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, num_trials: int, num_workers: int, overrides: Sequence[str] = ()
    ) -> None:
        self._cluster = cluster
        self._folder = folder
        self._given = [f"sweep.num_trials={num_trials}", f"sweep.workers_per_trial={num_workers}", *overrides]
        self._began = time.monotonic()
        self.steps: list[DrillStep] = []
        self._driver = self._start_driver()

    def _start_driver(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "benchmarks.cheap_sweep", str(self._folder)]
        if not (self._folder / "sweep.yaml").is_file():
            command += [*self._given, f"ray.address={self._cluster.get_address}"]
        with (self._cluster.folder / "driver.log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(command, env=self._cluster.environment, cwd=REPOSITORY, stdout=log, stderr=log)

    def kill_driver(self) -> None:
        self._driver.kill()
        self._driver.wait()

    def replace_driver(self) -> None:
        """Kill the driver, and start it again."""
        self.kill_driver()
        self._driver = self._start_driver()

    def do(self, what: str, after: int, action: Callable[[], None], until: Callable[[], bool] | None = None) -> None:
        """Do something when so many trials have ended. Then wait for its effect, or for more reports."""
        self._wait_until(lambda: self.count_ended() >= after)
        step = DrillStep(what, after, round(time.monotonic() - self._began, 1))
        action()
        acted = time.monotonic()
        self._wait_until(until or self._make_new_report_check())
        step.took_s = round(time.monotonic() - acted, 1)
        self.steps.append(step)
        print(f"{step.at_s:7.1f} s  {what}, after {after} trials; it took {step.took_s:.1f} s", flush=True)

    def finish(self) -> None:
        """Wait for the end of the sweep, and exit if it failed."""
        if status := self.status():
            sys.exit(f"the sweep ended with {status}:\n{self.log()[-3000:]}")

    def status(self) -> int:
        """Wait for the driver, and return its exit status."""
        return self._driver.wait(timeout=_LIMIT_S)

    def log(self) -> str:
        return (self._cluster.folder / "driver.log").read_text(encoding="utf-8")

    def events(self) -> Sequence[Event]:
        return read_events(self._folder / EVENTS_FILE)

    def find_busy_node(self) -> str:
        """Wait for a report of a trial that continues, and return its node, which is therefore training now."""
        num_known = len(self.events())

        def newest() -> list[EpochReported]:
            return [
                each
                for each in self.events()[num_known:]
                if isinstance(each, EpochReported) and each.decision == "continue"
            ]

        self._wait_until(lambda: bool(newest()))
        return newest()[-1].node

    def has_report_of(self, name: str) -> bool:
        """Whether a trial has reported from this node."""
        return any(isinstance(event, EpochReported) and event.node == name for event in self.events())

    def has_events(self, kind: type[Event], at_least: int = 1) -> bool:
        """Whether there are at least so many events of a kind."""
        return sum(isinstance(event, kind) for event in self.events()) >= at_least

    def _make_new_report_check(self) -> Callable[[], bool]:
        """Return a function that tells whether there are at least two more reports than now."""
        now = sum(isinstance(event, EpochReported) for event in self.events())
        return lambda: self.has_events(EpochReported, now + 2)

    def count_ended(self) -> int:
        return sum(isinstance(event, EpochReported) and event.decision != "continue" for event in self.events())

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _LIMIT_S
        while not condition():
            if self._driver.poll() == 0:
                sys.exit("error: the sweep was done before all had been tried; give more --trials")
            if self._driver.poll() is not None or time.monotonic() > end:
                sys.exit(f"the sweep broke off, or came to a standstill:\n{self.log()[-3000:]}")
            time.sleep(0.2)


def main() -> None:
    """Run the drill and print the results. The exit status is 1 if anything was lost, repeated or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60, help="number of trials; default: %(default)s")
    parser.add_argument(
        "--nodes",
        type=int,
        default=3,
        help="number of nodes at the start, in addition to the head; default: %(default)s",
    )
    parser.add_argument("--cpus", type=int, default=2, help="cores of each node; default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="workers of each trial; default: %(default)s")
    parser.add_argument(
        "--epoch-s",
        type=float,
        default=1.0,
        help="duration of an epoch in seconds; increase it if nodes start slowly; default: %(default)s",
    )
    parser.add_argument("--namespaces", action="store_true", help="give each node a network of its own; needs root")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    if given.namespaces and os.geteuid():
        sys.exit("error: --namespaces makes networks, which only root may")
    with tempfile.TemporaryDirectory(prefix="hpd") as place, contextlib.ExitStack() as stack:
        network = stack.enter_context(HostNetwork("hpd", "10.77.7.")) if given.namespaces else None
        cluster = Cluster(Path(place), given.cpus, given.epoch_s, network)
        stack.callback(cluster.stop)
        for name in (_HEAD_NODE, *(f"node{number}" for number in range(1, given.nodes + 1))):
            cluster.start(name)
        drill = ClusterDrill(cluster, Path(place) / "sweep", given.trials, given.workers)
        stack.callback(drill.kill_driver)  # if it is still running
        _run_steps(cluster, drill, given.trials, is_shared=given.workers > 1)
        drill.finish()
        found = audit(Path(place) / "sweep")
        results = count_events(drill.events())
        print("\n" + drill.log())
    results |= {name: len(sentences) for name, sentences in found._asdict().items()}
    print(*(sentence for sentences in found for sentence in sentences), sep="\n")
    print(*(f"{name.replace('_', ' '):48}{value:>8}" for name, value in results.items()), sep="\n")
    write_results(given.output, {"figures": results, "steps": [asdict(step) for step in drill.steps]})
    sys.exit(1 if any(results[name] for name in ("lost", "repeated", "wrong", "values_wrong")) else 0)


def _run_steps(cluster: Cluster, drill: ClusterDrill, num_trials: int, *, is_shared: bool) -> None:
    """Run the steps of the drill.

    Args:
        cluster: the cluster.
        drill: the sweep.
        num_trials: number of trials.
        is_shared: whether a trial has several workers. Only the first one reports, from its own node. Then the first
            node to be killed is another one than the node that reports, while trials use all nodes.
    """
    tenth = num_trials // 10
    drill.do(
        "a node killed",
        tenth,
        lambda: cluster.kill(
            _find_other_node(cluster, drill.find_busy_node()) if is_shared else drill.find_busy_node()
        ),
    )
    has_report = None if is_shared else partial(drill.has_report_of, _JOINED_NODE)
    drill.do("a node added", tenth, lambda: cluster.start(_JOINED_NODE), until=has_report)
    drill.do("the driver killed and started again", 2 * tenth, drill.replace_driver)
    break_one = partial(cluster.start, _BROKEN_NODE, is_broken=True)
    drill.do(
        "a node added on which every trial fails", 3 * tenth, break_one, until=lambda: drill.has_events(NodeQuarantined)
    )
    drill.do("a node taken away", 4 * tenth, lambda: cluster.preempt(drill.find_busy_node()))
    if (network := cluster.network) is not None:
        drill.do("a node cut off", 5 * tenth, lambda: network.disconnect(drill.find_busy_node()))
    else:
        drill.do("another node killed", 5 * tenth, lambda: cluster.kill(drill.find_busy_node()))


def _find_other_node(cluster: Cluster, node: str) -> str:
    return next(name for name in cluster.names[1:] if name != node)


def count_events(events: Sequence[Event]) -> dict[str, int]:
    """Count what happened in the sweep."""
    lr = {event.trial: event.params["optimizer.lr"] for event in events if isinstance(event, TrialSuggested)}
    reports = [event for event in events if isinstance(event, EpochReported)]
    failures = [event for event in events if isinstance(event, SegmentFailed)]
    wrong = [each for each in reports if abs(each.metrics[_METRIC] - (10 - each.epoch * lr[each.trial])) > 1e-9]
    return {
        "trials": len(lr),
        "trained_to_the_end": sum(event.epoch == EPOCHS for event in reports),
        "reports": len(reports),
        "segments_lost_with_their_node": sum(event.kind == "lost" for event in failures),
        "segments_preempted_with_their_node": sum(event.kind == "preempted" for event in failures),
        "segments_failed_on_the_broken_node": sum(event.node == _BROKEN_NODE for event in failures),
        "nodes_quarantined": sum(isinstance(event, NodeQuarantined) for event in events),
        "trials_given_up": sum(not event.retry for event in failures),
        "reports_from_the_node_that_joined": sum(event.node == _JOINED_NODE for event in reports),
        "epochs_trained_again": sum(_list_repeated_epochs(events)),
        "values_wrong": len(wrong),
    }


def _list_repeated_epochs(events: Sequence[Event]) -> Iterator[int]:
    """Yield for each segment the number of its epochs that had been reported before."""
    epochs: dict[int, int] = {}
    for event in events:
        if isinstance(event, EpochReported):
            epochs[event.trial] = event.epoch
        elif isinstance(event, SegmentStarted):
            yield epochs.get(event.trial, 0) - event.epoch


if __name__ == "__main__":
    main()
