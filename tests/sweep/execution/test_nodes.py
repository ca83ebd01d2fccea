"""A cluster as a sweep sees it: nodes that come and go, and a head that does not answer."""

import contextlib
import socket
import threading
from types import SimpleNamespace

import pytest

from handpose.sweep.controller.slots import Slots
from handpose.sweep.driver.cluster_use import ClusterUse
from handpose.sweep.execution import nodes as module
from handpose.sweep.execution.nodes import Node, NodeWatcher, _get_node_name, _poll_head
from handpose.sweep.record.settings import RaySettings
from tests.sweep.simulation import FakeClock
from tests.sweep.sweeps import make_settings

ONE, TWO = Node("1", "gpu1", {"CPU": 4}), Node("2", "gpu2", {"CPU": 4})


@pytest.fixture
def cluster():
    """The nodes that are alive, what was told of them, and a view of it."""
    alive, told, clock = [ONE], [], FakeClock()
    return alive, told, clock, NodeWatcher(told.append, list_nodes=lambda: list(alive), clock=clock)


def test_nodes_that_came_or_went_are_told_once(cluster):
    alive, told, clock, nodes = cluster
    for change in (lambda: None, lambda: alive.append(TWO), lambda: None, lambda: alive.remove(ONE)):
        change()
        clock.now += 1.0
        nodes.refresh()
    assert told == [[ONE], [ONE, TWO], [TWO]]


def test_it_looks_no_oftener_than_once_a_second_unless_it_must(cluster):
    alive, told, clock, nodes = cluster
    nodes.refresh()
    alive.append(TWO)
    clock.now += 0.5
    nodes.refresh()
    assert told == [[ONE]]
    nodes.refresh(at_once=True)
    assert told == [[ONE], [ONE, TWO]]


def test_a_node_that_is_gone_keeps_its_name(cluster):
    alive, _, clock, nodes = cluster
    nodes.refresh()
    alive.clear()
    clock.now += 1.0
    nodes.refresh()
    assert (nodes.get_name("1"), nodes.get_name("3"), nodes.get_name("")) == ("gpu1", "", "")
    assert nodes.get_ids(["gpu1"]) == []


@pytest.mark.parametrize(
    ("given", "name"), [("", "host"), ("10.0.0.1", "host"), ("rack-2", "rack-2")], ids=["none", "Ray's own", "given"]
)
def test_a_node_is_called_by_its_host_unless_it_was_given_a_name(given, name):
    node = {"NodeName": given, "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "host"}
    assert _get_node_name(node) == name


def test_nodes_that_come_and_go_are_shown_and_slots_counted_where_trials_may_run(tmp_path):
    notes, sizes = [], []
    state = SimpleNamespace(
        resize=lambda number, capacity: sizes.append((number, capacity.workers_by_node)),
        find_usable_nodes=lambda capacity: capacity.find_nodes_without({"gpu2"}) or capacity.nodes,
        history=SimpleNamespace(table=SimpleNamespace(num_slots=0), settings=make_settings(tmp_path)),
    )
    view = SimpleNamespace(show_note=notes.append)
    head = Node("0", "head", {"CPU": 0})  # it has no room for a trial
    follow = ClusterUse(RaySettings(address=None, num_cpus=None), Slots(4, 1, 0.0), state, view)._follow_nodes
    for alive in ([head, ONE], [head, ONE, TWO], [head, TWO], [head]):
        follow(alive)  # gpu2 is set aside
    assert sizes == [(4, {"gpu1": 4}), (4, {"gpu1": 4, "gpu2": 4}), (4, {"gpu2": 4}), (0, {})]
    assert notes == [
        "node gpu2 has joined: 4 trials at a time",
        "node gpu1 is gone: 4 trials at a time",
        "node gpu2 is gone: no node is left; the sweep waits for one",
    ]


@pytest.fixture
def head(monkeypatch):
    """A port that somebody listens on."""
    monkeypatch.setattr(module, "_HEAD_EVERY_S", 0.02)
    monkeypatch.setattr(module, "_HEAD_TIMEOUT_S", 0.1)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield listening


def watch(head, *, then, is_ending=False, patience_s=0.5):
    """Whether a head is given up within a time; then: what happens to it, once it has been heard."""
    lost, is_over = threading.Event(), threading.Event()
    address = head.getsockname()
    thread = threading.Thread(target=_poll_head, args=(address, lost.set, is_over, lambda: is_ending))
    thread.start()
    head.accept()[0].close()
    then(head)
    lost.wait(timeout=patience_s)
    is_over.set()
    thread.join()
    return lost.is_set()


def test_a_head_that_answers_no_more_is_given_up(head):
    assert watch(head, then=lambda head: head.close(), patience_s=30.0)


@pytest.mark.parametrize(("then", "is_given_up"), [(lambda head: None, False), (lambda head: head.close(), True)])
def test_a_sweep_that_is_ending_gives_a_silent_head_up_sooner(head, monkeypatch, then, is_given_up):
    """scancel ends Ray, too, and leaves all of them half a minute."""
    monkeypatch.setattr(module, "_HEAD_TIMEOUT_S", 30.0)
    monkeypatch.setattr(module, "_ENDING_TIMEOUT_S", 0.1)
    assert watch(head, then=then, is_ending=True, patience_s=10.0 if is_given_up else 0.5) == is_given_up


def test_a_silent_head_is_waited_for_unless_the_sweep_was_told_to_end(head, monkeypatch):
    monkeypatch.setattr(module, "_HEAD_TIMEOUT_S", 30.0)
    monkeypatch.setattr(module, "_ENDING_TIMEOUT_S", 0.1)
    assert not watch(head, then=lambda head: head.close())


def test_a_head_that_answers_is_not_given_up(head):
    assert not watch(head, then=lambda head: None)


def test_a_head_that_was_never_heard_is_not_given_up(head):
    head.close()
    lost = threading.Event()
    _poll_head(("127.0.0.1", 1), lost.set, threading.Event())
    assert not lost.is_set()
