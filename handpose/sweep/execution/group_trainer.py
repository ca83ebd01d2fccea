"""Ray Train's trainer, adapted to the workers of a trial on one node or several."""

import os
from collections.abc import Callable
from typing import Any

import ray
from ray.train import torch as train_torch

from handpose.resources import list_addresses
from handpose.sweep.execution.ray_internals import make_group_start_callback, remove_group_cleaner

_TorchTrainer: Any = train_torch.TorchTrainer  # the class of Train V2; type checkers see that of V1


class GroupTrainer(_TorchTrainer):
    """A TorchTrainer with a named placement group for its workers, which find each other on any network.

    Ray (2.60) keeps a placement group that an actor has created until the job ends. Train therefore has an actor that
    removes the group when its run is ended from outside, as Tune ends a trial. That actor asks the dashboard. Without a
    dashboard, as here, every stopped trial would keep its cores and GPUs, and a process that asks forever. So this
    class does without that actor, and the name lets the driver remove the group.

    Args:
        name: name of the placement group.
        train_loop: the function that every worker runs.
        settings: the other arguments of TorchTrainer.
    """

    def __init__(self, name: str, train_loop: Callable[[], None], **settings: Any) -> None:
        super().__init__(train_loop, **settings)
        self._group_name = name

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = remove_group_cleaner(super()._create_default_callbacks())
        return [make_group_start_callback(self._group_name, set_gloo_interface), *callbacks]


def set_gloo_interface() -> None:
    """Make gloo use the network interface through which Ray reaches this node, unless the user has set another.

    By default gloo (torch 2.15) uses the address of the host's own name, which on many systems is 127.0.1.1. Workers on
    other nodes cannot reach that address.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := find_interface(ray.util.get_node_ip_address())):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def find_interface(address: str) -> str | None:
    """Return the first network interface that has this IPv4 address; None if there is none."""
    return next((name for name, found in list_addresses().items() if found == address), None)
