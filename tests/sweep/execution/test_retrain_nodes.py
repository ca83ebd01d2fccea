"""Which machines of a cluster retrain a winner."""

from types import SimpleNamespace

import pytest

from handpose.config import compose
from handpose.sweep.controller.node_quarantine import find_quarantined_nodes
from handpose.sweep.execution import retrain_nodes as module
from handpose.sweep.execution.nodes import Node
from handpose.sweep.execution.retrain_nodes import _run_program, divide_devices, find_retrain_nodes
from handpose.sweep.record.events import NodeQuarantined, SweepOpened
from handpose.sweep.record.settings import SweepSettings


@pytest.mark.parametrize(
    ("rooms", "wanted", "batch_size", "found"),
    [
        ({"a": 4}, 4, 32, (["a"], 4)),
        ({"a": 4, "b": 4}, 4, 32, (["a"], 4)),  # as few nodes as there can be
        ({"a": 4, "b": 4}, 8, 32, (["a", "b"], 4)),
        ({"a": 4, "b": 4}, 7, 32, (["a"], 4)),  # 7, 6 and 5 do not divide the batch
        ({"a": 1, "b": 8}, 8, 32, (["b"], 8)),
        ({"a": 4, "b": 2}, 6, 30, (["a"], 3)),  # each node has as many
        ({"a": 2, "b": 4, "c": 2}, 6, 30, (["a", "b", "c"], 2)),
        ({"a": 1, "b": 1}, 2, 3, (["a"], 1)),
        ({"a": 0}, 1, 32, None),
        ({}, 1, 32, None),
    ],
)
def test_devices_are_as_many_as_share_the_batch_equally_on_as_few_nodes(rooms, wanted, batch_size, found):
    assert divide_devices(rooms, wanted, batch_size) == found


@pytest.fixture
def ask(monkeypatch):
    """Who is to retrain on a cluster: name -> (cores, GPUs) of each node; the driver is on the first."""

    def asked(nodes, *overrides, **more):
        alive = [Node(name, name, {"CPU": cpus, "GPU": gpus}) for name, (cpus, gpus) in nodes.items()]
        monkeypatch.setattr(module, "list_live_nodes", lambda: alive)
        context = SimpleNamespace(get_node_id=lambda: next(iter(nodes)))
        monkeypatch.setattr(module.ray, "get_runtime_context", lambda: context)
        config = compose("tune", ["sweep.name=a", *overrides])
        settings = {key: value for key, value in config.sweep.items() if key not in ("_target_", "confirm")}
        sweep = SweepSettings(**settings, confirm=config.sweep.confirm)
        found = find_retrain_nodes(sweep, **{"devices": None, "batch_size": 32, **more})
        return found and (list(found.node_ids), found.devices_per_node, found.gpus_per_device)

    return asked


def test_the_drivers_machine_does_it_where_it_has_the_room(ask):
    assert ask({"head": (8, 4), "other": (8, 4)}) is None
    assert ask({"head": (8, 4), "other": (8, 4)}, "sweep.workers_per_trial=4") is None
    assert ask({"head": (8, 0), "other": (8, 0)}) is None
    assert ask({"head": (0, 0), "other": (8, 0)}) is None  # it has cores all the same


def test_a_machine_with_gpus_does_it_where_the_drivers_has_none(ask):
    assert ask({"head": (8, 0), "small": (8, 1), "large": (8, 4)}) == (["large"], 4, 1.0)


def test_a_winner_gets_as_many_devices_as_its_trial_had_workers(ask):
    assert ask({"head": (8, 4), "other": (8, 4)}, "sweep.workers_per_trial=8") == (["head", "other"], 4, 1.0)
    assert ask({"head": (0, 0), "a": (1, 0), "b": (1, 0)}, "sweep.workers_per_trial=2") == (["a", "b"], 1, 0.0)


def test_trials_that_shared_a_gpu_have_a_winner_that_does_not(ask):
    assert ask({"head": (8, 0), "other": (8, 2)}, "sweep.gpus_per_trial=0.25") == (["other"], 2, 1.0)


def test_devices_that_were_asked_for_are_found_on_other_nodes(ask):
    assert ask({"head": (8, 4), "other": (8, 4)}, devices=8) == (["head", "other"], 4, 1.0)
    assert ask({"head": (8, 4), "other": (8, 4)}, devices=2) is None


def test_a_node_that_was_set_aside_is_left_out(ask):
    nodes = {"head": (8, 0), "broken": (8, 8), "sound": (8, 4)}
    assert ask(nodes, excluded_nodes={"broken"}) == (["sound"], 4, 1.0)


def test_nodes_count_as_set_aside_until_the_sweep_is_opened_again():
    events = [SweepOpened(0.0, 4, 0.0), NodeQuarantined(1.0, "a"), SweepOpened(2.0, 4, 0.0), NodeQuarantined(3.0, "b")]
    assert find_quarantined_nodes(events[:2]) == {"a"}
    assert find_quarantined_nodes(events[:3]) == set()
    assert find_quarantined_nodes(events) == {"b"}


def test_a_node_has_the_drivers_number_of_threads_and_not_rays(monkeypatch, tmp_path):
    (tmp_path / "print_threads.py").write_text("import os; print(os.environ.get('OMP_NUM_THREADS'))")
    monkeypatch.setattr(module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in a worker of Ray
    assert list(_run_program("print_threads", [], {}, str(tmp_path))) == ["None\n", 0]
    assert list(_run_program("print_threads", [], {"OMP_NUM_THREADS": "6"}, str(tmp_path))) == ["6\n", 0]
