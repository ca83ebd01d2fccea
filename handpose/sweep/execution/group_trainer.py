"""Ray Train's trainer as the workers of a trial need it, on one node or several."""

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import ray
from ray.train import torch as train_torch

from handpose.sweep.execution.ray_internals import group_start_callback, without_group_cleaner

_TorchTrainer: Any = train_torch.TorchTrainer  # of Train V2, while type checkers are shown the class of V1
_SIOCGIFADDR = 0x8915
"""SIOCGIFADDR of Linux."""


class GroupTrainer(_TorchTrainer):
    """A TorchTrainer whose workers are held by a placement group of this name, and find each other on any network.

    Ray (2.60) keeps a placement group that an actor has made until the job ends. So Train has an actor that removes it
    when the run was ended from outside, as Tune ends a trial; but that one asks the dashboard. Without one, as here,
    every trial that was stopped would keep its cores and GPUs, and a process that asks for ever.
    """

    def __init__(self, name: str, train_loop: Callable[[], None], **settings: Any) -> None:
        super().__init__(train_loop, **settings)
        self._group_name = name

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = without_group_cleaner(super()._create_default_callbacks())
        return [group_start_callback(self._group_name, set_gloo_interface), *callbacks]


def set_gloo_interface() -> None:
    """Let gloo talk over the network by which Ray knows this node, unless it was told otherwise.

    By itself gloo (torch 2.15) takes the address that the host's own name has, which on many a system is 127.0.1.1:
    workers of other nodes cannot reach that.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := find_interface(ray.util.get_node_ip_address())):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def find_interface(address: str) -> str | None:
    """The one that has this IPv4 address first."""
    import fcntl  # here, since not every system has it

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
