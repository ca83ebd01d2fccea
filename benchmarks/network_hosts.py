"""Hosts of this machine for drills: network namespaces on one switch, each with an address and a name. Linux, root."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType


class HostNetwork:
    """A switch that this machine is on, with the first address, and the hosts that are connected to it.

    name: of the switch, which those of devices and namespaces begin with; five letters at most. prefix: of the
    addresses, as 10.77.7. with the last dot. To be entered; at the end nothing of it is left.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self._name, self._prefix = name, prefix
        self._hosts: list[str] = []

    def __enter__(self) -> "HostNetwork":
        _run_ip("link", "add", self._name, "type", "bridge")
        try:
            _run_ip("addr", "add", f"{self.get_own_address}/24", "dev", self._name)
            _run_ip("link", "set", self._name, "up")
        except BaseException:
            _run_ip("link", "del", self._name)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for host in self._hosts:
            self.power_off(host)
            _run_ip("link", "del", self._get_cable(host))
            _run_ip("netns", "del", self._get_namespace(host))
        _run_ip("link", "del", self._name)

    @property
    def get_own_address(self) -> str:
        return f"{self._prefix}1"

    def add_host(self, host: str) -> str:
        """A new host; returns its address."""
        self._hosts.append(host)
        namespace = self._get_namespace(host)
        _run_ip("netns", "add", namespace)
        _run_ip("link", "add", self._get_cable(host), "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run_ip("link", "set", self._get_cable(host), "master", self._name, "up")
        for arguments in (
            ("addr", "add", f"{self.get_address(host)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _run_ip("-n", namespace, *arguments)
        _run_ip("-n", namespace, "link", "set", "lo", "up")
        # It leads nowhere, but Ray (2.60) takes the address that is on the way out, and without one only the loopback.
        _run_ip("-n", namespace, "route", "add", "default", "via", self.get_own_address)
        return self.get_address(host)

    def get_address(self, host: str) -> str:
        return f"{self._prefix}{self._hosts.index(host) + 2}"

    def format_hosts_file(self) -> str:
        """Those of all hosts, and of this machine, as /etc/hosts has them."""
        known = {os.uname().nodename: self.get_own_address} | {host: self.get_address(host) for host in self._hosts}
        return "".join(f"{address} {name}\n" for name, address in ({"localhost": "127.0.0.1"} | known).items())

    def make_command_prefix(self, host: str, *, names: Path | None = None) -> list[str]:
        """What a command line begins with that runs on a host, as the process that is started. names: its /etc/hosts.

        Not `ip netns exec`, whose fresh /sys has no cgroups, without which slurmd does not start (22.05, seen).
        """
        command = ["nsenter", f"--net=/run/netns/{self._get_namespace(host)}"]
        if names is None:
            return command
        return [*command, "unshare", "--mount", "sh", "-c", f'mount --bind {names} /etc/hosts && exec "$@"', "sh"]

    def disconnect(self, host: str) -> None:
        """Take its cable out."""
        _run_ip("link", "set", self._get_cable(host), "down")

    def list_processes(self, host: str) -> dict[int, str]:
        """What runs there: identifier -> command line."""
        command = ["ip", "netns", "pids", self._get_namespace(host)]
        listed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
        found = {}
        for pid in map(int, listed.split()):
            with contextlib.suppress(OSError):  # it has ended
                found[pid] = (
                    Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
                )
        return found

    def power_off(self, host: str) -> None:
        """SIGKILL to all of its processes; what was running there is gone."""
        for pid in self.list_processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _get_namespace(self, host: str) -> str:
        return f"{self._name}-{host}"

    def _get_cable(self, host: str) -> str:
        return f"{self._name}{self._hosts.index(host) + 1}"


def _run_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
