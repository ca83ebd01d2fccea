"""Run one Ray node of a job on this host, until it receives SIGTERM. `cluster/job.py` runs it on every host of a job.

    python cluster/node.py --folder FOLDER --host node01                          # the head
    python cluster/node.py --folder FOLDER --host node02 --head 10.1.0.1:6379     # another node

Jobs and users that share a host do not conflict, because each node has its own resources: ports that the system
chooses, a private folder for temporary files, and the token of its job.
"""

import argparse
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.allocation import remove_scheduler_variables
from handpose.files import write_atomically
from handpose.program import exit_on_user_error
from handpose.resources import count_cores, count_machine_cores, list_addresses, measure_memory
from handpose.sweep.controller.slots import compute_trial_memory
from handpose.sweep.execution.privacy import NO_USAGE_STATS, make_private_folder
from handpose.utf8 import use_utf8

_OBJECT_STORE_BYTES = 100 * 2**20  # only reports are transferred, as in a sweep on one machine
_END_TIMEOUT_S = 15.0


def find_own_address(*, network: str | None, host: str, other: str | None) -> str | None:
    """Find the IPv4 address at which the other machines of the job reach this one.

    Args:
        network: the network of the address, such as 10.1.0.0/16, if the user gave one.
        host: the scheduler's name of this machine.
        other: another machine of the job. The address is that of the route to it.

    Returns:
        The address; None: Ray chooses one.

    Raises:
        ValueError: this machine has no address in the network.
    """
    if network is not None:
        addresses = list_addresses().values()
        inside = [each for each in addresses if ipaddress.ip_address(each) in ipaddress.ip_network(network)]
        if not inside:
            raise ValueError(f"{host} has no address in --network {network}; its addresses are {', '.join(addresses)}")
        return inside[0]
    if other is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # connect sends nothing
            try:
                way.connect((other, 9))
            except OSError:  # only the scheduler knows this name
                return None
            found = str(way.getsockname()[0])
        return None if ipaddress.ip_address(found).is_loopback else found
    return None


def make_ray_command(given: argparse.Namespace, *, folder: Path, address: str | None) -> list[str]:
    """Build the command line of the Ray node.

    Args:
        given: the options of the command line.
        folder: the folder for temporary files.
        address: the address of this machine; None: Ray chooses one.
    """
    cores = count_cores()
    options = [
        f"--node-name={given.host}",
        f"--temp-dir={folder}",
        f"--num-cpus={min(cores, given.cpus) if given.cpus else cores}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--memory={compute_trial_memory(measure_memory(), with_driver=given.head is None)}",
        *("--min-worker-port=0", "--max-worker-port=0"),  # by default 10002 and up, in every job on a host
        "--dashboard-agent-listen-port=0",
        *([] if given.gpus is None else [f"--num-gpus={given.gpus}"]),
        *([] if address is None else [f"--node-ip-address={address}"]),
    ]
    if given.head is None:
        # Ray's client server cannot be turned off. Its default port is 10001.
        head = ["--head", "--port=0", f"--ray-client-server-port={_find_free_port()}", "--include-dashboard=false"]
    else:
        head = [f"--address={given.head}"]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *head, *options]


def explain_core_limit(host: str, *, cpus: int | None, usable: int, total: int) -> str:
    """Explain that a job for whole machines may use only some cores of this one; empty if it may use all.

    LSF binds the processes of a job to as many cores as the job has slots, also on hosts that it has for itself.

    Args:
        host: the scheduler's name of this machine.
        cpus: cores of each machine that the user requested; None: whole machines.
        usable: cores that this process may use.
        total: cores of this machine.
    """
    if cpus is not None or usable >= total:
        return ""
    return f"node: {host} has {total} cores, but this job may use only {usable} of them; give --cpus-per-node {total}"


def _find_free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """Run the node. The exit status is that of `ray start`, or 0 after SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the job, for the node's state and log")
    parser.add_argument("--host", required=True, help="the scheduler's name for this machine")
    parser.add_argument("--other", help="another host of the job")
    parser.add_argument("--head", help="HOST:PORT of the head to join; default: this machine is the head")
    parser.add_argument("--cpus", type=int, help="cores to use; default: all that this process may use")
    parser.add_argument("--gpus", type=int, help="GPUs to use; default: all that Ray finds")
    parser.add_argument("--network", help="network for traffic between nodes, such as 10.1.0.0/16")
    given = parser.parse_args()
    # For the job only; inherited by all processes of Ray.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    other = given.head.rpartition(":")[0] if given.head else given.other
    address = find_own_address(network=given.network, host=given.host, other=other)
    with (
        exit_on_user_error(),
        make_private_folder() as folder,
        (given.folder / f"{given.host}.log").open("a", encoding="utf-8") as log,
    ):
        if note := explain_core_limit(given.host, cpus=given.cpus, usable=count_cores(), total=count_machine_cores()):
            print(note, flush=True)
        command = make_ray_command(given, folder=folder, address=address)
        environment = remove_scheduler_variables(os.environ) | NO_USAGE_STATS
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        sys.exit(_wait_for_node(process, folder / "ray_current_cluster", given.folder / f"{given.host}.up"))


def _wait_for_node(process: subprocess.Popen[bytes], address: Path, address_file: Path) -> int:
    """Write the address of the cluster to a file as soon as the node has joined. Wait for the end of the node."""
    is_ended = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal is_ended
        is_ended = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    parent = os.getppid()
    while process.poll() is None and not is_ended and os.getppid() == parent:
        if not address_file.exists() and address.exists() and (text := address.read_text(encoding="utf-8").strip()):
            with write_atomically(address_file) as part:
                part.write_text(text, encoding="utf-8")
        time.sleep(0.2)
    if process.poll() is not None:
        return process.returncode
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:  # Ray waits up to 30 s for its processes; after this kill, its reaper ends them
        process.kill()
        process.wait()
    return 0


if __name__ == "__main__":
    use_utf8()
    main()
