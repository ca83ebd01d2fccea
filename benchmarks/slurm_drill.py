"""A sweep that needs three wall times, unattended, on a Slurm of one node that this script starts and ends.

    python benchmarks/slurm_drill.py --output benchmarks/results/slurm_drill.json

Needs Debian's slurm-wlm and munge, and root, as which the daemons run. `cluster/slurm.py` submits the sweep once; Slurm
warns, the sweep saves, the job is queued again, and so on to the retrained winner. Then the sweep is audited. Its
trials are tiny; that each is proposed four seconds after the one before makes it long enough on any machine.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from handpose.sweep.audit import audit  # noqa: E402
from handpose.sweep.events import EVENTS, Closed, Opened, Reported, read_events  # noqa: E402

_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
_SPACE = """
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
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def main() -> None:
    """Run the drill; status 1 where it took fewer than three jobs, or anything was lost, repeated or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--wall-time", default="00:04:00", help="Slurm may warn a minute early")
    parser.add_argument("--warning-s", type=int, default=40)
    parser.add_argument("--limit-s", type=float, default=3600.0, help="then the drill has failed")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended"))
    missing = [name for name in _DAEMONS if shutil.which(name, path=_path()) is None]
    if missing or os.getuid() != 0:
        sys.exit(f"this drill needs {', '.join(missing) or 'root'}: as root, apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, _slurm(Path(folder)) as environment:
        found = _drill(Path(folder), environment, given)
    for name, value in found.items():
        print(f"{name:22} {value}")
    if given.output:
        given.output.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **found}, indent=1) + "\n")
    sys.exit(0 if found["jobs"] >= 3 and found["is finished"] and not found["findings"] else 1)


def _drill(folder: Path, environment: dict[str, str], given: argparse.Namespace) -> dict[str, Any]:
    (folder / "space.py").write_text(_SPACE)
    options = [f"--wall-time={given.wall_time}", f"--warning-s={given.warning_s}", f"--cpus-per-node={os.cpu_count()}"]
    arguments = ["sweep.name=drill", f"sweep.num_trials={given.trials}", f"search_space={folder / 'space.py'}", *_SMALL]
    command = [sys.executable, str(REPOSITORY / "cluster" / "slurm.py"), *options, "--", *arguments]
    began = time.monotonic()
    submitted = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if submitted.returncode:
        sys.exit(submitted.stderr)
    job = re.search(r"Submitted batch job (\d+)", submitted.stdout)
    assert job is not None, submitted.stdout
    try:
        state = _wait(job[1], environment, began + given.limit_s)
    finally:
        subprocess.run(["scancel", job[1]], env=environment, check=False)
    log = (folder / "outputs" / "jobs" / "drill" / "job.log").read_text()
    print(log)
    sweep = folder / "outputs" / "sweeps" / "drill"
    events = read_events(sweep / EVENTS)
    findings = audit(sweep)
    return {
        "state of the job": state,
        "jobs": log.count("job: queued again") + 1,
        "seconds": round(time.monotonic() - began),
        "trials": given.trials,
        "reports": sum(isinstance(event, Reported) for event in events),
        "times begun": sum(isinstance(event, Opened) for event in events),
        "is finished": isinstance(events[-1], Closed) and events[-1].reason == "finished",
        "is retrained": (sweep / "retrain" / "metrics.json").is_file(),
        "lost": len(findings.lost),
        "repeated": len(findings.repeated),
        "wrong": len(findings.wrong),
        "findings": [*findings.lost, *findings.repeated, *findings.wrong],
    }


def _wait(job: str, environment: dict[str, str], end: float) -> str:
    """The state that the job has come to its end in."""
    while True:
        shown = subprocess.run(
            ["scontrol", "show", "job", job], env=environment, capture_output=True, text=True, check=False
        ).stdout
        found = re.search(r"JobState=(\w+)", shown)
        state = found[1] if found else "UNKNOWN"
        if state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING") or time.monotonic() > end:
            return state
        time.sleep(2.0)


@contextlib.contextmanager
def _slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A Slurm of this machine, with all of its files in a folder; yields the environment that leads to it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname()
    text = _SLURM_CONF.format(host=host, place=folder, ports=(_free_port(), _free_port()), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    # Ray starts workers with nice 15, which get nothing on a machine that somebody else uses meanwhile.
    environment["RAY_worker_niceness"] = "0"
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--{name}={folder}/munge.{suffix}" for name, suffix in files.items()]
    with contextlib.ExitStack() as stack:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            stack.callback(_end, subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
            time.sleep(2.0)
        yield environment


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


if __name__ == "__main__":
    main()
