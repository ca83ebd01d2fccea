"""Simulated hosts for drills: network namespaces on one switch, with addresses and names. Needs Linux and root."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType


class HostNetwork:
    """A switch to which this machine, with the first address, and the hosts are connected.

    Use it as a context manager, which removes everything at the end.

    Args:
        name: the name of the switch, and the prefix of the names of devices and namespaces; at most five letters.
        prefix: the prefix of the addresses with the last dot, such as 10.77.7.
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
        """Add a host and return its address."""
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
        # The route leads nowhere. But Ray (2.60) uses the address of the default route, and without one only the
        # loopback.
        _run_ip("-n", namespace, "route", "add", "default", "via", self.get_own_address)
        return self.get_address(host)

    def get_address(self, host: str) -> str:
        return f"{self._prefix}{self._hosts.index(host) + 2}"

    def format_hosts_file(self) -> str:
        """Format the addresses of this machine and all hosts as in /etc/hosts."""
        known = {os.uname().nodename: self.get_own_address} | {host: self.get_address(host) for host in self._hosts}
        return "".join(f"{address} {name}\n" for name, address in ({"localhost": "127.0.0.1"} | known).items())

    def make_command_prefix(self, host: str, *, names: Path | None = None) -> list[str]:
        """Return the start of a command line that runs a command on a host, in the process that is started.

        `ip netns exec` does not work here: it mounts a new /sys without cgroups, and without these slurmd does not
        start (22.05, observed).

        Args:
            host: the host.
            names: a file to use as its /etc/hosts.
        """
        command = ["nsenter", f"--net=/run/netns/{self._get_namespace(host)}"]
        if names is None:
            return command
        return [*command, "unshare", "--mount", "sh", "-c", f'mount --bind {names} /etc/hosts && exec "$@"', "sh"]

    def disconnect(self, host: str) -> None:
        """Disconnect a host from the switch."""
        _run_ip("link", "set", self._get_cable(host), "down")

    def list_processes(self, host: str) -> dict[int, str]:
        """List the processes on a host: identifier -> command line."""
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
        """Send SIGKILL to all processes of a host."""
        for pid in self.list_processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _get_namespace(self, host: str) -> str:
        return f"{self._name}-{host}"

    def _get_cable(self, host: str) -> str:
        return f"{self._name}{self._hosts.index(host) + 1}"


def _run_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
