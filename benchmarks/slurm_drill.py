"""Run a sweep that needs three wall times, unattended, on a Slurm that this script starts and stops.

    python benchmarks/slurm_drill.py --output benchmarks/results/slurm_drill.json
    python benchmarks/slurm_drill.py --nodes 2     # each a host with its own network; one loses its power once
    python benchmarks/slurm_drill.py --nodes 2 --gpus a100:2    # GPUs that Slurm and Ray believe in
    python benchmarks/slurm_drill.py --nodes 2 --unequal --export-none    # a site with nodes of two sizes

Needs Debian's slurm-wlm and munge, and root, because the daemons run as root. `cluster/slurm.py` submits the sweep
once. Slurm warns, the sweep saves, the job is requeued, and so on until the winner is retrained. Then the sweep is
audited. Its trials are tiny. A delay of four seconds before each proposal makes the sweep long enough on any machine.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.network_hosts import HostNetwork  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.sweep.audit.audit import audit  # noqa: E402
from handpose.sweep.record.events import (  # noqa: E402
    EVENTS_FILE,
    EpochReported,
    SegmentFailed,
    SweepClosed,
    SweepOpened,
    read_events,
)

_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
_POWER_OFF_S = 30.0
_SPACE_SOURCE = """
import time


def space(trial):
    if trial.number:
        time.sleep(4.0)
    return {"optimizer.lr": trial.suggest_float("optimizer.lr", 1e-4, 1e-2, log=True)}
"""
_SMALL = (
    *("data.source.num_train=120", "data.source.num_eval=20", "data.image_size=64", "trainer.max_epochs=2"),
    *("sweep.max_epochs=2", "sweep.preflight=off", "sweep.confirm.seeds=0", "scheduler=fifo", "searcher=random"),
    *("model.encoder.name=lcnet_035", "model.decoder.depth=1", "trainer.accelerator=cpu", "sweep.gpus_per_trial=0"),
)
_SLURM_CONF = """\
ClusterName=drill
SlurmctldHost={host}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=10
SlurmUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.%n.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def main() -> None:
    """Run the drill. The exit status is 1 if it took fewer than three jobs, or anything was lost, repeated or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="number of trials; default: %(default)s")
    parser.add_argument(
        "--wall-time",
        default="00:04:00",
        help="wall time of each job; Slurm may warn a minute early; default: %(default)s",
    )
    parser.add_argument(
        "--warning-s",
        type=int,
        default=40,
        help="seconds between the warning and the end of the wall time; default: %(default)s",
    )
    parser.add_argument(
        "--limit-s", type=float, default=3600.0, help="seconds after which the drill has failed; default: %(default)s"
    )
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        help="number of nodes; with more than one, each is a host with a network of its own; default: %(default)s",
    )
    parser.add_argument(
        "--gpus", help="type and number of GPUs of each node, such as a100:2; their devices are empty files"
    )
    parser.add_argument(
        "--unequal",
        action="store_true",
        help="the first node has twice as many CPUs as the others; jobs get whole nodes",
    )
    parser.add_argument(
        "--export-none", action="store_true", help="jobs do not get the environment (SBATCH_EXPORT=NONE)"
    )
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended"))
    missing = [name for name in _DAEMONS if shutil.which(name, path=_make_path_variable()) is None]
    if missing or os.getuid() != 0:
        sys.exit(f"this drill needs {', '.join(missing) or 'root'}: as root, apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, contextlib.ExitStack() as stack:
        slurm = LocalSlurm(Path(folder), given.nodes, stack, gpus=given.gpus, is_unequal=given.unequal)
        found = _run_drill(slurm, given)
    for name, value in found.items():
        print(f"{name:22} {value}")
    if given.output:
        given.output.write_text(
            json.dumps({"date": time.strftime("%Y-%m-%d"), **found}, indent=1) + "\n", encoding="utf-8"
        )
    sys.exit(0 if found["jobs"] >= 3 and found["is finished"] and not found["findings"] else 1)


class LocalSlurm:
    """A Slurm on this machine with all its files in a folder.

    A single node is this machine itself. Several nodes are hosts of a network that also has the controller.

    Args:
        folder: the folder.
        num_nodes: number of nodes.
        stack: stops Slurm at its end.
        gpus: type and number of GPUs of each node, such as a100:2. Their devices are empty files.
        is_unequal: whether the first node has twice as many CPUs as the others.
    """

    def __init__(
        self,
        folder: Path,
        num_nodes: int,
        stack: contextlib.ExitStack,
        *,
        gpus: str | None = None,
        is_unequal: bool = False,
    ) -> None:
        self.folder, self._gpus, self._is_unequal = folder, gpus, is_unequal
        (folder / "state").mkdir()
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._network = stack.enter_context(HostNetwork("hpslm", "10.77.8.")) if num_nodes > 1 else None
        self.cpus_per_node = max(1, count_cores() // num_nodes)
        self.nodes = self._add_nodes(num_nodes)
        self._stack = stack
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _make_path_variable()}
        # Ray starts workers with nice 15. On a machine with other load they would get no processor time.
        self.environment["RAY_worker_niceness"] = "0"
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munge += [f"--{name}={folder}/munge.{suffix}" for name, suffix in files.items()]
        for command in (munge, ["slurmctld", "-D"]):
            self._start(command)
        for node in self.nodes:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node."""
        inside = self._network.make_command_prefix(node, names=self.folder / "hosts") if self._network else []
        self._daemons[node] = self._start([*inside, "slurmd", "-D", "-N", node])

    def power_off(self, node: str) -> None:
        """Kill everything that runs on a node."""
        assert self._network is not None
        self._network.power_off(node)
        self._daemons[node].wait()

    def run_command(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, encoding="utf-8", check=False).stdout

    def _add_nodes(self, num: int) -> list[str]:
        """Write the nodes to slurm.conf and return their names."""
        host, network = socket.gethostname(), self._network
        names = [host] if network is None else [f"n{number}" for number in range(1, num + 1)]
        addresses = ["127.0.0.1"] if network is None else [network.add_host(name) for name in names]
        if network is not None:
            (self.folder / "hosts").write_text(network.format_hosts_file(), encoding="utf-8")
        gres = "" if self._gpus is None else f" Gres=gpu:{self._gpus}"
        sizes = [self.cpus_per_node * (2 if self._is_unequal and name == names[0] else 1) for name in names]
        lines = [
            f"NodeName={name} NodeAddr={address} CPUs={cpus}{gres} State=UNKNOWN"
            for name, address, cpus in zip(names, addresses, sizes, strict=True)
        ]
        if self._gpus is not None:
            lines.insert(0, "GresTypes=gpu")
            self._write_gpus(self._gpus)
        # By default the nodes look up the controller's name, which on many machines is the address of the loopback.
        controller = host if network is None else f"{host}({network.get_own_address})"
        text = _SLURM_CONF.format(
            host=controller, place=self.folder, ports=(_find_free_port(), _find_free_port()), nodes="\n".join(lines)
        )
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        return names

    def _write_gpus(self, gpus: str) -> None:
        """Make the devices of the GPUs and write gres.conf. All nodes have the same files."""
        kind, _, number = gpus.rpartition(":")
        for device in range(int(number)):
            (self.folder / f"gpu{device}").touch()
        line = f"Name=gpu Type={kind} File={self.folder}/gpu[0-{int(number) - 1}]\n"
        (self.folder / "gres.conf").write_text(line, encoding="utf-8")

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        daemon = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        self._stack.callback(_end_daemon, daemon)
        time.sleep(2.0)
        return daemon


def _run_drill(slurm: LocalSlurm, given: argparse.Namespace) -> dict[str, Any]:
    folder, began = slurm.folder, time.monotonic()
    (folder / "space.py").write_text(_SPACE_SOURCE, encoding="utf-8")
    options = [f"--wall-time={given.wall_time}", f"--warning-s={given.warning_s}", f"--nodes={given.nodes}"]
    options += [] if given.unequal else [f"--cpus-per-node={slurm.cpus_per_node}"]
    options += [] if given.gpus is None else [f"--gpus-per-node={given.gpus}"]
    arguments = ["sweep.name=drill", f"sweep.num_trials={given.trials}", f"search_space={folder / 'space.py'}", *_SMALL]
    if given.gpus is not None:  # a trial holds one, and trains on cores
        arguments[arguments.index("sweep.gpus_per_trial=0")] = "sweep.gpus_per_trial=1"
    if given.export_none:
        slurm.environment["SBATCH_EXPORT"] = "NONE"
    command = [sys.executable, str(REPOSITORY / "cluster" / "slurm.py"), *options, "--", *arguments]
    submitted = subprocess.run(
        command, cwd=folder, env=slurm.environment, capture_output=True, encoding="utf-8", check=False
    )
    if submitted.returncode:
        sys.exit(submitted.stderr)
    job = re.search(r"Submitted batch job (\d+)", submitted.stdout)
    assert job is not None, submitted.stdout
    sweep, log = folder / "outputs" / "sweeps" / "drill", folder / "outputs" / "jobs" / "drill" / "job.log"
    try:
        if given.nodes > 1:
            _lose_a_node(slurm, sweep / EVENTS_FILE, log, began + given.limit_s)
        state = _wait_for_job(slurm, job[1], began + given.limit_s)
    finally:
        slurm.run_command("scancel", job[1])
    text = log.read_text(encoding="utf-8")
    print(text)
    events = read_events(sweep / EVENTS_FILE)
    reports = [event for event in events if isinstance(event, EpochReported)]
    findings = audit(sweep)
    return {
        "state of the job": state,
        "nodes": given.nodes,
        "GPUs of a node": given.gpus or "0",
        "unequal nodes": given.unequal,
        "SBATCH_EXPORT=NONE": given.export_none,
        "nodes that reported": len({event.node for event in reports}),
        "nodes lost": len(re.findall(r"node \S+ is gone: ", text)),
        "nodes that joined": len(re.findall(r"node \S+ has joined", text)),
        "segments lost with them": sum(isinstance(each, SegmentFailed) and each.kind == "lost" for each in events),
        "jobs": text.count("job: queued again") + 1,
        "seconds": round(time.monotonic() - began),
        "trials": given.trials,
        "reports": len(reports),
        "times begun": sum(isinstance(event, SweepOpened) for event in events),
        "is finished": isinstance(events[-1], SweepClosed) and events[-1].reason == "finished",
        "is retrained": (sweep / "retrain" / "metrics.json").is_file(),
        "lost": len(findings.lost),
        "repeated": len(findings.repeated),
        "wrong": len(findings.wrong),
        "findings": [*findings.lost, *findings.repeated, *findings.wrong],
    }


def _lose_a_node(slurm: LocalSlurm, events: Path, log: Path, end: float) -> None:
    """In the second job, switch off the last node while it trains. Start it again half a minute later."""
    node = slurm.nodes[-1]

    def reports() -> list[EpochReported]:
        return [each for each in read_events(events) if isinstance(each, EpochReported)] if events.exists() else []

    def jobs_ended() -> int:
        return log.read_text(encoding="utf-8").count("job: queued again") if log.exists() else 0

    num_known: int | None = None
    while num_known is None or all(each.node != node for each in reports()[num_known:]):
        if num_known is None and jobs_ended() > 0:
            num_known = len(reports())
        if time.monotonic() > end:
            log_text = log.read_text(encoding="utf-8") if log.exists() else ""
            sys.exit(f"no trial of a second job has reported from {node}:\n{log_text}")
        time.sleep(0.5)
    slurm.power_off(node)
    print(f"{node} has lost its power", flush=True)
    time.sleep(_POWER_OFF_S)
    slurm.start_node(node)


def _wait_for_job(slurm: LocalSlurm, job: str, end: float) -> str:
    """Wait until the job ends, and return its state."""
    while True:
        found = re.search(r"JobState=(\w+)", slurm.run_command("scontrol", "show", "job", job))
        state = found[1] if found else "UNKNOWN"
        if state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING") or time.monotonic() > end:
            return state
        time.sleep(2.0)


def _end_daemon(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _find_free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _make_path_variable() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


if __name__ == "__main__":
    main()
