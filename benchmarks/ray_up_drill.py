"""Run a sweep with `ray up` on two simulated hosts with ssh, as docs/cluster/ray_up.md describes for your own machines.

    python benchmarks/ray_up_drill.py --output benchmarks/results/ray_up_drill.json

Needs Linux, root, and the Debian packages iproute2, openssh-server, rsync and python3-venv. Each host has its own
network, processes, home folder and /tmp. The hosts share only a folder that replaces an object store. Packages come
from a folder of wheels that is downloaded first, because the hosts have no internet. The commands that
cluster/ray_up.py prints are run unchanged. Then the sweep is audited, and the processes that `ray down` has left
running are counted.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.network_hosts import HostNetwork  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from handpose.sweep.audit.audit import audit  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE, EpochReported, read_events  # noqa: E402
from handpose.sweep.storage.stored_sweep import download_sweep  # noqa: E402

_PROGRAMS = ("ip", "nsenter", "unshare", "/usr/sbin/sshd", "ssh-keygen", "rsync")
_HOSTS = ("first", "second")
_TIMEOUT_S = 900.0
_DOWN_TIMEOUT_S = 120.0
# $1: the host's folder, $2: its name, $3: the public key that may log in
_HOST_SCRIPT = """
home=$(getent passwd root | cut -d: -f6)
mount --bind "$1/home" "$home" && mount --bind "$1/tmp" /tmp && mount -t tmpfs tmpfs /dev/shm && hostname "$2"
cp /etc/skel/.bashrc /etc/skel/.profile "$home"
mkdir -p -m 700 "$home/.ssh" /run/sshd && cp "$3" "$home/.ssh/authorized_keys"
ssh-keygen -q -t ed25519 -N '' -f "$home/host_key"
exec /usr/sbin/sshd -D -h "$home/host_key" -o PidFile=none -o PermitRootLogin=yes -o UsePAM=no
"""
_SMALL = (
    *("data.source.num_train=1200", "data.source.num_eval=60", "data.image_size=64", "trainer.max_epochs=2"),
    *("sweep.max_epochs=2", "sweep.preflight=off", "sweep.confirm.seeds=0", "scheduler=fifo", "searcher=random"),
    *("model.encoder.name=lcnet_035", "model.decoder.depth=1", "trainer.accelerator=cpu", "sweep.gpus_per_trial=0"),
)


def main() -> None:
    """Run the drill. The exit status is 1 if a host ran no trial, the sweep is incomplete, or Ray is still running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, help="number of trials; default: %(default)s")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels for requirements.txt; default: they are downloaded"
    )
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        sys.exit(f"this drill needs {', '.join(missing) or 'root'}: apt-get install iproute2 openssh-server rsync")
    # Not under /tmp, because each host has its own.
    with (
        tempfile.TemporaryDirectory(prefix="ray-up-", dir="/var/tmp") as place,
        HostNetwork("hpray", "10.77.9.") as network,
    ):
        folder = Path(place)
        wheels = given.wheels or _download(folder / "wheels")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        with contextlib.ExitStack() as stack:
            for host in _HOSTS:
                stack.enter_context(_start_host(network, host, folder))
            found = _run_drill(network, folder, wheels, given.trials)
    print(*(f"{name:24} {value}" for name, value in found.items()), sep="\n")
    write_results(given.output, found)
    is_good = found["reports"] == 2 * given.trials and found["hosts that reported"] == len(_HOSTS)
    sys.exit(0 if is_good and not found["findings"] and not found["of Ray still there"] else 1)


def _download(folder: Path) -> Path:
    options = ["-q", "-d", str(folder), "-r", str(REPOSITORY / "requirements.txt")]
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    return folder


@contextlib.contextmanager
def _start_host(network: HostNetwork, host: str, folder: Path) -> Iterator[None]:
    """Run a host within the block. The owner of the key can log in as root."""
    network.add_host(host)
    for name in ("home", "tmp"):
        (folder / host / name).mkdir(parents=True)
    apart = ["unshare", "--mount", "--pid", "--uts", "--fork", "--mount-proc"]
    script = ["sh", "-c", _HOST_SCRIPT, "sh", str(folder / host), host, str(folder / "key.pub")]
    with subprocess.Popen([*network.make_command_prefix(host), *apart, *script], stderr=subprocess.DEVNULL):
        try:
            yield
        finally:
            network.power_off(host)


def _run_drill(network: HostNetwork, folder: Path, wheels: Path, num_trials: int) -> dict[str, Any]:
    began, store = time.monotonic(), folder / "store"
    pip = f"mkdir -p ~/.config/pip && printf '[global]\\nno-index=1\\nfind-links={wheels}\\n' > ~/.config/pip/pip.conf"
    options = [
        "--provider",
        "local",
        "--hosts",
        *map(network.get_address, _HOSTS),
        "--ssh-user",
        "root",
        "--setup",
        pip,
    ]
    options += ["--ssh-private-key", str(folder / "key"), "--python", "/usr/bin/python3"]
    arguments = ["sweep.name=drill", f"sweep.storage=file://{store}", f"sweep.num_trials={num_trials}", *_SMALL]
    launcher = [sys.executable, str(REPOSITORY / "cluster" / "ray_up.py"), *options, "--output", "drill.yaml"]
    environment = os.environ | {"HOME": str(folder)}  # the token is created there
    output = _run_command([*launcher, "--", *arguments], folder, environment)
    up, sweep, down = output.splitlines()[-3:]
    _run_command(["bash", "-c", up], folder, environment)
    up_s = time.monotonic() - began
    _wait_for_nodes(shlex.split(down)[0], folder, environment)
    # In the foreground, to wait for its end.
    output = _run_command(["bash", "-c", sweep.replace(" --tmux", "")], folder, environment)
    print(output[-3000:])
    _run_command(["bash", "-c", down], folder, environment)
    download_sweep(f"file://{store}/drill", folder / "drill")
    reports = [each for each in read_events(folder / "drill" / EVENTS_FILE) if isinstance(each, EpochReported)]
    findings = audit(folder / "drill")
    return {
        "until the head was up, s": round(up_s),
        "seconds": round(time.monotonic() - began),
        "trials": num_trials,
        "reports": len(reports),
        "hosts that reported": len({each.node for each in reports}),
        "is retrained": (folder / "drill" / "retrain" / "metrics.json").is_file(),
        "of Ray still there": _count_remaining(network),
        "findings": [*findings.lost, *findings.repeated, *findings.wrong],
    }


def _wait_for_nodes(ray: str, folder: Path, environment: dict[str, str]) -> None:
    """Wait for all nodes: `ray up` returns when the head is up, which then starts the others."""
    command = shlex.join(["exec", "drill.yaml", "RAY_AUTH_MODE=token ray status"])
    end = time.monotonic() + _TIMEOUT_S
    while True:
        output = _run_command(["bash", "-c", f"{ray} {command}"], folder, environment)
        active = re.search(r"Active:\s+(\d+) local", output)
        if active and int(active[1]) == len(_HOSTS):
            return
        if time.monotonic() > end:
            sys.exit(f"the second host has not come:\n{output}")
        time.sleep(5.0)


def _count_remaining(network: HostNetwork) -> int:
    """Count the Ray processes on the hosts some time after `ray down`, which stops only those of the head."""
    end = time.monotonic() + _DOWN_TIMEOUT_S
    while True:
        lines = [line for host in _HOSTS for line in network.list_processes(host).values()]
        num_left = sum("raylet" in line or "gcs_server" in line for line in lines)
        if not num_left or time.monotonic() > end:
            return num_left
        time.sleep(2.0)


def _run_command(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
